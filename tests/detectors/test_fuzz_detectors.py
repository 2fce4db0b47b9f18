"""Detectors and what takes them answer or refuse, whatever they are given; `fuzzing` says how."""

import copy
import functools
import math
import tempfile

import clusterguard as cg
import pytest
import torch
from clusterguard.attacks import draw_targets, get_norm
from clusterguard.attacks._norms import dense_l1_direction
from clusterguard.detectors import GaussianClusters, Normalize
from clusterguard.evaluation import star_coordinates
from clusterguard.training import negative_log_likelihood
from fuzzing import (
    CLASSES,
    DETECTORS,
    FLOATS,
    MODULES,
    NUMBERS,
    SHAPE,
    a_guard,
    counts,
    draw_detection,
    draw_detector,
    draw_images,
    draw_labels,
    draw_number,
    draw_thresholds,
    outcomes,
    random,
    spoil,
)
from hypothesis import strategies as st
from torch import nn


def detect(draw):
    images = draw_images(draw, draw(counts))
    guard = draw(st.sampled_from(MODULES))
    verdict = guard.detect(images, check=draw(st.booleans()))
    assert verdict.labels.shape == (len(images),)
    usable = images.isfinite().flatten(1).all(dim=1) & ~guard.thresholds.isnan().any()
    assert verdict.is_adversarial[~usable].all()


def network(draw):
    images = draw_images(draw, draw(counts))
    guard, *_, classifier = MODULES
    assert guard(images).shape == classifier(images).shape == (len(images), CLASSES)
    assert guard.represent(images).shape == (len(images), CLASSES)
    assert guard.distances(images).shape == (len(images), CLASSES)
    for detector in (guard, classifier):
        evidence = detector.evidence(images)
        assert cg.decide(evidence, torch.full((CLASSES,), torch.inf)).is_adversarial.tolist() == [
            not image.isfinite().all() for image in images
        ]


@functools.cache
def a_graph():
    with tempfile.TemporaryDirectory() as folder:
        return cg.load_onnx(cg.export_onnx(a_guard(), f"{folder}/guard.onnx", torch.rand(1, *SHAPE)))


def graph(draw):
    images, detector = draw_images(draw, draw(counts)), copy.copy(a_graph())
    if getattr(images, "is_meta", False):
        return  # a graph moves its images to where it runs
    detector.thresholds = draw_thresholds(draw) if draw(st.booleans()) else a_graph().thresholds
    verdict = detector.detect(images, check=draw(st.booleans()))
    assert verdict.is_adversarial[~images.isfinite().flatten(1).all(dim=1)].all()
    evidence = detector.evidence(images)
    assert torch.equal(cg.decide(evidence, detector.thresholds).is_adversarial, verdict.is_adversarial)


def normalise(draw):
    mean, std = ([draw_number(draw) for _ in range(draw(st.sampled_from([1, 1, 3, 0])))] for _ in range(2))
    images = draw_images(draw, 2)
    normalised = Normalize(mean, std)(images)
    assert normalised.shape == images.shape
    assert normalised.dtype == images.dtype


def mixture(draw):
    clusters = GaussianClusters(
        draw(st.sampled_from([3, 3, 2, 1, 0])), draw(st.sampled_from([None, 6, 4, 0])), center_scale=draw_number(draw)
    )
    representations = spoil(draw, random(draw, 2, clusters.representation_dim), *NUMBERS, *FLOATS)
    distances = clusters.distances(representations)
    shape = (len(representations), clusters.num_classes)
    assert distances.shape == clusters.squared_distances(representations).shape == shape
    assert clusters.posterior(representations).shape == clusters.log_likelihood(representations).shape == shape
    assert clusters.logits(representations).shape == shape
    assert clusters.adversarial_energy(representations).shape == shape[:1]
    separate = spoil(draw, torch.tensor([True, False]))
    assert negative_log_likelihood(clusters, representations, draw_labels(draw, 2), separate).shape == ()


def norm(draw):
    name = draw(st.sampled_from(["linf", "l2", "l1", "l0", "nonsense"]))
    wanted, count = get_norm(name), draw(counts)
    images, candidates = draw_images(draw, count), draw_images(draw, count)
    each = draw(st.sampled_from([*NUMBERS, lambda x: x[:1], lambda x: x[:, None]]))(random(draw, count))
    eps = draw(st.sampled_from([draw_number(draw), random(draw, count), each]))
    shown = {
        "projected": wanted.project(images, candidates, eps),
        "random": wanted.random_start(images, eps),
    }
    assert wanted.direction(candidates).shape == dense_l1_direction(candidates).shape == candidates.shape
    is_image = ((images >= 0) & (images <= 1) & candidates.isfinite()).flatten(1).all(dim=1)
    for what, points in shown.items():
        assert ((points >= 0) & (points <= 1))[is_image].all(), what
        radius = torch.as_tensor(eps).nan_to_num(nan=0, posinf=math.inf)
        assert (wanted.size(points - images) <= radius)[is_image].all(), what


def monitor(draw):
    watching = cg.FalsePositiveMonitor(
        draw(st.sampled_from([0.5, 0.01, draw_number(draw)])),
        run_length=draw(st.sampled_from([100, 100, draw_number(draw)])),
    )
    count = draw(counts)
    flags, labels = spoil(draw, random(draw, count) > 0.5), draw_labels(draw, count)
    given = [(flags, None), (flags, labels), (draw_detection(draw, count), labels)]
    seen = watching.update(*draw(st.sampled_from(given)))
    assert seen.refused <= seen.seen <= 2 * count
    state = watching.state_dict()
    assert cg.FalsePositiveMonitor.from_state_dict(state).report == seen
    state[draw(st.sampled_from(list(state)))] = draw(
        st.sampled_from([*state.values(), *state.values(), None, [], math.nan, math.inf, -1, "x"])
    )
    assert cg.FalsePositiveMonitor.from_state_dict(state).report.seen >= 0


def plausible(draw):
    totals = tuple(draw(st.sampled_from([20, 90, 200, 1, 0, -1])) for _ in range(draw(st.integers(0, 3))))
    record = cg.Calibration(
        (1.0,) * len(totals), totals, sum(totals), (0.0,) * len(totals), draw(st.sampled_from([0.05, 0.5])), "conformal"
    )
    confidence = draw_number(draw)
    rate = cg.deployment.plausible_rate(record, confidence=confidence, any_mix=draw(st.booleans()))
    assert record.false_positive_rate * (confidence >= 0.5) <= rate <= 1


def view(draw):
    points = star_coordinates(spoil(draw, random(draw, 3, CLASSES), *NUMBERS, *FLOATS))
    assert points.shape[1:] == (2,)


def shown(draw):
    images, detector = draw_images(draw, draw(counts)), draw_detector(draw)
    width = CLASSES
    if draw(st.booleans()):
        model = cg.attacks.as_classifier(detector, temperature=draw(st.sampled_from([1.0, draw_number(draw)])))
    else:
        model, width = cg.attacks.as_rejecting_classifier(detector), CLASSES + 1
    assert model(images).shape == (len(images), width)


def targets_at_random(draw):
    labels = draw_labels(draw, draw(counts))
    targets = draw_targets(labels, draw(st.integers(-1, CLASSES)))
    assert targets.is_meta or (targets != labels).all()


def references(draw):
    count = draw(counts)
    images, labels = draw_images(draw, count), draw_labels(draw, count)
    starts = cg.attacks.Towards.accepted(draw_detector(draw), images, labels, batch_size=draw(st.integers(-1, 3)))
    assert len(starts.images) == len(starts.labels) <= count


def evaluate(draw):
    count, detector = draw(st.integers(0, 2)), draw_detector(draw)
    tried = draw(
        st.sampled_from([cg.FGSM(eps=0.1), {"a": cg.attacks.NES(eps=0.1, step_size=0.1, steps=1, samples=2)}, {}])
    )
    batches = [(draw_images(draw, count), draw_labels(draw, count)) for _ in range(draw(st.sampled_from([1, 1, 2, 0])))]
    report = cg.evaluate(detector, tried, batches, sanity_images=draw(st.sampled_from([0, 0, 2, -1])))
    assert report.worst_case.total <= report.images == sum(len(labels) for _, labels in batches)
    assert str(report)


def evaluate_liar(draw):
    """Attacks of users may return anything."""
    images, labels = random(draw, 2, *SHAPE), torch.tensor([0, 1])
    attacked = draw_images(draw, 2)
    report = cg.evaluate(
        DETECTORS["pixels"], lambda *_, **__: attacked, [(images, labels)], sanity_images=0, generator=None
    )
    assert not report.worst_case.count or (attacked.isfinite().all() or report.worst_case.count < 2)


def network_wrapped(draw):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(16, 8))
    backbone = draw(st.sampled_from([flat, flat, flat, nn.Flatten(), nn.Linear(16, 8), nn.Identity(), nn.Module()]))
    options = {
        "representation_dim": draw(st.sampled_from([None, None, 0, 6])),
        "center_scale": draw_number(draw),
        "example": draw(st.sampled_from([None, draw_images(draw, 1)])),
    }
    guard = cg.ClusterGuard(backbone, draw(st.sampled_from([2, 3, 3, 1, 0, -1])), **options)
    assert guard.num_classes >= 2


CALLS = [
    detect,
    network,
    graph,
    normalise,
    mixture,
    norm,
    monitor,
    plausible,
    view,
    shown,
    targets_at_random,
    references,
    evaluate,
    evaluate_liar,
    network_wrapped,
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_functions_answer_or_refuse(call):
    assert {"answered", "refused"} <= outcomes(call, examples=60).keys()
