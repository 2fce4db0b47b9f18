"""Attacks of torchattacks, Foolbox, ART, adv-lib and AutoAttack on detectors, which they see as classifiers."""

import importlib.util
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np
import torch
from clusterguard._support import check_calibrated, check_detector, evaluation_mode
from clusterguard.attacks._base import BuiltInAttack, check_budget
from clusterguard.attacks._descent import Problem
from clusterguard.attacks._norms import NORMS, LInf, get_norm
from clusterguard.attacks._objectives import margin
from clusterguard.attacks._starts import Towards
from clusterguard.attacks._wrapping import MultiTarget
from clusterguard.detection import Detector, Evidence, class_margins
from clusterguard.errors import ConfigurationError, MissingDependencyError
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable


@final
class DetectorAsClassifier(nn.Module):
    """A detector as a classifier for other libraries, which cannot change the detector through it.

    Args:
        detector: detector to show, which is shared and not copied.
        to_logits: function from the detector's evidence and thresholds (K,) to logits (B, num_logits).
        num_logits: number of logits.
    """

    def __init__(self, detector: Detector, to_logits: Callable[[Evidence, Tensor], Tensor], num_logits: int) -> None:
        super().__init__()
        self.num_logits = num_logits
        self._held = (detector, to_logits)  # in a tuple, or train(), zero_grad() and to() would reach the detector
        # Other libraries look up the device at a model's first parameter.
        self.anchor = nn.Parameter(torch.zeros((), device=detector.thresholds.device), requires_grad=False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """The logits (B, num_logits) of images (B, C, H, W) in [0, 1], with the detector in eval mode.

        They are in float32 or float64, and the smallest of each row is 0.
        """
        if not getattr(images, "requires_grad", False) or not torch.is_grad_enabled():
            with torch.no_grad():
                return self._logits(images)
        leaf = images.detach().requires_grad_()
        # Autograd does not see the graph in the tuple, so a call of backward() ends at the images and gives no gradient
        # to any parameter. Changing requires_grad of the parameters would disturb other threads with this detector.
        logits: Tensor = _ImagesAlone.apply(images, (leaf, self._logits(leaf)))  # type: ignore[no-untyped-call]
        return logits

    def _logits(self, images: Tensor) -> Tensor:
        detector, to_logits = self._held
        with evaluation_mode(detector) as detector:
            logits = to_logits(detector.evidence(images), detector.thresholds)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits - logits.detach().amin(dim=1, keepdim=True)


class _ImagesAlone(torch.autograd.Function):
    """Logits whose gradient is computed with respect to the images alone, and not to parameters."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, held: tuple[Tensor, Tensor]) -> Tensor:
        ctx.leaf, ctx.logits = held
        return held[1].detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.autograd.grad(ctx.logits, ctx.leaf, gradient, retain_graph=True)[0], None


def as_classifier(detector: Detector, *, temperature: float = 1.0) -> DetectorAsClassifier:
    """The detector as a classifier with K logits, without its refusals.

    Logits are the class scores of the evidence, with each row shifted so that its smallest value is 0. Attacks that
    mask logits with 0 or -1e4 would fail silently on negative ones. The shift does not change cross-entropy, margins
    and DLR. For a `ClusterGuard` the class scores are negative distances and not its own logits, because on these
    cross-entropy is exactly 0 for most clean images after training.

    Args:
        detector: detector to show, which returns evidence.
        temperature: divisor of the logits, positive. At M = 10, about 0.3 makes attacks on cross-entropy strongest.

    Returns:
        A module from images (B, C, H, W) in [0, 1] to logits (B, K), at least 0.

    Raises:
        ConfigurationError: the temperature is not positive.

    Example:
        >>> from clusterguard.detectors import ConfidenceDetector
        >>> as_classifier(ConfidenceDetector(nn.Flatten(), 3))(torch.tensor([[[[0.25, 0.5, 1.0]]]]))
        tensor([[0.0000, 0.2500, 0.7500]])
    """
    check_detector(detector)
    if not 0 < temperature < math.inf:
        raise ConfigurationError(f"expected a positive temperature, got {temperature}")
    num_classes = len(detector.thresholds)
    return DetectorAsClassifier(detector, lambda evidence, _: evidence.class_scores / temperature, num_classes)


def as_rejecting_classifier(detector: Detector) -> DetectorAsClassifier:
    """The detector as a classifier with K + 1 logits, of which the last one stands for refusal.

    Logit j < K is the negative margin of `class_margins`, and the last logit is 0. Then each row is shifted so that its
    smallest value is 0. A targeted attack on j < K succeeds if and only if the detector accepts the image as j, with
    ties (a margin of 0) included. The shift rounds tiny margins to ties, so count successes with the detector itself.
    An untargeted attack is already successful when the image is refused.

    Args:
        detector: calibrated detector.

    Returns:
        A module from images (B, C, H, W) in [0, 1] to logits (B, K + 1), at least 0 and finite.

    Raises:
        NotCalibratedError: the detector has no thresholds.

    Example:
        >>> from clusterguard.detectors import ConfidenceDetector, WithThresholds
        >>> strict = WithThresholds(ConfidenceDetector(nn.Flatten(), 3), torch.full((3,), 1e-6))  # refuses everything
        >>> as_rejecting_classifier(strict)(torch.rand(2, 1, 1, 3)).argmax(dim=1)
        tensor([3, 3])
    """
    check_detector(detector)
    check_calibrated(detector.thresholds)

    def to_logits(evidence: Evidence, thresholds: Tensor) -> Tensor:
        return nn.functional.pad(
            -class_margins(evidence, thresholds).nan_to_num(posinf=1e4), (0, 1)
        )  # whole rows can be infinite

    return DetectorAsClassifier(detector, to_logits, len(detector.thresholds) + 1)


@final
@dataclass(frozen=True, kw_only=True)
class PeerAttack(BuiltInAttack):
    """An attack of another library as a clusterguard attack, made by the ``from_…`` functions.

    For each call, the global random generators of torch and NumPy are seeded from `generator`, and restored afterwards.
    An attack with its own seed ignores them. Images that rounding moved out of the box or the budget are projected back
    into it, and all others stay as the other library returns them.

    Args:
        peer: description of the attack, for `repr`.
        norm: norm of the budget, a name of `clusterguard.attacks.NORMS`; None states no budget.
        eps: radius of the budget, at least 0; None states no budget.
        rejecting: whether to attack `as_rejecting_classifier` instead of `as_classifier`. Without targets, the attack
            is then aimed at every wrong class.
        temperature: temperature of `as_classifier`; set it with `dataclasses.replace`.
        run: function from the problem, the targets (or labels, without targets) and the classifier to attacked images.

    Raises:
        ConfigurationError: the norm is unknown or eps negative; when called, targets for an attack that takes none.
    """

    peer: str
    norm: str | None
    eps: float | None
    rejecting: bool = False
    temperature: float = 1.0
    run: Callable[[Problem, Tensor, DetectorAsClassifier], Tensor] = field(repr=False)

    def __post_init__(self) -> None:
        check_budget(eps=self.eps or 0, norm=self.norm, batch_size=self.batch_size, may_be_unbounded=True)

    def _perturb(
        self, detector: Detector, images: Tensor, labels: Tensor, targets: Tensor | None, generator: Generator | None
    ) -> Tensor:
        if self.rejecting and targets is None:
            return MultiTarget(attack=self)(detector, images, labels, generator=generator)
        plain = as_classifier(detector, temperature=self.temperature)
        model = as_rejecting_classifier(detector) if self.rejecting else plain
        eps = math.inf if self.eps is None or self.norm is None else self.eps
        images = images.clamp(0, 1)  # other libraries refuse -3e-8
        norm = LInf() if self.norm is None else get_norm(self.norm)  # without a budget, every norm has the same ball
        problem = Problem(detector, images, labels, targets, norm, eps, margin, generator)
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device if generator else None))
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices), ExitStack() as later:
            later.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002  # other libraries draw from it
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            attacked = self.run(problem, labels if targets is None else targets, model).detach().to(images)
        inside = problem.project(attacked)
        rounded = (inside - attacked).abs().flatten(1).amax(dim=1) <= 1e-6
        return torch.where(rounded[:, None, None, None], inside, attacked)


def from_torchattacks(
    factory: Callable[[nn.Module], Any], *, norm: str | None, eps: float | None, rejecting: bool = False
) -> PeerAttack:
    """An attack of torchattacks as a clusterguard attack.

    Args:
        factory: function from a model to the attack; a `functools.partial` of the attack's class has a readable `repr`.
        norm: norm of the budget, as in `PeerAttack`.
        eps: radius of the budget, as in `PeerAttack`.
        rejecting: whether to attack the detector with its refusals, as in `PeerAttack`.

    Example:
        >>> from_torchattacks(lambda model: torchattacks.PGD(model, eps=0.1), norm="linf", eps=0.1).eps
        0.1
    """

    def run(problem: Problem, goal: Tensor, model: DetectorAsClassifier) -> Tensor:
        attack = factory(model)
        if problem.targets is not None:
            # FAB claims a targeted mode, but changes only images that are of the target's class already.
            if "targeted" not in attack.supported_mode or attack.attack == "FAB":
                raise ConfigurationError(f"torchattacks.{attack.attack} takes no targets")
            attack.set_mode_targeted_by_label(quiet=True)
        return torch.as_tensor(attack(problem.images, goal))

    return PeerAttack(peer=repr(factory), norm=norm, eps=eps, rejecting=rejecting, run=run)


def from_foolbox(
    attack: Any, *, norm: str | None, eps: float | None, rejecting: bool = False, references: Towards | None = None
) -> PeerAttack:
    """An attack of Foolbox as a clusterguard attack.

    If an attack that minimises its perturbation ends beyond eps, Foolbox shrinks the perturbation to eps.

    Args:
        attack: attack object of Foolbox.
        norm: norm of the attack object, as in `PeerAttack`, or None.
        eps: radius of the budget, as in `PeerAttack`.
        rejecting: whether to attack the detector with its refusals, as in `PeerAttack`.
        references: accepted benign images as starting points for Boundary, HopSkipJump and similar attacks; an image
            without a fitting reference comes back unchanged. None starts from noise, which a distance detector refuses.

    Raises:
        ConfigurationError: the norm is not that of the attack object; when called, Foolbox refuses to run.
        MissingDependencyError: Foolbox is not installed.
    """
    foolbox = _load("foolbox", install="foolbox")
    order = getattr(attack.distance, "p", math.nan)
    actual = next((name for name, known in NORMS.items() if known.order == order), "none")
    if norm not in (None, actual):
        raise ConfigurationError(f"expected the attack's own norm {actual!r}, got {norm!r}")

    def run(problem: Problem, goal: Tensor, model: DetectorAsClassifier) -> Tensor:
        targeted, attacked, options = problem.targets is not None, problem.images.clone(), {}
        rows = torch.ones_like(goal, dtype=torch.bool)
        if references is not None:
            starts = references(replace(problem, eps=math.inf))
            rows = (model(starts).argmax(dim=1) == goal) == targeted
            options["starting_points"] = starts[rows]
        if not rows.any():
            return attacked
        shown = foolbox.PyTorchModel(model, bounds=(0, 1), device=problem.images.device)
        criterion = foolbox.criteria.TargetedMisclassification if targeted else foolbox.criteria.Misclassification
        radius = None if norm is not None and NORMS[norm].grain else eps  # Foolbox cannot shrink l0 perturbations
        try:
            _, attacked[rows], _ = attack(shown, attacked[rows], criterion(goal[rows]), epsilons=radius, **options)
        except (ValueError, NotImplementedError) as error:
            raise ConfigurationError(
                f"Foolbox cannot run {attack} on this detector with these options: {error}"
            ) from error
        return attacked

    return PeerAttack(peer=repr(attack), norm=norm, eps=eps, rejecting=rejecting, run=run)


def from_art(
    factory: Callable[[Any], Any], *, norm: str | None, eps: float | None, rejecting: bool = False
) -> PeerAttack:
    """An evasion attack of the Adversarial Robustness Toolbox (ART) as a clusterguard attack.

    Args:
        factory: function from an ART classifier to the attack; a `functools.partial` of the attack's class has a
            readable `repr`.
        norm: norm of the budget, as in `PeerAttack`.
        eps: radius of the budget, as in `PeerAttack`.
        rejecting: whether to attack the detector with its refusals, as in `PeerAttack`.

    Raises:
        MissingDependencyError: ART is not installed; raised when the attack is called.

    Example:
        >>> from_art(lambda classifier: SquareAttack(classifier, eps=0.1), norm="linf", eps=0.1).norm
        'linf'
    """

    def run(problem: Problem, goal: Tensor, model: DetectorAsClassifier) -> Tensor:
        art = _load("art.estimators.classification", install="adversarial-robustness-toolbox")
        images, one_hot = problem.images, nn.functional.one_hot(goal, model.num_logits).float()
        options = {"clip_values": (0.0, 1.0), "device_type": "gpu" if images.is_cuda else "cpu"}
        model.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(images.dtype),))  # ART passes float32 only
        with torch.cuda.device(images.get_device()):  # ART uses the current device
            loss, shape = nn.CrossEntropyLoss(), tuple(images.shape[1:])
            attack = factory(art.PyTorchClassifier(model, loss, shape, model.num_logits, **options))
            if problem.targets is not None:
                if "targeted" not in attack.attack_params:
                    raise ConfigurationError(f"ART's {type(attack).__name__} takes no targets")
                attack.set_params(targeted=True)
            return torch.from_numpy(attack.generate(images.float().cpu().numpy(), y=one_hot.cpu().numpy()))

    return PeerAttack(peer=repr(factory), norm=norm, eps=eps, rejecting=rejecting, run=run)


def from_adv_lib(
    function: Callable[..., Tensor], *, norm: str | None, eps: float | None, rejecting: bool = False
) -> PeerAttack:
    """An attack of adv-lib, or any function of that kind, as a clusterguard attack.

    Many attacks of adv-lib look for the smallest perturbation, which may be larger than eps. Such images are projected
    back into the budget.

    Args:
        function: function of a model, images (B, C, H, W), labels (B,) and the keyword ``targeted``, which returns
            attacked images (B, C, H, W). With ``targeted=True``, labels are classes to aim at. Set options by
            `functools.partial`, whose `repr` is readable.
        norm: norm of the budget, as in `PeerAttack`.
        eps: radius of the budget, as in `PeerAttack`.
        rejecting: whether to attack the detector with its refusals, as in `PeerAttack`; only for attacks that can aim.

    Raises:
        ConfigurationError: at the first call, if the attack gets targets and takes none.

    Example:
        >>> from functools import partial
        >>> def darken(model, images, labels, *, by, targeted):
        ...     return (images - by).clamp(0, 1)
        >>> from_adv_lib(partial(darken, by=0.2), norm="linf", eps=0.1).eps
        0.1
    """

    def run(problem: Problem, goal: Tensor, model: DetectorAsClassifier) -> Tensor:
        attacked = torch.as_tensor(function(model, problem.images, goal, targeted=problem.targets is not None))
        if problem.targets is not None and attacked is problem.images:  # what adv-lib's untargeted attacks do
            raise ConfigurationError(
                f"expected an attack that can aim at classes, got {function!r}, which returned its images; give no "
                "targets, and leave rejecting=False"
            )
        return attacked if problem.eps == math.inf else problem.project(attacked.detach().to(problem.images))

    return PeerAttack(peer=repr(function), norm=norm, eps=eps, rejecting=rejecting, run=run)


def from_autoattack(*, norm: str, eps: float, version: str = "standard") -> PeerAttack:
    """The AutoAttack of Croce & Hein (2020), from their repository or else from PyPI's pyautoattack, without targets.

    Args:
        norm: norm of the ball, "linf", "l2" or "l1".
        eps: radius of the ball, at least 0.
        version: version of AutoAttack, "standard", "plus" or "rand".

    Raises:
        ConfigurationError: the norm is another one, or eps is negative.
        MissingDependencyError: neither package is installed.
    """
    names = {"linf": "Linf", "l2": "L2", "l1": "L1"}
    if norm not in names:
        raise ConfigurationError(f"expected a norm among {', '.join(names)}, got {norm!r}")
    quiet = {"verbose": False} if importlib.util.find_spec("autoattack") else {}
    library = _load("autoattack" if quiet else "pyautoattack", install="pyautoattack")

    def run(problem: Problem, goal: Tensor, model: DetectorAsClassifier) -> Tensor:
        if problem.targets is not None:
            raise ConfigurationError("AutoAttack takes no targets")
        options = {"version": version, "seed": int(torch.randint(2**31, ())), "device": problem.images.device, **quiet}
        attack = library.AutoAttack(model, norm=names[norm], eps=eps, **options)
        attacked = attack.run_standard_evaluation(problem.images, goal)
        return torch.as_tensor(attacked[0] if isinstance(attacked, tuple) else attacked)  # pyautoattack adds labels

    return PeerAttack(peer=f"AutoAttack(version={version!r})", norm=norm, eps=eps, run=run)


def _load(module: str, *, install: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(f"{module} is needed for this; run: pip install {install}") from error
