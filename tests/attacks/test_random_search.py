import pytest
import torch
from clusterguard import SparseRS, Square, decide, success_margin
from clusterguard.attacks.norms import get_norm
from clusterguard.errors import ConfigurationError
from clusterguard.metrics import is_broken

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
    return is_broken(decide(guard.evidence(attacked), guard.thresholds), labels)


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
def test_targets_are_aimed_at(small_guard, cases, norm):
    images, labels = cases
    for shift in (1, 2):
        targets = (labels + shift) % 3
        attacked = ATTACKS[norm](small_guard, images, labels, targets=targets)
        before, after = (
            success_margin(small_guard.evidence(x), small_guard.thresholds, labels, targets) for x in (images, attacked)
        )
        assert (after < before).double().mean() > 0.9


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
