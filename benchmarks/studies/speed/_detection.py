"""The cost of a guard: detection compared with the bare backbone, and calibration with plain inference."""

import warnings
from functools import partial
from typing import Any

import torch
from clusterguard import Calibrator, ClusterGuard, Detection
from torch import Tensor, nn

from benchmarks.studies.speed._measure import Comparison

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@torch.no_grad()
def infer(model: nn.Module, images: Tensor) -> Tensor:
    """Label images without a guard: normalise them, run the model, take the largest logit."""
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (_MEAN, _STD))
    labels: Tensor = model((images - mean) / std).argmax(dim=1)
    return labels


def check_same_number_of_labels(ours: Detection, theirs: Tensor) -> None:
    """Check that both give as many labels. The labels themselves differ, because the networks are untrained."""
    assert ours.labels.shape == theirs.shape


def calibrate_guard(guard: ClusterGuard, loader: list[tuple[Tensor, Tensor]]) -> Any:
    """Calibrate a guard on a loader."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an untrained guard gives nearly all images one label
        return Calibrator(0.2, scarce="pool").fit(guard, loader)


@torch.no_grad()
def infer_all(guard: ClusterGuard, loader: list[tuple[Tensor, Tensor]]) -> Any:
    """Run one plain inference pass over a loader."""
    return torch.cat([guard(images).argmax(dim=1) for images, _ in loader])


def compare_detection(device: torch.device) -> list[Comparison]:
    """Compare detection with the bare backbone, and calibration with one pass of inference."""
    import timm

    torch.manual_seed(0)
    backbone = timm.create_model("resnet50", num_classes=1000).eval()
    guard = ClusterGuard(backbone).eval().to(device)
    backbone = backbone.to(device)
    guard.thresholds = torch.full((1000,), 1e6, device=device)
    comparisons = [
        Comparison(
            f"detection, ResNet-50 at 224, batch {batch}, against the bare backbone",
            partial(guard.detect, images, check=False),
            partial(infer, backbone, images),
            target=1 / allowed,
            check=check_same_number_of_labels,
        )
        for batch, allowed in ((1, 1.05), (32 if device.type == "cuda" else 8, 1.02))
        for images in [torch.rand(batch, 3, 224, 224, device=device)]
    ]
    small = ClusterGuard(timm.create_model("resnet18", num_classes=10)).eval().to(device)
    images = torch.rand(5, 20, 3, 64, 64, device=device)
    labels = infer_all(small, [(part, part) for part in images]).view(5, 20)
    loader = list(zip(images, labels, strict=True))
    comparisons.append(
        Comparison(
            "calibration, ResNet-18 at 64, 100 images, against one inference pass",
            partial(calibrate_guard, small, loader),
            partial(infer_all, small, loader),
            target=1 / 1.05,
        )
    )
    return comparisons
