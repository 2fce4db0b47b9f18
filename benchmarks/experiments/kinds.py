"""Kinds of attacks that experiments name, and what each costs: one code path for every detector."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from clusterguard import FGSM, PGD, ClusterGuard, Detector, Evidence, WorstCaseSuite, certify
from clusterguard.attacks import (
    EFFORTS,
    MIM,
    NES,
    Attack,
    Boundary,
    CarliniWagner,
    Objective,
    StageRecord,
    SteppedAttack,
    Towards,
    Transfer,
    at_step_sizes,
    get_objective,
    random_targets,
)
from clusterguard.detectors import WithThresholds
from clusterguard.errors import ConfigurationError
from torch import Generator, Tensor


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an attack needs beside its own options.

    Attributes:
        detector: calibrated, under attack.
        images: (B, C, H, W) in [0, 1].
        labels: (B,).
        objective: of attackers who know this detector.
        references: benign images and their labels, to start from or towards.
        surrogate: where transfer attacks are made, and the objective of attackers who know it.
        generator: randomness, on the images' device.
        checkpoint: a file for attacks that can go on where they were.
        on_stage: called by these when the checkpoint has been written.
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
    """What an attack found.

    Attributes:
        attacked: by variant, such as a step size: images (B, C, H, W).
        stages: of a suite.
        unproved: (B,) bool, of a certificate: images that some attack may break, as far as is proved.
    """

    attacked: dict[str, Tensor]
    stages: tuple[StageRecord, ...] = ()
    unproved: Tensor | None = None


class PlannedCost(NamedTuple):
    """Passes an image costs, at most."""

    forward: int
    backward: int


@dataclass(frozen=True)
class Kind:
    """A kind of attack.

    Attributes:
        run: scene and options -> what was found.
        run_both: the same, aimed as the options say and the other way, at one wrong class or at any, both in one batch;
            None if the attack has one way only.
        cost: number of classes and options -> passes an image.
        sees_thresholds: what it finds depends on them, so it is run again for every false-positive rate.
        whole: it takes all images at once and keeps a checkpoint of its own.
    """

    run: Callable[..., Outcome]
    cost: Callable[..., PlannedCost]
    run_both: Callable[..., list[Outcome]] | None = None
    sees_thresholds: bool = False
    whole: bool = False


def _call(scene: Scene, attack: Attack, variant: str = "") -> Outcome:
    attacked = attack(scene.detector, scene.images, scene.labels, generator=scene.generator)
    return Outcome({variant: attacked})


def _at_step_sizes(
    kind: Callable[..., SteppedAttack],
    scene: Scene,
    goals: tuple[bool, ...],
    *,
    step_sizes: Sequence[float],
    **options: Any,
) -> list[Outcome]:
    """For each goal, targeted or not, all in one batch with all step sizes; as in the paper the last iterate counts."""
    classes, objective = len(scene.detector.thresholds), scene.objective
    targets = random_targets(scene.labels, classes, scene.generator) if any(goals) else None
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
    """The objective for a batch whose images differ in whether they are aimed at their targets (B,)."""
    is_aimed = torch.tensor(goals, device=targets.device).repeat_interleave(len(targets)).repeat(step_sizes)
    aims = targets.repeat(len(goals) * step_sizes)

    def mixed(evidence: Evidence, thresholds: Tensor, labels: Tensor, _: Tensor | None) -> Tensor:
        aimed = objective(evidence, thresholds, labels, aims)
        return torch.where(is_aimed, aimed, objective(evidence, thresholds, labels, None))

    return mixed


def _stepped(kind: Callable[..., SteppedAttack], cost: Callable[..., PlannedCost], *, random: bool = False) -> Kind:
    """PGD and its like; one with randomness of its own would find other images in other company."""

    def run(scene: Scene, *, targeted: bool = False, **options: Any) -> Outcome:
        return _at_step_sizes(kind, scene, (targeted,), **options)[0]

    def run_both(scene: Scene, *, targeted: bool = False, **options: Any) -> list[Outcome]:
        return _at_step_sizes(kind, scene, (targeted, not targeted), **options)

    return Kind(run, cost, None if random else run_both)


def _iterated_cost(_: int, *, steps: int, step_sizes: Sequence[float], **__: Any) -> PlannedCost:
    return PlannedCost(len(step_sizes) * (steps + 1), len(step_sizes) * steps)


def _transfer(scene: Scene, *, step_size: float, **options: Any) -> Outcome:
    assert scene.surrogate is not None  # experiments see to it
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


def _certificate(scene: Scene, *, norm: str, eps: float) -> Outcome:
    if norm != "linf":
        raise ConfigurationError(f"expected a certificate in linf, got {norm!r}")
    assert isinstance(scene.detector, WithThresholds)  # tells the type checker
    guard = copy.deepcopy(scene.detector.detector)
    if not isinstance(guard, ClusterGuard):
        raise ConfigurationError(f"expected a guard to certify, got a {type(guard).__name__}")
    guard.thresholds = scene.detector.thresholds
    return Outcome({"": scene.images}, unproved=~certify(guard, scene.images, scene.labels, eps=eps).is_secure)


def _suite_cost(classes: int, *, budget: str = "standard", norm: str, **_: Any) -> PlannedCost:
    """Were nothing to break: nine single stages, random starts, three stages a target and two thrice as long."""
    effort = EFFORTS[budget]
    targets = min(classes - 1, effort.targets or classes)
    passes = effort.steps * (9 + effort.restarts + (3 + 2 * 3) * targets + (5 if norm == "l2" else 0))
    boundary = effort.queries if budget == "thorough" and norm in ("linf", "l2") else 0
    return PlannedCost(passes + effort.queries + boundary, passes)


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
    "transfer": Kind(_transfer, lambda _, *, steps, **__: PlannedCost(steps + 1, steps)),
    "suite": Kind(_suite, _suite_cost, sees_thresholds=True, whole=True),
    "certificate": Kind(_certificate, lambda _, **__: PlannedCost(3, 0), sees_thresholds=True),
}
