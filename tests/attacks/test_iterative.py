import math
from dataclasses import replace

import pytest
import torch
from clusterguard import FGSM, PGD, ClusterGuard, success_margin
from clusterguard.attacks import NoisyFGSM, get_norm
from clusterguard.errors import ConfigurationError, InputError, NotCalibratedError
from torch import nn

NORMS = ["linf", "l2"]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [0.0, 0.1, math.inf])
@pytest.mark.parametrize("start", ["image", "random"])
def test_the_result_is_inside_ball_and_box(small_guard, norm, eps, start):
    images, eps = torch.rand(6, 1, 8, 8), min(eps, get_norm(norm).largest((1, 8, 8)))
    attack = PGD(norm=norm, eps=eps, step_size=0.3, steps=5, start=start, keep="last")
    attacked = attack(small_guard, images, torch.zeros(6, dtype=torch.long))
    assert (get_norm(norm).size(attacked - images) <= eps * (1 + 1e-5) + 1e-6).all()
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert not attacked.requires_grad


def test_the_best_iterate_is_never_worse_than_the_last_or_the_start(small_guard):
    images, labels = torch.rand(20, 1, 8, 8), torch.arange(20) % 3
    last = PGD(eps=0.3, step_size=0.3, steps=7, keep="last", objective="margin")  # too long a step: it overshoots
    margins = [
        success_margin(small_guard.evidence(x), small_guard.thresholds, labels)
        for x in (
            replace(last, keep="best")(small_guard, images, labels),
            last(small_guard, images, labels),
            images,
        )
    ]
    assert (margins[0] <= margins[1]).all()
    assert (margins[0] <= margins[2]).all()


def test_fgsm_is_one_whole_step(small_guard):
    images, labels = torch.full((3, 1, 8, 8), 0.5), torch.arange(3)
    attacked = FGSM(eps=0.1)(small_guard, images, labels)
    assert ((attacked - images).abs() - 0.1).abs().max() < 1e-6
    assert torch.equal(attacked, PGD(eps=0.1, step_size=0.1, steps=1, keep="last")(small_guard, images, labels))
    assert torch.equal(FGSM(eps=0.0)(small_guard, images, labels), images)


def test_noisy_fgsm_steps_from_noise_and_is_not_projected(small_guard):
    images, labels = torch.full((200, 1, 8, 8), 0.5), torch.arange(200) % 3
    attack = NoisyFGSM(eps=0.1, noise=1.5, step_size=0.05)
    attacked = attack(small_guard, images, labels, generator=torch.Generator().manual_seed(3))
    noise = torch.empty_like(images).uniform_(-0.15, 0.15, generator=torch.Generator().manual_seed(3))
    leaf = (images + noise).requires_grad_()
    suspicion = small_guard.evidence(leaf).suspicion
    wrong = suspicion.scatter(1, labels[:, None], torch.inf).min(dim=1).values
    (gradient,) = torch.autograd.grad(wrong.sum(), leaf)
    assert torch.allclose(attacked, images + noise - 0.05 * gradient.sign(), atol=1e-6)
    assert 0.17 < (attacked - images).abs().max() <= attack.reach == 0.2
    half = NoisyFGSM(eps=0.05, noise=1.5, step_size=0.025)
    assert attack.scaled(0.5) == half
    assert attack.as_pgd().scaled(0.5) == half.as_pgd()
    attacked = NoisyFGSM(eps=0.4)(small_guard, images, labels)  # a reach beyond the box
    assert 0 <= attacked.min() < attacked.max() <= 1
    still = NoisyFGSM(eps=0.1, noise=0.0)(small_guard, images, labels)
    assert torch.allclose(still, FGSM(eps=0.1)(small_guard, images, labels))


@pytest.mark.parametrize("options", [{"noise": -1}, {"noise": math.inf}, {"step_size": 0}, {"eps": 25}])
def test_noisy_fgsm_refuses_what_it_cannot_do(options):
    with pytest.raises(ConfigurationError, match="expected"):
        NoisyFGSM(**{"eps": 0.1} | options)


@pytest.mark.parametrize(
    "attack", [PGD(eps=0.1, step_size=0.02, steps=10, objective="margin"), FGSM(eps=0.02, objective="margin")]
)
def test_targeted_aims_at_the_target(small_guard, attack):
    images, labels = torch.rand(30, 1, 8, 8), torch.zeros(30, dtype=torch.long)
    for target in (1, 2):
        targets = torch.full_like(labels, target)
        before, after = (
            success_margin(small_guard.evidence(x), small_guard.thresholds, labels, targets)
            for x in (images, attack(small_guard, images, labels, targets=targets))
        )
        assert (after < before).double().mean() > 0.9


def test_the_detector_is_left_as_it_was():
    torch.manual_seed(0)
    frozen = nn.BatchNorm2d(2).eval()
    backbone = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), frozen, nn.Dropout(0.5), nn.Flatten())
    guard = ClusterGuard(backbone, 2, example=torch.rand(2, 1, 6, 6)).train()
    guard.encoder[0][2].eval()
    guard.thresholds = torch.full((2,), 9.0)
    guard.encoder[0][0].weight.requires_grad_(False)
    guard.encoder[1].weight.grad = torch.ones_like(guard.encoder[1].weight)
    modes = [module.training for module in guard.modules()]
    needs_gradient = [parameter.requires_grad for parameter in guard.parameters()]
    state = {name: value.clone() for name, value in guard.state_dict().items()}
    PGD(eps=0.1, step_size=0.05, steps=3)(guard, torch.rand(2, 1, 6, 6), torch.tensor([0, 1]))
    assert [module.training for module in guard.modules()] == modes
    assert [parameter.requires_grad for parameter in guard.parameters()] == needs_gradient
    assert [parameter.grad is None for parameter in guard.parameters()].count(False) == 1
    assert guard.encoder[1].weight.grad.eq(1).all()
    assert all(torch.equal(value, state[name]) for name, value in guard.state_dict().items())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_attacks_work_where_the_caller_has_switched_gradients_off(small_guard, context):
    attack = PGD(eps=0.2, step_size=0.05, steps=4)
    labels = torch.arange(5) % 3
    images = torch.rand(5, 1, 8, 8)
    expected = attack(small_guard, images, labels)
    with context():
        attacked = attack(small_guard, images.clone(), labels.clone())
    assert torch.equal(attacked, expected)
    assert not torch.equal(attacked, images)


def test_random_starts_follow_the_generator(small_guard):
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4) % 3
    attack = PGD(eps=0.2, step_size=0.01, steps=2, start="random", keep="last")

    def run(seed: int) -> torch.Tensor:
        return attack(small_guard, images, labels, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_results_do_not_depend_on_the_batch(small_guard):
    images, labels = torch.rand(12, 1, 8, 8), torch.arange(12) % 3
    attack = PGD(norm="l2", eps=0.5, step_size=0.1, steps=5)
    together = attack(small_guard, images, labels)
    apart = torch.cat([attack(small_guard, images[i : i + 5], labels[i : i + 5]) for i in (0, 5, 10)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)


def test_doubles_stay_doubles(small_guard):
    guard = small_guard.double()
    attacked = PGD(eps=0.1, step_size=0.05, steps=2)(guard, torch.rand(2, 1, 8, 8).double(), torch.tensor([0, 1]))
    assert attacked.dtype == torch.float64


GOOD = torch.rand(2, 1, 8, 8)


@pytest.mark.parametrize(
    ("images", "labels", "targets", "message"),
    [
        (GOOD.index_fill(0, torch.tensor(0), torch.nan), torch.tensor([0, 1]), None, "finite images"),
        (GOOD + 1, torch.tensor([0, 1]), None, r"\[0, 1\]"),
        (GOOD, torch.tensor([0, 3]), None, "labels from 0 to 2"),
        (GOOD, torch.tensor([0, -1]), None, "labels from 0 to 2"),
        (GOOD, torch.tensor([0.0, 1.0]), None, "integer labels"),
        (GOOD, torch.tensor([0, 1, 2]), None, r"shape \(2,\)"),
        (GOOD, torch.tensor([0, 1]), torch.tensor([0, 2]), "targets that differ"),
        (GOOD, torch.tensor([0, 1]), torch.tensor([9, 9]), "targets from 0 to 2"),
        (GOOD.to("meta"), torch.tensor([0, 1]), None, "move one of them"),
    ],
)
def test_bad_input_is_named_before_any_work(small_guard, monkeypatch, images, labels, targets, message):
    monkeypatch.setattr(ClusterGuard, "evidence", lambda *_: pytest.fail("work was done"))
    if images.is_meta:
        monkeypatch.setattr("clusterguard.attacks._base.check_images", lambda _: None)
        monkeypatch.setattr(torch.Tensor, "isfinite", lambda _: torch.tensor(True))
    with pytest.raises(InputError, match=message):
        PGD(eps=0.1, step_size=0.1)(small_guard, images, labels, targets=targets)


def test_an_uncalibrated_detector_is_named(small_guard):
    small_guard.reset_calibration()
    with pytest.raises(NotCalibratedError, match="Calibrator"):
        PGD(eps=0.1, step_size=0.1)(small_guard, GOOD, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "options",
    [
        {"eps": -1},
        {"eps": float("nan")},
        {"steps": 0},
        {"step_size": 0},
        {"norm": "l3"},
        {"keep": "first"},
        {"objective": "x"},
    ],
)
def test_options_are_checked_at_once(options):
    with pytest.raises(ConfigurationError, match="expected"):
        PGD(**({"eps": 0.1, "step_size": 0.1} | options))


def test_attacks_print_and_compare():
    assert PGD(eps=0.1, step_size=0.1) == PGD(eps=0.1, step_size=0.1)
    attack = PGD(norm="l2", eps=0.5, step_size=0.1, steps=3, start="random")
    assert eval(repr(attack)) == attack
