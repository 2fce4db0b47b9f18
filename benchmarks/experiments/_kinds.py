"""The kinds of attacks that experiments name, and what each kind costs. Every detector takes the same code path."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from clusterguard import FGSM, PGD, ClusterGuard, Detector, Evidence, WorstCaseSuite, certify
from clusterguard.attacks import (
    EFFORTS,
    MIM,
    NES,
    Attack,
    Boundary,
    CarliniWagner,
    LInf,
    Objective,
    StageRecord,
    SteppedAttack,
    Towards,
    Transfer,
    at_step_sizes,
    draw_targets,
    get_norm,
    get_objective,
)
from clusterguard.detectors import WithThresholds
from clusterguard.errors import ConfigurationError
from torch import Generator, Tensor


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an attack needs besides its options.

    Attributes:
        detector: calibrated detector under attack.
        images: clean images (B, C, H, W) in [0, 1].
        labels: their true classes (B,).
        objective: objective of an attacker who knows this detector.
        references: benign images and their labels. An attack may start at them or move towards them.
        surrogate: detector that transfer attacks are computed on, and the objective of an attacker who knows it.
        generator: source of randomness on the device of the images.
        checkpoint: file for attacks that can be resumed.
        on_stage: function that a resumable attack calls after it has written the checkpoint.
    """

    detector: Detector
    images: Tensor
    labels: Tensor
    objective: str | Objective
    references: tuple[Tensor, Tensor]
    surrogate: tuple[Detector, str | Objective] | None
    generator: Generator
    checkpoint: Path
    on_stage: Callable[[StageRecord], None]


class Outcome(NamedTuple):
    """What an attack returns for a batch of images.

    Attributes:
        attacked: attacked images (B, C, H, W) by setting. A setting is a step size, or "" for attacks without.
        stages: records of the stages of a suite. Other attacks have none.
        unproved: boolean mask (B,) of the images that a certificate does not prove secure. Other attacks have None.
    """

    attacked: dict[str, Tensor]
    stages: tuple[StageRecord, ...] = ()
    unproved: Tensor | None = None


class PlannedCost(NamedTuple):
    """The largest number of passes that an attack takes for one image."""

    forward: int
    backward: int


@dataclass(frozen=True)
class Kind:
    """A kind of attack.

    Attributes:
        run: function of the scene and the options that returns an outcome.
        run_both: function that runs the targeted and the untargeted attack in one batch. Its first outcome belongs to
            the goal that the options name, its second to the other goal. None if the attack has one goal only.
        cost: function of the number of classes and the options that returns the passes for one image.
        sees_thresholds: whether the attack depends on the thresholds. If so, it is run for every false-positive rate.
        whole: whether the attack takes all images at once and writes its checkpoint itself.
        takes_precision: whether the attack searches along gradients and can do so in bfloat16.
    """

    run: Callable[..., Outcome]
    cost: Callable[..., PlannedCost]
    run_both: Callable[..., list[Outcome]] | None = None
    sees_thresholds: bool = False
    whole: bool = False
    takes_precision: bool = False


def _call(scene: Scene, attack: Attack, setting: str = "") -> Outcome:
    attacked = attack(scene.detector, scene.images, scene.labels, generator=scene.generator)
    return Outcome({setting: attacked})


def _at_step_sizes(
    kind: Callable[..., SteppedAttack],
    scene: Scene,
    goals: tuple[bool, ...],
    *,
    step_sizes: Sequence[float],
    **options: Any,
) -> list[Outcome]:
    """Run the attack for each goal, targeted or not, and each step size, all in one batch.

    The attack returns its last iterate, as in the paper.
    """
    classes, objective = len(scene.detector.thresholds), scene.objective
    targets = draw_targets(scene.labels, classes, scene.generator) if any(goals) else None
    if targets is not None and not all(goals):
        objective, targets = _each_its_goal(get_objective(objective), goals, targets, len(step_sizes)), None
    attacked = at_step_sizes(
        kind(step_size=step_sizes[0], objective=objective, keep="last", sparsity=None, **options),
        step_sizes,
        scene.detector,
        scene.images.repeat(len(goals), 1, 1, 1),
        scene.labels.repeat(len(goals)),
        targets=targets,
        generator=scene.generator,
    ).unflatten(1, (len(goals), -1))
    return [
        Outcome({f"step {size:g}": by_goal[index] for size, by_goal in zip(step_sizes, attacked, strict=True)})
        for index in range(len(goals))
    ]


def _each_its_goal(objective: Objective, goals: Sequence[bool], targets: Tensor, step_sizes: int) -> Objective:
    """An objective for a batch in which some images are attacked towards their targets (B,) and others are not."""
    is_aimed = torch.tensor(goals, device=targets.device).repeat_interleave(len(targets)).repeat(step_sizes)
    aims = targets.repeat(len(goals) * step_sizes)

    def mixed(evidence: Evidence, thresholds: Tensor, labels: Tensor, _: Tensor | None) -> Tensor:
        aimed = objective(evidence, thresholds, labels, aims)
        return torch.where(is_aimed, aimed, objective(evidence, thresholds, labels, None))

    return mixed


def _stepped(kind: Callable[..., SteppedAttack], cost: Callable[..., PlannedCost], *, random: bool = False) -> Kind:
    """The kind of an attack with step sizes, such as PGD.

    Both goals share a batch unless the attack draws random numbers. Those would depend on the size of the batch.
    """

    def run(scene: Scene, *, targeted: bool = False, **options: Any) -> Outcome:
        return _at_step_sizes(kind, scene, (targeted,), **options)[0]

    def run_both(scene: Scene, *, targeted: bool = False, **options: Any) -> list[Outcome]:
        return _at_step_sizes(kind, scene, (targeted, not targeted), **options)

    return Kind(run, cost, None if random else run_both, takes_precision=not random)


def _iterated_cost(_: int, *, steps: int, step_sizes: Sequence[float], **__: Any) -> PlannedCost:
    return PlannedCost(len(step_sizes) * (steps + 1), len(step_sizes) * steps)


def _transfer(scene: Scene, *, step_size: float, **options: Any) -> Outcome:
    assert scene.surrogate is not None  # an experiment with a transfer attack names one
    surrogate, objective = scene.surrogate
    return _call(scene, Transfer(surrogate=surrogate, attack=PGD(step_size=step_size, objective=objective, **options)))


def _boundary(scene: Scene, **options: Any) -> Outcome:
    references = Towards.accepted(scene.detector, *scene.references, batch_size=1000)
    return _call(scene, Boundary(references=references, **options))


def _suite(scene: Scene, *, norm: str, **options: Any) -> Outcome:
    suite = WorstCaseSuite(norm, references=scene.references, **options)
    result = suite.run(
        scene.detector,
        scene.images,
        scene.labels,
        generator=scene.generator,
        checkpoint=scene.checkpoint,
        on_stage=scene.on_stage,
    )
    return Outcome({"": result.images}, result.stages)


def _certificate(
    scene: Scene, *, norm: str, eps: float, method: Literal["intervals", "linear", "branching"] = "intervals"
) -> Outcome:
    if norm != LInf.name:
        raise ConfigurationError(f"expected a certificate in {LInf.name}, got {norm!r}")
    assert isinstance(scene.detector, WithThresholds)  # tells the type checker
    guard = copy.deepcopy(scene.detector.detector)
    if not isinstance(guard, ClusterGuard):
        raise ConfigurationError(f"expected a guard to certify, got a {type(guard).__name__}")
    guard.thresholds = scene.detector.thresholds
    is_secure = certify(guard, scene.images, scene.labels, eps=eps, method=method).is_secure
    return Outcome({"": scene.images}, unproved=~is_secure)


def _certificate_cost(classes: int, *, method: str = "intervals", **_: Any) -> PlannedCost:
    """What a proof takes if intervals prove nothing.

    Intervals take three passes, and linear bounds 60 steps for each class. Branches may take thirty times as long.
    """
    if method == "intervals":
        return PlannedCost(3, 0)
    steps = 60 * classes * (30 if method == "branching" else 1)
    return PlannedCost(3 + steps, 2 * steps)


def _suite_cost(classes: int, *, budget: str = "standard", norm: str, **_: Any) -> PlannedCost:
    """The cost of a suite that breaks no image.

    The stages are nine single ones, one for each random start, and five for each target, of which two take three times
    as many steps in sparse norms. In l0 six stages for each target take equal steps, and Sparse-PGD and σ-zero add five
    single ones. Carlini & Wagner's attack adds five in its norm. Polish comes last, from the image and then from the
    best image. Each time it may take four times its first rounds, and a round takes 128 forward passes for proposals
    and 48 steps.
    """
    effort = EFFORTS[budget]
    targets = min(classes - 1, effort.targets or classes)
    over_pixels = get_norm(norm).searched_over == "pixels"
    per_target = 6 if over_pixels else 3 + 2 * (3 if get_norm(norm).is_sparse else 1)
    single = 9 + effort.restarts + (5 if over_pixels or norm == CarliniWagner.norm else 0)
    passes = effort.steps * (single + per_target * targets)
    rounds = 4 * max(1, effort.steps // 20) * (1 + effort.searches)
    passes += 48 * rounds
    boundary = effort.queries if budget == "thorough" and not get_norm(norm).is_sparse else 0
    return PlannedCost(passes + effort.queries + 128 * rounds + boundary, passes)


KINDS: dict[str, Kind] = {
    "pgd": _stepped(PGD, _iterated_cost),
    "mim": _stepped(MIM, _iterated_cost),
    "nes": _stepped(
        NES,
        lambda _, *, steps, samples, step_sizes, **__: PlannedCost(len(step_sizes) * steps * (samples + 1), 0),
        random=True,
    ),
    "fgsm": Kind(
        lambda scene, **options: _call(scene, FGSM(objective=scene.objective, **options)),
        lambda _, **__: PlannedCost(2, 1),
    ),
    "cw": Kind(
        lambda scene, **options: _call(scene, CarliniWagner(**options)),
        lambda _, *, searches, steps, **__: PlannedCost(searches * steps, searches * steps),
        sees_thresholds=True,
    ),
    "boundary": Kind(_boundary, lambda _, *, queries, **__: PlannedCost(queries, 0), sees_thresholds=True),
    "transfer": Kind(_transfer, lambda _, *, steps, **__: PlannedCost(steps + 1, steps), takes_precision=True),
    "suite": Kind(_suite, _suite_cost, sees_thresholds=True, whole=True, takes_precision=True),
    "certificate": Kind(_certificate, _certificate_cost, sees_thresholds=True),
}
