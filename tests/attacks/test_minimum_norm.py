import math
from dataclasses import replace

import pytest
import torch
from clusterguard import decide, success_margin
from clusterguard.attacks import PDPGD, FastMinimumNorm, MultiTarget, SigmaZero, SparsePGD, get_norm
from clusterguard.detection import Verdicts, is_broken
from clusterguard.errors import ConfigurationError

NORMS = {"linf": 0.1, "l2": 0.6, "l1": 3.0, "l0": 12.0}


@pytest.fixture
def cases(small_guard):
    images = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return images, small_guard(images).argmax(1)


def broken(guard, attacked, labels):
    return is_broken(Verdicts(decide(guard.evidence(attacked), guard.thresholds), labels))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [0, 1, math.inf])
@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("start", ["image", "random"])
def test_the_result_is_inside_ball_and_box(small_guard, cases, norm, scale, keep, start):
    images, labels = cases[0][:8], cases[1][:8]
    eps = min(NORMS[norm] * scale, get_norm(norm).largest(images.shape[1:]))
    attack = FastMinimumNorm(norm=norm, eps=eps, steps=13, keep=keep, start=start)
    attacked = attack(small_guard, images, labels)
    assert (get_norm(norm).size(attacked - images) <= eps).all()
    assert attacked.min() >= 0
    assert attacked.max() <= 1


@pytest.mark.parametrize("norm", NORMS)
def test_it_never_ends_worse_than_the_image_and_breaks_some(small_guard, cases, norm):
    images, labels = cases
    attacked = FastMinimumNorm(norm=norm, eps=NORMS[norm], steps=40)(small_guard, images, labels)
    before, after = (
        success_margin(small_guard.evidence(x), small_guard.thresholds, labels) for x in (images, attacked)
    )
    assert (after <= before).all()
    assert 0 < broken(small_guard, attacked, labels).sum() < 60


ALL = {
    **{f"fast minimum norm {norm}": FastMinimumNorm(norm=norm, eps=eps, steps=30) for norm, eps in NORMS.items()},
    **{f"PDPGD {norm}": PDPGD(norm=norm, eps=eps, steps=30) for norm, eps in NORMS.items() if norm != "l0"},
    "σ-zero": SigmaZero(eps=12, steps=30),
    "Sparse-PGD": SparsePGD(eps=12, steps=30),
    "Sparse-PGD, projected": SparsePGD(eps=12, steps=30, everywhere=False),
}


@pytest.mark.parametrize("attack", ALL.values(), ids=ALL)
def test_stopping_early_breaks_the_same_images(small_guard, cases, attack):
    hits = []
    for stop_early in (False, True):
        attacked = replace(attack, stop_early=stop_early)(small_guard, *cases, generator=torch.Generator())
        hits.append(broken(small_guard, attacked, cases[1]))
    assert torch.equal(*hits)
    assert 0 < hits[0].sum() < 60


@pytest.mark.parametrize("attack", ALL.values(), ids=ALL)
def test_the_nearest_success_is_no_larger_than_the_best_and_no_worse_where_there_is_none(small_guard, cases, attack):
    images, labels = cases
    best, nearest = (
        replace(attack, keep=keep)(small_guard, images, labels, generator=torch.Generator())
        for keep in ("best", "nearest")
    )
    hit, sizes = broken(small_guard, best, labels), [get_norm(attack.norm).size(x - images) for x in (best, nearest)]
    assert torch.equal(hit, broken(small_guard, nearest, labels))
    assert (sizes[1] <= sizes[0])[hit].all()
    assert torch.equal(best[~hit], nearest[~hit])


def test_the_nearest_success_is_not_sought_where_images_leave_at_the_first():
    with pytest.raises(ConfigurationError, match="expected keep='best' where stop_early is on, got 'nearest'"):
        SigmaZero(eps=3, keep="nearest", stop_early=True)


@pytest.mark.parametrize("norm", NORMS)
def test_results_do_not_depend_on_the_batch(small_guard, cases, norm):
    images, labels = cases[0][:11], cases[1][:11]
    whole, parts = (
        FastMinimumNorm(norm=norm, eps=NORMS[norm], steps=10, batch_size=size)(small_guard, images, labels)
        for size in (None, 4)
    )
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-4)


def test_targets_are_aimed_at(small_guard, cases):
    images, labels = cases
    targets = (labels + 1) % 3
    attacked = FastMinimumNorm(norm="l2", eps=8.0, steps=40)(small_guard, images, labels, targets=targets)
    verdict = small_guard.detect(attacked)
    assert ((verdict.labels == targets) & ~verdict.is_adversarial).double().mean() > 0.9


class Detour:
    """Class 1 lies behind a ridge: within eps the slope leads to a corner without it, further out the slope turns."""

    thresholds = torch.tensor([torch.inf, torch.inf])

    def evidence(self, images):
        from clusterguard import Evidence

        x, y = images[:, 0, 0, 0] - 0.5, images[:, 0, 0, 1] - 0.5
        # Downhill along x up to 0.15, a wall in y until x > 0.12, success only beyond y = 0.1.
        margin = 0.3 - x - torch.where(x > 0.12, 3 * y, -y)
        return Evidence(torch.stack([margin, -margin], 1), torch.zeros(len(images), 2))


def test_a_way_through_a_larger_ball_is_found_where_success_lies_within_the_budget():
    images, labels = torch.full((1, 1, 1, 2), 0.5), torch.tensor([0])
    attack = FastMinimumNorm(norm="linf", eps=0.13, steps=200, step_size=0.1)
    assert broken(Detour(), attack(Detour(), images, labels), labels).all()


def test_evidence_that_is_not_finite_does_not_fail_the_batch(small_guard, cases, monkeypatch):
    images, labels = cases[0][:6], cases[1][:6]
    attack = FastMinimumNorm(eps=0.1, steps=10)
    expected = attack(small_guard, images[1:], labels[1:])
    represent = type(small_guard).represent

    def overflowing(self, batch):
        representations = represent(self, batch)
        sick = (batch - images[0]).flatten(1).abs().amax(1) <= 0.1 + 1e-6
        return representations / (~sick[:, None]).float()

    monkeypatch.setattr(type(small_guard), "represent", overflowing)
    attacked = attack(small_guard, images, labels)
    assert attacked.isfinite().all()
    torch.testing.assert_close(attacked[1:], expected)


def test_inside_multi_target_it_prints_and_costs_a_gradient_a_step(small_guard, cases):
    from clusterguard.attacks import Metered

    metered = Metered(small_guard)
    attack = FastMinimumNorm(eps=1e-6, steps=7)
    MultiTarget(attack=attack)(metered, cases[0][:5], cases[1][:5])
    assert metered.cost.backward == 2 * 7 * 5
    assert "FastMinimumNorm" in repr(attack)
    assert attack == FastMinimumNorm(eps=1e-6, steps=7)


@pytest.mark.parametrize("wrong", [{"step_size": 0}, {"adjustment": 0}, {"adjustment": 1.0}, {"steps": 0}, {"eps": -1}])
def test_options_are_checked_at_once(wrong):
    with pytest.raises(ConfigurationError, match="expected"):
        FastMinimumNorm(**({"eps": 0.1} | wrong))


@pytest.mark.parametrize(
    ("attack", "wrong"),
    [
        *((SigmaZero, {name: value}) for name in ("learning_rate", "smoothing") for value in (0, math.inf)),
        *((SigmaZero, wrong) for wrong in ({"threshold": 1.5}, {"adjustment": -1})),
        *((SparsePGD, {name: value}) for name in ("colour_step", "score_step") for value in (0, math.inf)),
        *((PDPGD, wrong) for wrong in ({"learning_rate": 0}, {"dual_rate": -0.1}, {"norm": "l0"})),
    ],
)
def test_options_of_the_others_are_checked_at_once(attack, wrong):
    with pytest.raises(ConfigurationError, match="expected"):
        attack(**({"eps": 1} | wrong))
