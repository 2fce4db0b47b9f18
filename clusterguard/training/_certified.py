"""Training for a proof: the guard is fitted to the worst that a box of images can do, without any attack."""

import math
from typing import final

import torch
from clusterguard._support import IN_GREY_LEVELS, check_numbers, evaluation_mode
from clusterguard.certification import bound, check_bounds
from clusterguard.detection import Calibrator
from clusterguard.detectors import ClusterGuard
from clusterguard.errors import ConfigurationError
from clusterguard.training._engine import TrainingStep
from clusterguard.training._optimizers import MakeOptimizer, MakeScheduler
from clusterguard.training._options import TrainingOptions
from clusterguard.training._trainer import DetectorTrainer
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy


def initialise(module: nn.Module, *, generator: Generator | None = None) -> None:
    """Draw all weights of linear layers and convolutions anew, so that intervals keep their width from layer to layer.

    From torch's own initial weights intervals grow with depth, and a training for certificates has to undo that first.
    Biases become 0; other layers stay as they are.

    Args:
        module: whose layers, such as a guard or its encoder; changed in place.
        generator: randomness, on the weights' device; None takes torch's global one.

    Reference:
        Shi et al., "Fast certified robust training with short warmup" (2021).

    Example:
        >>> layer = nn.Linear(10_000, 100)
        >>> initialise(layer)
        >>> round(layer.weight.abs().sum(dim=1).mean().item(), 1)  # times a radius before the ReLU halves it
        2.0
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            inputs = layer.weight[0].numel()
            nn.init.normal_(layer.weight, std=math.sqrt(2 * math.pi) / inputs, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@final
class CertifiedTrainer(DetectorTrainer):
    """Teaches a guard decisions that `certify` can prove, for every image within a radius in l∞.

    A step costs about three plain ones, however strong an attack would have to be: instead of attacking, it bounds what
    the whole ball can become. The loss is ``(1 − κ) · (cross-entropy + center_weight · mean ½d²) + κ · cross-entropy of
    the bounds``, where κ and the radius grow together; cross-entropies are of the mixture's posterior at a temperature.
    A guard that is trained from scratch gains by `initialise` first.

    Args:
        guard: trained in place, on its own device; its network as in `certify`.
        eps: radius in l∞, in (0, 1]. Somewhat more than what is to be proved proves more.
        optimizer: a function that makes one of the guard's parameters, such as
            ``lambda parameters: torch.optim.SGD(parameters, lr=0.1)``, or an optimizer of ``guard.parameters()``; None
            takes Adam with learning rate 1e-3.
        scheduler: a function that makes one of the optimizer, or a scheduler of it; see `DetectorTrainer`.
        warmup_epochs: epochs on benign images alone first.
        ramp_epochs: epochs after that over which the radius grows to its full length; short ones end at chance.
        bound_weight: κ at its largest, in (0, 1].
        center_weight: of the distance of benign images to their centres, at least 0. It makes for tight clusters, so
            for detection outside the ball, and costs certificates.
        temperature: by which the mixture's logits are divided, positive.
        calibrator: fits the final thresholds.
        options: how steps are taken.

    Raises:
        ConfigurationError: an option out of its range.

    Reference:
        Gowal et al., "On the effectiveness of interval bound propagation for training verifiably robust models" (2018).

    Example:
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 1, 2))
        >>> images = torch.tensor([[[[0.9, 0.1]]], [[[0.1, 0.9]]]])
        >>> optimizer = torch.optim.Adam(guard.parameters(), 0.1)
        >>> trainer = CertifiedTrainer(guard, eps=0.2, ramp_epochs=20, optimizer=optimizer)
        >>> loader = [(images, torch.tensor([0, 1]))]
        >>> history = trainer.fit(loader, loader, epochs=40, calibrate=False, progress=False)
        >>> history[-1].attack_success_rate  # what is not proved of the last batches
        0.0
    """

    def __init__(
        self,
        guard: ClusterGuard,
        *,
        eps: float,
        optimizer: MakeOptimizer | None = None,
        scheduler: MakeScheduler | None = None,
        warmup_epochs: float = 1.0,
        ramp_epochs: float = 10.0,
        bound_weight: float = 0.5,
        center_weight: float = 0.02,
        temperature: float = 1.0,
        calibrator: Calibrator | None = None,
        options: TrainingOptions | None = None,
    ) -> None:
        check_numbers(
            eps=eps,
            warmup_epochs=warmup_epochs,
            ramp_epochs=ramp_epochs,
            bound_weight=bound_weight,
            center_weight=center_weight,
            temperature=temperature,
        )
        if not (0 < eps <= 1 and 0 < bound_weight <= 1):
            raise ConfigurationError(
                f"expected eps and bound_weight in (0, 1], got {eps} and {bound_weight}; {IN_GREY_LEVELS}"
            )
        if not (0 <= warmup_epochs < math.inf and 0 <= ramp_epochs < math.inf):
            raise ConfigurationError(
                f"expected warmup_epochs and ramp_epochs of at least 0, got {warmup_epochs} and {ramp_epochs}"
            )
        if not (0 <= center_weight < math.inf and 0 < temperature < math.inf):
            raise ConfigurationError(
                "expected center_weight of at least 0 and a positive temperature, got "
                f"{center_weight} and {temperature}"
            )
        super().__init__(guard, optimizer=optimizer, scheduler=scheduler, calibrator=calibrator, options=options)
        self.guard = guard
        self.eps = eps
        self.warmup_epochs = warmup_epochs
        self.ramp_epochs = ramp_epochs
        self.bound_weight = bound_weight
        self.center_weight = center_weight
        self.temperature = temperature

    def training_step(self, images: Tensor, labels: Tensor, generator: Generator | None) -> TrainingStep:
        """The loss of a batch, of images (B, C, H, W) in [0, 1] and labels (B,); nothing in it is random."""
        representations, head = self.guard.represent(images), self.guard.head
        logits = head.logits(representations)
        spread = 0.5 * head.energies(representations).gather(1, labels[:, None].long()).mean()
        loss = cross_entropy(logits / self.temperature, labels) + self.center_weight * spread
        right = (logits.argmax(dim=1) == labels).sum()
        share = self._grown
        if not self.engine.steps:  # a network without bounds is refused now, not when the warm-up is over
            with torch.autocast(images.device.type, enabled=False):
                check_bounds(self.guard, images[:4], labels[:4], eps=self.eps)
        if not share:
            return TrainingStep(loss, right, terms={"loss/benign": loss.detach()})
        with evaluation_mode(self.guard):  # bounds need running statistics, and no dropout
            leads = bound(self.guard, images, labels, eps=share * self.eps).leads
        worst = (-leads / (2 * self.temperature)).logsumexp(dim=1).mean()  # the label's own lead is 0
        weight = share * self.bound_weight
        return TrainingStep(
            (1 - weight) * loss + weight * worst,
            right,
            (leads < 0).any(dim=1).sum(),
            {"loss/benign": loss.detach(), "loss/bounds": worst.detach()},
        )

    @property
    def _grown(self) -> float:
        """The share of its radius that the ball has by now."""
        grown = self.epochs_done - self.warmup_epochs
        return 0.0 if grown < 0 else min(1.0, grown / self.ramp_epochs) if self.ramp_epochs else 1.0
