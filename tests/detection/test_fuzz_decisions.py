"""Decisions, metrics and calibrations answer or refuse, whatever they are given; `fuzzing` says how."""

import copy
import math

import clusterguard as cg
import pytest
import torch
from clusterguard.attacks import _objectives as objectives
from clusterguard.detection import _metrics as metrics
from clusterguard.detection import class_margins, fit_shared_threshold, fit_thresholds, judge, minimum_examples
from fuzzing import (
    CLASSES,
    FLOATS,
    NUMBERS,
    Pixels,
    counts,
    draw_detection,
    draw_detector,
    draw_evidence,
    draw_images,
    draw_labels,
    draw_number,
    draw_targets,
    draw_thresholds,
    outcomes,
    random,
    spoil,
)
from hypothesis import strategies as st
from torch import nn

# What is tried: each draws, calls, and checks the answer.


def decide(draw):
    count = draw(counts)
    evidence, thresholds = draw_evidence(draw, count), draw_thresholds(draw)
    verdict = cg.decide(evidence, thresholds)
    if any(part.is_meta for part in verdict):
        return
    assert [part.shape for part in verdict] == [(count,)] * 3
    for row, (label, distance, refused) in enumerate(zip(*verdict, strict=True)):
        finite = torch.cat([evidence.class_scores[row], evidence.suspicion[row]]).isfinite().all()
        assert bool(refused) == (not finite or not bool(distance <= thresholds[label]))


def margins(draw):
    evidence, thresholds = draw_evidence(draw, draw(counts)), draw_thresholds(draw)
    margins = class_margins(evidence, thresholds)
    if margins.is_meta:
        return
    verdict = cg.decide(evidence, thresholds)
    accepted = nn.functional.one_hot(verdict.labels, CLASSES).bool() & ~verdict.is_adversarial[:, None]
    assert torch.equal(margins <= 0, accepted)


def success_margin(draw):
    count = draw(counts)
    evidence, thresholds, labels = draw_evidence(draw, count), draw_thresholds(draw), draw_labels(draw, count)
    targets = draw_targets(draw, labels)
    margins = cg.success_margin(evidence, thresholds, labels, targets)
    if margins.is_meta:
        return
    verdict = cg.decide(evidence, thresholds)
    right = verdict.labels != labels if targets is None else verdict.labels == targets
    assert torch.equal(margins <= 0, right & ~verdict.is_adversarial)


def objective(draw):
    count = draw(counts)
    evidence, thresholds, labels = draw_evidence(draw, count), draw_thresholds(draw), draw_labels(draw, count)
    wanted = objectives.get_objective(draw(st.sampled_from([*objectives.OBJECTIVES, "nonsense"])))
    assert wanted(evidence, thresholds, labels, draw_targets(draw, labels)).shape == (count,)


def metric(draw):
    count = draw(counts)
    labels = draw_labels(draw, count)
    clean, attacked = (metrics.Verdicts(draw_detection(draw, count), labels) for _ in range(2))
    for rate in (metrics.accuracy, metrics.accuracy_after_rejection, metrics.false_positive_rate):
        assert rate(clean).total <= count
    asr = metrics.attack_success_rate(clean, attacked)
    assert asr.count <= asr.total <= count
    assert metrics.is_eligible(clean).shape == metrics.is_broken(attacked).shape == (count,)
    area = metrics.expected_roc_auc(clean, attacked, CLASSES)
    assert math.isnan(area) or 0 <= area <= 1


def roc_auc(draw):
    benign, adversarial = (spoil(draw, random(draw, draw(counts)), *NUMBERS, *FLOATS) for _ in range(2))
    area = metrics.roc_auc(benign, adversarial)
    pairs = [(a, b) for a in benign.double().tolist() for b in adversarial.double().tolist()]
    assert math.isnan(area) == (not pairs)
    if pairs:
        refused = [(a if math.isfinite(a) else math.inf, b if math.isfinite(b) else math.inf) for a, b in pairs]
        expected = sum((b > a) + 0.5 * (b == a) for a, b in refused) / len(pairs)
        assert area == pytest.approx(expected)


def wilson(draw):
    low, high = metrics.wilson_interval(draw(st.integers(-1, 5)), draw(st.integers(3, 9)), confidence=draw_number(draw))
    assert 0 <= low <= high <= 1


def thresholds(draw):
    count, rate = draw(st.sampled_from([0, 1, 40])), draw(st.sampled_from([0.1, 0.5, draw_number(draw)]))
    options = {"method": draw(st.sampled_from(["conformal", "quantile", "nonsense"]))}
    suspicion = spoil(draw, random(draw, count), *NUMBERS, *FLOATS)
    threshold = fit_shared_threshold(suspicion, rate, **options)
    assert math.isfinite(threshold)
    assert count >= minimum_examples(rate)
    benign = suspicion.double()
    assert float((~(benign <= threshold) | ~benign.isfinite()).double().mean()) <= rate + 1 / count


def thresholds_by_class(draw):
    count = draw(st.sampled_from([0, 3, 60]))
    labels = draw_labels(draw, count)
    predicted = draw(st.sampled_from([labels, draw_labels(draw, count)]))
    suspicion = spoil(draw, random(draw, count), *NUMBERS, *FLOATS)
    fitted = fit_thresholds(
        suspicion,
        predicted,
        labels,
        draw(st.sampled_from([CLASSES, CLASSES, CLASSES, 2, 0])),
        false_positive_rate=draw(st.sampled_from([0.2, 0.5])),
        scarce=draw(st.sampled_from(["error", "pool", "nonsense"])),
    )
    assert all(map(math.isfinite, fitted.thresholds))
    assert sum(fitted.counts) == int((predicted == labels).sum())


def minimum(draw):
    rate = draw_number(draw)
    assert minimum_examples(rate) >= 1 / rate - 1


def calibrate(draw):
    detector, count = draw_detector(draw), draw(st.sampled_from([0, 2, 30]))
    detector = Pixels() if isinstance(detector, Pixels) else copy.deepcopy(detector)
    batches = [(draw_images(draw, count), draw_labels(draw, count)) for _ in range(draw(st.integers(0, 2)))]
    calibrator = cg.Calibrator(draw(st.sampled_from([0.5, draw_number(draw)])), scarce="pool")
    calibrator.check_counts(batches, CLASSES)
    calibration = calibrator.fit(detector, batches)
    assert all(map(math.isfinite, detector.thresholds.tolist()))
    assert calibration.images == sum(len(labels) for _, labels in batches)


def judged(draw):
    count = draw(counts)
    verdict, labels = judge(draw_detector(draw), [(draw_images(draw, count), draw_labels(draw, count))])
    assert verdict.labels.shape == verdict.is_adversarial.shape == labels.shape == (count,)


CALLS = [
    decide,
    margins,
    success_margin,
    objective,
    metric,
    roc_auc,
    wilson,
    thresholds,
    thresholds_by_class,
    minimum,
    calibrate,
    judged,
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_functions_answer_or_refuse(call):
    assert {"answered", "refused"} <= outcomes(call, examples=60).keys()
