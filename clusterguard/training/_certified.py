"""Certified training: the guard is trained on proved bounds over a ball of images, without any attack."""

import math
from collections.abc import Mapping
from typing import final

import torch
from clusterguard._support import IN_GREY_LEVELS, check_numbers, evaluation_mode, sole_use
from clusterguard.attacks import PGD, LInf
from clusterguard.certification import Interval, bound
from clusterguard.certification._internal import Box, check_bounds, followed_activations
from clusterguard.detection import Calibrator
from clusterguard.detectors import ClusterGuard, WithThresholds
from clusterguard.errors import ConfigurationError
from clusterguard.training._bound_terms import (
    Statistics,
    balance_loss,
    batch_statistics,
    normalized_by,
    stability_loss,
    tightness_loss,
)
from clusterguard.training._optimizers import OptimizerOrFactory, SchedulerOrFactory
from clusterguard.training._options import TrainingOptions
from clusterguard.training._step import TrainingStep
from clusterguard.training._trainer import DetectorTrainer
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

_ATTACK_STEPS = 8


def initialise(module: nn.Module, *, generator: Generator | None = None) -> None:
    """Redraw all weights of linear layers and convolutions, so that intervals keep their width from layer to layer.

    With torch's default initial weights, intervals grow with depth, and certified training has to undo this growth
    first. Biases become 0; other layers stay as they are.

    Args:
        module: module to change in place, such as a guard or its encoder.
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
    """Trains a guard to make decisions that `certify` can prove for every image within a radius in l∞.

    A step attacks nothing, unless `bound_radius` is set. It computes bounds over the whole ball, so it costs about
    three plain steps, however expensive a strong attack would be. The loss is ``(1 − κ) · (cross-entropy +
    center_weight · mean ½·energy) + κ · cross-entropy of the bounds``, where κ and the radius grow together. The energy
    is the head's, d² for the paper's head. The first cross-entropy is that of the head's logits, the second that of
    −½d² with bounds on the distances d, both at a temperature. Batch normalisation uses the statistics of the benign
    batch in both, with gradients through them; proofs use the running ones. Before training from scratch, call
    `initialise` on the guard for a better result.

    Args:
        guard: guard to train, in place and on its own device; its network is as in `certify`.
        eps: radius in l∞, in (0, 1]. A radius somewhat larger than the one to prove gives more proofs.
        optimizer: optimizer of ``guard.parameters()``, or a function that makes one from the guard's parameters, such
            as ``lambda parameters: torch.optim.SGD(parameters, lr=0.1)``; None takes Adam with learning rate 1e-3.
        scheduler: scheduler of the optimizer, or a function that makes one from it; see `DetectorTrainer`.
        warmup_epochs: number of first epochs on benign images alone.
        ramp_epochs: number of epochs after the warm-up over which the radius grows to full length. With too
            short a ramp, training ends at chance accuracy.
        bound_weight: largest value of κ, in (0, 1].
        center_weight: factor of the energy of benign images under their classes, at least 0. A larger one gives tighter
            clusters, and so better detection outside the ball, but fewer certificates.
        temperature: divisor of the head's logits, positive. For `GaussianClusters`, M gives plain cross-entropy.
        regularization: factor of two terms that keep deep networks trainable while the radius grows, at least 0; it
            falls to 0 as the radius reaches its full length. One keeps the intervals before the ReLUs from becoming
            wider than twice those of the images, the other keeps ReLUs that are always on and always off in balance.
        stability_weight: factor of a term that makes ReLUs keep their sign in the whole ball, at least 0. It gives
            tighter proofs, and a lower accuracy.
        bound_radius: radius of the balls that are bounded, in (0, eps]; None takes eps. A smaller ball lies around an
            image that eight steps of PGD find, and stays within the whole ball (SABR). Its authors report a higher
            accuracy; intervals then prove less at eps, so prove such a guard with `method="branching"`.
        calibrator: calibrator that fits the final thresholds; None takes `Calibrator()`.
        options: options of the training steps; None takes `TrainingOptions()`.

    Raises:
        ConfigurationError: an option is out of its range.

    Reference:
        Gowal et al., "On the effectiveness of interval bound propagation for training verifiably robust models" (2018).
        Shi et al., "Fast certified robust training with short warmup" (2021), for batch normalisation and
        `regularization`. Xiao et al., "Training for faster adversarial robustness verification via inducing ReLU
        stability" (2019), for `stability_weight`. Müller et al., "Certified training: small boxes are all you need"
        (2023), for `bound_radius`.

    Example:
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 1, 2))
        >>> images = torch.tensor([[[[0.9, 0.1]]], [[[0.1, 0.9]]]])
        >>> optimizer = torch.optim.Adam(guard.parameters(), 0.1)
        >>> trainer = CertifiedTrainer(guard, eps=0.2, ramp_epochs=20, optimizer=optimizer)
        >>> loader = [(images, torch.tensor([0, 1]))]
        >>> history = trainer.fit(loader, loader, epochs=40, calibrate=False, progress=False)
        >>> history[-1].attack_success_rate  # share of images without a proof in the last epoch
        0.0
    """

    def __init__(
        self,
        guard: ClusterGuard,
        *,
        eps: float,
        optimizer: OptimizerOrFactory | None = None,
        scheduler: SchedulerOrFactory | None = None,
        warmup_epochs: float = 1.0,
        ramp_epochs: float = 10.0,
        bound_weight: float = 0.5,
        center_weight: float = 0.02,
        temperature: float = 1.0,
        regularization: float = 0.0,
        stability_weight: float = 0.0,
        bound_radius: float | None = None,
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
            regularization=regularization,
            stability_weight=stability_weight,
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
        if not (0 <= regularization < math.inf and 0 <= stability_weight < math.inf):
            raise ConfigurationError(
                "expected regularization and stability_weight of at least 0, got "
                f"{regularization} and {stability_weight}"
            )
        check_numbers(bound_radius=eps if bound_radius is None else bound_radius)
        if bound_radius is not None and not 0 < bound_radius <= eps:
            raise ConfigurationError(f"expected bound_radius in (0, eps], got {bound_radius} with eps {eps}")
        super().__init__(guard, optimizer=optimizer, scheduler=scheduler, calibrator=calibrator, options=options)
        self.guard = guard
        self.eps = eps
        self.warmup_epochs = warmup_epochs
        self.ramp_epochs = ramp_epochs
        self.bound_weight = bound_weight
        self.center_weight = center_weight
        self.temperature = temperature
        self.regularization = regularization
        self.stability_weight = stability_weight
        self.bound_radius = bound_radius

    @property
    def _bound_radius(self) -> float:
        return self.eps if self.bound_radius is None else self.bound_radius

    def defining_options(self) -> dict[str, float | None]:
        """All that the trainer was made with, beside the guard."""
        plain = ("eps", "warmup_epochs", "ramp_epochs", "bound_weight", "center_weight", "temperature")
        return {name: getattr(self, name) for name in (*plain, "regularization", "stability_weight", "bound_radius")}

    def training_step(self, images: Tensor, labels: Tensor, generator: Generator | None) -> TrainingStep:
        """The loss of a batch of images (B, C, H, W) in [0, 1] and labels (B,).

        Args:
            images: (B, C, H, W) in [0, 1], on the guard's device.
            labels: class labels (B,).
            generator: randomness of the attack that `bound_radius` asks for.
        """
        with batch_statistics(self.guard) as statistics:
            representations, head = self.guard.represent(images), self.guard.head
        logits = head.logits(representations)
        spread = 0.5 * head.energies(representations).gather(1, labels[:, None].long()).mean()
        loss = cross_entropy(logits / self.temperature, labels) + self.center_weight * spread
        right = (head.distances(representations.detach()).argmin(dim=1) == labels).sum()
        share = self._grown
        if not self.engine.steps:  # refuses a network without known bounds now, rather than after the warm-up
            with torch.autocast(images.device.type, enabled=False):
                check_bounds(self.guard, images[:4], labels[:4], eps=self.eps)
        if not share:
            return TrainingStep(loss, right, terms={"loss/benign": loss.detach()})
        # Bounds are known for given statistics only, and not for dropout.
        boxes: list[Box] = []
        centers, radius = self._move(images, labels, generator, statistics), share * self._bound_radius
        with (
            sole_use(self.guard),
            evaluation_mode(self.guard),
            normalized_by(statistics),
            followed_activations(boxes.append),
        ):
            leads = bound(self.guard, centers, labels, eps=radius).leads
        worst = (-leads / (2 * self.temperature)).logsumexp(dim=1).mean()  # includes the label, whose lead is 0
        weight = share * self.bound_weight
        terms = {"loss/benign": loss.detach(), "loss/bounds": worst.detach()}
        loss = (1 - weight) * loss + weight * worst
        if boxes and self.regularization and share < 1:
            ball = Interval.around(centers, radius)
            width = (self.guard.normalize(ball.upper) - self.guard.normalize(ball.lower)).mean()
            terms["loss/regularization"] = tightness_loss(width, boxes) + balance_loss(boxes)
            loss = loss + self.regularization * (1 - share) * terms["loss/regularization"]
        if boxes and self.stability_weight:
            terms["loss/stability"] = stability_loss(boxes)
            loss = loss + self.stability_weight * terms["loss/stability"]
        terms = {name: term.detach() for name, term in terms.items()}
        return TrainingStep(loss, right, (leads < 0).any(dim=1).sum(), terms)

    def _move(self, images: Tensor, labels: Tensor, generator: Generator | None, statistics: Statistics) -> Tensor:
        """The centres of the balls that are bounded: images, or where an attack takes them."""
        reach = self._grown * (self.eps - self._bound_radius)
        if not reach:
            return images
        attack = PGD(
            norm=LInf.name,
            eps=reach,
            step_size=reach / 4,
            steps=_ATTACK_STEPS,
            start="random",
            keep="last",
            objective="cross_entropy",
        )
        accepting = WithThresholds(self.guard, torch.full_like(self.guard.thresholds, torch.inf))
        fixed = {layer: (mean.detach(), var.detach()) for layer, (mean, var) in statistics.items()}
        with sole_use(self.guard), normalized_by(fixed):
            return attack(accepting, images, labels, generator=generator)

    def validate(self, images: Tensor, labels: Tensor, generator: Generator) -> Mapping[str, Tensor]:
        """The figures of validation images, with bounds at the full radius; see `DetectorTrainer`.

        The bounds leave out rounding, so they are no proofs; `certified_success_rate` proves.

        Args:
            images: (B, C, H, W) in [0, 1], on the guard's device.
            labels: class labels (B,).
            generator: not used.
        """
        figures = super().validate(images, labels, generator)
        with torch.no_grad():
            leads = bound(self.guard, images, labels, eps=self.eps).leads
        return {**figures, "certified_accuracy": figures["accepted_accuracy"] & (leads >= 0).all(dim=1)}

    @property
    def epochs_before_full_strength(self) -> float:
        """The epochs of the warm-up and of the ramp."""
        return self.warmup_epochs + self.ramp_epochs

    @property
    def _grown(self) -> float:
        """The present radius as a share of the full one."""
        grown = self.epochs_done - self.warmup_epochs
        return 0.0 if grown < 0 else min(1.0, grown / self.ramp_epochs) if self.ramp_epochs else 1.0
