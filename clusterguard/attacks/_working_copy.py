"""Copies of detectors for fast searches in bfloat16.

A copy takes images with channels last. Its weights are cast once, and its batch normalisation is folded into
convolutions.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from clusterguard._support import CompiledCall, copy_module
from clusterguard.attacks._metering import Metered
from clusterguard.detection import Detector, Evidence
from clusterguard.detection._internal import without_autocast
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_FEW = 2  # number of images on which a change is tried
_TOO_FAR = 1 / 4  # share of the largest value by which evidence in bfloat16 may be wrong
_TOLERANCE = 1e-3  # largest change as a share of the largest value, because folding may only change rounding


def working_copy(detector: Detector) -> Detector:
    """A copy of a detector for searching in bfloat16, or the detector itself if it is compiled or cannot be copied.

    The weights of the copy are frozen.

    Args:
        detector: detector in eval mode; it is not changed. If it counts costs, the copy adds to the same counter.

    Example:
        >>> class Sums(nn.Module):
        ...     thresholds = torch.ones(2)
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(4, 2)
        ...     def evidence(self, images):
        ...         return Evidence(-self.layer(images.flatten(1)), self.layer(images.flatten(1)))
        >>> working_copy(Sums()).layer.weight.requires_grad
        False
    """
    if not isinstance(detector, nn.Module) or not all(isinstance(link, nn.Module) for link in _links(detector)):
        return detector  # it may be a client of a service, for instance
    if any(_is_compiled(module) for module in detector.modules()):
        return detector
    try:
        copied = copy_module(detector)
    except Exception:  # a class that forbids copying may raise anything
        return detector
    return copied.requires_grad_(False)


@torch.no_grad()
def exact_evidence(detector: Detector, images: Tensor) -> Evidence:
    """The evidence of a detector on the few images (B, C, H, W) on which its copy is tried. It counts as no cost."""
    with without_autocast():
        return _without_meter(detector).evidence(images[:_FEW])


@torch.no_grad()
def put_into_bfloat16(detector: Detector, images: Tensor, exact: Evidence) -> tuple[torch.memory_format, float]:
    """Cast weights to bfloat16, and put weights and images into channels last, as far as the detector works so.

    Nearly every detector works with both. For the others the layout is tried first, and then the casts. A network that
    flattens feature maps with `view`, for example, does not work with channels last, and a layer that runs outside of
    autocast does not work with weights in bfloat16.

    Args:
        detector: working copy, which is changed.
        images: (B, C, H, W); the first few are used for the trials.
        exact: what `exact_evidence` gives for the detector itself.

    Returns:
        The memory layout for images, and the largest error that evidence then has. The error is infinite if the
        detector does not work in bfloat16, or if the copy computes something else.
    """
    detector = _without_meter(detector)
    if not isinstance(detector, nn.Module):
        return torch.contiguous_format, math.inf
    layout = torch.channels_last
    arrange_weights(detector, layout)
    weights = _cast_weights(detector)
    error = _error(detector, images, layout, exact)
    if error < math.inf:
        return layout, error
    _uncast(weights)
    error = _error(detector, images, layout, exact)
    if error == math.inf:
        layout = torch.contiguous_format
        arrange_weights(detector, layout)
        error = _error(detector, images, layout, exact)
    weights = _cast_weights(detector)
    cast = _error(detector, images, layout, exact)
    if cast == math.inf:
        _uncast(weights)
        return layout, error
    return layout, cast


def arrange_weights(module: nn.Module, layout: torch.memory_format) -> None:
    """Put the weights of convolutions into a memory layout."""
    for parameter in module.parameters():
        if parameter.ndim == 4:  # `contiguous` would leave weights of one input channel, which counts as either layout
            parameter.data = parameter.data.to(memory_format=layout)


def _cast_weights(detector: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Cast the weights of plain linear layers and convolutions, and return each with its value before."""
    exact: list[tuple[Tensor, Tensor]] = []
    for module in detector.modules():
        if type(module) in (nn.Linear, nn.Conv2d) and not _has_hooks(module):
            for parameter in module.parameters(recurse=False):
                if parameter.dtype == torch.float32:
                    exact.append((parameter, parameter.data))
                    parameter.data = parameter.data.bfloat16()
    return exact


def _uncast(exact: list[tuple[Tensor, Tensor]]) -> None:
    for parameter, value in exact:
        parameter.data = value


def _error(detector: Detector, images: Tensor, layout: torch.memory_format, exact: Evidence) -> float:
    """The largest error of evidence in bfloat16; infinite if it is of no use for a search.

    It is of no use if it cannot be computed, if it has no gradient, or if it is far from the exact evidence. A copy may
    for example read what a hook writes into the original.
    """
    try:
        with torch.enable_grad(), torch.autocast(images.device.type, torch.bfloat16):
            rough = detector.evidence(images[:_FEW].contiguous(memory_format=layout).requires_grad_())
    except Exception:  # a network or layer without bfloat16 may raise anything
        return math.inf
    if not any(part.requires_grad for part in rough):
        return math.inf
    largest = 0.0
    for old, new in zip(exact, rough, strict=True):
        if new.shape != old.shape:
            return math.inf
        known = old.isfinite()  # the others are refused in any precision
        gap = (new.detach().to(old.dtype) - old).abs().masked_fill(~known, 0).amax().item()
        if not gap <= _TOO_FAR * old.abs().masked_fill(~known, 0).amax().item():
            return math.inf
        largest = max(largest, gap)
    return largest


@torch.no_grad()
def fold_batch_norms(detector: Detector, images: Tensor) -> None:
    """Fold batch normalisation in eval mode into the convolutions before it, if the detector's evidence stays the same.

    Args:
        detector: working copy, which is changed.
        images: (B, C, H, W); the first few are used to find out which layer follows which.
    """
    detector = _without_meter(detector)
    if not isinstance(detector, nn.Module) or not any(type(part) is nn.BatchNorm2d for part in detector.modules()):
        return
    images = images[:_FEW]
    with without_autocast():
        before, pairs = _trace(detector, images)
        parents = {child: (parent, name) for parent in detector.modules() for name, child in parent.named_children()}
        changed: list[tuple[nn.Module, str, nn.Module]] = []
        for convolution, norm in pairs:
            folded = fuse_conv_bn_eval(convolution, norm).requires_grad_(False)
            replaced: tuple[tuple[nn.Module, nn.Module], ...] = ((convolution, folded), (norm, nn.Identity()))
            for module, other in replaced:
                parent, name = parents[module]
                changed.append((parent, name, module))
                setattr(parent, name, other)
        if not _agree(before, detector.evidence(images)):
            for parent, name, module in changed:
                setattr(parent, name, module)


def _without_meter(detector: Detector) -> Detector:
    """The detector inside `Metered`, because these trials do not count as a cost of the attack."""
    while isinstance(detector, Metered):
        detector = detector.detector
    return detector


def _links(detector: object) -> Iterator[object]:
    """The detector, the detector in its attribute `detector` if it is a wrapper, and so on."""
    link: object | None = detector
    while link is not None:
        yield link
        link = getattr(link, "detector", None)


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or any(
        isinstance(value, CompiledCall) for value in vars(module).values()
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "parametrizations"))


def _trace(detector: Any, images: Tensor) -> tuple[Evidence, list[tuple[nn.Conv2d, nn.BatchNorm2d]]]:
    """The evidence on images, and the pairs of a convolution and the batch normalisation that takes its output.

    Only layers that are called once are paired.
    """
    made: list[tuple[Tensor, nn.Conv2d]] = []  # keeps outputs alive, so that no other tensor gets the same id
    met: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    calls: dict[nn.Module, int] = {}

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(module, nn.BatchNorm2d):
            met.extend((convolution, module) for output, convolution in made if output is inputs[0])

    def note(module: nn.Conv2d, _: tuple[Tensor, ...], output: Tensor) -> None:
        made.append((output, module))

    layers = [module for module in detector.modules() if type(module) in (nn.Conv2d, nn.BatchNorm2d)]
    plain = [module for module in layers if not _has_hooks(module)]
    hooks = [module.register_forward_pre_hook(count) for module in plain]
    hooks += [module.register_forward_hook(note) for module in plain if isinstance(module, nn.Conv2d)]
    try:
        evidence = detector.evidence(images)
    finally:
        for hook in hooks:
            hook.remove()
    return evidence, [
        (convolution, norm)
        for convolution, norm in met
        if calls[convolution] == calls[norm] == 1 and not norm.training and norm.running_mean is not None
    ]


def _agree(before: Evidence, after: Evidence) -> bool:
    scales = [part.abs().amax().item() for part in before]
    differences = [(new - old).abs().amax().item() for old, new in zip(before, after, strict=True)]
    return all(gap <= _TOLERANCE * scale for gap, scale in zip(differences, scales, strict=True))
