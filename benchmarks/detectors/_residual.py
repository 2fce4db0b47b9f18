"""The residual networks of the comparison, without their classifiers."""

from torch import Tensor, nn
from torch.nn import functional

InputShape = tuple[int, int, int]


def resnet18(shape: InputShape, *, width: int = 64) -> nn.Module:
    """ResNet-18 of timm with a stem for images of 32 × 32 pixels: one 3 × 3 convolution to 64 channels and no pooling.

    Args:
        shape: shape (C, H, W) of an image.
        width: number of channels of the first stage, which doubles with each further one. The published network has 64.
    """
    import timm

    channels = (width, 2 * width, 4 * width, 8 * width)
    model: nn.Module = timm.create_model("resnet18", num_classes=0, in_chans=shape[0], channels=channels)
    model.conv1 = nn.Conv2d(shape[0], 64, kernel_size=3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


class PlainBlock(nn.Module):
    """A residual block of two 3 × 3 convolutions, whose sum has no activation behind it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_convolve(channels, channels), *_convolve(channels, channels))

    def forward(self, images: Tensor) -> Tensor:
        """Map feature maps (B, channels, H, W) to feature maps of the same shape."""
        change: Tensor = self.layers(images)
        return images + change


def _convolve(inside: int, outside: int) -> list[nn.Module]:
    return [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]


class Scaled(nn.Module):
    """A multiplication by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, features: Tensor) -> Tensor:
        """The features, of any shape, times the factor."""
        return self.factor * features


def resnet9(shape: InputShape) -> nn.Module:
    """The fast residual network of nine layers by Page, "How to train your ResNet" (2018), without its classifier.

    There the logits are multiplied by 0.125. Here it is the features, without which the last layer diverges at the
    learning rates of the other networks.
    """
    pool = nn.MaxPool2d(2)
    return nn.Sequential(
        *_convolve(shape[0], 64),
        *_convolve(64, 128),
        pool,
        PlainBlock(128),
        *_convolve(128, 256),
        pool,
        *_convolve(256, 512),
        pool,
        PlainBlock(512),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        Scaled(0.125),
    )


class WideBlock(nn.Module):
    """A pre-activation residual block of two 3 × 3 convolutions."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inside), nn.BatchNorm2d(outside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False) if inside != outside else None

    def forward(self, images: Tensor) -> Tensor:
        """Map feature maps (B, inside, H, W) to (B, outside, H/stride, W/stride)."""
        active = functional.relu(self.norm1(images))
        kept = images if self.shortcut is None else self.shortcut(active)
        change: Tensor = self.conv2(functional.relu(self.norm2(self.conv1(active))))
        return kept + change


def wide_resnet(shape: InputShape, *, depth: int, width: int) -> nn.Module:
    """The wide residual network of Zagoruyko & Komodakis (2016)."""
    blocks, channels = (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]
    layers: list[nn.Module] = [nn.Conv2d(shape[0], channels[0], 3, 1, 1, bias=False)]
    for group in range(3):
        for index in range(blocks):
            inside = channels[group] if index == 0 else channels[group + 1]
            layers.append(WideBlock(inside, channels[group + 1], 2 if group and index == 0 else 1))
    body = nn.Sequential(*layers, nn.BatchNorm2d(channels[3]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return body
