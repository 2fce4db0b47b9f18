"""Attacks that descend an objective in steps of fixed length: PGD, MIM, NES, and FGSM, its noisy form and BIM."""

import math
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from functools import partial
from typing import final, get_args

import torch
from clusterguard.attacks._base import BuiltInAttack, check_budget
from clusterguard.attacks._descent import (
    EvaluatingRule,
    Gradient,
    Keep,
    NaturalEvolution,
    ObjectiveValues,
    OnStep,
    Problem,
    UpdateRule,
    backpropagate,
    descend,
)
from clusterguard.attacks._norms import dense_l1_direction, get_norm
from clusterguard.attacks._objectives import Objective, get_objective
from clusterguard.attacks._search_precision import InBfloat16, Precision, check_precision, choose_precision
from clusterguard.attacks._starts import RandomWithin, Start, get_start
from clusterguard.detection import Detector
from clusterguard.errors import ConfigurationError
from torch import Generator, Tensor, nn


@dataclass(frozen=True, kw_only=True)
class IteratedAttack(BuiltInAttack):
    """Base of attacks that descend an objective inside a ball.

    Args:
        norm: norm of the ball, a name of `clusterguard.attacks.NORMS`.
        eps: radius of the ball, at least 0, in units of the norm over pixels in [0, 1]; for l0 a number of pixels.
        steps: number of steps, at least 1.
        start: first iterate, "image", "random", "output_diversified", "towards_batch", or a callable such as `Towards`.
        keep: iterate to return, "best" by success margin, "nearest" for the smallest perturbation that succeeds, or
            "last". Where nothing succeeds, "nearest" returns the best.
        objective: loss to minimise, a name of `clusterguard.attacks.OBJECTIVES` or a callable.
        stop_early: whether broken images leave the batch, which breaks the same images at a lower cost.
        precision: precision of the search, "float32", "bf16", or "auto", which times both and takes bfloat16 if it is
            faster and works as well. An image counts as broken only if the detector says so in its own precision. Equal
            seeds give equal results on any machine only with "float32". `NES` and `OrthogonalPGD` always search in the
            detector's precision.
        on_step: callback for traces, which gets the step and the best margins so far (B,).
    """

    norm: str = "linf"
    eps: float
    steps: int = 40
    start: str | Start = "image"
    keep: Keep = "best"
    objective: str | Objective = "suspicion"
    stop_early: bool = False
    precision: Precision = "float32"
    on_step: OnStep | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_budget(eps=self.eps, norm=self.norm, steps=self.steps, batch_size=self.batch_size)
        get_norm(self.norm)
        get_objective(self.objective)
        get_start(self.start)
        check_precision(self.precision)
        if self.keep not in get_args(Keep):
            raise ConfigurationError(f"expected keep among {', '.join(get_args(Keep))}, got {self.keep!r}")
        if self.stop_early and self.keep != "best":
            raise ConfigurationError(f"expected keep='best' where stop_early is on, got {self.keep!r}")

    @abstractmethod
    def _rule(self, problem: Problem, start: Tensor) -> UpdateRule:
        """A new rule for a batch."""

    def _gradient(self, rule: UpdateRule) -> Gradient:
        """The function that evaluates iterates: the method of a rule that has one, or backpropagation."""
        if isinstance(rule, EvaluatingRule):
            return rule.evaluate
        return partial(backpropagate, with_margin=self.keep != "last" or self.on_step is not None)

    def _perturb(
        self,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        generator: Generator | None,
    ) -> Tensor:
        if isinstance(detector, nn.Module) and any(weight.is_inference() for weight in detector.parameters()):
            raise ConfigurationError(
                "expected a detector that gradients can pass through, got one that was made inside "
                "torch.inference_mode(); make it outside, or attack copy.deepcopy(detector)"
            )
        objective = get_objective(self.objective)
        precision = choose_precision(detector, images, labels) if self.precision == "auto" else self.precision
        search = InBfloat16(detector) if precision == "bf16" else None
        norm = get_norm(self.norm)
        problem = Problem(detector, images, labels, targets, norm, self.eps, objective, generator, search)
        start = get_start(self.start)(problem)
        rule = self._rule(problem, start)
        return descend(
            problem,
            start,
            rule,
            gradient=self._gradient(rule),
            steps=self.steps,
            keep=self.keep,
            stop_early=self.stop_early,
            on_step=self.on_step,
            judge_all=type(self)._gradient is not IteratedAttack._gradient,  # some of these need exact margins
        )


class SteepestDescent:
    """The rule of FGSM, BIM and PGD, a step of fixed length along the steepest direction followed by a projection.

    Args:
        step_size: length of the step in the problem's norm, one number or (B,).
        sparsity: fraction of coordinates that an l1 step changes; None takes the paper's dense step.
        momentum: decay factor of a running sum of l1-normalised gradients, which replaces the gradient; None uses the
            gradient itself.

    Reference:
        Madry et al. (2018); Dong et al., "Boosting adversarial attacks with momentum" (2018).
    """

    def __init__(self, step_size: float | Tensor, *, sparsity: float | None, momentum: float | None = None) -> None:
        self.step_size = step_size.view(-1, 1, 1, 1) if isinstance(step_size, Tensor) else step_size
        self.sparsity = sparsity
        self.momentum = momentum
        self._sum: Tensor | float = 0.0

    def step(self, problem: Problem, iterates: Tensor, evaluation: ObjectiveValues) -> Tensor:
        """The next iterates (B, C, H, W) of a problem, from the present ones and their evaluation."""
        gradient = evaluation.gradient
        if self.momentum is not None:
            gradient = self._sum = self.momentum * self._sum + dense_l1_direction(gradient)
        if problem.norm.takes_sparsity and self.sparsity is None:
            direction = dense_l1_direction(gradient)
        else:
            coordinates = max(1, round((self.sparsity or 0) * gradient[0].numel()))
            direction = problem.norm.direction(gradient, sparsity=coordinates)
        return problem.project(iterates - self.step_size * direction)

    def select(self, index: Tensor) -> None:
        """Keep the sums and step sizes of a part of the images; the index is (b,) integers or (B,) bools."""
        if isinstance(self._sum, Tensor):
            self._sum = self._sum[index]
        if isinstance(self.step_size, Tensor):
            self.step_size = self.step_size[index]


@dataclass(frozen=True, kw_only=True)
class SteppedAttack(IteratedAttack):
    """Base of iterated attacks with steps of fixed length.

    Args:
        step_size: length of a step in the norm, positive, one number or (B,); see `at_step_sizes`.
        sparsity: fraction of coordinates that an l1 step changes, in (0, 1]; None takes the paper's dense step.
    """

    step_size: float | Tensor
    sparsity: float | None = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.step_size, Tensor) and self.batch_size is not None:
            raise ConfigurationError("expected one step_size for all images where batch_size is set")
        check_budget(eps=self.eps, step_size=float(torch.as_tensor(self.step_size).min()))
        if self.sparsity is not None and not 0 < self.sparsity <= 1:
            raise ConfigurationError(f"expected sparsity in (0, 1] or None, got {self.sparsity}")

    def _rule(self, problem: Problem, start: Tensor) -> UpdateRule:
        return SteepestDescent(self.step_size, sparsity=self.sparsity)


@final
@dataclass(frozen=True, kw_only=True)
class PGD(SteppedAttack):
    """Projected gradient descent (PGD) on the detector's own decision.

    With the default objective and start and with ``keep="last"``, it is the adaptive attack of the paper's training.
    For evaluation, keep the default ``keep="best"``, because a success at any iterate counts.

    Raises:
        ConfigurationError: an option is out of its range.

    Reference:
        arXiv 2012.03483, equations 17 to 19; Madry et al. (2018).

    Example:
        >>> import torch
        >>> from clusterguard import ClusterGuard
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=10, example=torch.rand(1, 1, 8, 8))
        >>> guard.thresholds = torch.full((10,), 8.0)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
        >>> attacked = PGD(norm="linf", eps=0.1, step_size=0.02, steps=10)(guard, images, labels)
        >>> bool((attacked - images).abs().max() <= 0.1 + 1e-6)
        True
    """


@final
@dataclass(frozen=True, kw_only=True)
class MIM(SteppedAttack):
    """PGD with momentum, whose steps follow a decaying sum of all gradients so far.

    Args:
        decay: decay factor of the sum, at least 0.

    Raises:
        ConfigurationError: an option is out of its range.

    Reference:
        Dong et al., "Boosting adversarial attacks with momentum" (2018).

    Example:
        >>> MIM(eps=0.3, step_size=0.01, decay=0.9).decay
        0.9
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.decay >= 0:
            raise ConfigurationError(f"expected decay of at least 0, got {self.decay}")

    def _rule(self, problem: Problem, start: Tensor) -> UpdateRule:
        return SteepestDescent(self.step_size, sparsity=self.sparsity, momentum=self.decay)


@final
@dataclass(frozen=True, kw_only=True)
class NES(SteppedAttack):
    """PGD with gradients estimated from queries, a black-box attack that uses evidence and never a gradient.

    It takes ``steps · (samples + 1) + 1`` queries for each image.

    Args:
        samples: number of queries for each image and step, even and at least 2.
        sigma: standard deviation of the queries around the iterate, positive, in pixel units.

    Raises:
        ConfigurationError: an option is out of its range.

    Reference:
        Ilyas et al., "Black-box adversarial attacks with limited queries and information" (2018).

    Example:
        >>> NES(eps=0.3, step_size=0.01, samples=50).samples
        50
    """

    samples: int = 50
    sigma: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 2 or self.samples % 2 or not self.sigma > 0:
            raise ConfigurationError(
                f"expected an even number of samples and a positive sigma, got {self.samples} and {self.sigma}"
            )

    def _gradient(self, rule: UpdateRule) -> Gradient:
        return NaturalEvolution(samples=self.samples, sigma=self.sigma)


@dataclass(frozen=True, kw_only=True)
class FixedSchedule(BuiltInAttack):
    """Base of attacks that run PGD from the image with equal steps, which add up to the radius.

    They return the last iterate.

    Args:
        norm: norm of the ball, a name of `clusterguard.attacks.NORMS`.
        eps: radius of the ball, at least 0.
        objective: loss to minimise, a name of `clusterguard.attacks.OBJECTIVES` or a callable.
    """

    norm: str = "linf"
    eps: float
    objective: str | Objective = "suspicion"

    def __post_init__(self) -> None:
        self.as_pgd()

    @abstractmethod
    def as_pgd(self) -> PGD:
        """The same attack as an instance of `PGD`."""

    def _spell_out(self, steps: int) -> PGD:
        return PGD(
            norm=self.norm,
            eps=self.eps,
            step_size=self.eps / max(1, steps) or 1.0,
            steps=steps,
            keep="last",
            objective=self.objective,
            batch_size=self.batch_size,
        )

    def _perturb(
        self,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        generator: Generator | None,
    ) -> Tensor:
        return self.as_pgd()._perturb(detector, images, labels, targets, generator)


@final
@dataclass(frozen=True, kw_only=True)
class FGSM(FixedSchedule):
    """The fast gradient sign method, one step of the whole radius.

    Raises:
        ConfigurationError: an option is out of its range.

    Reference:
        Goodfellow et al., "Explaining and harnessing adversarial examples" (2015).

    Example:
        >>> FGSM(eps=0.1).as_pgd().step_size
        0.1
    """

    def as_pgd(self) -> PGD:
        """The same attack as PGD with one step."""
        return self._spell_out(1)


@final
@dataclass(frozen=True, kw_only=True)
class NoisyFGSM(FixedSchedule):
    """The single step of N-FGSM, from a random point around the image and without a projection, for fast training.

    The attacked images lie in a larger ball than that of `eps`, whose radius is `reach`. So this is an attack to train
    with; evaluate with `PGD` or stronger ones. The single step of FGSM-RS (Wong et al., 2020) stays in the ball. It is
    ``PGD(eps=eps, step_size=1.25 * eps, steps=1, start="random", keep="last")``.

    Args:
        eps: radius that the detector is trained for.
        noise: radius of the random start as a multiple of eps, at least 0. More noise makes catastrophic overfitting
            less likely, and costs accuracy.
        step_size: length of the step in the norm, positive; None takes eps.

    Raises:
        ConfigurationError: an option is out of its range.

    Reference:
        de Jorge et al., "Make some noise: reliable and efficient single-step adversarial training" (2022); Wong, Rice &
        Kolter, "Fast is better than free: revisiting adversarial training" (2020).

    Example:
        >>> NoisyFGSM(eps=0.125).reach  # the noise of 0.25, then the step of 0.125
        0.375
    """

    noise: float = 2.0
    step_size: float | None = None

    def __post_init__(self) -> None:
        check_budget(eps=self.eps, norm=self.norm)
        if not 0 <= self.noise < math.inf:
            raise ConfigurationError(f"expected a finite noise of at least 0, got {self.noise}")
        super().__post_init__()

    @property
    def reach(self) -> float:
        """The radius of the ball around the image in which the attacked image lies."""
        step = self.eps if self.step_size is None else self.step_size
        return min(self.noise * self.eps + step, get_norm(self.norm).limit)

    def as_pgd(self) -> PGD:
        """The same attack as PGD with one step in the larger ball."""
        share = min(1.0, self.noise * self.eps / (self.reach or 1.0))  # scaling the radius scales the noise
        pgd = replace(self._spell_out(1), eps=self.reach, start=RandomWithin(share))
        return pgd if self.step_size is None else replace(pgd, step_size=self.step_size)


@final
@dataclass(frozen=True, kw_only=True)
class BIM(FixedSchedule):
    """The basic iterative method, several equal steps that add up to the radius.

    Args:
        steps: number of steps, at least 1.

    Raises:
        ConfigurationError: an option is out of its range.

    Reference:
        Kurakin, Goodfellow & Bengio, "Adversarial examples in the physical world" (2017).

    Example:
        >>> BIM(eps=0.3).as_pgd().step_size
        0.03
    """

    steps: int = 10

    def as_pgd(self) -> PGD:
        """The same attack as PGD with this number of steps."""
        return self._spell_out(self.steps)
