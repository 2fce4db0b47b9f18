"""The paper's training algorithm: attack the guard as it is, relabel what got through, fit the clusters."""

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal, NamedTuple, final, get_args

import torch
from clusterguard._support import check_numbers, evaluation_mode
from clusterguard.attacks import Attack, check_radius, get_norm, ramp, scale
from clusterguard.detection import Calibrator, Loader, decide, false_positive_rate, fit_thresholds, is_broken, judge
from clusterguard.detectors import ClusterGuard, WithThresholds
from clusterguard.errors import ConfigurationError, TooFewCalibrationExamplesError
from clusterguard.training._engine import TrainingStep
from clusterguard.training._losses import (
    AdversarialTarget,
    adversarial_energy,
    class_cross_entropy,
    cluster_terms,
    counts_of,
)
from clusterguard.training._optimizers import MakeOptimizer, MakeScheduler
from clusterguard.training._options import TrainingOptions
from clusterguard.training._trainer import DetectorTrainer
from torch import Generator, Tensor

Relabel = Literal["separate", "graded", "original"]


class _Relabelled(NamedTuple):
    """A batch when it has been attacked: images (B, C, H, W), and (B,) each of the rest.

    Attributes:
        images: benign ones, then attacked ones.
        labels: their original classes.
        found: the labels that the guard gave to attacked ones; of benign ones their classes.
        is_separate: the share of each that does not belong to its class.
    """

    images: Tensor
    labels: Tensor
    found: Tensor
    is_separate: Tensor


@final
class AdversarialClusterTrainer(DetectorTrainer):
    """Teaches a guard to keep benign classes and adversarial images in clusters of their own.

    Each step attacks a batch with the guard as it is (in eval mode), relabels each attacked image by whether it
    got through (accepted under a wrong label: adversarial cluster; otherwise: its original class), and takes one
    optimiser step on benign and attacked images together. The loss is equation 31 as a negative log-likelihood,
    ``mean over successes of ½d² · adversarial_weight + mean over the rest of ½d²``; the likelihood itself
    underflows in float32 at the distances of an untrained network.

    Args:
        guard: trained in place, on its own device.
        attack: the training attack, such as ``PGD(norm="linf", eps=0.3, step_size=0.01, steps=40, keep="last")``.
        optimizer: a function that makes one of the guard's parameters, such as
            ``lambda parameters: torch.optim.SGD(parameters, lr=0.1)``, or an optimizer of ``guard.parameters()``; None
            takes Adam with learning rate 1e-3.
        scheduler: a function that makes one of the optimizer, or a scheduler of it; see `DetectorTrainer`.
        warmup_epochs: epochs on benign images alone first (equations 9 and 10).
        adversarial_weight: of the term of successful attacks, at least 0.
        adversarial_floor: share of the attacked images, in [0, 1]: the mean over successes is taken over at least so
            many. With the paper's 0 a single success weighs as much as all other images together.
        adversarial_target: where these are sent. "origin" is the paper's: one centre for all. "opposite": a centre for
            every original class, across the origin from its own, so that attacks on different classes need not look
            alike. "outside": to no centre at all, but out of the accepted region of the label they got. With
            relabel "original" nothing is sent.
        adversarial_margin: for "outside": how far beyond the threshold, as a share of it, at least 0. The term is
            ½·max(0, (1 + margin) τ_ŷ − d_ŷ)², with half the distance between centres in place of a τ that is +inf.
        cross_entropy_weight: of a further term, at least 0: the cross-entropy of softmax(−½d² / T), averaged over the
            images that belong to their classes. The likelihood pulls an image to its own centre however far the others
            are; cross-entropy only cares which is closest.
        temperature: T, positive. It is fixed: the optimizer is yours, and would not know of a learned one. At 1 the
            cross-entropy is that of the guard's own posterior, which is all but 0 a little off the boundary.
        relabel: "separate" is the paper's method: what got through belongs to the adversarial cluster. "graded": the
            more so, the larger its perturbation; see `grading_power`. "original" gives every attacked image its
            original class, the paper's ablation L-Ben, which is adversarial training of the same head.
        grading_power: ρ. Graded, a share of 1 − (1 − ‖δ‖ / ε)^ρ of an image that got through belongs to the adversarial
            cluster and the rest to its class, as if its centre lay between theirs. Needs an attack with a norm and eps.
        ramp_epochs: epochs after the warm-up over which the attack's radius and steps grow to their full length.
        refresh_every: steps between refreshes of the thresholds that decide what got through. Before the first
            they are +inf, so that "got through" means "misclassified".
        refresh_batches: calibration batches a refresh looks at, taken in turn.
        calibrator: fits the final thresholds; its rate is also that of the refreshes.
        options: how steps are taken: clipping, averaging, devices and processes; None takes `TrainingOptions()`.

    Raises:
        ConfigurationError: an option out of its range, or an attack that lacks what one of them needs.

    Reference:
        arXiv 2012.03483, section 3.3 and algorithm 1. Grading: Stutz, Hein & Schiele, "Confidence-calibrated
        adversarial training" (2020).

    Example:
        >>> from clusterguard import PGD
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 4, 4))
        >>> loader = DataLoader(TensorDataset(torch.rand(64, 1, 4, 4), torch.arange(64) % 2), batch_size=16)
        >>> trainer = AdversarialClusterTrainer(guard, PGD(eps=0.1, step_size=0.05, steps=2, keep="last"))
        >>> history = trainer.fit(loader, loader, epochs=2, calibrate=False, progress=False)
        >>> history[-1].loss < history[0].loss
        True
    """

    def __init__(
        self,
        guard: ClusterGuard,
        attack: Attack,
        *,
        optimizer: MakeOptimizer | None = None,
        scheduler: MakeScheduler | None = None,
        warmup_epochs: int = 0,
        adversarial_weight: float = 1.0,
        adversarial_floor: float = 0.0,
        adversarial_target: AdversarialTarget = "origin",
        adversarial_margin: float = 0.1,
        cross_entropy_weight: float = 0.0,
        temperature: float = 1.0,
        relabel: Relabel = "separate",
        grading_power: float = 10.0,
        ramp_epochs: float = 0.0,
        refresh_every: int = 10,
        refresh_batches: int = 4,
        calibrator: Calibrator | None = None,
        options: TrainingOptions | None = None,
    ) -> None:
        weights: dict[str, Any] = {
            "adversarial_weight": adversarial_weight,
            "adversarial_margin": adversarial_margin,
            "cross_entropy_weight": cross_entropy_weight,
        }
        if relabel not in ("separate", "graded", "original"):
            raise ConfigurationError(f"expected relabel 'separate', 'graded' or 'original', got {relabel!r}")
        if relabel == "graded" and (getattr(attack, "norm", None) is None or not getattr(attack, "eps", None)):
            raise ConfigurationError(f"expected an attack with a norm and a positive eps, to grade by, got {attack!r}")
        check_numbers(
            adversarial_floor=adversarial_floor,
            temperature=temperature,
            grading_power=grading_power,
            ramp_epochs=ramp_epochs,
            **weights,
        )
        check_numbers(
            whole=True, warmup_epochs=warmup_epochs, refresh_every=refresh_every, refresh_batches=refresh_batches
        )
        if not 0 < grading_power < math.inf:
            raise ConfigurationError(f"expected a positive grading_power, got {grading_power}")
        if not 0 <= ramp_epochs < math.inf:
            raise ConfigurationError(f"expected ramp_epochs of at least 0, got {ramp_epochs}")
        if ramp_epochs:
            scale(attack, 1.0)  # one that cannot be scaled is refused now
        for name, value in weights.items():
            if not 0 <= value < math.inf:
                raise ConfigurationError(f"expected {name} of at least 0, got {value}")
        if not 0 <= adversarial_floor <= 1:
            raise ConfigurationError(f"expected adversarial_floor in [0, 1], got {adversarial_floor}")
        if adversarial_target not in get_args(AdversarialTarget):
            raise ConfigurationError(
                f"expected adversarial_target 'origin', 'opposite' or 'outside', got {adversarial_target!r}"
            )
        if not 0 < temperature < math.inf:
            raise ConfigurationError(f"expected a positive temperature, got {temperature}")
        if warmup_epochs < 0 or refresh_every < 1 or refresh_batches < 1:
            raise ConfigurationError(
                "expected warmup_epochs of at least 0, refresh_every and refresh_batches of at least 1, got "
                f"{warmup_epochs}, {refresh_every} and {refresh_batches}"
            )
        super().__init__(guard, optimizer=optimizer, scheduler=scheduler, calibrator=calibrator, options=options)
        self.guard = guard
        self.attack = attack
        self.warmup_epochs = warmup_epochs
        self.adversarial_weight = adversarial_weight
        self.adversarial_floor = adversarial_floor
        self.adversarial_target: AdversarialTarget = adversarial_target
        self.adversarial_margin = adversarial_margin
        self.cross_entropy_weight = cross_entropy_weight
        self.temperature = temperature
        self.relabel = relabel
        self.grading_power = grading_power
        self.ramp_epochs = ramp_epochs
        self.refresh_every = refresh_every
        self.refresh_batches = refresh_batches

    @property
    def _is_warming_up(self) -> bool:
        return len(self.history) < self.warmup_epochs

    def training_step(self, images: Tensor, labels: Tensor, generator: Generator | None) -> TrainingStep:
        """Both phases of algorithm 1: attack a batch and relabel it, then the loss on all of it.

        Args:
            images: (B, C, H, W) in [0, 1], on the guard's device.
            labels: (B,).
            generator: the attack's randomness; None takes torch's global one.
        """
        batch = _Relabelled(images, labels, labels, torch.zeros(len(labels), device=labels.device))
        successes = None
        check_radius(self.attack, images)  # also in the warm-up, or training would end in an error after it
        if not self._is_warming_up:
            detector = WithThresholds(self.guard, self.thresholds)
            attacked = self._present_attack(detector, images, labels, generator=generator)
            with torch.no_grad(), evaluation_mode(detector):
                detection = decide(detector.evidence(attacked), self.thresholds)
            got_through = is_broken(detection, labels)
            successes = got_through.sum()
            shares = self._separate_shares(images, attacked, got_through)
            attacked_batch = _Relabelled(attacked, labels, detection.labels, shares)
            batch = _Relabelled(*map(torch.cat, zip(batch, attacked_batch, strict=True)))
        loss, terms, logits = self._loss(batch)
        correct = (logits[: len(labels)].argmax(dim=1) == labels).sum()
        return TrainingStep(loss, correct, successes, terms, again=lambda: self._loss(batch)[0])

    def _loss(self, batch: _Relabelled) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss of a relabelled batch, what it is made of, and the logits (B, K)."""
        clusters, representations = self.guard.clusters, self.guard.represent(batch.images)
        # With several processes the means are over all their images, as if one process had seen them.
        counts = self.engine.accelerator.reduce(counts_of(batch.is_separate), "mean")
        if self.adversarial_floor:
            attacked = counts.sum() / 2
            counts = torch.stack([counts[0], counts[1].clamp_min(self.adversarial_floor * attacked)])
        energy = adversarial_energy(
            clusters,
            representations,
            batch.labels,
            batch.found,
            self.thresholds,
            target=self.adversarial_target,
            margin=self.adversarial_margin,
        )
        own, adversarial = cluster_terms(clusters, representations, batch.labels, batch.is_separate, counts, energy)
        loss, terms = own + self.adversarial_weight * adversarial, {"own": own, "adversarial": adversarial}
        if self.cross_entropy_weight:
            terms["cross_entropy"] = class_cross_entropy(
                clusters,
                representations,
                batch.labels,
                batch.is_separate,
                counts,
                temperature=self.temperature,
            )
            loss = loss + self.cross_entropy_weight * terms["cross_entropy"]
        measured = {f"loss/{name}": term.detach() for name, term in terms.items()}
        return loss, measured, clusters.logits(representations.detach())

    @property
    def _present_attack(self) -> Attack:
        """The attack, smaller while the ramp lasts."""
        return ramp(self.attack, self.epochs_done - self.warmup_epochs, self.ramp_epochs)

    def _separate_shares(self, images: Tensor, attacked: Tensor, got_through: Tensor) -> Tensor:
        """(B,) how much of each attacked image belongs to the adversarial cluster, in [0, 1]."""
        if self.relabel == "original":
            return torch.zeros_like(got_through, dtype=torch.float32)
        if self.relabel == "separate":
            return got_through.float()
        attack: Any = self.attack  # has both, by the checks above
        size: Tensor = get_norm(attack.norm).size(attacked - images)
        shares: Tensor = got_through * (1 - (1 - size.float() / attack.eps).clamp(0, 1) ** self.grading_power)
        return shares

    def after_step(self, calibration_batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Refresh the thresholds every now and then."""
        if not self._is_warming_up and self.engine.steps % self.refresh_every == 0:
            count = self.refresh_batches * self.engine.accelerator.num_processes
            self._refresh_thresholds(islice(calibration_batches, count))

    def _refresh_thresholds(self, batches: Loader) -> None:
        detector = WithThresholds(self.guard, self.thresholds)
        detection, labels = judge(detector, batches, accelerator=self.engine.shared)
        self.note({"false_positive_rate": false_positive_rate(detection, labels).value})
        finite = detection.distances.isfinite()
        try:
            fitted = fit_thresholds(
                detection.distances[finite],
                detection.labels[finite],
                labels[finite],
                self.guard.num_classes,
                false_positive_rate=self.calibrator.false_positive_rate,
                method="quantile",
                scarce="pool",
            )
        except TooFewCalibrationExamplesError:
            return  # hardly anything is classified correctly yet: the old thresholds stand
        self.thresholds = self.thresholds.new_tensor(fitted.thresholds)
