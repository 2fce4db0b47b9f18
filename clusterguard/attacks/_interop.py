"""Other libraries' attacks on our detectors, shown to them as classifiers: torchattacks, Foolbox, ART, AutoAttack."""

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
from clusterguard.attacks._norms import get_norm
from clusterguard.attacks._objectives import margin
from clusterguard.attacks._starts import Towards
from clusterguard.attacks._wrapping import MultiTarget
from clusterguard.detection import Detector, Evidence, class_margins
from clusterguard.errors import ConfigurationError, MissingDependencyError
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable


class DetectorAsClassifier(nn.Module):
    """A detector behind glass, whatever a peer does to its model; `to_logits` makes its `num_logits` logits."""

    def __init__(self, detector: Detector, to_logits: Callable[[Evidence, Tensor], Tensor], num_logits: int) -> None:
        super().__init__()
        self.num_logits = num_logits
        self._held = (detector, to_logits)  # a tuple: peers would reach a submodule with train(), zero_grad() and to()
        # Peers ask a model's first parameter for the device.
        self.anchor = nn.Parameter(torch.zeros((), device=detector.thresholds.device), requires_grad=False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> logits in float32 at least, the smallest of each row 0; in eval mode."""
        if not getattr(images, "requires_grad", False) or not torch.is_grad_enabled():
            with torch.no_grad():
                return self._logits(images)
        leaf = images.detach().requires_grad_()
        # A tuple hides the graph behind the logits, so a peer's backward() ends at the images and no parameter gets a
        # gradient. Setting requires_grad of the parameters instead would disturb other threads that use the detector.
        logits: Tensor = _ImagesAlone.apply(images, (leaf, self._logits(leaf)))  # type: ignore[no-untyped-call]
        return logits

    def _logits(self, images: Tensor) -> Tensor:
        detector, to_logits = self._held
        with evaluation_mode(detector):
            logits = to_logits(detector.evidence(images), detector.thresholds)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits - logits.detach().amin(dim=1, keepdim=True)


class _ImagesAlone(torch.autograd.Function):
    """Logits whose gradient is taken with respect to the images alone."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, held: tuple[Tensor, Tensor]) -> Tensor:
        ctx.leaf, ctx.logits = held
        return held[1].detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.autograd.grad(ctx.logits, ctx.leaf, gradient, retain_graph=True)[0], None


def as_classifier(detector: Detector, *, temperature: float = 1.0) -> DetectorAsClassifier:
    """The detector as a classifier with K logits, which knows nothing of refusal.

    Logits are the class scores of its evidence, each row shifted so that the smallest is 0: attacks that mask logits
    with 0 or -1e4 fail silently on negative ones; cross-entropy, margins and DLR do not change. For a `ClusterGuard`
    these are negative distances: on its own logits cross-entropy is exactly 0 for most clean images once trained.

    Args:
        detector: whatever yields evidence.
        temperature: positive; divides the logits. At M = 10, about 0.3 makes attacks by cross-entropy strongest.

    Returns:
        A module from images (B, C, H, W) in [0, 1] to logits (B, K), at least 0.

    Raises:
        ConfigurationError: a temperature that is not positive.

    Example:
        >>> from clusterguard.detectors import ConfidenceDetector
        >>> as_classifier(ConfidenceDetector(nn.Flatten(), 3))(torch.tensor([[[[0.25, 0.5, 1.0]]]]))
        tensor([[0.0000, 0.2500, 0.7500]])
    """
    check_detector(detector)
    if not 0 < temperature < math.inf:
        raise ConfigurationError(f"expected a positive temperature, got {temperature}")
    return DetectorAsClassifier(detector, lambda seen, _: seen.class_scores / temperature, len(detector.thresholds))


def as_rejecting_classifier(detector: Detector) -> DetectorAsClassifier:
    """The detector as a classifier with K + 1 logits, the last one for refusal.

    Logit j is minus the margin of `class_margins`, the last one 0, before each row is shifted to a smallest value of 0.
    A targeted attack on j < K succeeds iff the detector accepts the image as j, ties (a margin of 0) included; but the
    shift rounds tiny margins to ties, so let the detector count. Untargeted attacks are content to be refused.

    Args:
        detector: calibrated.

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
        return nn.functional.pad(-class_margins(evidence, thresholds).nan_to_num(posinf=1e4), (0, 1))  # inf: whole rows

    return DetectorAsClassifier(detector, to_logits, len(detector.thresholds) + 1)


@final
@dataclass(frozen=True, kw_only=True)
class PeerAttack(BuiltInAttack):
    """Another library's attack as one of ours, made by the ``from_…`` functions.

    Global random streams of torch and NumPy are seeded from the generator for the call and then put back; a peer with
    a seed of its own ignores that. What rounding took out of box or budget is put back inside, the rest left as it is.

    Args:
        peer: what runs, for print.
        norm: of the budget, "linf", "l2", "l1" or "l0"; None states no budget.
        eps: the budget, at least 0; None states no budget.
        rejecting: show `as_rejecting_classifier` instead of `as_classifier`, and without targets try every wrong class.
        temperature: of `as_classifier`; `dataclasses.replace` sets it.
        run: (what is attacked, its targets or else its labels, the classifier to show) -> attacked images.

    Raises:
        ConfigurationError: an unknown norm, a negative eps, or, when called, targets for a peer that takes none.
    """

    peer: str
    norm: str | None
    eps: float | None
    rejecting: bool = False
    temperature: float = 1.0
    run: Callable[[Problem, Tensor, DetectorAsClassifier], Tensor] = field(repr=False)

    def __post_init__(self) -> None:
        check_budget(eps=self.eps or 0, norm=self.norm or "l2", batch_size=self.batch_size, may_be_unbounded=True)
        get_norm(self.norm or "linf")

    def _perturb(
        self, detector: Detector, images: Tensor, labels: Tensor, targets: Tensor | None, generator: Generator | None
    ) -> Tensor:
        if self.rejecting and targets is None:
            return MultiTarget(attack=self)(detector, images, labels, generator=generator)
        plain = as_classifier(detector, temperature=self.temperature)
        model = as_rejecting_classifier(detector) if self.rejecting else plain
        eps = math.inf if self.eps is None or self.norm is None else self.eps
        images = images.clamp(0, 1)  # peers refuse -3e-8
        problem = Problem(detector, images, labels, targets, get_norm(self.norm or "linf"), eps, margin, generator)
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device if generator else None))
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices), ExitStack() as later:
            later.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002  # what peers draw from
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            attacked = self.run(problem, labels if targets is None else targets, model).detach().to(images)
        inside = problem.project(attacked)
        rounded = (inside - attacked).abs().flatten(1).amax(dim=1) <= 1e-6
        return torch.where(rounded[:, None, None, None], inside, attacked)


def from_torchattacks(
    factory: Callable[[nn.Module], Any], *, norm: str | None, eps: float | None, rejecting: bool = False
) -> PeerAttack:
    """An attack of torchattacks.

    Args:
        factory: model -> attack; a `functools.partial` of the attack's class prints well.
        norm: see `PeerAttack`.
        eps: see `PeerAttack`.
        rejecting: see `PeerAttack`.

    Example:
        >>> from_torchattacks(lambda model: torchattacks.PGD(model, eps=0.1), norm="linf", eps=0.1).eps
        0.1
    """

    def run(problem: Problem, goal: Tensor, model: DetectorAsClassifier) -> Tensor:
        attack = factory(model)
        if problem.targets is not None:
            # FAB claims a targeted mode, but leaves alone all images that are not of the target's class already.
            if "targeted" not in attack.supported_mode or attack.attack == "FAB":
                raise ConfigurationError(f"torchattacks.{attack.attack} takes no targets")
            attack.set_mode_targeted_by_label(quiet=True)
        return torch.as_tensor(attack(problem.images, goal))

    return PeerAttack(peer=repr(factory), norm=norm, eps=eps, rejecting=rejecting, run=run)


def from_foolbox(
    attack: Any, *, norm: str | None, eps: float | None, rejecting: bool = False, references: Towards | None = None
) -> PeerAttack:
    """An attack of Foolbox; what one that minimises its perturbation finds beyond eps, Foolbox shrinks to eps.

    Args:
        attack: Foolbox's attack object.
        norm: the attack's own; see `PeerAttack`.
        eps: see `PeerAttack`.
        rejecting: see `PeerAttack`.
        references: accepted benign images as starting points for Boundary, HopSkipJump and the like; None lets them
            start from noise, which a distance detector refuses. Images without a fitting one come back unchanged.

    Raises:
        ConfigurationError: a norm that is not the attack's; when called, what Foolbox refuses to run.
        MissingDependencyError: Foolbox is not installed.
    """
    foolbox = _load("foolbox", install="foolbox")
    own = {math.inf: "linf", 2: "l2", 1: "l1", 0: "l0"}.get(getattr(attack.distance, "p", math.nan), "none")
    if norm not in (None, own):
        raise ConfigurationError(f"expected the attack's own norm {own!r}, got {norm!r}")

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
        radius = None if norm == "l0" else eps  # Foolbox cannot shrink l0 perturbations
        try:
            _, attacked[rows], _ = attack(shown, attacked[rows], criterion(goal[rows]), epsilons=radius, **options)
        except (ValueError, NotImplementedError) as error:
            raise ConfigurationError(f"Foolbox cannot run {attack} on this detector so: {error}") from error
        return attacked

    return PeerAttack(peer=repr(attack), norm=norm, eps=eps, rejecting=rejecting, run=run)


def from_art(
    factory: Callable[[Any], Any], *, norm: str | None, eps: float | None, rejecting: bool = False
) -> PeerAttack:
    """An evasion attack of the Adversarial Robustness Toolbox.

    Args:
        factory: ART classifier -> attack; a `functools.partial` of the attack's class prints well.
        norm: see `PeerAttack`.
        eps: see `PeerAttack`.
        rejecting: see `PeerAttack`.

    Raises:
        MissingDependencyError: when called, ART is not installed.

    Example:
        >>> from_art(lambda classifier: SquareAttack(classifier, eps=0.1), norm="linf", eps=0.1).norm
        'linf'
    """

    def run(problem: Problem, goal: Tensor, model: DetectorAsClassifier) -> Tensor:
        art = _load("art.estimators.classification", install="adversarial-robustness-toolbox")
        images, one_hot = problem.images, nn.functional.one_hot(goal, model.num_logits).float()
        options = {"clip_values": (0.0, 1.0), "device_type": "gpu" if images.is_cuda else "cpu"}
        model.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(images.dtype),))  # ART knows only float32
        with torch.cuda.device(images.get_device()):  # ART takes the current one
            loss, shape = nn.CrossEntropyLoss(), tuple(images.shape[1:])
            attack = factory(art.PyTorchClassifier(model, loss, shape, model.num_logits, **options))
            if problem.targets is not None:
                if "targeted" not in attack.attack_params:
                    raise ConfigurationError(f"ART's {type(attack).__name__} takes no targets")
                attack.set_params(targeted=True)
            return torch.from_numpy(attack.generate(images.float().cpu().numpy(), y=one_hot.cpu().numpy()))

    return PeerAttack(peer=repr(factory), norm=norm, eps=eps, rejecting=rejecting, run=run)


def from_autoattack(*, norm: str, eps: float, version: str = "standard") -> PeerAttack:
    """The AutoAttack of Croce & Hein (2020), from their repository or else PyPI's pyautoattack; it takes no targets.

    Args:
        norm: "linf", "l2" or "l1".
        eps: radius of the ball, at least 0.
        version: AutoAttack's "standard", "plus" or "rand".

    Raises:
        ConfigurationError: another norm, or a negative eps.
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
