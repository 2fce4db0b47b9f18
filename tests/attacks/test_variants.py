from itertools import pairwise

import pytest
import torch
from clusterguard import PGD, decide, success_margin
from clusterguard.attacks import BIM, MIM, NES, MultiTarget, Problem, Towards, get_norm, output_diversified
from clusterguard.attacks._objectives import OBJECTIVES
from clusterguard.detection import Verdicts, is_broken
from clusterguard.errors import ConfigurationError

NORMS = {"linf": 0.1, "l2": 0.6, "l1": 3.0, "l0": 12}


def broken(detector, attacked, labels):
    return is_broken(Verdicts(decide(detector.evidence(attacked), detector.thresholds), labels))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [PGD, MIM, NES])
def test_attacks_lower_the_margin_inside_ball_and_box(small_guard, norm, kind):
    eps = NORMS[norm]
    images = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = small_guard(images).argmax(1)
    attack = kind(norm=norm, eps=eps, step_size=eps if norm == "l0" else eps / 4, steps=12, objective="margin")
    attacked = attack(small_guard, images, labels, generator=torch.Generator().manual_seed(1))
    before, after = (
        success_margin(small_guard.evidence(x), small_guard.thresholds, labels) for x in (images, attacked)
    )
    assert (after <= before).all()
    assert (after < before).double().mean() > 0.8
    assert (get_norm(norm).size(attacked - images) <= eps * (1 + 1e-5)).all()
    assert attacked.min() >= 0
    assert attacked.max() <= 1


def test_momentum_of_zero_is_pgd_and_momentum_accumulates(small_guard):
    images, labels = torch.rand(5, 1, 8, 8), torch.arange(5) % 3
    options = {"eps": 0.3, "step_size": 0.05, "steps": 6, "keep": "last"}
    plain = PGD(**options)(small_guard, images, labels)
    assert torch.equal(MIM(decay=0.0, **options)(small_guard, images, labels), plain)
    assert not torch.equal(MIM(decay=1.0, **options)(small_guard, images, labels), plain)


@pytest.mark.parametrize("kind", [PGD, MIM])
def test_stopping_early_breaks_the_same_images(small_guard, kind):
    images = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = small_guard(images).argmax(1)
    verdicts = []
    for stop_early in (False, True):
        attack = kind(eps=0.08, step_size=0.01, steps=30, objective="margin", stop_early=stop_early)
        verdicts.append(broken(small_guard, attack(small_guard, images, labels), labels))
    assert torch.equal(verdicts[0], verdicts[1])
    assert 0 < verdicts[0].sum() < 60


def test_stopping_early_saves_work(small_guard, monkeypatch):
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = small_guard(images).argmax(1)
    counts, evidence = [], type(small_guard).evidence

    def count(self, batch):
        counts[-1] += len(batch)
        return evidence(self, batch)

    monkeypatch.setattr(type(small_guard), "evidence", count)
    for stop_early in (False, True):
        counts.append(0)
        PGD(eps=0.2, step_size=0.02, steps=60, objective="margin", stop_early=stop_early)(small_guard, images, labels)
    assert counts[1] < 0.7 * counts[0]


def test_batch_size_bounds_memory_and_changes_nothing(small_guard, monkeypatch):
    images, labels = torch.rand(11, 1, 8, 8), torch.arange(11) % 3
    attack = PGD(eps=0.1, step_size=0.02, steps=5)
    expected = attack(small_guard, images, labels, targets=(labels + 1) % 3)
    sizes, evidence = [], type(small_guard).evidence

    def record(self, batch):
        sizes.append(len(batch))
        return evidence(self, batch)

    monkeypatch.setattr(type(small_guard), "evidence", record)
    attack = PGD(eps=0.1, step_size=0.02, steps=5, batch_size=4)
    torch.testing.assert_close(attack(small_guard, images, labels, targets=(labels + 1) % 3), expected)
    assert max(sizes) == 4


def test_no_images_are_no_problem(small_guard):
    nothing = torch.empty(0, 1, 8, 8), torch.empty(0, dtype=torch.long)
    for attack in (PGD(eps=0.1, step_size=0.1), BIM(eps=0.1), MultiTarget(attack=BIM(eps=0.1))):
        assert attack(small_guard, *nothing).shape == (0, 1, 8, 8)


def test_bim_is_pgd_with_steps_that_add_up(small_guard):
    images, labels = torch.full((3, 1, 8, 8), 0.5), torch.arange(3)
    expected = PGD(eps=0.2, step_size=0.05, steps=4, keep="last")(small_guard, images, labels)
    assert torch.equal(BIM(eps=0.2, steps=4)(small_guard, images, labels), expected)


def test_nes_estimates_the_gradient(linear_detector):
    images = 0.5 + 0.02 * torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = (images.flatten(1) @ linear_detector.weight.flatten() > linear_detector.bias).long()
    options = {"norm": "l2", "eps": 0.1, "step_size": 0.1, "steps": 1, "keep": "last", "objective": "logit"}
    exact = PGD(**options)(linear_detector, images, labels) - images
    estimated = NES(samples=2000, **options)(linear_detector, images, labels) - images
    assert (torch.cosine_similarity(exact.flatten(1), estimated.flatten(1)) > 0.98).all()


def test_nes_asks_for_evidence_and_nothing_else(small_guard):
    class Service:
        thresholds = small_guard.thresholds
        queries = 0

        @torch.no_grad()
        def evidence(self, images):
            self.queries += len(images)
            return small_guard.evidence(images)

    service = Service()
    NES(eps=0.2, step_size=0.05, steps=3, samples=10)(service, torch.rand(4, 1, 8, 8), torch.arange(4) % 3)
    assert service.queries == 4 * (3 * (10 + 1) + 1)


def test_trying_every_target_is_at_least_as_good_as_any_one(small_guard):
    images = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = small_guard(images).argmax(1)
    attack = PGD(eps=0.06, step_size=0.01, steps=20, objective="margin")
    together = broken(small_guard, MultiTarget(attack=attack)(small_guard, images, labels), labels)
    for shift in (1, 2):
        single = broken(small_guard, attack(small_guard, images, labels, targets=(labels + shift) % 3), labels)
        assert (together | ~single).all()
    assert MultiTarget(attack=attack).eps == 0.06


def test_fewer_targets_are_the_most_promising(small_guard):
    images = torch.rand(10, 1, 8, 8)
    labels = small_guard(images).argmax(1)
    asked = []

    def attack(detector, images, labels, *, targets=None, generator=None):
        asked.append(targets)
        return images

    MultiTarget(attack=attack, max_targets=1)(small_guard, images, labels)
    distances = small_guard.distances(images).scatter(1, labels[:, None], torch.inf)
    assert torch.equal(asked[0], distances.argmin(1))
    assert len(asked) == 1


def problem(guard, images, labels, targets=None, norm="linf", eps=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Problem(guard, images, labels, targets, get_norm(norm), eps, OBJECTIVES["margin"], generator)


@pytest.mark.parametrize("targeted", [False, True])
def test_starts_towards_accepted_images_go_to_the_nearest_of_a_fitting_class(small_guard, targeted):
    images, references = torch.rand(8, 1, 8, 8), torch.rand(30, 1, 8, 8)
    labels, reference_labels = torch.arange(8) % 3, torch.arange(30) % 3
    targets = (labels + 1) % 3 if targeted else None
    start = Towards(references, reference_labels)(problem(small_guard, images, labels, targets))
    for image, label, begun in zip(images, labels, start, strict=True):
        fitting = reference_labels == (label + 1) % 3 if targeted else reference_labels != label
        nearest = references[fitting][(references[fitting] - image).flatten(1).norm(dim=1).argmin()]
        torch.testing.assert_close(begun, image + (nearest - image).clamp(-0.2, 0.2))


def test_only_images_accepted_under_their_own_label_are_references(small_guard):
    images = torch.rand(50, 1, 8, 8)
    labels = small_guard(images).argmax(1)
    labels[:10] = (labels[:10] + 1) % 3
    small_guard.thresholds = small_guard.distances(images).amin(1).median().expand(3)
    references = Towards.accepted(small_guard, images, labels)
    accepted = ~small_guard.detect(images).is_adversarial
    accepted[:10] = False
    assert torch.equal(references.images, images[accepted])
    assert torch.equal(references.labels, labels[accepted])


def test_without_a_fitting_reference_the_start_is_the_image(small_guard):
    images, labels = torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.long)
    for references in (Towards(images, labels), Towards(images[:0], labels[:0])):
        assert torch.equal(references(problem(small_guard, images, labels)), images)


def test_an_image_start_finds_what_a_plateau_hides():
    """Accepted as class 1 only inside a small island around one image; everywhere else the gradient is exactly 0."""
    island = torch.full((1, 1, 4, 4), 0.7)

    class Plateau:
        thresholds = torch.tensor([1.0, 1.0])

        def evidence(self, images):
            near = ((images - island).flatten(1).abs().amax(1) < 0.15).float()
            flat = 0 * images.flatten(1).sum(1)
            return torch.stack([1 - near + flat, near + flat], 1), torch.stack([0.5 + flat, 2 - 2 * near + flat], 1)

    def as_evidence(self, images):
        from clusterguard import Evidence

        return Evidence(*Plateau.plain(self, images))

    Plateau.plain, Plateau.evidence = Plateau.evidence, as_evidence
    images, labels = torch.full((2, 1, 4, 4), 0.5), torch.tensor([0, 0])
    options = {"eps": 0.1, "step_size": 0.02, "steps": 20, "objective": "margin"}
    assert not broken(Plateau(), PGD(**options)(Plateau(), images, labels), labels).any()
    references = Towards(island, torch.tensor([1]))
    assert broken(Plateau(), PGD(start=references, **options)(Plateau(), images, labels), labels).all()


def test_diversified_starts_are_inside_and_differ(small_guard):
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    first, second = (output_diversified(problem(small_guard, images, labels, seed=seed)) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert ((first - images).abs().amax() <= 0.2 + 1e-6).item()


def test_each_step_reports_the_best_margins_so_far(small_guard):
    seen = []
    attack = PGD(eps=0.2, step_size=0.05, steps=4, on_step=lambda step, margins: seen.append((step, margins)))
    attack(small_guard, torch.rand(5, 1, 8, 8), torch.arange(5) % 3)
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4]
    assert all((later <= earlier).all() for (_, earlier), (_, later) in pairwise(seen))


@pytest.mark.parametrize(
    "make",
    [
        lambda: MIM(eps=0.1, step_size=0.1, decay=-1),
        lambda: NES(eps=0.1, step_size=0.1, samples=3),
        lambda: NES(eps=0.1, step_size=0.1, sigma=0),
        lambda: PGD(eps=0.1, step_size=0.1, sparsity=0),
        lambda: PGD(eps=0.1, step_size=0.1, start="x"),
        lambda: PGD(eps=0.1, step_size=0.1, keep="last", stop_early=True),
        lambda: BIM(eps=0.1, steps=0),
        lambda: BIM(eps=0.1, batch_size=0),
        lambda: MultiTarget(attack=BIM(eps=0.1), max_targets=0),
    ],
)
def test_options_are_checked_at_once(make):
    with pytest.raises(ConfigurationError, match="expected"):
        make()
