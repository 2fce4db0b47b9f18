"""Runs a detector over a whole loader."""

from typing import TYPE_CHECKING

import torch
from clusterguard._support import check_detector, check_images, check_labels, collect, evaluation_mode, share
from clusterguard.detection._decision import Detection, Detector, Evidence, decide
from clusterguard.detection._loaders import Loader, Pairs, Unpack, number_of_batches
from clusterguard.detection._metrics import Verdicts
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

    Returns:
        Verdicts on all n images, and the true labels (n,), on the CPU.

    Raises:
        InputError: images or labels have a wrong shape, dtype or range, or the loader is empty.
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
    rows = collect(verdicts, accelerator)
    if not rows:
        raise InputError("expected a loader with at least one batch, got an empty one")
    *judged, all_labels = map(torch.cat, zip(*rows, strict=True))
    return Verdicts(Detection(*judged), all_labels)


def check_repeated(detector: Detector, images: Tensor) -> None:
    """Check that a detector gives the same evidence for the same images in four calls.

    Small differences are tolerated, because a device may add numbers in any order.

    Args:
        detector: detector in eval mode.
        images: (B, C, H, W) images in [0, 1], of which up to 100 are judged.

    Raises:
        ConfigurationError: if the check fails.
    """
    first, *others = (detector.evidence(images[:100]) for _ in range(4))
    for other in others:
        for name, one, again in zip(Evidence._fields, first, other, strict=True):
            scale = float(one.nan_to_num(0, 0, 0).abs().max()) if one.numel() else 0.0
            tolerance = scale * (1e-5 if one.device.type == "cpu" else 1e-3)
            if not torch.allclose(one, again, rtol=0, atol=tolerance, equal_nan=True):
                raise ConfigurationError(
                    f"expected a detector that gives the same images the same {name.replace('_', ' ')} at every call, "
                    f"got differences of up to {float((one - again).abs().max()):.3g}: a layer draws random numbers or "
                    "changes at every call, in eval mode too; let it do this only while self.training is True"
                )
