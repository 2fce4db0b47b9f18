import math
from dataclasses import replace

import pytest
import torch
from clusterguard import Evidence, decide, success_margin
from clusterguard.attacks import SparseRS, Square, get_norm
from clusterguard.detection import Verdicts, is_broken
from clusterguard.errors import ConfigurationError

ATTACKS = {
    "linf": Square(norm="linf", eps=0.1, queries=150),
    "l2": Square(norm="l2", eps=0.8, queries=150),
    "l1": Square(norm="l1", eps=4.0, queries=150),
    "l0": SparseRS(eps=6, queries=150),
}


class Service:
    """Answers with evidence, detached, and has nothing else; counts what each image was asked about."""

    def __init__(self, detector):
        self.detector, self.thresholds, self.asked = detector, detector.thresholds, 0

    @torch.no_grad()
    def evidence(self, images):
        self.asked += len(images)
        return self.detector.evidence(images)


@pytest.fixture
def cases(small_guard):
    images = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return images, small_guard(images).argmax(1)


def broken(guard, attacked, labels):
    return is_broken(Verdicts(decide(guard.evidence(attacked), guard.thresholds), labels))


@pytest.mark.parametrize("norm", ATTACKS)
def test_queries_alone_lower_the_margin_inside_ball_and_box(small_guard, cases, norm):
    images, labels = cases
    attack, service = ATTACKS[norm], Service(small_guard)
    attacked = attack(service, images, labels, generator=torch.Generator().manual_seed(0))
    before, after = (
        success_margin(small_guard.evidence(x), small_guard.thresholds, labels) for x in (images, attacked)
    )
    assert (after <= before).all()
    assert (after < before).double().mean() > 0.9
    assert (get_norm(norm).size(attacked - images) <= attack.eps * (1 + 1e-5) + 1e-6).all()
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert service.asked <= len(images) * attack.queries


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_success_only_above_the_closed_form_optimum(linear_detector, norm):
    images = 0.5 + 0.02 * torch.randn(30, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    activation = (images.flatten(1) @ linear_detector.weight.flatten() - linear_detector.bias).detach()
    labels = (activation > 0).long()
    weight = linear_detector.weight.detach().flatten()
    needed = activation.abs() / {"linf": weight.abs().sum(), "l2": weight.norm(), "l1": weight.abs().max()}[norm]
    eps = needed.median().item()
    attacked = Square(norm=norm, eps=eps, queries=600)(
        linear_detector, images, labels, generator=torch.Generator().manual_seed(0)
    )
    hits = broken(linear_detector, attacked, labels)
    assert not hits[needed > eps * 1.001].any()
    assert hits[needed < 0.4 * eps].all()


@pytest.mark.parametrize("norm", ATTACKS)
def test_equal_generators_give_equal_results(small_guard, cases, norm):
    runs = [ATTACKS[norm](small_guard, *cases, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("norm", ATTACKS)
@pytest.mark.parametrize("target", [1, 2])
def test_targets_are_aimed_at(norm, target):
    class Halves:
        """Class 1 is a bright upper half, class 2, harder to reach, a bright lower half."""

        thresholds = torch.full((3,), torch.inf)

        def evidence(self, images):
            upper, lower = images[:, :, :4].flatten(1).mean(1), images[:, :, 4:].flatten(1).mean(1)
            scores = torch.stack([torch.full_like(upper, 0.05), 2 * (upper - 0.5), lower - 0.5], dim=1)
            return Evidence(scores, torch.zeros_like(scores))

    images, labels = torch.full((6, 1, 8, 8), 0.5), torch.zeros(6, dtype=torch.long)
    attack = replace(ATTACKS[norm], eps={"linf": 0.1, "l2": 0.8, "l1": 5.0, "l0": 12}[norm], queries=400)
    targets = torch.full_like(labels, target)
    attacked = attack(Halves(), images, labels, targets=targets, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Halves().evidence(attacked).class_scores.argmax(1), targets)


def test_sparse_search_breaks_what_a_few_pixels_can(linear_detector):
    images = 0.5 + 0.02 * torch.randn(30, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    weight = linear_detector.weight.detach().flatten()
    activation = images.flatten(1) @ weight - linear_detector.bias
    labels = (activation > 0).long()
    # Each pixel goes to the end of the box that moves the activation most; so many of the best ones are needed.
    towards = torch.where(activation[:, None] * weight > 0, images.flatten(1), 1 - images.flatten(1))
    gains = (towards * weight.abs()).sort(dim=1, descending=True).values.cumsum(dim=1)
    needed = (gains < activation.abs()[:, None]).sum(dim=1) + 1
    for eps in (1, 2, 16):
        attacked = SparseRS(eps=eps, queries=400)(
            linear_detector, images, labels, generator=torch.Generator().manual_seed(0)
        )
        assert torch.equal(broken(linear_detector, attacked, labels), needed <= eps)
        assert (get_norm("l0").size(attacked - images) <= eps).all()


@pytest.mark.parametrize("norm", ATTACKS)
def test_stopping_early_breaks_the_same_images_and_leaves_them_alone(small_guard, cases, norm):
    images, labels = cases
    attack = replace(ATTACKS[norm], eps={"linf": 0.06, "l2": 0.4, "l1": 1.5, "l0": 2}[norm])
    services = Service(small_guard), Service(small_guard)
    stopped, ran_on = (
        replace(attack, stop_early=stop)(service, images, labels, generator=torch.Generator().manual_seed(0))
        for stop, service in zip((True, False), services, strict=True)
    )
    hits = broken(small_guard, stopped, labels)
    assert torch.equal(hits, broken(small_guard, ran_on, labels))
    assert 0 < hits.sum() < len(images)
    torch.testing.assert_close(stopped[~hits], ran_on[~hits])  # dropping others changes nobody's luck
    assert services[0].asked < services[1].asked == len(images) * attack.queries


@pytest.mark.parametrize("norm", ATTACKS)
def test_images_that_are_wrong_already_stay_as_they_are(small_guard, cases, norm):
    images, labels = cases
    accepted = ~small_guard.detect(images).is_adversarial
    service = Service(small_guard)
    attacked = ATTACKS[norm](service, images[accepted], (labels[accepted] + 1) % 3)
    assert torch.equal(attacked, images[accepted])
    assert service.asked == accepted.sum()


@pytest.mark.parametrize("norm", ATTACKS)
@pytest.mark.parametrize("eps", [0, 1, math.inf])
@pytest.mark.parametrize("shape", [(3, 7, 5), (1, 1, 1), (2, 1, 6)])
def test_any_shape_and_budget_and_doubles(norm, eps, shape):
    class Bright:
        thresholds = torch.full((2,), torch.inf)

        def evidence(self, images):
            scores = images.flatten(1).mean(1) - 0.5
            return Evidence(torch.stack([-scores, scores], 1), torch.zeros(len(images), 2, dtype=images.dtype))

    images = torch.rand(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    largest = get_norm(norm).largest(shape)
    eps = min(eps, largest)
    attack = replace(ATTACKS[norm], eps=eps, queries=40, stop_early=False)
    attacked = attack(Bright(), images, torch.zeros(4, dtype=torch.long))
    assert attacked.dtype == torch.float64
    assert attacked.isfinite().all()
    assert (get_norm(norm).size(attacked - images) <= eps).all()
    assert ((attacked >= 0) & (attacked <= 1)).all()
    if eps == largest:
        assert (attacked.flatten(1).mean(1) > images.flatten(1).mean(1)).all()


def test_an_objective_that_is_not_finite_is_no_improvement(small_guard, cases):
    def fussy(evidence, thresholds, labels, targets):
        loss = success_margin(evidence, thresholds, labels, targets)
        return torch.where(torch.arange(len(loss)) % 2 == 0, torch.nan, loss)

    images, labels = cases
    attacked = Square(eps=0.1, queries=60, objective=fussy, stop_early=False)(small_guard, images, labels)
    before, after = (
        success_margin(small_guard.evidence(x), small_guard.thresholds, labels) for x in (images, attacked)
    )
    assert (after <= before).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Square(eps=-1),
        lambda: Square(eps=0.1, queries=0),
        lambda: Square(norm="l0", eps=0.1),
        lambda: Square(eps=0.1, initial_share=0),
        lambda: SparseRS(eps=-1),
    ],
)
def test_options_are_checked_at_once(make):
    with pytest.raises(ConfigurationError, match="expected"):
        make()
