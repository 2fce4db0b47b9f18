"""Running a detector over a whole loader."""

from typing import TYPE_CHECKING

import torch
from clusterguard._support import check_detector, check_images, check_labels, collect, evaluation_mode, share
from clusterguard.detection._decision import Detection, Detector, Evidence, decide
from clusterguard.detection._loaders import Loader, Pairs, Unpack, number_of_batches
from clusterguard.detection._precision import full_precision
from clusterguard.errors import ConfigurationError, InputError
from torch import Tensor
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from accelerate import Accelerator


@torch.no_grad()
def judge(
    detector: Detector,
    loader: Loader,
    *,
    accelerator: "Accelerator | None" = None,
    unpack: Unpack | None = None,
    progress: str = "",
) -> tuple[Detection, Tensor]:
    """Run a detector in eval mode over a whole loader; only verdicts are kept, so memory does not grow with images.

    Args:
        detector: whatever yields evidence; without thresholds everything is refused, labels and suspicion still count.
        loader: batches of images (B, C, H, W) in [0, 1] and labels (B,).
        accelerator: whose processes take a batch each, in turn; all of them get all verdicts.
        unpack: finds images and labels in batches of another form.
        progress: the progress bar's title; empty shows none.

    Returns:
        Verdicts on all n images, and their labels (n,), on the CPU.

    Raises:
        InputError: images or labels of a wrong shape, dtype or range, or an empty loader.
    """
    check_detector(detector)
    verdicts: dict[int, list[Tensor]] = {}
    with evaluation_mode(detector), full_precision():
        pairs, batches = Pairs(loader, unpack), number_of_batches(loader)
        bar = tqdm(pairs, desc=progress, total=batches, disable=not progress, leave=False)
        for position, (images, labels) in share(bar, accelerator):
            check_images(images)
            check_labels(labels, images, len(detector.thresholds))
            images = images.to(detector.thresholds.device)
            verdict = decide(detector.evidence(images), detector.thresholds)
            verdicts[position] = [part.cpu() for part in (*verdict, labels)]
    found = collect(verdicts, accelerator)
    if not found:
        raise InputError("expected a loader with at least one batch, got an empty one")
    *judged, all_labels = map(torch.cat, zip(*found, strict=True))
    return Detection(*judged), all_labels


def check_repeated(detector: Detector, images: Tensor) -> None:
    """Four answers to the same images are the same, but for the rounding of a device that adds in any order.

    Args:
        detector: in eval mode.
        images: (B, C, H, W) in [0, 1]; eight of them are judged.

    Raises:
        ConfigurationError: otherwise.
    """
    first, *others = (detector.evidence(images[:8]) for _ in range(4))
    for other in others:
        for name, one, again in zip(Evidence._fields, first, other, strict=True):
            scale = float(one.nan_to_num(0, 0, 0).abs().max()) if one.numel() else 0.0
            tolerance = scale * (1e-5 if one.device.type == "cpu" else 1e-3)
            if not torch.allclose(one, again, rtol=0, atol=tolerance, equal_nan=True):
                raise ConfigurationError(
                    f"expected a detector that gives the same images the same {name.replace('_', ' ')} at every call, "
                    f"got differences of up to {float((one - again).abs().max()):.3g}: a layer draws random numbers or "
                    "changes at every call, in eval mode too; make it do so only while self.training is True"
                )
