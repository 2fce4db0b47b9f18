import pytest
import torch
from clusterguard import PGD, ClusterGuard, success_margin
from clusterguard.attacks import NES, MultiTarget, Transfer
from clusterguard.detectors import ConfidenceDetector, WithThresholds
from clusterguard.errors import ConfigurationError, InputError, NotCalibratedError
from torch import nn

INNER = PGD(eps=0.2, step_size=0.02, steps=10, objective="margin")


class Thresholds:
    """A victim that answers nothing."""

    thresholds = torch.full((3,), 9.0)


def clean(count=10):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(count) % 3


@pytest.mark.parametrize("targeted", [False, True])
def test_the_victim_is_asked_for_nothing(small_guard, targeted):
    images, labels = clean()
    targets = (labels + 1) % 3 if targeted else None
    attacked = Transfer(surrogate=small_guard, attack=INNER)(Thresholds(), images, labels, targets=targets)
    assert torch.equal(attacked, INNER(small_guard, images, labels, targets=targets))
    before, after = (
        success_margin(small_guard.evidence(x), small_guard.thresholds, labels, targets) for x in (images, attacked)
    )
    assert (after < before).double().mean() > 0.8


def test_what_breaks_a_surrogate_like_the_victim_breaks_the_victim(small_guard):
    """An undefended copy of the guard's own classifier: the same mistakes, if nothing is refused."""
    images, _ = clean()
    labels = small_guard(images).argmax(1)
    surrogate = WithThresholds(ConfidenceDetector(small_guard, 3), torch.full((3,), torch.inf))
    attacked = Transfer(surrogate=surrogate, attack=INNER)(small_guard, images, labels)
    changed = small_guard(attacked).argmax(1) != labels
    assert changed.any()
    small_guard.thresholds = torch.full((3,), torch.inf)
    assert torch.equal(success_margin(small_guard.evidence(attacked), small_guard.thresholds, labels) <= 0, changed)


def test_gradient_free_attacks_transfer_with_their_randomness(small_guard):
    class Service:
        thresholds = small_guard.thresholds

        @torch.no_grad()
        def evidence(self, images):
            return small_guard.evidence(images)

    images, labels = clean(4)
    inner = NES(eps=0.2, step_size=0.05, steps=3, samples=10)
    attack = Transfer(surrogate=Service(), attack=inner)
    runs = [attack(Thresholds(), images, labels, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_budgets_are_the_inner_attacks(small_guard):
    attack = Transfer(surrogate=small_guard, attack=INNER)
    assert (attack.norm, attack.eps) == ("linf", 0.2)
    assert MultiTarget(attack=attack).eps == 0.2
    function = Transfer(surrogate=small_guard, attack=lambda *_, **__: None)
    assert (function.norm, function.eps) == (None, None)


def test_it_prints_without_the_surrogates_modules(small_guard):
    text = repr(Transfer(surrogate=small_guard, attack=INNER))
    assert text == f"Transfer(batch_size=None, surrogate=ClusterGuard, attack={INNER!r})"
    assert Transfer(surrogate=small_guard, attack=INNER) == Transfer(surrogate=small_guard, attack=INNER)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_surrogate_is_attacked_in_eval_mode_and_left_as_it_was(context):
    torch.manual_seed(0)
    frozen = nn.BatchNorm2d(2).eval()
    backbone = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), frozen, nn.Dropout(0.5), nn.Flatten())
    surrogate = ClusterGuard(backbone, 3, example=torch.rand(2, 1, 8, 8)).train()
    surrogate.thresholds = torch.full((3,), 9.0)
    modes = [module.training for module in surrogate.modules()]
    state = {name: value.clone() for name, value in surrogate.state_dict().items()}

    def attack(detector, images, labels, *, targets=None, generator=None):
        assert not any(module.training for module in detector.modules())
        return INNER(detector, images, labels, targets=targets, generator=generator)

    images, labels = clean(5)
    with context():
        attacked = Transfer(surrogate=surrogate, attack=attack, batch_size=2)(Thresholds(), images, labels)
    torch.testing.assert_close(attacked, INNER(surrogate, images, labels), rtol=0, atol=1e-5)
    assert not attacked.requires_grad
    assert [module.training for module in surrogate.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in surrogate.state_dict().items())
    assert all(parameter.grad is None for parameter in surrogate.parameters())


def test_a_surrogate_that_does_not_fit_is_named_before_any_work(small_guard):
    images, labels = clean(3)

    def attack(*_, **__):
        pytest.fail("work was done")

    few = ConfidenceDetector(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), 2)
    few.thresholds = torch.ones(2)
    with pytest.raises(InputError, match="labels from 0 to 1"):
        Transfer(surrogate=few, attack=attack)(Thresholds(), images, labels)
    small_guard.reset_calibration()
    with pytest.raises(NotCalibratedError, match="Calibrator"):
        Transfer(surrogate=small_guard, attack=attack)(Thresholds(), images, labels)
    with pytest.raises(InputError, match="on meta"):
        Transfer(surrogate=small_guard.to("meta"), attack=attack)(Thresholds(), images, labels)


def test_options_are_checked_at_once(small_guard):
    with pytest.raises(ConfigurationError, match="expected"):
        Transfer(surrogate=small_guard, attack=INNER, batch_size=0)
