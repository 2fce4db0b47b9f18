"""Polish goes on from what other attacks have left."""

import pytest
import torch
from clusterguard import PGD, WorstCaseSuite, success_margin
from clusterguard.attacks import EFFORTS, AtPoints, Metered, Polish, get_norm
from clusterguard.errors import ConfigurationError, InputError

RADII = {"linf": 0.1, "l2": 0.8, "l1": 4.0, "l0": 6}
FEW = {"rounds": 2, "halvings": 2, "tries": 2, "steps": 3}


@pytest.fixture
def cases(small_guard):
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return images, small_guard(images).argmax(1)


def margins_of(guard, images, labels):
    return success_margin(guard.evidence(images), guard.thresholds, labels)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("norm", RADII)
def test_it_lowers_the_margins_of_given_points_inside_ball_and_box(small_guard, cases, norm):
    images, labels = cases
    step = get_norm(norm).step_size(RADII[norm], images.shape[1:], share=0.3)
    points = PGD(norm=norm, eps=RADII[norm], step_size=step, steps=2)(small_guard, images, labels)
    attack = Polish(norm=norm, eps=RADII[norm], start=AtPoints(points), **FEW)
    polished = attack(small_guard, images, labels, generator=seeded())
    before, after = (margins_of(small_guard, x, labels) for x in (points, polished))
    assert (after <= before + 1e-5).all()
    assert (after < before)[before > 0].double().mean() > 0.5
    assert (get_norm(norm).size(polished - images) <= RADII[norm] * (1 + 1e-5)).all()
    assert ((polished >= 0) & (polished <= 1)).all()


def test_what_is_broken_stays_as_it_is_and_costs_nothing(small_guard, cases):
    images, labels = cases
    small_guard.thresholds = torch.full((3,), 1e3)
    wrong = (labels + 1) % 3  # every image is accepted under a wrong label
    metered = Metered(small_guard)
    assert torch.equal(Polish(eps=0.1, **FEW)(metered, images, wrong), images)
    assert metered.cost == (len(images), 0)


def test_images_near_success_get_most_of_the_work(small_guard, cases):
    images, labels = cases
    small_guard.thresholds = torch.full((3,), 1e-3)  # out of reach
    metered = Metered(small_guard)
    attack = Polish(eps=0.01, rounds=1, halvings=2, tries=1, proposals=4, steps=1, max_targets=1)
    attack(metered, images, labels, generator=seeded())
    rounds = 20 + 2 * 10 + 4 * 5  # all, then half of them twice as often, and so on
    assert metered.cost.backward == rounds * 2  # one step of each length
    assert metered.cost.forward >= rounds * (4 + 2)


def test_targets_are_what_it_aims_at(small_guard, cases):
    images, labels = cases
    targets = (labels + 1) % 3
    attack = Polish(norm="l2", eps=3.0, rounds=4)
    polished = attack(small_guard, images, labels, targets=targets, generator=seeded())
    aimed = success_margin(small_guard.evidence(polished), small_guard.thresholds, labels, targets)
    before = success_margin(small_guard.evidence(images), small_guard.thresholds, labels, targets)
    assert (aimed <= before + 1e-5).all()
    assert (aimed <= 0).double().mean() > 0.5


def test_equal_seeds_give_equal_images(small_guard, cases):
    attack = Polish(eps=0.1, **FEW)
    first, second, other = (attack(small_guard, *cases, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_suite_hands_its_best_images_to_the_polish(small_guard, cases, monkeypatch):
    images, labels = cases
    small_guard.thresholds = torch.full((3,), 1e-3)  # nothing is ever accepted
    starts = []
    whole = Polish.__call__

    def noting(polish, *arguments, **options):
        starts.append(polish.start.points)
        return whole(polish, *arguments, **options)

    monkeypatch.setattr(Polish, "__call__", noting)
    suite = WorstCaseSuite("linf", eps=0.05, budget="quick", batch_size=8)
    suite.run(small_guard, images, labels, generator=seeded())
    assert [len(points) for points in starts] == [8, 8, 4]
    points = torch.cat(starts)
    assert (margins_of(small_guard, points, labels) < margins_of(small_guard, images, labels)).double().mean() > 0.9


def test_a_suite_also_polishes_from_the_images_themselves(small_guard, cases, monkeypatch):
    images, labels = cases
    small_guard.thresholds = torch.full((3,), 1e-3)  # nothing is ever accepted
    monkeypatch.setitem(EFFORTS, "thorough", EFFORTS["quick"]._replace(searches=2, steps=3, targets=1, queries=10))
    starts = []
    monkeypatch.setattr(Polish, "__call__", lambda polish, _, images, *__, **___: starts.append(polish.start) or images)
    result = WorstCaseSuite("l2", eps=0.05, budget="thorough").run(small_guard, images, labels, generator=seeded())
    names = [record.name for record in result.stages if "polish" in record.name]
    assert names == ["polish from the image 1", "polish from the image 2", "polish"]
    assert starts[:2] == ["image", "image"]
    assert isinstance(starts[2], AtPoints)
    budgets = {name: effort.searches for name, effort in EFFORTS.items()}
    assert budgets["quick"] < budgets["standard"]


def test_points_that_are_not_one_for_each_image_are_refused(small_guard, cases):
    images, labels = cases
    for options in ({"start": AtPoints(images[:3])}, {"start": AtPoints(images), "batch_size": 8}):
        with pytest.raises(InputError, match="points, one for each image"):
            Polish(eps=0.1, **options, **FEW)(small_guard, images, labels)


@pytest.mark.parametrize(
    "wrong",
    [
        *({name: 0} for name in ("rounds", "tries", "proposals", "max_targets", "steps")),
        *({"halvings": -1}, {"eps": -1.0}, {"norm": "l3"}, {"start": "anywhere"}, {"precision": "half"}),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigurationError):
        Polish(**({"eps": 0.1} | wrong))
