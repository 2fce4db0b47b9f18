"""Attacks that search in bfloat16, while the detector judges in its own precision.

On hardware for bfloat16 they take two to seven times as many steps in the same time.
"""

import math
from dataclasses import fields, is_dataclass, replace
from time import perf_counter
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from clusterguard.attacks._base import Attack
from clusterguard.attacks._gradients import gradient_at
from clusterguard.attacks._working_copy import exact_evidence, fold_batch_norms, put_into_bfloat16, working_copy
from clusterguard.detection import Detector, Evidence, success_margin
from clusterguard.errors import ConfigurationError
from torch import Tensor
from torch.nn import functional

Precision = Literal["float32", "bf16", "auto"]
_WORTH_IT = 0.9  # bfloat16 must take at most this share of the time
_AGREES = 0.9  # smallest mean cosine between both gradients, and smallest ratio of what both attacks achieve
_STEPS, _STEP = 3, 0.02  # number and length of the steps of the trial attack
_FEW, _MANY = 16, 200  # smallest and largest number of images in the trial
_AFFORDABLE = 0.3  # seconds that a step of the trial attack may take
_TOO_SHORT = 0.002  # seconds; if a step takes less, bfloat16 is not worth a trial


class InBfloat16:
    """A detector whose network computes in bfloat16, with channels last, the layout that matrix units need.

    Distances and everything after them stay in float32. The evidence is precise enough for gradients to follow, but not
    for deciding whether an attack has succeeded. If the copy fails in bfloat16, or if its evidence on the first images
    is far from the detector's, the detector itself is used, in its own precision.

    Args:
        detector: detector in eval mode. A copy of it is used, see `working_copy`, so later changes of the detector have
            no effect.

    Attributes:
        is_rough: whether the evidence is in bfloat16; False if the detector itself is used in its own precision.
        error: largest error of the evidence on the first images; 0 if it was not measured.

    Example:
        >>> from clusterguard import ClusterGuard
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 4, 4))
        >>> images = torch.rand(3, 1, 4, 4)
        >>> difference = InBfloat16(guard).evidence(images).suspicion - guard.evidence(images).suspicion
        >>> bool(difference.abs().max() < 0.1)
        True
    """

    def __init__(self, detector: Detector) -> None:
        self.detector = working_copy(detector)
        self.thresholds = detector.thresholds
        self.is_rough, self.error = True, 0.0
        self._exact = detector
        self._is_ready = self.detector is detector  # without a copy, the user's detector must not change
        self._format = torch.contiguous_format

    def evidence(self, images: Tensor) -> Evidence:
        """The evidence on images (B, C, H, W), computed in bfloat16 and returned in float32."""
        if not self._is_ready:
            self._prepare(images.detach())
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.is_rough):
            scores, suspicion = self.detector.evidence(images.contiguous(memory_format=self._format))
        return Evidence(scores.float(), suspicion.float())

    def _prepare(self, images: Tensor) -> None:
        self._is_ready = True
        exact = exact_evidence(self._exact, images)
        try:
            fold_batch_norms(self.detector, images)
            self._format, self.error = put_into_bfloat16(self.detector, images, exact)
        except Exception:  # a copy that needs its original may raise anything
            self.error = math.inf
        if self.error == math.inf:
            self.detector, self._format = self._exact, torch.contiguous_format
            self.is_rough, self.error = False, 0.0


def check_precision(precision: str) -> None:
    """Check the name of a precision.

    Raises:
        ConfigurationError: the name is unknown.
    """
    if precision not in get_args(Precision):
        raise ConfigurationError(f"expected precision 'float32', 'bf16' or 'auto', got {precision!r}")


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16, so that it probably computes faster than in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    supports = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return device.type == "cpu" and any(ask() for ask in supports if ask is not None)


def in_precision(attack: Attack, precision: Precision, *, instead_of: Precision | None = None) -> Attack:
    """An attack with another precision, if it has this option; attacks inside wrappers get it too.

    Args:
        attack: any attack; one without the option is returned as it is.
        precision: "float32", "bf16" or "auto".
        instead_of: the only precision that is replaced; None replaces all.

    Raises:
        ConfigurationError: the precision is unknown.

    Example:
        >>> from clusterguard.attacks import PGD, MultiTarget
        >>> in_precision(MultiTarget(attack=PGD(eps=0.1, step_size=0.01)), "bf16").attack.precision
        'bf16'
    """
    check_precision(precision)
    given: Any = attack
    if not is_dataclass(given) or isinstance(given, type):
        return attack
    options = {option.name: getattr(given, option.name) for option in fields(given)}
    changed: dict[str, Any] = {}
    if "precision" in options and instead_of in (None, options["precision"]):
        changed["precision"] = precision
    if "attack" in options:
        changed["attack"] = in_precision(options["attack"], precision, instead_of=instead_of)
    if "attacks" in options:
        inside = (in_precision(inner, precision, instead_of=instead_of) for inner in options["attacks"])
        changed["attacks"] = tuple(inside)
    return cast(Attack, replace(given, **changed)) if changed else attack


def precisions_of(attack: object) -> set[str]:
    """The precisions in which an attack and those inside it search; empty if none of them has this option."""
    inside = [getattr(attack, "attack", None), *getattr(attack, "attacks", ())] if is_dataclass(attack) else []
    own = getattr(attack, "precision", None)
    return {own for own in (own,) if isinstance(own, str)}.union(*map(precisions_of, inside))


def choose_precision(detector: Detector, images: Tensor, labels: Tensor) -> Literal["float32", "bf16"]:
    """The precision in which attacks run faster without becoming weaker.

    A short attack is timed in each precision, on some of the images. bfloat16 is chosen if it saves at least a tenth of
    the time, its gradients point the same way, and its attack lowers the margins in the detector's own precision nearly
    as far. float32 is chosen if the device has no bfloat16, if the network fails in it, or if a gradient takes so
    little time that bfloat16 saves nothing.

    Args:
        detector: detector in eval mode that will be attacked.
        images: (B, C, H, W), at least one.
        labels: (B,) true labels.
    """
    if images.dtype != torch.float32 or not len(images) or not has_bfloat16(images.device):
        return "float32"
    started = perf_counter()
    _margins_and_gradient(detector, detector, images[:_FEW], labels[:_FEW])
    count = int(
        _FEW * _AFFORDABLE / max(perf_counter() - started, 1e-6)
    )  # so many images that a step takes about the affordable time
    images, labels = images[: max(_FEW, min(count, _MANY))], labels[: max(_FEW, min(count, _MANY))]
    exact = _try_out(detector, detector, images, labels)
    if exact.seconds < _TOO_SHORT:
        return "float32"
    search = InBfloat16(detector)
    try:
        rough = _try_out(search, detector, images, labels)
    except Exception:  # a network or layer without bfloat16 may raise anything
        return "float32"
    cosine = functional.cosine_similarity(exact.gradient.flatten(1), rough.gradient.flatten(1))
    agrees = bool(cosine.isfinite().all()) and float(cosine.mean()) >= _AGREES
    succeeds = rough.lowered >= _AGREES * exact.lowered
    return (
        "bf16" if search.is_rough and agrees and succeeds and rough.seconds <= _WORTH_IT * exact.seconds else "float32"
    )


def searches_in_bfloat16(detector: Detector, images: Tensor) -> bool:
    """Whether bfloat16 works for a detector; if not, its attacks search in the detector's own precision.

    Args:
        detector: detector in eval mode.
        images: (B, C, H, W), of which the first few are used.
    """
    search = InBfloat16(detector)
    with torch.no_grad():
        search.evidence(images[:_FEW])
    return search.is_rough


class _Trial(NamedTuple):
    """The outcome of a short attack.

    Attributes:
        gradient: (B, C, H, W) gradient at the first step.
        lowered: mean amount by which the attack lowered the success margins.
        seconds: seconds that the fastest step took.
    """

    gradient: Tensor
    lowered: float
    seconds: float


def _try_out(search: Detector, judge: Detector, images: Tensor, labels: Tensor) -> _Trial:
    """Take a few signed steps along the gradients of `search`, and measure with `judge` how far margins fall."""
    before, gradient = _margins_and_gradient(
        search, judge, images, labels
    )  # this first call also does work that later calls need not do
    iterates, direction, seconds = images, gradient, math.inf
    for _ in range(_STEPS):
        iterates = (iterates - _STEP * direction.sign()).clamp(0, 1)
        started = perf_counter()
        _, direction = _margins_and_gradient(search, search, iterates, labels)
        seconds = min(seconds, perf_counter() - started)
    after, _ = _margins_and_gradient(search, judge, iterates, labels)
    return _Trial(gradient, float((before - after).mean()), seconds)


def _margins_and_gradient(search: Detector, judge: Detector, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The success margins (B,) by `judge`, and the gradient (B, C, H, W) of the margins by `search`."""
    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        margins = success_margin(search.evidence(leaf), search.thresholds, labels)
        gradient = gradient_at(leaf, margins, search)
    if search is not judge:
        with torch.no_grad():
            margins = success_margin(judge.evidence(images), judge.thresholds, labels)
    gradient[0, 0, 0, 0].item()  # waits until the device has finished
    return margins.detach(), gradient
