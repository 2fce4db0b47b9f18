"""Runs a backbone on an example, or on blank images that fit, to find out what it returns."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from clusterguard._support import shorten
from clusterguard.detection._internal import without_autocast
from clusterguard.detectors._dense_layers import dense_layers, last_parameter
from clusterguard.errors import UnsupportedBackboneError
from torch import Tensor, nn

PASS_EXAMPLE = "pass example=images, a batch as the backbone will get it"
_COMMON_SIZES = (224, 32, 28, 64, 299, 96, 128, 16, 8, 48, 84, 112, 160, 192, 227, 256, 384, 512)


def find_output(
    features: nn.Module, module: nn.Module, example: Tensor | None, *, usual: tuple[int, ...] | None = None
) -> Tensor:
    """Find what a backbone returns for an example, or for blank images that fit.

    Args:
        features: backbone, perhaps followed by a pooling.
        module: backbone alone.
        example: (B, C, H, W) images that it takes; None tries blank ones.
        usual: shape (C, H, W) of images that the backbone was made for, which is tried first; None if it is not known.

    Returns:
        The output (B, D).

    Raises:
        UnsupportedBackboneError: the output is no such tensor, or D depends on the size of the images.
    """
    # Two images, because a module that confuses the batch with another axis may work with one.
    dtype = getattr(last_parameter(module), "dtype", None)
    blanks = (torch.empty(2, *shape, device="meta", dtype=dtype) for shape in _plausible_shapes(module, usual))
    return _probe(features, blanks if example is None else [example])


def _plausible_shapes(module: nn.Module, usual: tuple[int, ...] | None) -> Iterable[tuple[int, ...]]:
    """Shapes (C, H, W) of images that the module may take, the likeliest first."""
    if usual is not None:
        yield usual
    first = next(iter(dense_layers(module)), None)
    if isinstance(first, nn.Linear):
        yield 1, 1, first.in_features  # if nn.Flatten comes before the layer, only the number of pixels matters
        if first.in_features > 1:
            yield 1, first.in_features, 1  # a second shape that fits, so that no others have to be tried
    channels = (first.in_channels,) if isinstance(first, nn.Conv2d) else (3, 1)
    yield from ((channel, size, size) for size in _COMMON_SIZES for channel in channels)


def _probe(module: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """The output for the first batch that fits. A second batch that fits must give the same width."""
    outputs: list[Tensor] = []
    failures: list[UnsupportedBackboneError] = []
    for images in batches:
        try:
            outputs.append(run_once(module, images))
        except UnsupportedBackboneError as error:
            failures.append(error)
        if len(outputs) == 2:
            break
    if not outputs:  # an error about the output says more than one about the size of images
        raise next((failure for failure in failures if failure.__cause__ is None), failures[0])
    widths = [output.shape[1] for output in outputs]
    if widths[0] != widths[-1]:
        raise UnsupportedBackboneError(f"expected one D for all image sizes, got {widths}; {PASS_EXAMPLE}")
    return outputs[0]


def run_once(module: nn.Module, images: Tensor) -> Tensor:
    """The module's output (B, D) in eval mode. The module itself, its modes and its buffers do not change."""
    expected = f"expected floating-point features ({len(images)}, D) for images {tuple(images.shape)}"
    # The copy shares the parameters. On the meta device it gets empty ones, which need no memory and no arithmetic.
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    try:
        if images.is_meta:
            tensors = [*module.parameters(), *module.buffers()]
            memo = {id(t): nn.Parameter(torch.empty_like(t, device="meta"), False) for t in tensors}
        shadow = copy.deepcopy(module, memo)
        for submodule in shadow.modules():
            submodule.training = False  # not eval(), which some modules override to change their weights
        with torch.no_grad(), without_autocast():  # a new layer takes the data type of the output
            output = shadow(images)
    except Exception as error:
        raise UnsupportedBackboneError(f"{expected}, got {shorten(error)}; {PASS_EXAMPLE}") from error
    if isinstance(output, Tensor) and output.is_floating_point() and output.shape[:-1] == images.shape[:1]:
        return output
    if not isinstance(output, Tensor):
        raise UnsupportedBackboneError(
            f"{expected}, got {type(output).__name__}; wrap the backbone in a module whose forward returns one tensor "
            "of its output"
        )
    raise UnsupportedBackboneError(
        f"{expected}, got {output.dtype} {tuple(output.shape)}; wrap the backbone so that it pools its output, such as "
        "nn.Sequential(backbone, nn.AdaptiveAvgPool2d(1), nn.Flatten())"
    )


def has_width(encoder: nn.Module, out_features: int, *, usual: tuple[int, ...] | None = None) -> bool:
    """Whether a module returns (B, out_features) for blank images that fit, the first of them of the usual shape."""
    try:
        return find_output(encoder, encoder, None, usual=usual).shape[1] == out_features
    except UnsupportedBackboneError:
        return False
