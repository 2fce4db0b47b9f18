import copy
import importlib.machinery
import math
import sys
import types
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from clusterguard import ClusterGuard, Evidence, decide, evaluate
from clusterguard.attacks import (
    PeerAttack,
    as_classifier,
    as_rejecting_classifier,
    from_art,
    from_autoattack,
    from_foolbox,
    from_torchattacks,
    get_norm,
)
from clusterguard.detectors import WithThresholds
from clusterguard.errors import ConfigurationError, MissingDependencyError, NotCalibratedError
from peer_makers import art, check_valid, foolbox, seeded, torchattacks
from torch import nn
from torch.nn.functional import cross_entropy


class Preset(nn.Module):
    """A detector that has made up its mind."""

    def __init__(self, scores, suspicion, thresholds):
        super().__init__()
        self.known = Evidence(scores, suspicion)
        self.thresholds = thresholds

    def evidence(self, images):
        return self.known


@pytest.mark.parametrize("whole_numbers", [False, True])
def test_the_rejecting_classifier_decides_as_the_detector_does(whole_numbers):
    scores, suspicion = (5 * torch.randn(2000, 4, generator=seeded(seed)) for seed in (1, 2))
    if whole_numbers:  # so that suspicion meets thresholds exactly
        scores, suspicion = scores.round(), suspicion.round()
        untied = scores.topk(2).values.diff().squeeze(1) != 0
        scores, suspicion = scores[untied], suspicion[untied]
    scores[:3, 0], suspicion[3:6, 1] = torch.tensor([torch.nan, torch.inf, -torch.inf]), torch.inf
    detector = Preset(scores, suspicion, torch.tensor([0.0, 3.0, -2.0, torch.inf]))
    logits = as_rejecting_classifier(detector)(torch.rand(1, 1, 2, 2))
    verdict = decide(detector.known, detector.thresholds)
    assert torch.equal(logits.argmax(1), torch.where(verdict.is_adversarial, 4, verdict.labels))
    assert logits.isfinite().all()
    assert logits.amin(1).eq(0).all()
    assert 0.2 < verdict.is_adversarial.double().mean() < 0.8


def test_the_classifier_keeps_labels_and_losses(trained_guard, images, labels):
    scores = trained_guard.evidence(images).class_scores
    logits = as_classifier(trained_guard)(images)
    assert logits.amin(1).eq(0).all()
    assert torch.equal(logits.argmax(1), trained_guard.detect(images).labels)
    torch.testing.assert_close(logits.diff(dim=1), scores.diff(dim=1))
    torch.testing.assert_close(cross_entropy(logits, labels), cross_entropy(scores, labels))
    torch.testing.assert_close(as_classifier(trained_guard, temperature=0.5)(images), 2 * logits)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigurationError, match="positive temperature"):
            as_classifier(trained_guard, temperature=temperature)


def test_attacks_that_mask_logits_with_zero_work_only_on_shifted_ones(trained_guard, images, labels):
    class Negative(nn.Linear):
        def forward(self, x):
            return trained_guard.evidence(x).class_scores

    attack = partial(pytest.importorskip("torchattacks").CW, c=100, lr=0.1, steps=30)
    assert torch.equal(attack(Negative(1, 1))(images, labels), images)
    assert not torch.equal(attack(as_classifier(trained_guard))(images, labels), images)


def test_temperature_reaches_the_peer(trained_guard, images, labels):
    seen = []
    attack = from_torchattacks(lambda model: lambda x, _: seen.append(model(x)) or x, norm=None, eps=None)
    for temperature in (1.0, 0.25):
        replace(attack, temperature=temperature)(trained_guard, images, labels)
    torch.testing.assert_close(seen[1], 4 * seen[0])


def test_an_uncalibrated_detector_cannot_reject(small_guard):
    small_guard.reset_calibration()
    with pytest.raises(NotCalibratedError, match="Calibrator"):
        as_rejecting_classifier(small_guard)


ONE_OF_EACH = {
    "torchattacks": torchattacks("CW", "l2", minimises=True, c=100, steps=5),
    "Foolbox": foolbox("L2CarliniWagnerAttack", "l2", binary_search_steps=1, steps=5),
    "ART": art("ProjectedGradientDescent", "linf", eps_step=0.05, max_iter=3),
}


def half_frozen_guard():
    """In train mode, one BatchNorm frozen, one weight fixed, one with a gradient that its owner still needs."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten())
    guard = ClusterGuard(backbone, 3, example=torch.rand(2, 1, 6, 6)).train()
    guard.encoder[0][2].eval()
    guard.thresholds = torch.full((3,), 20.0)
    guard.encoder[0][0].weight.requires_grad_(False)
    guard.encoder[1].weight.grad = torch.ones_like(guard.encoder[1].weight)
    return guard


def fingerprint(guard):
    """All that a peer could disturb, as plain values."""
    return (
        [module.training for module in guard.modules()],
        [parameter.requires_grad for parameter in guard.parameters()],
        [None if parameter.grad is None else parameter.grad.tolist() for parameter in guard.parameters()],
        {name: value.tolist() for name, value in guard.state_dict().items()},
    )


@pytest.mark.parametrize("make", ONE_OF_EACH.values(), ids=ONE_OF_EACH)
@pytest.mark.parametrize("rejecting", [False, True])
def test_the_detector_is_left_as_it_was(make, rejecting):
    guard = half_frozen_guard()
    before = fingerprint(guard)
    make(rejecting=rejecting)(guard, torch.rand(4, 1, 6, 6), torch.tensor([0, 1, 2, 0]))
    assert fingerprint(guard) == before


def test_a_classifier_handed_to_a_peer_by_the_user_protects_the_detector_too():
    guard, images, labels = half_frozen_guard(), torch.rand(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
    before = fingerprint(guard)
    model = as_classifier(guard)
    expected = model(images)
    model.train().double()
    cross_entropy(model(images), labels)
    pytest.importorskip("torchattacks").PGD(model)(images, labels)
    leaf = images.clone().requires_grad_()
    cross_entropy(model(leaf), labels).backward()
    model.zero_grad()
    assert leaf.grad.abs().max() > 0
    torch.testing.assert_close(model(images), expected)
    assert fingerprint(guard) == before


@pytest.mark.parametrize("make", ONE_OF_EACH.values(), ids=ONE_OF_EACH)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_peers_work_where_the_caller_has_switched_gradients_off(trained_guard, images, labels, make, context):
    attack = make()
    expected = attack(trained_guard, images, labels, generator=seeded())
    with context():
        attacked = attack(trained_guard, images.clone(), labels.clone(), generator=seeded())
    assert torch.equal(attacked, expected)


@pytest.mark.parametrize("make", ONE_OF_EACH.values(), ids=ONE_OF_EACH)
def test_bounds_are_meant_with_a_tolerance_and_doubles_stay_doubles(trained_guard, images, labels, make):
    outside = torch.where(images == 0, -3e-8, images).double()
    outside[0, 0, 0, 0] = 1 + 3e-8
    attack = make()
    attacked = attack(copy.deepcopy(trained_guard).double(), outside, labels, generator=seeded())
    check_valid(attack, outside, attacked)


@pytest.mark.parametrize(
    "make",
    [
        torchattacks("PGD", "linf", alpha=0.01, steps=2),
        art("ProjectedGradientDescent", "linf", eps_step=0.01, max_iter=2, num_random_init=1),
    ],
    ids=["torch's stream", "NumPy's stream"],
)
def test_randomness_comes_from_the_generator_alone(trained_guard, images, labels, make):
    streams = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    runs = [make()(trained_guard, images, labels, generator=seeded(seed)) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (np.random.get_state()[1] == streams[1]).all()  # noqa: NPY002


def peer(change, *, norm="linf", eps=0.1, **options):
    """A peer that returns changed images."""
    return PeerAttack(peer="", norm=norm, eps=eps, run=lambda problem, goal, model: change(problem.images), **options)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_what_rounding_took_outside_is_put_back(trained_guard, norm):
    labels, grey = torch.zeros(5, dtype=torch.long), torch.full((5, 1, 28, 28), 0.5)
    length = get_norm(norm).size(torch.full_like(grey, 0.1))[:, None, None, None]
    attack = peer(lambda x: x + 0.1 * (1 + 1e-6), norm=norm, eps=length[0].item())
    assert (get_norm(norm).size(attack(trained_guard, grey, labels) - grey) <= attack.eps).all()
    beyond_the_box = peer(lambda x: x + 2e-7)(trained_guard, torch.ones_like(grey), labels)
    assert beyond_the_box.max() == 1


def test_gross_violations_are_left_for_the_evaluator(trained_guard, images, labels):
    too_far, too_bright, broken_pixels = (
        peer(change) for change in (lambda x: (x - 0.2).abs(), lambda x: x + 0.05, lambda x: x * torch.nan)
    )
    assert torch.equal(too_far(trained_guard, images, labels), (images - 0.2).abs())
    assert too_bright(trained_guard, images, labels).max() > 1.04
    assert broken_pixels(trained_guard, images, labels).isnan().all()
    attacks = {"far": too_far, "bright": too_bright, "PGD": torchattacks("PGD", "linf", alpha=0.02, steps=10)()}
    results = evaluate(trained_guard, attacks, [(images, labels)]).results
    assert [result.invalid for result in results] == [30, 30, 0]
    assert [result.success.count for result in results[:2]] == [0, 0]
    assert results[2].success.total == 30


def test_peers_work_through_other_detectors_and_in_parts(trained_guard, images, labels):
    wrapped = WithThresholds(trained_guard, torch.full((10,), torch.inf))
    attack = torchattacks("PGD", "linf", alpha=0.02, steps=5, random_start=False)(rejecting=True)
    attacked = attack(wrapped, images, labels, targets=(labels + 1) % 10)
    parts = replace(attack, batch_size=7)(wrapped, images, labels, targets=(labels + 1) % 10)
    torch.testing.assert_close(parts, attacked)


def test_attacks_print_what_they_run():
    assert "PGD" in repr(torchattacks("PGD", "linf", alpha=0.02)())
    assert "alpha=0.02" in repr(torchattacks("PGD", "linf", alpha=0.02)())
    assert "steps=7" in repr(foolbox("LinfPGD", "linf", steps=7)())
    assert "rejecting=True" in repr(art("SquareAttack", "linf")(rejecting=True))


def test_options_are_checked_at_once():
    for options in ({"norm": "l3"}, {"eps": -1.0}, {"batch_size": 0}):
        with pytest.raises(ConfigurationError, match="expected"):
            peer(lambda x: x, **options)
    with pytest.raises(ConfigurationError, match="expected a norm among linf, l2, l1"):
        from_autoattack(norm="l0", eps=1)
    library = pytest.importorskip("foolbox")
    with pytest.raises(ConfigurationError, match="own norm 'l2', got 'linf'"):
        from_foolbox(library.attacks.L2PGD(), norm="linf", eps=1)


@pytest.mark.parametrize(("name", "options"), [("LinfPGD", {}), ("NewtonFoolAttack", {"targeted": True})])
def test_what_foolbox_refuses_is_explained(trained_guard, images, labels, name, options):
    library = pytest.importorskip("foolbox")
    attack = from_foolbox(getattr(library.attacks, name)(), norm=None, eps=None)
    with pytest.raises(ConfigurationError, match=r"Foolbox cannot run (Linf|NewtonFool)"):
        attack(trained_guard, images, labels, targets=(labels + 1) % 10 if options else None)


@pytest.mark.parametrize(
    ("missing", "call"),
    [
        ("foolbox", lambda guard, x, y: from_foolbox(None, norm=None, eps=None)),
        ("art.estimators.classification", lambda guard, x, y: from_art(None, norm=None, eps=None)(guard, x, y)),
        ("pyautoattack", lambda guard, x, y: from_autoattack(norm="linf", eps=0.1)),
    ],
)
def test_a_missing_library_is_named_with_the_command(trained_guard, images, labels, monkeypatch, missing, call):
    monkeypatch.setitem(sys.modules, "autoattack", None)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        call(trained_guard, images, labels)


def test_the_original_autoattack_is_preferred_and_called_as_its_authors_say(trained_guard, images, labels, monkeypatch):
    class AutoAttack:
        def __init__(self, model, norm="Linf", eps=0.3, seed=None, verbose=True, attacks_to_run=(), version="standard",
                     is_tf_model=False, device="cuda", log_path=None):  # fmt: skip
            assert (norm, version, verbose, device) == ("L2", "rand", False, torch.device("cpu"))
            self.model, self.step = model, eps * (1 + seed % 7) / 1000

        def run_standard_evaluation(self, x_orig, y_orig, bs=250, return_labels=False, state_path=None):
            assert self.model(x_orig).argmax(1).eq(y_orig).all()
            return (x_orig - self.step).abs()

    package = types.ModuleType("autoattack")
    package.__spec__ = importlib.machinery.ModuleSpec("autoattack", None)
    package.AutoAttack = AutoAttack
    monkeypatch.setitem(sys.modules, "autoattack", package)
    attack = from_autoattack(norm="l2", eps=0.5, version="rand")
    assert not torch.equal(attack(trained_guard, images, labels, generator=seeded()), images)
