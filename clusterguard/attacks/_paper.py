"""The paper's attack protocol, which takes the worst of adaptive PGD at several step sizes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from clusterguard._support import check_range, check_tensor
from clusterguard.attacks._base import Attack, WrappingAttack, attack_checked_images
from clusterguard.attacks._pgd import PGD, SteppedAttack
from clusterguard.detection import Detector
from clusterguard.errors import ConfigurationError
from torch import Generator, Tensor


def draw_targets(labels: Tensor, num_classes: int, generator: Generator | None = None) -> Tensor:
    """A random wrong class for each label, with all wrong classes equally likely.

    Args:
        labels: (B,) true labels.
        num_classes: number of classes, at least 2.
        generator: randomness, on the labels' device; None takes torch's global one.

    Returns:
        Wrong labels (B,).

    Raises:
        InputError: labels have a wrong shape, dtype or range.
        ConfigurationError: there are fewer than two classes.

    Example:
        >>> bool((draw_targets(torch.tensor([0, 1, 2]), num_classes=3) != torch.tensor([0, 1, 2])).all())
        True
    """
    if num_classes < 2:
        raise ConfigurationError(f"expected num_classes of at least 2, got {num_classes}")
    check_tensor(labels, "labels", "B", kind="integer")
    if labels.device.type == "cpu":  # on another device the check would wait for its queue
        check_range(labels, num_classes)
    shift = torch.randint(1, num_classes, labels.shape, generator=generator, device=labels.device)
    return (labels.long() + shift) % num_classes


def at_step_sizes(
    attack: SteppedAttack,
    step_sizes: Sequence[float],
    detector: Detector,
    images: Tensor,
    labels: Tensor,
    *,
    targets: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Run one attack at A step sizes in a single batch, which on a GPU costs little more than one step size.

    For an attack without randomness, the result is the same as that of A separate attacks.

    Args:
        attack: attack to run, such as `PGD`; its own step size is not used.
        step_sizes: positive step sizes, A of them.
        detector: calibrated detector.
        images: (B, C, H, W), finite, in [0, 1].
        labels: (B,) true labels.
        targets: (B,) wrong labels to aim at; None aims at any wrong label.
        generator: randomness, on the images' device.

    Returns:
        Attacked images (A, B, C, H, W).

    Raises:
        ConfigurationError: there is no step size, or one is not positive.
        InputError: images, labels or targets have a wrong shape, dtype, range or device.
        NotCalibratedError: the detector has no thresholds.

    Example:
        >>> from clusterguard.detectors import ConfidenceDetector, WithThresholds
        >>> detector = WithThresholds(ConfidenceDetector(torch.nn.Flatten(), 4), torch.full((4,), torch.inf))
        >>> attack = PGD(eps=0.1, step_size=0.1, steps=3)
        >>> at_step_sizes(attack, [0.1, 0.05], detector, torch.rand(5, 1, 2, 2), torch.zeros(5).long()).shape
        torch.Size([2, 5, 1, 2, 2])
    """
    if not step_sizes:
        raise ConfigurationError("expected at least one step size, got none")
    count = len(step_sizes)
    sizes = torch.tensor(step_sizes, device=images.device).repeat_interleave(len(images))
    attacked: Tensor = replace(attack, step_size=sizes, batch_size=None)(
        detector,
        images.repeat(count, 1, 1, 1),
        labels.repeat(count),
        targets=None if targets is None else targets.repeat(count),
        generator=generator,
    )
    return attacked.view(count, *images.shape)


@final
@dataclass(frozen=True, kw_only=True)
class RandomTarget(WrappingAttack):
    """An attack that is aimed at one random wrong class for each image.

    Args:
        attack: attack to run with these targets.

    Example:
        >>> RandomTarget(attack=PGD(eps=0.3, step_size=0.01)).eps
        0.3
    """

    def _perturb(
        self,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        generator: Generator | None,
    ) -> Tensor:
        if targets is None:
            targets = draw_targets(labels, len(detector.thresholds), generator)
        return attack_checked_images(self.attack, detector, images, labels, targets=targets, generator=generator)


@final
@dataclass(frozen=True, kw_only=True)
class PaperProtocol:
    """The attacks behind one row of the paper's Table 2, whose figure is the largest ASR among them.

    Pass `attacks()` to `evaluate` and read `largest_mean_asr`. The protocol is weaker than `WorstCaseSuite`.

    Args:
        norm: norm of the ball, a name of `clusterguard.attacks.NORMS`.
        eps: radius of the ball.
        step_sizes: step sizes to try; the paper tries 3 to 8.
        targeted: whether to aim at a random wrong class for each image ("T") instead of at any wrong class ("U").
        steps: number of steps k; the paper's figures converge before 1,000.

    Raises:
        ConfigurationError: there are no step sizes, or an option is out of its range.

    Reference:
        arXiv 2012.03483, section 5.1, Table 2, figures 6 and 7.

    Example:
        >>> list(PaperProtocol(norm="l2", eps=2.0, step_sizes=(0.1, 0.2), targeted=True).attacks())
        ['PGD l2 2 T, step 0.1', 'PGD l2 2 T, step 0.2']
    """

    norm: str
    eps: float
    step_sizes: Sequence[float]
    targeted: bool = False
    steps: int = 1000

    def __post_init__(self) -> None:
        if not self.step_sizes:
            raise ConfigurationError("expected at least one step size, got none")
        self.attacks()

    def attacks(self) -> dict[str, Attack]:
        """One attack for each step size, by name."""
        named: dict[str, Attack] = {}
        for step_size in self.step_sizes:
            attack = PGD(
                norm=self.norm,
                eps=self.eps,
                step_size=step_size,
                steps=self.steps,
                sparsity=None,  # the paper's l1 step is dense
                keep="last",
            )
            name = f"PGD {self.norm} {self.eps:g} {'T' if self.targeted else 'U'}, step {step_size:g}"
            named[name] = RandomTarget(attack=attack) if self.targeted else attack
        return named
