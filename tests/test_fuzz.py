"""Whatever is handed in, a public function answers rightly or refuses with an error of ours.

A call draws its arguments, right ones and wrong ones, and checks what comes back by an invariant. Tensors on the meta
device stand for those on a wrong device: they can be moved nowhere without an error.
"""

import contextlib
import copy
import functools
import math
import tempfile
import warnings
from collections import Counter

import clusterguard as cg
import pytest
import torch
from clusterguard import metrics
from clusterguard.attacks import objectives
from clusterguard.attacks.metering import Metered
from clusterguard.attacks.norms import dense_l1_direction, get_norm
from clusterguard.attacks.paper import random_targets
from clusterguard.calibration import fit_threshold, fit_thresholds, minimum_examples
from clusterguard.checks import check_tensor
from clusterguard.clusters import GaussianClusters, cluster_loss
from clusterguard.decision import class_margins
from clusterguard.detector import Normalize, judge
from clusterguard.errors import ClusterGuardError, InputError
from clusterguard.plots import star_coordinates
from clusterguard.sanity import examine
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

CLASSES, SHAPE = 3, (1, 4, 4)


class Pixels:
    """K brightest pixels, in whatever dtype they come; an image whose first pixel is above 0.9 cannot be judged."""

    def __init__(self):
        self.thresholds = torch.full((CLASSES,), 0.6)

    def evidence(self, images):
        check_tensor(images, "images", "B", *SHAPE)
        scores = images.flatten(1)[:, :CLASSES]
        scores = scores.masked_fill(scores[:, :1] > 0.9, torch.nan)
        return cg.Evidence(scores, 1 - scores)


class VerdictsOnly:
    def detect(self, images):
        return cg.decide(Pixels().evidence(images), Pixels().thresholds)


def a_guard(threshold=12.0):
    torch.manual_seed(0)
    guard = cg.ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU()), CLASSES)
    guard.thresholds = torch.full((CLASSES,), threshold)
    return guard.eval()


def a_guard_with(thresholds):
    guard = a_guard()
    guard.thresholds = thresholds
    return guard


def a_classifier():
    torch.manual_seed(0)
    return cg.ConfidenceDetector(nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES)), CLASSES)


DETECTORS = {
    "guard": a_guard(),
    "confidence": cg.WithThresholds(a_classifier(), torch.ones(CLASSES)),
    "pixels": Pixels(),
    "metered": Metered(Pixels()),
    "uncalibrated": a_classifier(),
    "too many thresholds": a_guard_with(torch.full((CLASSES + 1,), 12.0)),
    "elsewhere": a_guard_with(torch.full((CLASSES,), 12.0, device="meta")),
    "verdicts only": VerdictsOnly(),
    "no detector": nn.Flatten(),
}


def spoil(draw, tensor, *faults):
    """The tensor as it is, or made wrong in one of many ways."""
    general = [
        lambda x: x[None],
        lambda x: x.sum(dim=0),
        lambda x: x[..., :0],
        lambda x: torch.cat([x, x]),
        lambda x: x.to("meta"),
        lambda x: x.numpy(),
        lambda x: x.tolist(),
        lambda x: None,
        lambda x: x.bool(),
        lambda x: x.to(torch.complex64),
        lambda x: x.to(torch.float8_e4m3fn),
        lambda x: x.to_sparse(),
    ]
    return tensor if draw(st.integers(0, 7)) else draw(st.sampled_from([*general, *faults]))(tensor)


def with_one(value):
    """A fault: one entry gets this value."""

    def fault(tensor):
        spoilt = tensor.clone()
        if spoilt.numel():
            spoilt.view(-1)[spoilt.numel() // 2] = value
        return spoilt

    return fault


NUMBERS = [with_one(value) for value in (math.nan, math.inf, -math.inf, 1e30, -1e30, -1.0, 0.0, 1.0)]
FLOATS = [lambda x, dtype=dtype: x.to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)]


def random(draw, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))


def draw_images(draw, count):
    faults = [
        *NUMBERS,
        *FLOATS,
        *(lambda x, dtype=dtype: x.to(dtype) for dtype in (torch.uint8, torch.int64)),
        lambda x: x.round(),
        lambda x: x * 255,
        lambda x: x.expand(-1, 3, -1, -1),
        lambda x: x[:, :, :3],
        lambda x: x[:, :0],
        lambda x: x.mT,
        lambda x: x.requires_grad_(),
        lambda x: x - 5e-5,  # what the checks tolerate
    ]
    return spoil(draw, random(draw, count, *SHAPE), *faults)


def draw_labels(draw, count, *, wrong=()):
    labels = (random(draw, count) * CLASSES).long().clamp_max(CLASSES - 1)
    faults = [
        *(lambda x, value=value: x.fill_(value) for value in (-1, CLASSES, 2**40)),
        *(lambda x, dtype=dtype: x.to(dtype) for dtype in (torch.int32, torch.uint8, torch.float32)),
        *wrong,
    ]
    return spoil(draw, labels, *faults)


def draw_targets(draw, labels):
    if draw(st.booleans()) or getattr(labels, "dtype", None) != torch.int64 or labels.ndim != 1 or labels.is_sparse:
        return None
    right, wrong = (labels + 1) % CLASSES, [labels, labels + 1, labels[:1], labels.double(), labels.to("meta"), 1]
    return draw(st.sampled_from([right] * len(wrong) + wrong))


def draw_evidence(draw, count):
    scores, suspicion = (spoil(draw, random(draw, count, CLASSES), *NUMBERS, *FLOATS) for _ in range(2))
    if draw(st.integers(0, 4)) == 0:  # hardly any classes
        classes = draw(st.integers(0, 1))
        scores, suspicion = torch.zeros(count, classes), torch.zeros(count, classes)
    return cg.Evidence(scores, suspicion)


def draw_thresholds(draw):
    return spoil(draw, random(draw, CLASSES), *NUMBERS, *FLOATS)


def draw_detection(draw, count):
    distances = spoil(draw, random(draw, count), *NUMBERS, *FLOATS)
    refused = spoil(draw, random(draw, count) > 0.5, lambda x: x.float())
    return cg.Detection(draw_labels(draw, count), distances, refused)


def draw_number(draw):
    odd = [math.nan, math.inf, -math.inf, -1, 0, 1e-30, 1e30, 1, True, 2, 3]
    return draw(st.sampled_from([0.5, 0.05, 0.9] * 3 + odd))


def draw_detector(draw):
    return DETECTORS[draw(st.sampled_from(["guard", "confidence", "pixels"] * 3 + [*DETECTORS]))]


counts = st.integers(0, 3)
MODULES = [a_guard(), a_guard(math.inf), a_guard(math.nan), a_classifier()]


# What is tried: each draws, calls, and checks the answer.


def decide(draw):
    count = draw(counts)
    evidence, thresholds = draw_evidence(draw, count), draw_thresholds(draw)
    verdict = cg.decide(evidence, thresholds)
    if any(own.is_meta for own in verdict):
        return
    assert [own.shape for own in verdict] == [(count,)] * 3
    for row, (label, distance, refused) in enumerate(zip(*verdict, strict=True)):
        finite = torch.cat([evidence.class_scores[row], evidence.suspicion[row]]).isfinite().all()
        assert bool(refused) == (not finite or not bool(distance <= thresholds[label]))


def margins(draw):
    evidence, thresholds = draw_evidence(draw, draw(counts)), draw_thresholds(draw)
    found = class_margins(evidence, thresholds)
    if found.is_meta:
        return
    verdict = cg.decide(evidence, thresholds)
    accepted = nn.functional.one_hot(verdict.labels, CLASSES).bool() & ~verdict.is_adversarial[:, None]
    assert torch.equal(found <= 0, accepted)


def success_margin(draw):
    count = draw(counts)
    evidence, thresholds, labels = draw_evidence(draw, count), draw_thresholds(draw), draw_labels(draw, count)
    targets = draw_targets(draw, labels)
    found = cg.success_margin(evidence, thresholds, labels, targets)
    if found.is_meta:
        return
    verdict = cg.decide(evidence, thresholds)
    right = verdict.labels != labels if targets is None else verdict.labels == targets
    assert torch.equal(found <= 0, right & ~verdict.is_adversarial)


def objective(draw):
    count = draw(counts)
    evidence, thresholds, labels = draw_evidence(draw, count), draw_thresholds(draw), draw_labels(draw, count)
    wanted = objectives.get_objective(draw(st.sampled_from([*objectives.OBJECTIVES, "nonsense"])))
    assert wanted(evidence, thresholds, labels, draw_targets(draw, labels)).shape == (count,)


def metric(draw):
    count = draw(counts)
    clean, attacked, labels = draw_detection(draw, count), draw_detection(draw, count), draw_labels(draw, count)
    for rate in (metrics.accuracy, metrics.accuracy_after_rejection, metrics.false_positive_rate):
        assert rate(clean, labels).total <= count
    asr = metrics.attack_success_rate(clean, attacked, labels)
    assert asr.count <= asr.total <= count
    assert metrics.is_eligible(clean, labels).shape == metrics.is_broken(attacked, labels).shape == (count,)
    area = metrics.expected_roc_auc(clean, labels, attacked, labels, CLASSES)
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
    found = fit_threshold(suspicion, rate, **options)
    assert math.isfinite(found)
    assert count >= minimum_examples(rate)
    benign = suspicion.double()
    assert float((~(benign <= found) | ~benign.isfinite()).double().mean()) <= rate + 1 / count


def thresholds_by_class(draw):
    count = draw(st.sampled_from([0, 3, 60]))
    labels = draw_labels(draw, count)
    predicted = draw(st.sampled_from([labels, draw_labels(draw, count)]))
    suspicion = spoil(draw, random(draw, count), *NUMBERS, *FLOATS)
    found = fit_thresholds(
        suspicion,
        predicted,
        labels,
        draw(st.sampled_from([CLASSES, CLASSES, CLASSES, 2, 0])),
        false_positive_rate=draw(st.sampled_from([0.2, 0.5])),
        scarce=draw(st.sampled_from(["error", "pool", "nonsense"])),
    )
    assert all(map(math.isfinite, found.thresholds))
    assert sum(found.counts) == int((predicted == labels).sum())


def minimum(draw):
    rate = draw_number(draw)
    assert minimum_examples(rate) >= 1 / rate - 1


def calibrate(draw):
    detector, count = draw_detector(draw), draw(st.sampled_from([0, 2, 30]))
    detector = Pixels() if isinstance(detector, Pixels) else copy.deepcopy(detector)
    batches = [(draw_images(draw, count), draw_labels(draw, count)) for _ in range(draw(st.integers(0, 2)))]
    calibrator = cg.Calibrator(draw(st.sampled_from([0.5, draw_number(draw)])), scarce="pool")
    calibrator.check_counts(batches, CLASSES)
    found = calibrator.fit(detector, batches)
    assert all(map(math.isfinite, detector.thresholds.tolist()))
    assert found.images == sum(len(labels) for _, labels in batches)


def judged(draw):
    count = draw(counts)
    verdict, labels = judge(draw_detector(draw), [(draw_images(draw, count), draw_labels(draw, count))])
    assert verdict.labels.shape == verdict.is_adversarial.shape == labels.shape == (count,)


def detect(draw):
    images = draw_images(draw, draw(counts))
    guard = draw(st.sampled_from(MODULES))
    verdict = guard.detect(images, check=draw(st.booleans()))
    assert verdict.labels.shape == (len(images),)
    usable = images.isfinite().flatten(1).all(dim=1) & guard.is_calibrated
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
    found = clusters.distances(representations)
    shape = (len(representations), clusters.num_classes)
    assert found.shape == clusters.squared_distances(representations).shape == shape
    assert clusters.posterior(representations).shape == clusters.log_likelihood(representations).shape == shape
    assert clusters.logits(representations).shape == shape
    assert clusters.adversarial_squared_distance(representations).shape == shape[:1]
    separate = spoil(draw, torch.tensor([True, False]))
    assert cluster_loss(clusters, representations, draw_labels(draw, 2), separate).shape == ()


def norm(draw):
    name = draw(st.sampled_from(["linf", "l2", "l1", "l0", "nonsense"]))
    wanted, count = get_norm(name), draw(counts)
    images, candidates = draw_images(draw, count), draw_images(draw, count)
    each = draw(st.sampled_from([*NUMBERS, lambda x: x[:1], lambda x: x[:, None]]))(random(draw, count))
    eps = draw(st.sampled_from([draw_number(draw), random(draw, count), each]))
    found = {
        "projected": wanted.project(images, candidates, eps),
        "random": wanted.random_start(images, eps),
    }
    assert wanted.direction(candidates).shape == dense_l1_direction(candidates).shape == candidates.shape
    is_image = ((images >= 0) & (images <= 1) & candidates.isfinite()).flatten(1).all(dim=1)
    for what, points in found.items():
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
    rate = cg.plausible_rate(record, confidence=confidence, any_mix=draw(st.booleans()))
    assert record.false_positive_rate * (confidence >= 0.5) <= rate <= 1


def view(draw):
    points = star_coordinates(spoil(draw, random(draw, 3, CLASSES), *NUMBERS, *FLOATS))
    assert points.shape[1:] == (2,)


def shown(draw):
    images, detector = draw_images(draw, draw(counts)), draw_detector(draw)
    width = CLASSES
    if draw(st.booleans()):
        model = cg.interop.as_classifier(detector, temperature=draw(st.sampled_from([1.0, draw_number(draw)])))
    else:
        model, width = cg.interop.as_rejecting_classifier(detector), CLASSES + 1
    assert model(images).shape == (len(images), width)


def targets_at_random(draw):
    labels = draw_labels(draw, draw(counts))
    found = random_targets(labels, draw(st.integers(-1, CLASSES)))
    assert found.is_meta or (found != labels).all()


def references(draw):
    count = draw(counts)
    images, labels = draw_images(draw, count), draw_labels(draw, count)
    found = cg.Towards.accepted(draw_detector(draw), images, labels, batch_size=draw(st.integers(-1, 3)))
    assert len(found.images) == len(found.labels) <= count


def evaluate(draw):
    count, detector = draw(st.integers(0, 2)), draw_detector(draw)
    tried = draw(st.sampled_from([cg.FGSM(eps=0.1), {"a": cg.NES(eps=0.1, step_size=0.1, steps=1, samples=2)}, {}]))
    batches = [(draw_images(draw, count), draw_labels(draw, count)) for _ in range(draw(st.sampled_from([1, 1, 2, 0])))]
    found = cg.evaluate(detector, tried, batches, sanity_images=draw(st.sampled_from([0, 0, 2, -1])))
    assert found.worst_case.total <= found.images == sum(len(labels) for _, labels in batches)
    assert str(found)


def evaluate_liar(draw):
    """Attacks of users may return anything."""
    images, labels = random(draw, 2, *SHAPE), torch.tensor([0, 1])
    attacked = draw_images(draw, 2)
    found = cg.evaluate(
        DETECTORS["pixels"], lambda *_, **__: attacked, [(images, labels)], sanity_images=0, generator=None
    )
    assert not found.worst_case.count or (attacked.isfinite().all() or found.worst_case.count < 2)


def probe(draw):
    count = draw(st.integers(0, 2))
    examine(draw_detector(draw), draw_images(draw, count), draw_labels(draw, count), [])


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
    probe,
    network_wrapped,
]


FEW = {"steps": 2}
STEP = FEW | {"step_size": 0.05}
IN_NORMS = {
    "PGD": lambda **o: cg.PGD(**STEP, **o),
    "PGD random": lambda **o: cg.PGD(start="random", stop_early=True, batch_size=2, **STEP, **o),
    "PGD diversified": lambda **o: cg.PGD(start="output_diversified", objective="adaptive", **STEP, **o),
    "MIM": lambda **o: cg.MIM(**STEP, **o),
    "NES": lambda **o: cg.NES(samples=2, **STEP, **o),
    "APGD": lambda **o: cg.APGD(**FEW, **o),
    "FGSM": lambda **o: cg.FGSM(**o),
    "BIM": lambda **o: cg.BIM(**FEW, **o),
    "fast minimum norm": lambda **o: cg.FastMinimumNorm(**FEW, **o),
    "orthogonal": lambda **o: cg.OrthogonalPGD(**STEP, **o),
    "repel": lambda **o: cg.RepelThenMinimise(**STEP, **o),
    "match": lambda **o: cg.RepresentationMatching(references=SOME, **STEP, **o),
    "multi-target": lambda **o: cg.MultiTarget(attack=cg.PGD(**STEP, **o)),
    "random target": lambda **o: cg.RandomTarget(attack=cg.PGD(**STEP, **o)),
    "transfer": lambda **o: cg.Transfer(surrogate=DETECTORS["guard"], attack=cg.PGD(**STEP, **o)),
    "Square": lambda **o: cg.Square(queries=5, **o),
    "Boundary": lambda **o: cg.Boundary(queries=8, **o),
    "Carlini-Wagner": lambda norm, eps: cg.CarliniWagner(eps=eps, searches=2, steps=2),
    "Sparse-RS": lambda norm, eps: cg.SparseRS(eps=eps, queries=5),
}
SOME = cg.Towards(torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.arange(6) % CLASSES)


def attacked(draw, attack):
    """Attack something, and check that what comes back is as an attack's answer must be."""
    count, detector = draw(counts), draw_detector(draw)
    images, labels = draw_images(draw, count), draw_labels(draw, count)
    targets, before = draw_targets(draw, labels), copy.deepcopy(images)
    generator = draw(st.sampled_from([None, torch.Generator().manual_seed(1)]))
    found = attack(detector, images, labels, targets=targets, generator=generator)
    assert (found.shape, found.dtype, found.device) == (images.shape, images.dtype, images.device)
    assert torch.equal(images, before)
    assert not found.requires_grad
    assert ((found >= 0) & (found <= 1) | (found == images)).all()
    if len(found):
        norm, eps = get_norm(attack.norm), attack.eps
        assert (norm.size(found - images) <= eps * (1 + 1e-5) + 2e-4 * (images.min() < 0) * SIZE[attack.norm]).all()


SIZE = {"linf": 1, "l2": 4, "l1": 16, "l0": 16}  # of the box, for images that leave it within the checks' tolerance


def outcomes(call, *, examples: int) -> Counter[str]:
    """How often a call answered and how often it refused; anything else is raised."""
    seen: Counter[str] = Counter()

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def run(data):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                call(data.draw)
            except ClusterGuardError:
                seen["refused"] += 1
            else:
                seen["answered"] += 1

    run()
    return seen


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_functions_answer_or_refuse(call):
    assert {"answered", "refused"} <= outcomes(call, examples=60).keys()


@pytest.mark.parametrize("name", IN_NORMS)
def test_attacks_answer_or_refuse(name):
    def call(draw):
        norm = draw(st.sampled_from(["linf", "l2", "l1", "l0"]))
        attacked(draw, IN_NORMS[name](norm=norm, eps=draw(st.sampled_from([0.3, 2, 2, draw_number(draw)]))))

    assert {"answered", "refused"} <= outcomes(call, examples=60).keys()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
@pytest.mark.parametrize("name", IN_NORMS)
def test_attacks_stay_in_odd_budgets(name, norm):
    images, labels = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    for eps in (math.inf, -math.inf, math.nan, -1, 0, 1e-45, 1e30, 1e39, True):
        with contextlib.suppress(ClusterGuardError):
            attack = IN_NORMS[name](norm=norm, eps=eps)
            found = attack(DETECTORS["pixels" if name not in ("match", "repel") else "guard"], images, labels)
            assert ((found >= 0) & (found <= 1)).all(), eps
            assert (get_norm(attack.norm).size(found - images) <= eps).all(), eps


@pytest.mark.parametrize("name", sorted(IN_NORMS.keys() - {"Boundary", "transfer"}))
def test_attacks_that_need_evidence_refuse_verdicts(name):
    attack = IN_NORMS[name](norm="l2", eps=1)
    with pytest.raises(InputError, match=r"evidence\(images\).* got VerdictsOnly"):
        attack(VerdictsOnly(), torch.rand(2, *SHAPE), torch.tensor([0, 1]))
