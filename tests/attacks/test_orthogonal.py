import pytest
import torch
from clusterguard import PGD, Evidence, decide, success_margin
from clusterguard.attacks import MultiTarget, OrthogonalPGD, get_norm
from clusterguard.detection import Verdicts, is_broken
from clusterguard.errors import ConfigurationError
from torch import nn

STRATEGIES = ["orthogonal", "selective"]
NORMS = {"linf": 0.1, "l2": 0.6, "l1": 3.0, "l0": 12}


class SeparateDetector(nn.Module):
    """A linear classifier along u, and beside it a detector that measures how far v·x is from where clean images lie.

    u and v are at 45°: the straight way across the boundary is seen. Suspicion is in much larger units than scores.
    """

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(16, 2, generator=generator)).Q
        self.u = nn.Parameter(basis[:, 0].clone())
        self.v = nn.Parameter((basis[:, 0] + basis[:, 1]) / 2**0.5)
        self.thresholds = torch.tensor([20.0, 20.0])
        self.calls = 0

    def coordinates(self, images):
        offset = images.flatten(1) - 0.5
        return offset @ self.u, offset @ self.v

    def evidence(self, images):
        self.calls += 1
        along, seen = self.coordinates(images)
        scores = torch.stack([0.3 - along, along - 0.3], dim=1)
        return Evidence(scores, 1000 * seen.abs()[:, None].expand_as(scores))


def broken(detector, attacked, labels, targets=None):
    return success_margin(detector.evidence(attacked), detector.thresholds, labels, targets) <= 0


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("targeted", [False, True])
def test_it_fools_both_where_the_sum_of_both_losses_gets_stuck(norm, targeted):
    detector = SeparateDetector()
    images = 0.5 + 0.002 * torch.randn(10, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(10, dtype=torch.long)
    targets = 1 - labels if targeted else None
    options = {"norm": norm, "eps": {"l2": 1.0, "linf": 0.45}[norm], "step_size": {"l2": 0.02, "linf": 0.006}[norm]}
    summed = PGD(objective="adaptive", steps=100, **options)(detector, images, labels, targets=targets)
    assert not broken(detector, summed, labels, targets).any()
    for strategy in STRATEGIES:
        attack = OrthogonalPGD(strategy=strategy, steps=100, **options)
        assert broken(detector, attack(detector, images, labels, targets=targets), labels, targets).all()


def test_an_orthogonal_step_is_not_seen_and_a_selective_one_is():
    detector = SeparateDetector()
    images, labels = torch.full((1, 1, 4, 4), 0.5) + 0.01 * detector.v.detach().view(1, 1, 4, 4), torch.tensor([0])
    before = detector.coordinates(images)
    change = {}
    for strategy in STRATEGIES:
        attack = OrthogonalPGD(norm="l2", eps=1.0, step_size=0.1, steps=1, keep="last", strategy=strategy)
        after = detector.coordinates(attack(detector, images, labels))
        change[strategy] = [(new - old).item() for old, new in zip(before, after, strict=True)]
    assert change["orthogonal"] == pytest.approx([0.1 / 2**0.5, 0], abs=1e-5)
    assert change["selective"] == pytest.approx([0.1, 0.1 / 2**0.5], abs=1e-5)


@pytest.mark.parametrize("target", [1, 2])
def test_the_suspicion_that_counts_is_the_targets(target):
    class ThreeClasses:
        """Each class has its own direction of score and, at an angle to it, of suspicion."""

        thresholds = torch.zeros(3)
        directions = torch.linalg.qr(torch.randn(16, 3, generator=torch.Generator().manual_seed(0))).Q

        def evidence(self, images):
            scores = (images.flatten(1) - 0.5) @ self.directions - torch.tensor([0.0, 0.1, 0.2])
            return Evidence(scores, scores.cumsum(dim=1).flip(1))

    detector = ThreeClasses()
    images, labels = torch.full((1, 1, 4, 4), 0.5), torch.tensor([0])
    attack = OrthogonalPGD(norm="l2", eps=1.0, step_size=0.05, steps=1, keep="last")
    attacked = attack(detector, images, labels, targets=torch.tensor([target]))
    change = (detector.evidence(attacked).suspicion - detector.evidence(images).suspicion)[0]
    assert change[target].item() == pytest.approx(0, abs=1e-5)


def test_once_the_label_is_wrong_it_goes_down_in_suspicion():
    detector = SeparateDetector()
    across = 0.5 * (detector.u + 0.2 * detector.v).detach().view(1, 1, 4, 4)
    images, labels = 0.5 + across, torch.tensor([0])
    attack = OrthogonalPGD(norm="l2", eps=1.0, step_size=0.05, steps=1, keep="last", strategy="selective")
    (_, before), (_, after) = (detector.coordinates(x) for x in (images, attack(detector, images, labels)))
    assert (after - before).item() == pytest.approx(-0.05, abs=1e-5)


def test_parallel_gradients_are_left_whole(linear_detector):
    """Scores and suspicion of the linear detector have one direction: nothing is left without it but rounding."""
    images = 0.5 + 0.02 * torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    labels = (images.flatten(1) @ linear_detector.weight.flatten() > linear_detector.bias).long()
    results = [
        OrthogonalPGD(norm="l2", eps=1.0, step_size=0.1, strategy=strategy)(linear_detector, images, labels)
        for strategy in STRATEGIES
    ]
    torch.testing.assert_close(*results)
    assert broken(linear_detector, results[0], labels).all()


def test_a_suspicion_without_gradient_leaves_plain_pgd():
    detector = SeparateDetector()
    detector.v.data.zero_()
    images, labels = torch.full((2, 1, 4, 4), 0.5), torch.zeros(2, dtype=torch.long)
    options = {"norm": "l2", "eps": 0.2, "step_size": 0.02, "steps": 5}
    expected = PGD(objective="logit", **options)(detector, images, labels)
    torch.testing.assert_close(OrthogonalPGD(**options)(detector, images, labels), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("norm", NORMS)
def test_it_lowers_the_margin_inside_ball_and_box(small_guard, norm, strategy):
    eps = NORMS[norm]
    images = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = small_guard(images).argmax(1)
    attack = OrthogonalPGD(norm=norm, eps=eps, step_size=eps if norm == "l0" else eps / 4, steps=12, strategy=strategy)
    attacked = attack(small_guard, images, labels)
    before, after = (
        success_margin(small_guard.evidence(x), small_guard.thresholds, labels) for x in (images, attacked)
    )
    assert (after <= before).all()
    assert (after < before).double().mean() > 0.8
    assert (get_norm(norm).size(attacked - images) <= eps * (1 + 1e-5)).all()
    assert attacked.min() >= 0
    assert attacked.max() <= 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_aims_at_the_target(small_guard, strategy):
    images = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(30, dtype=torch.long)
    attack = OrthogonalPGD(eps=0.1, step_size=0.02, steps=10, strategy=strategy)
    for target in (1, 2):
        targets = torch.full_like(labels, target)
        before, after = (
            success_margin(small_guard.evidence(x), small_guard.thresholds, labels, targets)
            for x in (images, attack(small_guard, images, labels, targets=targets))
        )
        assert (after < before).double().mean() > 0.8


def test_a_step_asks_for_evidence_once():
    detector = SeparateDetector().eval()  # in train mode a copy of it would be attacked, and count
    OrthogonalPGD(eps=0.1, step_size=0.1, steps=7)(detector, torch.rand(3, 1, 4, 4), torch.zeros(3, dtype=torch.long))
    assert detector.calls == 7 + 1  # the last iterate is judged too


def test_stopping_early_and_trying_every_target_work_as_for_any_attack(small_guard):
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = small_guard(images).argmax(1)
    options = {"eps": 0.06, "step_size": 0.01, "steps": 20}
    whole, early = (
        is_broken(Verdicts(decide(small_guard.evidence(x), small_guard.thresholds), labels))
        for x in (
            OrthogonalPGD(stop_early=stop_early, **options)(small_guard, images, labels) for stop_early in (False, True)
        )
    )
    assert torch.equal(whole, early)
    every = MultiTarget(attack=OrthogonalPGD(**options))(small_guard, images, labels)
    assert 0 < broken(small_guard, every, labels).sum() < 40


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_detector_and_the_caller_are_left_alone(context):
    detector = SeparateDetector()
    images, labels = torch.rand(3, 1, 4, 4), torch.zeros(3, dtype=torch.long)
    attack = OrthogonalPGD(eps=0.2, step_size=0.05, steps=4)
    expected = attack(detector, images, labels)
    with context():
        attacked = attack(detector, images.clone(), labels.clone())
    assert torch.equal(attacked, expected)
    assert not attacked.requires_grad
    assert all(parameter.grad is None for parameter in detector.parameters())
    assert detector.training


@pytest.mark.parametrize("options", [{"strategy": "both"}, {"eps": -1}, {"step_size": 0}, {"objective": "x"}])
def test_options_are_checked_at_once(options):
    with pytest.raises(ConfigurationError, match="expected"):
        OrthogonalPGD(**({"eps": 0.1, "step_size": 0.1} | options))


def test_it_prints_and_compares():
    attack = OrthogonalPGD(norm="l2", eps=0.5, step_size=0.1, strategy="selective")
    assert eval(repr(attack)) == attack
