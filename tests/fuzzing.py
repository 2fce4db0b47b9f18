"""Whatever is handed in, a public function answers rightly or refuses with an error of ours.

A call draws its arguments, right ones and wrong ones, and checks what comes back by an invariant. Tensors on the meta
device stand for those on a wrong device: they can be moved nowhere without an error.
"""

import math
import warnings
from collections import Counter

import clusterguard as cg
import torch
from clusterguard._support import check_tensor
from clusterguard.attacks import Metered
from clusterguard.errors import ClusterGuardError
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
    return cg.detectors.ConfidenceDetector(nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES)), CLASSES)


DETECTORS = {
    "guard": a_guard(),
    "confidence": cg.detectors.WithThresholds(a_classifier(), torch.ones(CLASSES)),
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
