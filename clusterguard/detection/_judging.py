"""Runs a detector over a whole loader."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from clusterguard._support import (
    bar,
    check_detector,
    check_images,
    check_labels,
    draws_random_numbers,
    evaluation_mode,
    gather,
    share,
)
from clusterguard.detection._arithmetic import full_precision
from clusterguard.detection._decision import Detection, Detector, Evidence, decide
from clusterguard.detection._loaders import Loader, Pairs, Unpack, number_of_batches
from clusterguard.detection._metrics import Verdicts
from clusterguard.errors import ConfigurationError, InputError
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator

_CHANGING = (
    "a layer draws random numbers or changes at every call, in eval mode too; let it do this only while self.training "
    "is True"
)
_WITH_OTHERS = "whatever other images are in the batch"
_MIXING = (
    "a layer mixes the images of a batch, such as BatchNorm with track_running_stats=False; take BatchNorm with "
    "running statistics, or GroupNorm"
)


@torch.no_grad()
def judge(
    detector: Detector,
    loader: Loader,
    *,
    accelerator: "Accelerator | None" = None,
    unpack: Unpack | None = None,
    progress: str = "",
    check: bool = True,
) -> Verdicts:
    """Run a detector in eval mode over a whole loader.

    Only the verdicts are kept, so memory does not grow with the size of the images.

    Args:
        detector: any detector that yields evidence. If it is not calibrated, everything is refused, but labels and
            suspicion are valid.
        loader: batches of images (B, C, H, W) in [0, 1] and labels (B,).
        accelerator: accelerator whose processes take the batches in turn; all of them get all verdicts.
        unpack: function that finds images and labels in batches of another form.
        progress: title of the progress bar; an empty title shows no bar.
        check: whether to check images and labels. Switch it off if they were checked already.

    Returns:
        Verdicts on all n images, and the true labels (n,), on the CPU.

    Raises:
        InputError: images or labels have a wrong shape, dtype or range, or the loader is empty.
    """
    check_detector(detector)
    verdicts: dict[int, list[Tensor]] = {}
    with evaluation_mode(detector) as detector, full_precision():
        pairs, batches = Pairs(loader, unpack), number_of_batches(loader)
        shown = bar(pairs, progress, total=batches)
        for position, (images, labels) in share(shown, accelerator):
            if check:
                check_images(images)
                check_labels(labels, images, len(detector.thresholds))
            images = images.to(detector.thresholds.device)
            verdict = decide(detector.evidence(images), detector.thresholds)
            verdicts[position] = [part.cpu() for part in (*verdict, labels)]
    rows = gather(verdicts, accelerator)
    if not rows:
        raise InputError("expected a loader with at least one batch, got an empty one")
    *judged, all_labels = map(torch.cat, zip(*rows, strict=True))
    return Verdicts(Detection(*judged), all_labels)


@torch.no_grad()
def check_evidence(detector: Detector, images: Tensor) -> None:
    """Check that a detector gives the same evidence for the same images, in every call and whatever their batch.

    Up to 100 images are judged four times. Small differences are tolerated, because a device may add numbers in any
    order. A call must not move the global random states of torch, NumPy or Python either, so that a change of a few
    calls in a hundred is found too. Up to four images are then judged in batches of one size with other neighbours,
    before or after them: their black and white negatives, black, white, stripes, chequers, and random black and white
    pixels. Rounding depends on the shape of a batch and not on what its images show, so no more is tolerated here. They
    are also judged alone, where other kernels round differently. There, 0.001 of the largest number is tolerated, a
    thousand times what deep networks in float32 differ by, and 32 units in the last place of weights in half precision.
    The batches of graphs with dynamic quantisation are not checked, because their scales depend on them by design.

    Args:
        detector: detector, which is put into eval mode for the check.
        images: (B, C, H, W) images in [0, 1].

    Raises:
        ConfigurationError: if the check fails.
    """
    images = images.to(detector.thresholds.device)
    with evaluation_mode(detector) as detector, full_precision():
        first, *others = (detector.evidence(images[:100]) for _ in range(4))
        for other in others:
            _check_same(first, other, _repeated(first), "at every call", _CHANGING)
        if draws_random_numbers(lambda: detector.evidence(images[:1]), images.device):
            raise ConfigurationError(
                "expected a detector that gives the same images the same evidence at every call, got one that moves a "
                f"global random state: {_CHANGING}"
            )
        if not getattr(detector, "has_dynamic_scales", False):
            _check_independent(detector, images[:4])


def _check_independent(detector: Detector, images: Tensor) -> None:
    first, last = slice(len(images)), slice(len(images), None)
    twice = detector.evidence(torch.cat([images, images]))
    for index, neighbours in enumerate(_neighbours_of(images)):
        rows, batch = (last, [neighbours, images]) if index % 2 else (first, [images, neighbours])
        other = detector.evidence(torch.cat(batch))
        _check_same(_of(twice, rows), _of(other, rows), _repeated(twice), _WITH_OTHERS, _MIXING)
    alone = Evidence(*map(torch.cat, zip(*map(detector.evidence, images.split(1)), strict=True)))
    weights = detector.parameters() if isinstance(detector, nn.Module) else ()
    unit = max((torch.finfo(weight.dtype).eps for weight in weights if weight.is_floating_point()), default=0.0)
    _check_same(_of(twice, first), alone, max(1e-3, 32 * unit), _WITH_OTHERS, _MIXING)


def _neighbours_of(images: Tensor) -> Iterator[Tensor]:
    """Images of the highest contrast, in batches as large as the one that is given; each kind comes twice."""
    negative = (1 - images).round()  # never the images themselves
    yield from (negative, negative)
    rows, columns = torch.arange(images.shape[2])[:, None], torch.arange(images.shape[3])
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).round()
    for pattern in (0 * columns, rows % 2, columns % 2, (rows + columns) % 2, noise):
        yield from (one.to(images).expand_as(images) for one in (pattern, 1 - pattern))


def _of(evidence: Evidence, rows: slice) -> Evidence:
    return Evidence(evidence.class_scores[rows], evidence.suspicion[rows])


def _repeated(evidence: Evidence) -> float:
    """How far evidence may differ between calls with the same images, as a share of the largest number."""
    return 1e-5 if evidence.suspicion.device.type == "cpu" else 1e-3


def _check_same(first: Evidence, other: Evidence, tolerance: float, when: str, cause: str) -> None:
    """Check that evidence differs by at most a share of its largest number."""
    for name, one, again in zip(Evidence._fields, first, other, strict=True):
        scale = float(one.nan_to_num(0, 0, 0).abs().max()) if one.numel() else 0.0
        if not torch.allclose(one, again, rtol=0, atol=tolerance * scale, equal_nan=True):
            raise ConfigurationError(
                f"expected a detector that gives the same images the same {name.replace('_', ' ')} {when}, got "
                f"differences of up to {float((one - again).abs().max()):.3g}: {cause}"
            )
