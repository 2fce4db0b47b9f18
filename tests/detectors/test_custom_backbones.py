from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from clusterguard.detectors import make_encoder
from clusterguard.errors import UnsupportedBackboneError
from torch import Tensor, nn

M = 14


class LeNet(nn.Module):
    """Reshapes as many tutorials do, so that images of a wrong size give another batch size instead of an error."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 5, stride=4)
        self.linear = nn.Linear(4 * 36, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.convolution(images).relu().reshape(-1, 4 * 36))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU()), (1, 8, 8)),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 50 * 50, 16)), (3, 50, 50)),
        (nn.Sequential(nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (4, 9, 9)),
        (nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 30 * 30, 5)), (3, 32, 32)),
        (nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.BatchNorm2d(3), nn.Flatten()), (3, 7, 7)),
        (LeNet(), (1, 28, 28)),
    ],
)
def test_the_width_of_other_modules_is_found_without_images(module: nn.Module, shape: tuple[int, ...]) -> None:
    encoder = make_encoder(module, M)
    assert encoder(torch.rand(3, *shape)).shape == (3, M)
    assert not any(tensor.is_meta for tensor in [*module.state_dict().values(), *encoder.state_dict().values()])


class LooksAtValues(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) * images.mean().item()


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()),
        nn.Sequential(nn.Flatten(), nn.LazyLinear(5)),
        LooksAtValues(),
    ],
    ids=["depends-on-size", "lazy", "looks-at-values"],
)
def test_other_modules_take_an_example(module: nn.Module) -> None:
    images = torch.rand(3, 1, 6, 6)
    with pytest.raises(UnsupportedBackboneError, match=r"expected .*, got .*; pass example=images"):
        make_encoder(module, M)
    assert make_encoder(module, M, example=images)(images).shape == (3, M)


class ReturnsDict(nn.Module):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": images.flatten(1)}


class ForgetsTheBatch(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(0, 3))


@pytest.mark.parametrize(
    ("module", "got"),
    [
        (ReturnsDict(), "got dict"),
        (nn.Conv2d(3, 4, 3, padding=1), r"got torch.float32 \(2, 4, 8, 8\)"),
        (ForgetsTheBatch(), r"got torch.float32 \(3, 8\)"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(0)), r"got torch.float32 \(6,\)"),
    ],
    ids=["dict", "map", "no-batch", "one-axis"],
)
def test_an_output_that_is_no_batch_of_vectors_is_refused(module: nn.Module, got: str) -> None:
    with pytest.raises(UnsupportedBackboneError, match=rf"expected .*\(2, D\).*{got}; wrap the backbone"):
        make_encoder(module, M, example=torch.rand(2, 3, 8, 8))
    with pytest.raises(UnsupportedBackboneError, match=r"expected .*\(2, D\).*got .*; wrap the backbone"):
        make_encoder(module, M)


@pytest.mark.parametrize(
    "build", [lambda: timm.create_model("test_resnet"), torchvision.models.shufflenet_v2_x0_5, lambda: LeNet()]
)
def test_an_example_that_the_backbone_does_not_take_is_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(UnsupportedBackboneError, match=r"images \(2, 5, 28, 28\), got RuntimeError"):
        make_encoder(build(), M, example=torch.rand(2, 5, 28, 28))


class Counting(nn.Module):
    """Keeps state in the ways modules do, in eval mode too."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.frozen = nn.BatchNorm2d(3).eval()
        self.learning = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        assert not self.drop.training
        self.calls += 1
        self.seen.append(tuple(images.shape))
        return self.drop(self.learning(self.frozen(images))).mean(dim=(2, 3))


@pytest.mark.parametrize("example", [None, torch.rand(2, 3, 8, 8)])
def test_looking_for_the_width_leaves_no_trace(example: Tensor | None) -> None:
    module = Counting()
    encoder = make_encoder(module, 1, example=example)
    for counting in (module, encoder[0]):
        assert counting.calls == 0
        assert counting.seen == []
        assert counting.learning.num_batches_tracked == 0
        assert counting.training
        assert counting.learning.training
        assert not counting.frozen.training
        assert all(parameter.grad is None for parameter in counting.parameters())
    assert encoder.training


def test_a_lazy_backbone_stays_lazy_and_its_encoder_does_not() -> None:
    module = nn.Sequential(nn.Flatten(), nn.LazyLinear(5))
    encoder = make_encoder(module, M, example=torch.rand(2, 1, 4, 4))
    assert isinstance(module[1].weight, nn.UninitializedParameter)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 16 * 5 + 5 + 5 * M + M


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.ReLU()),
        lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        lambda: timm.create_model("resnet10t", num_classes=0),
        lambda: torchvision.models.resnet18(num_classes=4),
    ],
)
@pytest.mark.parametrize("has_example", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_encoder_that_is_made_under_autocast_has_the_data_type_of_its_backbone(
    build: Callable[[], nn.Module], has_example: bool, dtype: torch.dtype
) -> None:
    images = torch.rand(2, 3, 32, 32, dtype=dtype)
    backbone = build().to(dtype).eval()
    if not has_example:
        backbone(images)  # a lazy layer needs images from somewhere
    with torch.autocast("cpu", torch.bfloat16):
        encoder = make_encoder(backbone, 5, example=images if has_example else None)
    assert {parameter.dtype for parameter in encoder.parameters()} == {dtype}
    assert encoder.eval()(images).dtype == dtype
