"""Training of a guard that compares images with templates."""

import math
from collections.abc import Iterable
from typing import final

import torch
from clusterguard._support import check_numbers
from clusterguard.certification._internal import linear_layer_of, window_parts
from clusterguard.detection import Calibrator
from clusterguard.detectors import ClusterGuard, NearestTemplate
from clusterguard.detectors._internal import project_templates
from clusterguard.errors import ConfigurationError
from clusterguard.training._optimizers import OptimizerOrFactory, SchedulerOrFactory
from clusterguard.training._options import TrainingOptions
from clusterguard.training._step import TrainingStep
from clusterguard.training._trainer import DetectorTrainer
from einops import rearrange
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy, one_hot


@final
class TemplateTrainer(DetectorTrainer):
    """Trains a guard of `make_template_guard` or `make_local_guard` so that few changes can't change its decision.

    After every step, templates are limited so that one pixel adds at most 1 to a cost. So t changed pixels move every
    distance by at most t, and so does a change of size t in l1. In a guard of `make_local_guard`, a window adds at most
    1, so t windows take the part of t pixels. The loss asks for room: it is the cross-entropy of
    −distance / temperature, where 2·pixels is first taken from the distances to the wrong classes. During training, the
    distance to a class is a smooth minimum over its templates, so that all templates learn. Nothing is attacked.

    Args:
        guard: guard to train, in place and on its own device, as `make_template_guard` or `make_local_guard` returns
            it.
        pixels: number of pixels, or of windows, for which to make room, at least 0. More of them give larger
            certificates, and a lower accuracy. A square patch of side k meets up to ⌈(k + size − 1) / stride⌉² windows.
        temperature: divisor of the distances, positive, in pixels.
        smoothness: temperature of the smooth minimum, positive, in pixels.
        optimizer: optimizer of ``guard.parameters()``, or a function that makes one from the guard's parameters; None
            takes Adam with learning rate 1e-2.
        scheduler: scheduler of the optimizer, or a function that makes one from it; see `DetectorTrainer`.
        calibrator: calibrator that fits the final thresholds; None takes `Calibrator()`.
        options: options of the training steps; None takes `TrainingOptions()`.

    Raises:
        ConfigurationError: an option is out of its range, or the guard is another one.

    Reference:
        Pal, Vidal & Sulam, "Certified robustness against sparse adversarial perturbations via data localization"
        (2024), for classifiers whose scores change by at most 1 with a pixel.

    Example:
        >>> from clusterguard.detectors import make_template_guard
        >>> labels = torch.arange(200) % 2
        >>> images = 0.6 * torch.rand(200, 1, 4, 4) + 0.4 * labels.view(-1, 1, 1, 1)
        >>> guard = make_template_guard([(images, labels)], num_classes=2, templates=3)
        >>> trainer = TemplateTrainer(guard, pixels=2)
        >>> loader = [(images, labels)]
        >>> history = trainer.fit(loader, loader, epochs=20, calibrate=False, progress=False)
        >>> history[-1].accuracy > 0.95
        True
    """

    def __init__(
        self,
        guard: ClusterGuard,
        *,
        pixels: float = 12.0,
        temperature: float = 5.0,
        smoothness: float = 1.0,
        optimizer: OptimizerOrFactory | None = None,
        scheduler: SchedulerOrFactory | None = None,
        calibrator: Calibrator | None = None,
        options: TrainingOptions | None = None,
    ) -> None:
        check_numbers(pixels=pixels, temperature=temperature, smoothness=smoothness)
        if not (0 <= pixels < math.inf and 0 < temperature < math.inf and 0 < smoothness < math.inf):
            raise ConfigurationError(
                "expected pixels of at least 0, and a positive temperature and smoothness, got "
                f"{pixels}, {temperature} and {smoothness}"
            )
        if not isinstance(guard, ClusterGuard) or not isinstance(guard.head, NearestTemplate):
            raise ConfigurationError(
                "expected a guard as make_template_guard or make_local_guard returns it, got one without templates"
            )
        windows = window_parts(guard)
        self.layer = None if windows else _find_templates(guard)
        if windows:  # hands on the costs as they are, also in a guard that was loaded
            windows[1].requires_grad_(False)
        super().__init__(
            guard,
            optimizer=_adam if optimizer is None else optimizer,
            scheduler=scheduler,
            calibrator=calibrator,
            options=options,
        )
        self.guard = guard
        self.pixels = pixels
        self.temperature = temperature
        self.smoothness = smoothness

    def defining_options(self) -> dict[str, float]:
        """All that the trainer was made with, beside the guard."""
        return {name: getattr(self, name) for name in ("pixels", "temperature", "smoothness")}

    def training_step(self, images: Tensor, labels: Tensor, generator: Generator | None) -> TrainingStep:
        """The loss of a batch of images (B, C, H, W) in [0, 1] and labels (B,); the generator is not used."""
        costs = rearrange(self.guard.represent(images).float(), "b (k j) -> b k j", k=self.guard.num_classes)
        distances = -self.smoothness * (-costs / self.smoothness).logsumexp(dim=2)
        is_other = 1 - one_hot(labels.long(), self.guard.num_classes)
        logits = (2 * self.pixels * is_other - distances) / self.temperature
        right = (costs.detach().amin(dim=2).argmin(dim=1) == labels).sum()
        return TrainingStep(cross_entropy(logits, labels), right)

    def limit_weights(self) -> None:
        """Limit what one pixel may add to a cost. Costs of windows have their limits by themselves."""
        if self.layer is not None and isinstance(self.guard.image_shape, tuple):
            project_templates(self.layer, self.guard.image_shape[0])


def _find_templates(guard: ClusterGuard) -> nn.Linear:
    """The layer that holds the templates of a guard.

    Raises:
        ConfigurationError: the guard does not shift pixels by -0.5, or has no bias, or knows no image shape.
    """
    layer = linear_layer_of(guard)
    if layer.bias is None or not isinstance(guard.image_shape, tuple) or not _is_centred(guard):
        raise ConfigurationError(
            "expected a guard as make_template_guard returns it, with mean=0.5, std=1.0, a bias and a known "
            f"image_shape, got {guard.normalize.mean.flatten().tolist()}, {guard.normalize.std.flatten().tolist()}, "
            f"{layer} and {guard.image_shape}"
        )
    return layer


def _is_centred(guard: ClusterGuard) -> bool:
    """Whether pixels reach the network shifted by -0.5 and otherwise as they are."""
    return bool((guard.normalize.mean == 0.5).all() and (guard.normalize.std == 1).all())


def _adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)
