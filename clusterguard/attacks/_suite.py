"""The worst case over many attacks, and the state from which an interrupted suite continues."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import torch
from clusterguard._support import bar, evaluation_mode, only_writer, read_progress, save_progress
from clusterguard.attacks._auto_pgd import APGD
from clusterguard.attacks._base import (
    Attack,
    BuiltInAttack,
    attack_checked_images,
    check_attack_input,
    check_budget,
    check_radius,
    has_representation,
)
from clusterguard.attacks._boundary import Boundary
from clusterguard.attacks._carlini_wagner import CarliniWagner
from clusterguard.attacks._metering import Cost, Metered
from clusterguard.attacks._minimum_norm import FastMinimumNorm
from clusterguard.attacks._norms import get_norm
from clusterguard.attacks._orthogonal import OrthogonalPGD
from clusterguard.attacks._pgd import MIM, PGD
from clusterguard.attacks._polish import Polish
from clusterguard.attacks._precision import Precision, check_precision, choose_precision
from clusterguard.attacks._random_search import SparseRS, make_random_search
from clusterguard.attacks._representation import RepelThenMinimise, RepresentationMatching
from clusterguard.attacks._starts import AtPoints, Start, Towards, is_accepted
from clusterguard.attacks._wrapping import MultiTarget, Transfer
from clusterguard.detection import Detector, success_margin
from clusterguard.errors import ConfigurationError, PersistenceError, in_one_line
from torch import Generator, Tensor

_KIND = "suite"
_SEARCHES = {"squares": "Square", "pixels": "Sparse-RS", "patches": "patches"}  # names of stages
_KEYS = {"suite", "clean_margins", "best", "margins", "records", "generator", "runs"}


@dataclass(frozen=True)
class StageRecord:
    """The result of one stage of a suite.

    Attributes:
        name: name of the stage.
        attacked: number of images that were unbroken before the stage. Images that are refused or labelled wrongly when
            clean are attacked too but not counted, because they count in no attack success rate.
        broken: number of these images that the stage broke.
        forward: number of images judged.
        backward: number of gradients taken.
    """

    name: str
    attacked: int
    broken: int
    forward: int
    backward: int


class SuiteResult(NamedTuple):
    """The result of a suite.

    Attributes:
        images: (B, C, H, W) for each image, the attacked version with the smallest success margin.
        stages: one record for each stage, in order.
        cost: cost of all stages together, including stages of earlier runs. Judging clean images and references before
            the stages is not part of it.
        runs: number of runs, including earlier ones that this one resumed.
    """

    images: Tensor
    stages: tuple[StageRecord, ...]
    cost: Cost
    runs: int


@dataclass
class SuiteState:
    """The state from which an interrupted suite continues.

    Attributes:
        suite: `repr` of the suite.
        clean_margins: (B,) success margins of the clean images, which differ for another detector or other images.
        best: (B, C, H, W) attacked images with the smallest success margins so far.
        margins: (B,) success margins of these images.
        records: records of the finished stages.
        eligible: (B,) whether the clean image is accepted under its true label; it is not saved.
        runs: number of runs, including this one.
    """

    suite: str
    clean_margins: Tensor
    best: Tensor
    margins: Tensor
    records: list[StageRecord]
    eligible: Tensor
    runs: int = 1

    def save(self, path: str | Path, generator: Generator | None) -> None:
        """Write the state to a file, completely or not at all."""
        state = {
            "suite": self.suite,
            "clean_margins": self.clean_margins,
            "best": self.best,
            "margins": self.margins,
            "records": [asdict(record) for record in self.records],
            "generator": None if generator is None else generator.get_state(),
            "runs": self.runs,
        }
        save_progress(path, _KIND, state)

    def load(self, path: str | Path, generator: Generator | None) -> None:
        """Restore a state that `save` wrote for the same suite, detector, images and labels.

        Raises:
            ConfigurationError: the state belongs to another suite, another detector or other images.
            PersistenceError: the file is damaged, or is not the state of a suite.
        """
        again = f"delete {path} to begin the suite anew, or choose another checkpoint"
        progress = read_progress(path, _KIND, hint=again, device=self.best.device)
        if progress is None:
            return
        state = progress.state
        if set(state) - {"cost"} != _KEYS or not _is_state(state):
            raise PersistenceError(f"{path} holds no state of a suite; {again}")
        clean = state["clean_margins"]
        if state["suite"] != self.suite or state["best"].shape != self.best.shape:
            raise ConfigurationError(
                f"{path} belongs to {state['suite'][:200]} on {len(clean)} images; use another checkpoint"
            )
        if not torch.allclose(clean.to(self.clean_margins), self.clean_margins, rtol=1e-3, atol=1e-3):
            raise ConfigurationError(f"{path} belongs to another detector or other images; use another checkpoint")
        if generator is not None and state["generator"] is not None:
            try:
                generator.set_state(state["generator"].cpu())
            except (RuntimeError, TypeError) as error:
                raise PersistenceError(
                    f"{path} holds another generator's state ({in_one_line(error)}); {again}"
                ) from error
        self.best, self.margins = state["best"], state["margins"]
        self.records = [StageRecord(**record) for record in state["records"]]
        self.runs = state["runs"] + 1


def _is_state(state: dict[str, Any]) -> bool:
    """Whether an archive has the types and shapes that `SuiteState.save` writes, no NaN margins and finite pixels."""
    clean, best, margins, generator = (state[name] for name in ("clean_margins", "best", "margins", "generator"))
    if not all(isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in (clean, best, margins)):
        return False
    if clean.ndim != 1 or margins.shape != clean.shape or best.ndim != 4 or len(best) != len(clean):
        return False
    if clean.isnan().any() or margins.isnan().any() or not best.isfinite().all():
        return False
    kinds = {"name": str, "attacked": int, "broken": int, "forward": int, "backward": int}
    return (
        isinstance(state["suite"], str)
        and type(state["runs"]) is int
        and (generator is None or isinstance(generator, Tensor))
        and isinstance(state["records"], list)
        and all(
            isinstance(record, dict) and {k: type(v) for k, v in record.items()} == kinds for record in state["records"]
        )
    )


Budget = Literal["quick", "standard", "thorough"]


class Effort(NamedTuple):
    """The work of a budget.

    Attributes:
        steps: number of steps of a gradient attack.
        restarts: number of random starts.
        targets: number of targets for each image; None takes all wrong classes.
        queries: number of queries for each image.
    """

    steps: int
    restarts: int
    targets: int | None
    queries: int


EFFORTS: dict[str, Effort] = {
    "quick": Effort(steps=20, restarts=1, targets=3, queries=200),
    "standard": Effort(steps=100, restarts=3, targets=9, queries=2000),
    "thorough": Effort(steps=300, restarts=5, targets=None, queries=10_000),
}


@final
@dataclass(frozen=True, kw_only=True)
class WorstCaseSuite(BuiltInAttack):
    """A suite of all strong attacks of this library in one norm; an image counts as broken if any of them breaks it.

    The stages are the following, and each one attacks only images that are still unbroken. (1) APGD on the success
    margin starts from the image, from random and output-diversified points, and towards accepted images of other
    classes. (2) APGD is aimed at every wrong class, from the image and from an accepted image of this class. (3) MIM,
    fast minimum norm aimed at every wrong class, and for l2 Carlini & Wagner follow. (4) Attacks that escape from the
    adversarial plateau repel first, match representations, use orthogonal gradients, or transfer from a surrogate.
    (5) The attacks without gradients are Square, or Sparse-RS for l0, and with the thorough budget Boundary for linf
    and l2. Balls of l2 and l1 also contain every change of a few pixels, so Sparse-RS with as many pixels runs second.
    (6) `Polish` goes on from the best images of all stages before it.

    Args:
        norm: norm of the ball, "linf", "l2", "l1", "l0" or "patch".
        eps: radius of the ball, at least 0; for l0 a number of pixels.
        budget: amount of work, "quick", "standard" or "thorough".
        references: benign images (R, C, H, W) and their labels (R,), as starts for attacks; None takes the attacked
            images. Only images that the detector accepts are used.
        surrogates: detectors whose adversarial images are tried too.
        precision: precision of the gradients, as in `IteratedAttack`; "auto" decides once for each run.

    Raises:
        ConfigurationError: an option is out of its range.

    Reference:
        Croce & Hein (2020) for the idea of a fixed, parameter-free ensemble; Tramer et al., "On adaptive attacks to
        adversarial example defenses" (2020) for why each stage is there.

    Example:
        >>> WorstCaseSuite("linf", eps=0.3, budget="quick")
        WorstCaseSuite(batch_size=None, norm='linf', eps=0.3, budget='quick', precision='float32')
    """

    norm: str = field(kw_only=False)
    eps: float
    budget: Budget = "standard"
    references: tuple[Tensor, Tensor] | None = field(default=None, repr=False, compare=False)
    surrogates: tuple[Detector, ...] = field(default=(), repr=False, compare=False)
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        check_budget(eps=self.eps, norm=self.norm, batch_size=self.batch_size)
        get_norm(self.norm)
        check_precision(self.precision)
        if self.budget not in EFFORTS:
            raise ConfigurationError(f"expected a budget among {', '.join(EFFORTS)}, got {self.budget!r}")
        if self.references is not None:  # without references, the size of images is unknown until the first call
            check_radius(self, self.references[0])

    def stages(self, detector: Detector, references: Towards) -> dict[str, Attack]:
        """The attacks by name, in order, without those that do not suit the detector.

        Args:
            detector: detector to attack.
            references: accepted benign images.
        """
        effort = EFFORTS[self.budget]
        norm, share = get_norm(self.norm), 2 / max(10, effort.steps // 5)
        step = norm.step_size(self.eps, references.images.shape[1:], share=share) or 1.0  # positive also for eps = 0

        options: dict[str, Any] = {"norm": self.norm, "eps": self.eps, "batch_size": self.batch_size}
        searched: dict[str, Any] = options | {"stop_early": True, "precision": self.precision}
        iterated: dict[str, Any] = searched | {"steps": effort.steps, "step_size": step}
        matched = {name: value for name, value in iterated.items() if name != "precision"}

        def apgd(start: str | Start, objective: str = "margin") -> APGD:
            return APGD(start=start, objective=objective, steps=effort.steps, **searched)

        slow = effort.steps * (3 if norm.is_sparse else 1)  # in l1 and l0 fast minimum norm converges slowly
        pixels = 0 if norm.grain else norm.pixels_inside(self.eps, references.images.shape[1:])
        within: dict[str, Any] = {"eps": pixels, "queries": effort.queries, "batch_size": self.batch_size}
        stages: dict[str, Attack] = {
            "APGD": apgd("image"),
            **({"Sparse-RS, few pixels": SparseRS(**within)} if pixels else {}),
            "APGD towards accepted images": apgd(references),
            **{f"APGD random {index + 1}": apgd("random") for index in range(effort.restarts)},
            "APGD output-diversified": apgd("output_diversified"),
            "APGD suspicion": apgd("image", "suspicion"),
            "multi-target APGD": MultiTarget(attack=apgd("image"), max_targets=effort.targets),
            "multi-target APGD towards accepted images": MultiTarget(
                attack=apgd(references), max_targets=effort.targets
            ),
            "MIM": MIM(objective="margin", **iterated),
            "PGD towards accepted images": PGD(objective="suspicion", start=references, **iterated),
            # Each of the two step lengths breaks images that the other misses.
            **{
                f"multi-target fast minimum norm, step {length:g}": MultiTarget(
                    attack=FastMinimumNorm(step_size=length, steps=slow, **searched), max_targets=effort.targets
                )
                for length in ((10.0, 1.0) if norm.grain else (1.0, 0.3))
            },
        }
        if self.norm == CarliniWagner.norm:
            carlini_wagner = CarliniWagner(eps=self.eps, steps=effort.steps, searches=5, batch_size=self.batch_size)
            stages["Carlini-Wagner"] = carlini_wagner
        stages["selective PGD"] = OrthogonalPGD(strategy="selective", **iterated)
        if has_representation(detector):
            stages["repel, then minimise"] = RepelThenMinimise(**iterated)
            stages["match representations"] = MultiTarget(
                attack=RepresentationMatching(references=references, **matched), max_targets=effort.targets
            )
        else:
            stages["orthogonal PGD"] = OrthogonalPGD(strategy="orthogonal", **iterated)
        for index, surrogate in enumerate(self.surrogates):
            stages[f"transfer {index + 1}"] = Transfer(surrogate=surrogate, attack=apgd("image"))
        return stages | self._searches(effort, options, references)

    def _searches(self, effort: Effort, options: dict[str, Any], references: Towards) -> dict[str, Attack]:
        """The last stages, which search without gradients or hardly need them."""
        search = make_random_search(queries=effort.queries, **options)
        polish = Polish(rounds=max(1, effort.steps // 20), precision=self.precision, **options)
        stages: dict[str, Attack] = {
            _SEARCHES[get_norm(self.norm).searched_over]: search,
            "polish": polish,
        }
        if self.budget == "thorough" and not get_norm(self.norm).is_sparse:
            stages["boundary"] = Boundary(queries=effort.queries, references=references, stop_early=True, **options)
        return stages

    def run(
        self,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        *,
        targets: Tensor | None = None,
        generator: Generator | None = None,
        checkpoint: str | Path | None = None,
        progress: bool = False,
        on_stage: Callable[[StageRecord], None] | None = None,
        check: bool = True,
    ) -> SuiteResult:
        """Run the stages and return the strongest images with a record of each stage.

        Args:
            detector: detector to attack, which returns evidence and has thresholds.
            images: (B, C, H, W), finite, in [0, 1].
            labels: (B,) true labels.
            targets: (B,) wrong labels to aim at; None aims at any wrong label.
            generator: randomness, on the images' device.
            checkpoint: file to write after every stage; if it exists, the run resumes from it.
            progress: whether to show a progress bar.
            on_stage: function to call with the record of each stage.
            check: whether to check the detector, images, labels and targets first. Switch it off if they were checked
                already.

        Returns:
            The strongest attacked version of each image, and one record for each stage.

        Raises:
            InputError: images, labels or targets have a wrong shape, dtype, range or device.
            NotCalibratedError: the detector has no thresholds.
            ConfigurationError: the checkpoint belongs to another suite or to other images.
            PersistenceError: the checkpoint is damaged, is not the state of a suite, or is being written by
                another run.
        """
        if check:
            check_attack_input(detector, images, labels, targets)
        check_radius(self, images)
        with torch.inference_mode(False), evaluation_mode(detector), only_writer(checkpoint):
            images, labels = images.detach().clone(), labels.long().clone()
            targets = None if targets is None else targets.long().clone()
            chosen = choose_precision(detector, images, labels) if self.precision == "auto" else self.precision
            state = self._begin(detector, images, labels, targets, checkpoint, generator)
            if self.references is None:
                accepted = Towards(images[state.eligible], labels[state.eligible])
            else:
                accepted = Towards.accepted(detector, *self.references, batch_size=self.batch_size or 500)
            stages = replace(self, precision=chosen).stages(detector, accepted)
            shown = bar(stages.items(), f"{self.norm} {self.eps:g}" * progress)
            for name, attack in shown:
                rows = (state.margins > 0).nonzero().squeeze(1)
                if not len(rows):
                    break
                if any(record.name == name for record in state.records):
                    continue
                record = self._run_stage(name, attack, state, rows, detector, images, labels, targets, generator)
                state.records.append(record)
                shown.set_postfix(broken=int((state.eligible & (state.margins <= 0)).sum()))
                if checkpoint is not None:
                    state.save(checkpoint, generator)
                if on_stage is not None:
                    on_stage(record)
        cost = sum((Cost(record.forward, record.backward) for record in state.records), Cost())
        return SuiteResult(state.best, tuple(state.records), cost, state.runs)

    def _attack_checked(
        self,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        generator: Generator | None,
    ) -> Tensor:
        return self.run(detector, images, labels, targets=targets, generator=generator, check=False).images

    _perturb = _attack_checked  # a suite splits a batch itself, within each stage

    def _run_stage(
        self,
        name: str,
        attack: Attack,
        state: "SuiteState",
        rows: Tensor,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        generator: Generator | None,
    ) -> StageRecord:
        metered = Metered(detector)
        aims = None if targets is None else targets[rows]
        if isinstance(attack, Polish):
            attacked = self._polish(attack, state.best[rows], metered, images[rows], labels[rows], aims, generator)
        else:
            attacked = attack_checked_images(
                attack, metered, images[rows], labels[rows], targets=aims, generator=generator
            )
        margins = self._margins(detector, attacked, labels[rows], aims)
        # A stage may return images outside ball or box, which must not count.
        size = get_norm(self.norm).size(attacked - images[rows])
        inside = (size <= self.eps * (1 + 1e-5) + 1e-6) & ((attacked >= 0) & (attacked <= 1)).flatten(1).all(dim=1)
        margins = margins.masked_fill(~inside, torch.inf)
        better = margins < state.margins[rows]
        state.best[rows[better]], state.margins[rows[better]] = attacked[better], margins[better]
        counted = state.eligible[rows]
        return StageRecord(name, int(counted.sum()), int((counted & (margins <= 0)).sum()), *metered.cost)

    def _polish(
        self,
        polish: Polish,
        best: Tensor,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        generator: Generator | None,
    ) -> Tensor:
        """Polish the best images (B, C, H, W) so far."""
        parts = torch.arange(len(images), device=images.device).split(self.batch_size or len(images))
        return torch.cat(
            [
                attack_checked_images(
                    replace(polish, start=AtPoints(best[part])),
                    detector,
                    images[part],
                    labels[part],
                    targets=None if targets is None else targets[part],
                    generator=generator,
                )
                for part in parts
            ]
        )

    @torch.no_grad()
    def _margins(self, detector: Detector, images: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        margins = [
            success_margin(
                detector.evidence(images[rows]),
                detector.thresholds,
                labels[rows],
                None if targets is None else targets[rows],
            ).float()
            for rows in torch.arange(len(images), device=images.device).split(self.batch_size or max(1, len(images)))
        ]
        return torch.cat(margins)

    def _begin(
        self,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        checkpoint: str | Path | None,
        generator: Generator | None,
    ) -> "SuiteState":
        clean = self._margins(detector, images, labels, targets)
        eligible = is_accepted(detector, images, labels, batch_size=self.batch_size or 500)
        state = SuiteState(repr(self), clean, images.clone(), clean.clone(), [], eligible)
        if checkpoint is not None:
            state.load(checkpoint, generator)
        return state
