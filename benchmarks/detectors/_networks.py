"""The networks of the comparison. They map images to features, and each detector adds a head."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from clusterguard.detectors import CompiledCall
from clusterguard.errors import ConfigurationError
from torch import Tensor, nn

from benchmarks.detectors._residual import InputShape, resnet9, resnet18, wide_resnet


class Features(nn.Module):
    """A network body, with the number of its features and the shape of its images.

    Args:
        body: module that maps images (B, C, H, W) to features (B, D).
        image_shape: shape (C, H, W) of an image.

    Attributes:
        num_features: number D of features.
    """

    def __init__(self, body: nn.Module, image_shape: InputShape) -> None:
        super().__init__()
        self.body = body
        self.image_shape = image_shape
        self._call: Callable[[nn.Module, Tensor], Tensor] = _run_body
        with torch.no_grad():
            was_training = body.training
            self.num_features: int = body.eval()(torch.zeros(1, *image_shape)).shape[1]
            body.train(was_training)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, num_features) of images (B, C, H, W) in [0, 1]."""
        return self._call(self.body, images)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Run the body through `torch.compile`, as `ClusterGuard.compile` does."""
        self._call = CompiledCall(*args, **kwargs)


def _run_body(body: nn.Module, images: Tensor) -> Tensor:
    features: Tensor = body(images)
    return features


def strided_cnn(shape: InputShape, *, width: int, features: int) -> nn.Module:
    """Two strided convolutions of `width` and twice `width` channels, then a linear layer.

    With 16 channels, as in the tiny network, a digit takes about 1 MFLOP.
    """
    size = (shape[1] // 4) * (shape[2] // 4)
    convolutions = [nn.Conv2d(shape[0], width, 4, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 4, 2, 1), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(2 * width * size, features), nn.ReLU())


def cnn_5(shape: InputShape) -> nn.Module:
    """Four 3 × 3 convolutions, of 16, 32, 64 and 64 channels, the second and fourth strided, then a linear layer.

    Batch normalisation follows each. It is the kind of network that certified training is compared on, made narrow.
    """
    layers: list[nn.Module] = []
    channels = shape[0]
    for width, stride in ((16, 1), (32, 2), (64, 1), (64, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    size = channels * -(-shape[1] // 4) * -(-shape[2] // 4)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(size, 200), nn.BatchNorm1d(200), nn.ReLU())


def small_cnn(shape: InputShape) -> nn.Module:
    """The network of TRADES for MNIST by Zhang et al. (2019): 32-32-pool-64-64-pool, then 200-200."""

    def block(inside: int, outside: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inside, outside, 3),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]

    size = (((shape[1] - 4) // 2 - 4) // 2) * (((shape[2] - 4) // 2 - 4) // 2)
    dense = [nn.Linear(64 * size, 200), nn.ReLU(), nn.Dropout(0.5), nn.Linear(200, 200), nn.ReLU()]
    return nn.Sequential(*block(shape[0], 32), *block(32, 64), nn.Flatten(), *dense)


def released_cnn(shape: InputShape) -> nn.Module:
    """The network of the paper's released code: 64-pool-128-pool, then 1,024."""
    size = (shape[1] // 4) * (shape[2] // 4)
    return nn.Sequential(
        nn.Conv2d(shape[0], 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128 * size, 1024),
        nn.ReLU(),
    )


MODELS: dict[str, Callable[[InputShape], nn.Module]] = {
    "tiny-cnn": partial(strided_cnn, width=16, features=100),
    "wide-cnn": partial(strided_cnn, width=32, features=256),
    "cnn-5": cnn_5,
    "small-cnn": small_cnn,
    "released-cnn": released_cnn,
    "resnet9": resnet9,
    "resnet18": resnet18,
    "resnet18-half": partial(resnet18, width=32),
    "wrn-10-1": partial(wide_resnet, depth=10, width=1),
    "wrn-16-4": partial(wide_resnet, depth=16, width=4),
    "wrn-28-10": partial(wide_resnet, depth=28, width=10),
    "wrn-34-10": partial(wide_resnet, depth=34, width=10),
}


def build_network(name: str, image_shape: InputShape) -> Features:
    """Build a network without a classifier. Its weights are drawn from torch's global generator.

    Args:
        name: key of `MODELS`.
        image_shape: shape (C, H, W) of an image.

    Raises:
        ConfigurationError: the name is unknown.
    """
    if name not in MODELS:
        raise ConfigurationError(f"expected a model among {', '.join(MODELS)}, got {name!r}")
    return Features(MODELS[name](image_shape), image_shape)
