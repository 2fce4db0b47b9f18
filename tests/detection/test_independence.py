"""Whether images are judged one by one: what mixes the images of a batch is refused, what only rounds is not."""

import random

import clusterguard as cg
import numpy as np
import pytest
import torch
from clusterguard.deployment import export_program
from clusterguard.detection._internal import check_evidence
from clusterguard.errors import ConfigurationError
from torch import nn

SHAPE = (3, 8, 8)


class Mixing(nn.Module):
    """Hands images on, changed by a function of the whole batch."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, images):
        return self.change(images)


MIXING = {
    "batch statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "the mean": lambda: Mixing(lambda x: x - x.mean(0)),
    "a hundredth of the mean": lambda: Mixing(lambda x: x - 0.01 * x.mean(0)),
    "the largest": lambda: Mixing(lambda x: x / x.amax().clamp_min(0.1)),
    "the image before": lambda: Mixing(lambda x: x + x.roll(1, 0)),
    "all images before": lambda: Mixing(lambda x: x.cumsum(0)),
    "all images after": lambda: Mixing(lambda x: x.flip(0).cumsum(0).flip(0)),
    "the number of images": lambda: Mixing(lambda x: x / len(x)),
    "whether it is alone": lambda: Mixing(lambda x: x * (1 + (len(x) == 1))),
}
HONEST = {
    "convolution": lambda: nn.Conv2d(3, 3, 3, padding=1),
    "running statistics": lambda: nn.BatchNorm2d(3),
    "statistics of an image": lambda: nn.GroupNorm(1, 3),
    "statistics of a channel": lambda: nn.InstanceNorm2d(3),
    "attention": lambda: Mixing(lambda x: (x.flatten(2) @ x.flatten(2).mT).softmax(-1) @ x.flatten(2)),
    "other kernels for one image": lambda: Mixing(lambda x: x * (1 + 4 * (len(x) == 1) * torch.finfo(x.dtype).eps)),
}


def guard_with(layer, dtype=torch.float32):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), layer, nn.Flatten(), nn.Linear(192, 16), nn.GELU())
    return cg.ClusterGuard(backbone, num_classes=3, example=torch.rand(2, *SHAPE)).to(dtype)


def batches(guard, count=90):
    images = torch.rand(count, *SHAPE).to(next(guard.parameters()).dtype)
    return [(images, guard.detect(images, check=False).labels)]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, torch.float32) for kind in MIXING]
    + [(kind, dtype) for kind in ("batch statistics", "the mean") for dtype in (torch.bfloat16, torch.float16)],
)
def test_a_guard_that_mixes_images_is_not_calibrated(kind, dtype):
    guard = guard_with(MIXING[kind](), dtype)
    with pytest.raises(ConfigurationError, match="whatever other images are in the batch"):
        cg.Calibrator(0.2, scarce="pool").fit(guard, batches(guard))
    assert not guard.is_calibrated
    assert guard.image_shape == SHAPE  # that of the example


@pytest.mark.parametrize("kind", MIXING)
def test_a_guard_that_mixes_images_is_not_trained_to_be_calibrated(kind):
    guard = guard_with(MIXING[kind]())
    trainer = cg.AdversarialClusterTrainer(guard, cg.FGSM(eps=0.1), calibrator=cg.Calibrator(0.2, scarce="pool"))
    before = guard.encoder[0][0].weight.clone()
    with pytest.raises(ConfigurationError, match="whatever other images are in the batch"):
        trainer.fit(batches(guard), batches(guard), epochs=1, progress=False)
    assert torch.equal(guard.encoder[0][0].weight, before)


@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_guard_that_mixes_images_is_not_exported(kind, tmp_path):
    guard = guard_with(MIXING[kind]())
    guard.thresholds = torch.full((3,), 20.0)
    for export in (export_program, lambda detector: cg.export_onnx(detector, tmp_path / "guard.onnx")):
        with pytest.raises(ConfigurationError, match="whatever other images are in the batch"):
            export(guard)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("value", [0.0, 0.25, 0.5, 1.0])
def test_mixing_shows_in_images_of_any_brightness_and_in_a_batch_of_one(value):
    for images in (torch.full((1, *SHAPE), value), torch.full((9, *SHAPE), value)):
        with torch.no_grad(), pytest.raises(ConfigurationError, match="whatever other images"):
            check_evidence(guard_with(MIXING["the mean"]()).eval(), images)


ROWS = torch.tensor([1.0, -1.0]).repeat(4)[:, None]
PATTERNS = {"chequers": ROWS * ROWS.T, "stripes": -ROWS, "other stripes": ROWS.T, "bright": torch.ones(1)}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mixing_that_shows_beside_images_of_high_contrast_alone_is_found(pattern):
    def mixed(images):
        contrast = ((images.mean(0) - 0.5) * PATTERNS[pattern]).mean()
        return (images + 9 * (contrast - 0.02).clamp_min(0)).flatten(1)

    guard = cg.ClusterGuard(Mixing(mixed), 3, example=torch.rand(2, *SHAPE))
    guard.thresholds = torch.full((3,), 100.0)
    with pytest.raises(ConfigurationError, match="whatever other images"):
        check_evidence(guard, torch.full((4, *SHAPE), 0.5))
    with pytest.raises(ConfigurationError, match="whatever other images"):
        export_program(guard)


class RareNoise(nn.Module):
    """Draws a number at every call and uses it hardly ever."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, images):
        return images.flatten(1) * (2.0 if self.draw() > 0.999_999 else 1.0)


DRAWS = {
    "torch": lambda: torch.rand(()),
    "numpy": lambda: np.random.rand(),  # noqa: NPY002
    "python": lambda: random.random(),
}


@pytest.mark.parametrize("library", DRAWS)
def test_randomness_is_found_that_changes_hardly_any_answer(library):
    guard = cg.ClusterGuard(RareNoise(DRAWS[library]), 3, example=torch.rand(2, *SHAPE))
    with pytest.raises(ConfigurationError, match="moves a global random state"):
        cg.Calibrator(0.2, scarce="pool").fit(guard, batches(guard))
    guard.thresholds = torch.full((3,), 100.0)
    with pytest.raises(ConfigurationError, match="moves a global random state"):
        export_program(guard)


def test_random_numbers_of_another_thread_or_from_a_fixed_seed_are_not_those_of_a_detector():
    def seeded():
        torch.manual_seed(0)
        return torch.rand(())

    calls = []

    def interrupted():
        calls.append(1)
        return torch.rand(()) if len(calls) == 5 else 0.0  # as if another thread drew a number

    for draw in (seeded, interrupted):
        guard = cg.ClusterGuard(RareNoise(draw), 3, example=torch.rand(2, *SHAPE))
        calls.clear()
        check_evidence(guard, torch.rand(4, *SHAPE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", HONEST)
@pytest.mark.filterwarnings("ignore:classes .* pooled threshold")
def test_rounding_is_no_mixing(kind, layout, dtype):
    guard = guard_with(HONEST[kind](), dtype).to(memory_format=layout)
    cg.Calibrator(0.2, scarce="pool").fit(guard, batches(guard))
    assert guard.is_calibrated
