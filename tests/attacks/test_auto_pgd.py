import math
from dataclasses import replace

import pytest
import torch
from clusterguard import (
    APGD,
    PGD,
    AdversarialClusterTrainer,
    Calibrator,
    ClusterGuard,
    Evidence,
    decide,
    success_margin,
)
from clusterguard.attacks import L1, Problem, Towards, get_norm
from clusterguard.attacks._objectives import OBJECTIVES
from clusterguard.detection import Verdicts, is_broken, is_eligible
from clusterguard.errors import ConfigurationError
from clusterguard.samples import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

NORMS = {"linf": 0.1, "l2": 0.6, "l1": 3.0, "l0": 12}
DIGIT_NORMS = {"linf": 0.1, "l2": 1.2, "l1": 8.0, "l0": 8}


def margins(detector, images, labels, targets=None):
    with torch.no_grad():
        return success_margin(detector.evidence(images), detector.thresholds, labels, targets)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def problem(detector, images, labels, *, norm="linf", eps=0.1):
    return Problem(detector, images, labels, None, get_norm(norm), eps, OBJECTIVES["margin"])


@pytest.fixture(scope="session")
def digit_guard():
    torch.manual_seed(0)
    data = TensorDataset(*(part[:1000] for part in load_digits("train").tensors))
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU())
    guard = ClusterGuard(backbone, num_classes=10, example=data[0][0][None])
    trainer = AdversarialClusterTrainer(
        guard,
        PGD(eps=0.1, step_size=0.05, steps=3, keep="last"),
        optimizer=torch.optim.Adam(guard.parameters(), lr=3e-3),
        warmup_epochs=2,
    )
    calibration = DataLoader(load_digits("calibration"), batch_size=500)
    loader = DataLoader(data, batch_size=100, shuffle=True)
    trainer.fit(loader, calibration, epochs=6, calibrate=False, progress=False)
    Calibrator(false_positive_rate=0.05).fit(guard, calibration, progress=False)
    return guard.eval()


@pytest.fixture(scope="session")
def eligible_digits(digit_guard):
    images, labels = (part[:110] for part in load_digits("test").tensors)
    eligible = is_eligible(Verdicts(digit_guard.detect(images), labels))
    return images[eligible], labels[eligible]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", ["image", "random", "output_diversified"])
@pytest.mark.parametrize("scale", [0, 1, math.inf])
def test_the_result_is_inside_ball_and_box(small_guard, norm, start, scale):
    images = rand(6, 1, 8, 8)
    eps = min(NORMS[norm] * scale, get_norm(norm).largest((1, 8, 8)))
    attacked = APGD(norm=norm, eps=eps, steps=12, start=start, keep="last")(small_guard, images, torch.arange(6) % 3)
    assert (get_norm(norm).size(attacked - images) <= eps).all()
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert not attacked.requires_grad


@pytest.mark.parametrize("norm", DIGIT_NORMS)
@pytest.mark.parametrize("steps", [20, 40])
def test_it_is_at_least_as_strong_as_pgd(digit_guard, eligible_digits, norm, steps):
    images, labels = eligible_digits
    options = {"norm": norm, "eps": DIGIT_NORMS[norm], "steps": steps}
    step_size = options["eps"] / (1 if norm == "l0" else 10)
    ours, theirs = (
        margins(digit_guard, attack(digit_guard, images, labels), labels)
        for attack in (APGD(**options), PGD(step_size=step_size, objective="margin", **options))
    )
    assert 5 < (ours <= 0).sum() < len(images) - 5  # else the comparison says nothing
    assert (ours <= 0).sum() >= (theirs <= 0).sum() - 1
    assert ours.mean() <= theirs.mean()


@pytest.mark.parametrize("norm", DIGIT_NORMS)
def test_the_result_is_never_worse_than_the_start(digit_guard, eligible_digits, norm):
    images, labels = eligible_digits
    references = Towards.accepted(digit_guard, *(part[:300] for part in load_digits("calibration").tensors))
    eps = 3 * DIGIT_NORMS[norm]
    attacked = APGD(norm=norm, eps=eps, steps=10, start=references, objective="logit")(digit_guard, images, labels)
    start = references(problem(digit_guard, images, labels, norm=norm, eps=eps))
    assert (margins(digit_guard, attacked, labels) <= margins(digit_guard, start, labels) + 1e-5).all()


@pytest.mark.parametrize("norm", NORMS)
def test_results_do_not_depend_on_the_batch(small_guard, norm):
    images, labels = rand(7, 1, 8, 8), torch.arange(7) % 3
    attack = APGD(norm=norm, eps=NORMS[norm], steps=25)
    together = attack(small_guard, images, labels)
    apart = torch.cat([attack(small_guard, images[i : i + 1], labels[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, replace(attack, batch_size=3)(small_guard, images, labels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_stopping_early_breaks_the_same_images(small_guard, norm):
    images = rand(60, 1, 8, 8)
    labels = small_guard(images).argmax(1)
    attack = APGD(norm=norm, eps=0.7 * NORMS[norm], steps=40)
    verdicts = [
        is_broken(Verdicts(decide(small_guard.evidence(attacked), small_guard.thresholds), labels))
        for attacked in (run(small_guard, images, labels) for run in (attack, replace(attack, stop_early=True)))
    ]
    assert torch.equal(*verdicts)
    assert 0 < verdicts[0].sum() < 60


@pytest.mark.parametrize("norm", NORMS)
def test_targeted_aims_at_the_target(small_guard, norm):
    images, labels = rand(30, 1, 8, 8), torch.zeros(30, dtype=torch.long)
    attack = APGD(norm=norm, eps=NORMS[norm], steps=20)
    attacked = [attack(small_guard, images, labels, targets=torch.full_like(labels, target)) for target in (1, 2)]
    for aimed, other, target in ((attacked[0], attacked[1], 1), (attacked[1], attacked[0], 2)):
        before, after, elsewhere = (
            margins(small_guard, x, labels, torch.full_like(labels, target)) for x in (images, aimed, other)
        )
        assert (after < before).double().mean() > 0.9
        assert (after < elsewhere).double().mean() > 0.9


def test_l1_reports_the_steps_in_the_ball_itself(small_guard):
    seen = []
    attack = APGD(norm="l1", eps=3.0, steps=20, on_step=lambda step, margins: seen.append((step, margins)))
    labels = torch.arange(5) % 3
    attacked = attack(small_guard, rand(5, 1, 8, 8), labels)
    assert [step for step, _ in seen] == list(range(12, 21))
    torch.testing.assert_close(seen[-1][1], margins(small_guard, attacked, labels))


def test_l1_goes_from_larger_balls_to_its_own_and_no_image_leaves_before_that(small_guard, monkeypatch):
    radii, sizes = [], []
    project, evidence = L1.project, type(small_guard).evidence

    def record_radius(self, images, candidates, eps):
        radii.append(eps)
        return project(self, images, candidates, eps)

    def record_size(self, images):
        if images.requires_grad:
            sizes.append(len(images))
        return evidence(self, images)

    monkeypatch.setattr(L1, "project", record_radius)
    monkeypatch.setattr(type(small_guard), "evidence", record_size)
    images = rand(20, 1, 8, 8)
    attack = APGD(norm="l1", eps=3.0, steps=40, stop_early=True)
    attack(small_guard, images, small_guard(images).argmax(1))
    assert [radius for radius, before in zip(radii, [None, *radii], strict=False) if radius != before] == [9, 6, 3]
    assert sizes[:24] == [20] * 24
    assert min(sizes[24:]) < 20


def test_larger_balls_do_not_lose_a_success_at_the_start():
    """Broken in a small disc around `inside`; elsewhere the loss falls along the second pixel, to success at 0.3."""
    inside = torch.tensor([0.6, 0.5]).view(1, 1, 1, 2)

    class Lured:
        thresholds = torch.zeros(2)

        def evidence(self, images):
            first, second = (images - 0.5).flatten(1).unbind(1)
            in_disc = (images - inside).flatten(1).norm(dim=1) < 0.02
            suspicion = torch.where(in_disc, -0.01, 1.0) - 4 * second
            return Evidence(torch.stack([0 * first, 0 * first + 1], 1), torch.stack([0 * first, suspicion], 1))

    image, label = torch.full((1, 1, 1, 2), 0.5), torch.tensor([0])
    attack = APGD(norm="l1", eps=0.1, steps=20, start=lambda problem: problem.project(inside))
    assert margins(Lured(), attack(Lured(), image, label), label) <= 0
    assert margins(Lured(), replace(attack, start="image")(Lured(), image, label), label) > 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20])
def test_it_costs_the_gradients_that_it_says(small_guard, monkeypatch, norm, steps):
    gradients, evidence = [], type(small_guard).evidence

    def count(self, images):
        gradients.append(images.requires_grad)
        return evidence(self, images)

    monkeypatch.setattr(type(small_guard), "evidence", count)
    APGD(norm=norm, eps=NORMS[norm], steps=steps)(small_guard, rand(2, 1, 8, 8), torch.arange(2))
    assert sum(gradients) == steps
    assert len(gradients) <= steps + 5


def test_doubles_stay_doubles(small_guard):
    for norm, eps in NORMS.items():
        attack = APGD(norm=norm, eps=eps, steps=10)
        assert attack(small_guard.double(), rand(2, 1, 8, 8).double(), torch.tensor([0, 1])).dtype == torch.float64


def test_an_image_whose_evidence_is_not_finite_does_not_fail_the_batch(small_guard, monkeypatch):
    evidence = type(small_guard).evidence

    def break_one(self, images):
        judged = evidence(self, images)
        broken = images.flatten(1).sum(1, keepdim=True) < 1  # only the black image
        return type(judged)(*(torch.where(broken, torch.nan, part) for part in judged))

    images, labels = rand(3, 1, 8, 8), torch.arange(3)
    expected = APGD(eps=0.01, steps=10)(small_guard, images, labels)
    images[1] = 0
    monkeypatch.setattr(type(small_guard), "evidence", break_one)
    attacked = APGD(eps=0.01, steps=10)(small_guard, images, labels)
    torch.testing.assert_close(attacked[::2], expected[::2])
    assert attacked.isfinite().all()


@pytest.mark.parametrize("options", [{"eps": -1}, {"steps": 0}, {"norm": "l3"}, {"objective": "x"}, {"start": "x"}])
def test_options_are_checked_at_once(options):
    with pytest.raises(ConfigurationError, match="expected"):
        APGD(**({"eps": 0.1} | options))


def test_it_prints_and_compares():
    attack = APGD(norm="l1", eps=0.5, steps=3, start="random", large_radii=False)
    assert eval(repr(attack)) == attack
    assert attack != APGD(norm="l1", eps=0.5, steps=3, start="random")
