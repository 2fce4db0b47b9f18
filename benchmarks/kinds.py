"""Kinds of attacks that experiments name, and what each costs: one code path for every detector."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from clusterguard import (
    FGSM,
    MIM,
    NES,
    PGD,
    Attack,
    Boundary,
    CarliniWagner,
    ClusterGuard,
    Detector,
    Towards,
    Transfer,
    WithThresholds,
    WorstCaseSuite,
    certify,
)
from clusterguard.attacks.iterative import SteppedAttack
from clusterguard.attacks.objectives import Objective
from clusterguard.attacks.paper import at_step_sizes, random_targets
from clusterguard.attacks.suite import EFFORTS
from clusterguard.attacks.suite_state import StageRecord
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


class Cost(NamedTuple):
    """Passes an image costs, at most."""

    forward: int
    backward: int


@dataclass(frozen=True)
class Kind:
    """A kind of attack.

    Attributes:
        run: scene and options -> what was found.
        cost: number of classes and options -> passes an image.
        sees_thresholds: what it finds depends on them, so it is run again for every false-positive rate.
        whole: it takes all images at once and keeps a checkpoint of its own.
    """

    run: Callable[..., Outcome]
    cost: Callable[..., Cost]
    sees_thresholds: bool = False
    whole: bool = False


def _call(scene: Scene, attack: Attack, variant: str = "") -> Outcome:
    found = attack(scene.detector, scene.images, scene.labels, generator=scene.generator)
    return Outcome({variant: found})


def _at_step_sizes(
    scene: Scene,
    kind: Callable[..., SteppedAttack],
    *,
    step_sizes: Sequence[float],
    targeted: bool = False,
    **options: Any,
) -> Outcome:
    """All step sizes in one batch; what counts is where an attack ends, as in the paper."""
    classes = len(scene.detector.thresholds)
    targets = random_targets(scene.labels, classes, scene.generator) if targeted else None
    attack = kind(step_size=step_sizes[0], objective=scene.objective, keep="last", sparsity=None, **options)
    found = at_step_sizes(
        attack, step_sizes, scene.detector, scene.images, scene.labels, targets=targets, generator=scene.generator
    )
    return Outcome({f"step {size:g}": images for size, images in zip(step_sizes, found, strict=True)})


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


def _suite_cost(classes: int, *, budget: str = "standard", norm: str, **_: Any) -> Cost:
    """Were nothing to break: nine single stages, random starts, three stages a target and two thrice as long."""
    effort = EFFORTS[budget]
    targets = min(classes - 1, effort.targets or classes)
    passes = effort.steps * (9 + effort.restarts + (3 + 2 * 3) * targets + (5 if norm == "l2" else 0))
    return Cost(passes + effort.queries, passes)


KINDS: dict[str, Kind] = {
    "pgd": Kind(
        lambda scene, **options: _at_step_sizes(scene, PGD, **options),
        lambda _, *, steps, step_sizes, **__: Cost(len(step_sizes) * (steps + 1), len(step_sizes) * steps),
    ),
    "mim": Kind(
        lambda scene, **options: _at_step_sizes(scene, MIM, **options),
        lambda _, *, steps, step_sizes, **__: Cost(len(step_sizes) * (steps + 1), len(step_sizes) * steps),
    ),
    "nes": Kind(
        lambda scene, **options: _at_step_sizes(scene, NES, **options),
        lambda _, *, steps, samples, step_sizes, **__: Cost(len(step_sizes) * steps * (samples + 1), 0),
    ),
    "fgsm": Kind(
        lambda scene, **options: _call(scene, FGSM(objective=scene.objective, **options)), lambda _, **__: Cost(2, 1)
    ),
    "cw": Kind(
        lambda scene, **options: _call(scene, CarliniWagner(**options)),
        lambda _, *, searches, steps, **__: Cost(searches * steps, searches * steps),
        sees_thresholds=True,
    ),
    "boundary": Kind(_boundary, lambda _, *, queries, **__: Cost(queries, 0), sees_thresholds=True),
    "transfer": Kind(_transfer, lambda _, *, steps, **__: Cost(steps + 1, steps)),
    "suite": Kind(_suite, _suite_cost, sees_thresholds=True, whole=True),
    "certificate": Kind(_certificate, lambda _, **__: Cost(3, 0), sees_thresholds=True),
}
