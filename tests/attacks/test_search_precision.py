"""Attacks in bfloat16 find what attacks in float32 find, and nothing counts that the detector does not accept."""

import pytest
import torch
from clusterguard import APGD, PGD, ClusterGuard, Evidence, WorstCaseSuite, decide, success_margin
from clusterguard.attacks import FastMinimumNorm, Metered, OrthogonalPGD, _search_precision, get_norm, in_precision
from clusterguard.attacks._internal import choose_precision
from clusterguard.attacks._search_precision import InBfloat16
from clusterguard.detection import Verdicts, is_broken
from clusterguard.detectors import WithThresholds
from clusterguard.errors import ConfigurationError
from torch import nn

EPS = {"linf": 0.1, "l2": 1.0, "l1": 6.0, "l0": 12}


def broken(guard, attacked, labels):
    return is_broken(Verdicts(decide(guard.evidence(attacked), guard.thresholds), labels))


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("attack", [PGD, APGD, FastMinimumNorm, OrthogonalPGD], ids=lambda attack: attack.__name__)
def test_as_many_images_are_broken_within_the_same_ball(trained_guard, images, labels, attack, norm):
    options = {"norm": norm, "eps": EPS[norm], "steps": 20, "stop_early": True}
    if attack in (PGD, OrthogonalPGD):
        options["step_size"] = get_norm(norm).step_size(EPS[norm], images.shape[1:], share=0.2)
    counts = []
    for precision in ("float32", "bf16"):
        attacked = attack(precision=precision, **options)(trained_guard, images, labels)
        assert (get_norm(norm).size(attacked - images) <= EPS[norm] * (1 + 1e-5)).all()
        counts.append(int(broken(trained_guard, attacked, labels).sum()))
    assert counts[1] >= counts[0] - 1


@pytest.mark.slow
def test_a_suite_in_bfloat16_breaks_at_least_as_many(trained_guard, images, labels):
    suites = (WorstCaseSuite("linf", eps=0.1, budget="quick", precision=name) for name in ("float32", "bf16"))
    counts = [int(broken(trained_guard, suite(trained_guard, images, labels), labels).sum()) for suite in suites]
    assert counts[1] >= counts[0]


def is_rough(images):
    """Whether the search asks; the two images of its first trial get honest answers, or it would stop there."""
    return torch.is_autocast_enabled(images.device.type) and len(images) > 2


class Liar(nn.Module):
    """Accepts everything under a wrong label, but only in bfloat16."""

    def __init__(self, guard: ClusterGuard) -> None:
        super().__init__()
        self.guard, self.thresholds = guard, guard.thresholds

    def evidence(self, images):
        scores, suspicion = self.guard.evidence(images)
        if is_rough(images):
            return Evidence(-scores, 0 * suspicion)
        return Evidence(scores, suspicion)


@pytest.mark.parametrize("objective", ["margin", "suspicion"])
def test_a_success_in_bfloat16_alone_is_none(trained_guard, images, labels, objective):
    best = []
    attack = PGD(
        eps=1e-6,
        step_size=1e-6,
        steps=6,
        precision="bf16",
        objective=objective,
        stop_early=True,
        on_step=lambda step, margins: best.append(margins),
    )
    metered = Metered(Liar(trained_guard))
    attack(metered, images, labels)
    assert len(best) == 7  # nothing left early
    assert all((margins > 0).all() for margins in best)
    assert metered.cost.forward == 13 * len(images)  # each step asks twice


class Boaster(Liar):
    """Sees a success in each image, but only in bfloat16, and a larger one the more the image has changed."""

    def __init__(self, guard: ClusterGuard, images) -> None:
        super().__init__(guard)
        self.images = images

    def evidence(self, images):
        scores, suspicion = self.guard.evidence(images)
        if not is_rough(images):
            return Evidence(scores, suspicion)
        change = (images - self.images).abs().flatten(1).mean(dim=1, keepdim=True)
        return Evidence(-scores, suspicion * 0 - change)


def test_a_success_is_kept_whatever_bfloat16_makes_of_later_iterates(trained_guard, images, labels):
    options = {"eps": 0.3, "step_size": 0.02, "steps": 12, "precision": "bf16"}
    exact = PGD(**options)(trained_guard, images, labels)
    wrong = exact[broken(trained_guard, exact, labels)]
    assert len(wrong) > 1
    right = labels[broken(trained_guard, exact, labels)]
    boaster = Boaster(trained_guard, wrong)
    again = PGD(**options)(boaster, wrong, right)
    assert broken(trained_guard, again, right).all()
    assert (
        success_margin(trained_guard.evidence(again), trained_guard.thresholds, right)
        .le(success_margin(trained_guard.evidence(wrong), trained_guard.thresholds, right))
        .all()
    )


@pytest.mark.parametrize("attack", [PGD, APGD], ids=lambda attack: attack.__name__)
def test_images_with_a_success_are_judged_once_more_and_not_at_every_step(trained_guard, images, labels, attack):
    """All images are successes from the start, for none is of the class that is asked for."""
    options = {"eps": 0.1, "steps": 10, "precision": "bf16", "objective": "margin"}
    if attack is PGD:
        options["step_size"] = 0.02
    wrong = (trained_guard.detect(images).labels + 1) % 10
    permissive = Metered(WithThresholds(trained_guard, torch.full((10,), 1e6)))
    last = []
    attacked = attack(**options, on_step=lambda step, margins: last.append(margins))(permissive, images, wrong)
    assert permissive.cost.forward == (10 + 3) * len(images)
    margins = success_margin(trained_guard.evidence(attacked), permissive.thresholds, wrong)
    torch.testing.assert_close(margins, last[-1])
    assert (margins < last[0]).all()


class Large(nn.Module):
    """Adds a large number to what a layer makes, within the network or in the scores, so that bfloat16 rounds a lot."""

    def __init__(self, *, within: float, beyond: float) -> None:
        super().__init__()
        self.layer, self.within, self.beyond = nn.Linear(16, 2), within, beyond
        self.register_buffer("thresholds", torch.full((2,), 0.6))

    def evidence(self, images):
        scores = self.layer(images.flatten(1)) + self.within - self.within + self.beyond
        return Evidence(scores, -scores.log_softmax(dim=1))


@pytest.mark.parametrize(("within", "beyond"), [(0, -500), (20, 0), (150, 0)])
def test_no_success_is_lost_to_the_rounding_of_large_numbers(within, beyond):
    torch.manual_seed(1)
    detector, images = Large(within=within, beyond=beyond), torch.rand(256, 1, 4, 4)
    verdict = decide(detector.evidence(images), detector.thresholds)
    images, wrong = images[~verdict.is_adversarial], 1 - verdict.labels[~verdict.is_adversarial]
    assert len(images) > 100  # and each is a success, some by little
    last = []
    PGD(eps=1e-6, step_size=1e-6, steps=2, precision="bf16", on_step=lambda step, margins: last.append(margins))(
        detector, images, wrong
    )
    assert (last[0] <= 0).all()


def test_evidence_in_bfloat16_is_near_and_in_float32(trained_guard, images):
    exact, rough = trained_guard.evidence(images), InBfloat16(trained_guard).evidence(images)
    for one, other in zip(exact, rough, strict=True):
        assert other.dtype == torch.float32
        assert 0 < (one - other).abs().max() < 0.02 * one.abs().max()


@pytest.mark.parametrize(
    ("seconds", "cosine", "lowered", "expected"),
    [
        ((1.0, 0.5), 1.0, (3.0, 3.0), "bf16"),
        ((1.0, 0.95), 1.0, (3.0, 3.0), "float32"),
        ((1.0, 0.1), 0.5, (3.0, 3.0), "float32"),
        ((1.0, 0.1), 1.0, (3.0, 2.0), "float32"),
        ((0.001, 0.0001), 1.0, (3.0, 3.0), "float32"),
        ((1.0, 0.1), float("nan"), (3.0, 3.0), "float32"),
    ],
    ids=["faster", "not faster", "other gradients", "a weaker attack", "nothing to save", "no gradients"],
)
def test_what_is_faster_and_agrees_is_chosen(
    trained_guard, images, labels, monkeypatch, seconds, cosine, lowered, expected
):
    monkeypatch.setattr(_search_precision, "has_bfloat16", lambda device: True)

    def try_out(search, judge, images, labels):
        assert judge is trained_guard
        is_rough = isinstance(search, InBfloat16)
        angle = torch.tensor(cosine).acos() * is_rough
        gradient = torch.stack([angle.cos(), angle.sin()]).view(1, 1, 1, 2).expand(len(images), -1, -1, -1)
        return _search_precision._Trial(gradient, lowered[is_rough], seconds[is_rough])

    monkeypatch.setattr(_search_precision, "_try_out", try_out)
    assert choose_precision(trained_guard, images, labels) == expected


def test_on_a_device_without_bfloat16_nothing_is_timed(trained_guard, images, labels, monkeypatch):
    monkeypatch.setattr(_search_precision, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(_search_precision, "_try_out", None)
    assert choose_precision(trained_guard, images, labels) == "float32"
    attack = PGD(eps=0.1, step_size=0.02, steps=5)
    exact = attack(trained_guard, images, labels)
    auto = PGD(eps=0.1, step_size=0.02, steps=5, precision="auto")(trained_guard, images, labels)
    assert torch.equal(exact, auto)


def test_other_precisions_are_refused():
    with pytest.raises(ConfigurationError, match="'float32', 'bf16' or 'auto', got 'fp16'"):
        PGD(eps=0.1, step_size=0.1, precision="fp16")
    with pytest.raises(ConfigurationError, match="precision"):
        WorstCaseSuite("linf", eps=0.1, precision="half")


@pytest.mark.parametrize("error", [TypeError, ValueError, AssertionError, KeyError, RuntimeError])
def test_the_search_is_in_float32_whatever_a_network_raises_in_bfloat16(
    trained_guard, images, labels, monkeypatch, error
):
    monkeypatch.setattr(_search_precision, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(_search_precision, "_TOO_SHORT", 0)

    class Picky(nn.Module):
        def __init__(self, guard):
            super().__init__()
            self.guard, self.thresholds = guard, guard.thresholds

        def evidence(self, images):
            if torch.is_autocast_enabled("cpu"):
                raise error("only float32")
            return self.guard.evidence(images)

    picky, attack = Picky(trained_guard), PGD(eps=0.1, step_size=0.02, steps=3)
    assert choose_precision(picky, images, labels) == "float32"
    assert torch.equal(in_precision(attack, "bf16")(picky, images, labels), attack(trained_guard, images, labels))


def test_a_detector_that_cannot_be_copied_for_any_reason_is_shared(trained_guard, images):
    class Single(nn.Module):
        def __init__(self, guard):
            super().__init__()
            self.guard, self.thresholds = guard, guard.thresholds

        def evidence(self, images):
            return self.guard.evidence(images)

        def __deepcopy__(self, memo):
            raise KeyError("there is one of me")

    single = Single(trained_guard)
    assert InBfloat16(single).detector is single
    assert InBfloat16(single).evidence(images).suspicion.shape == trained_guard.evidence(images).suspicion.shape
