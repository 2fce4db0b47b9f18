"""The worst case over many attacks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import torch
from clusterguard._support import bar, evaluation_mode, only_writer
from clusterguard.attacks._auto_pgd import APGD
from clusterguard.attacks._base import (
    Attack,
    BuiltInAttack,
    attack_checked_images,
    check_attack_input,
    check_budget,
    check_radius,
)
from clusterguard.attacks._boundary import Boundary
from clusterguard.attacks._carlini_wagner import CarliniWagner
from clusterguard.attacks._encoders import has_representation
from clusterguard.attacks._fitting_search import make_random_search
from clusterguard.attacks._metering import Cost, Metered
from clusterguard.attacks._minimum_norm import FastMinimumNorm
from clusterguard.attacks._norm_base import Norm
from clusterguard.attacks._norms import get_norm
from clusterguard.attacks._orthogonal import OrthogonalPGD
from clusterguard.attacks._pgd import MIM, PGD
from clusterguard.attacks._polish import Polish
from clusterguard.attacks._random_search import SparseRS
from clusterguard.attacks._representation import RepelThenMinimise, RepresentationMatching
from clusterguard.attacks._search_precision import Precision, check_precision, choose_precision
from clusterguard.attacks._sigma_zero import SigmaZero
from clusterguard.attacks._sparse_pgd import SparsePGD
from clusterguard.attacks._starts import AtPoints, Start, Towards, is_accepted
from clusterguard.attacks._suite_state import StageRecord, SuiteState, digests_of_inputs
from clusterguard.attacks._wrapping import MultiTarget, Transfer
from clusterguard.detection import Detector, full_precision, success_margin
from clusterguard.errors import ConfigurationError
from torch import Generator, Tensor


class SuiteResult(NamedTuple):
    """The result of a suite.

    Attributes:
        images: (B, C, H, W) for each image, the attacked version with the smallest success margin.
        stages: one record for each stage, in order.
        cost: cost of all stages together, including stages of earlier runs. Judging clean images and references before
            the stages is not part of it.
        runs: number of runs, including earlier ones that this one resumed.
        precision: precision of the gradients, "float32" or "bf16".
    """

    images: Tensor
    stages: tuple[StageRecord, ...]
    cost: Cost
    runs: int
    precision: str


_TRIES = 5  # references of each class that starts are chosen from
_FEW_PIXEL_QUERIES = 500  # fewer leave many images that the cheap search over few pixels can break

Budget = Literal["quick", "standard", "thorough", "converge"]


class Effort(NamedTuple):
    """The work of a budget.

    Attributes:
        steps: number of steps of a gradient attack.
        restarts: number of random starts.
        targets: number of targets for each image; None takes all wrong classes.
        queries: number of queries for each image.
        searches: number of local searches from the image itself, before that from the best image so far.
    """

    steps: int
    restarts: int
    targets: int | None
    queries: int
    searches: int = 0


EFFORTS: dict[str, Effort] = {
    "quick": Effort(steps=20, restarts=1, targets=3, queries=200),
    "standard": Effort(steps=100, restarts=3, targets=9, queries=2000, searches=1),
    "thorough": Effort(steps=300, restarts=5, targets=None, queries=10_000, searches=3),
    "converge": Effort(steps=300, restarts=5, targets=None, queries=10_000, searches=3),
}
_POLISH = "polish"  # the stage that goes on from the best images; others of its kind start from the images themselves
_FROM_IMAGE = f"{_POLISH} from the image"
_REPEATED = ("APGD random 1", "Sparse-RS", "Sparse-RS, few pixels", "Square", "patches", f"{_FROM_IMAGE} 1", _POLISH)


@final
@dataclass(frozen=True, kw_only=True)
class WorstCaseSuite(BuiltInAttack):
    """A suite of all strong attacks of this library in one norm; an image counts as broken if any of them breaks it.

    The stages are the following, and each one attacks only images that are still unbroken. (1) APGD on the success
    margin starts from the image, from random and output-diversified points, and towards accepted images of other
    classes. (2) APGD is aimed at every wrong class, from the image and from an accepted image of this class. (3) MIM,
    fast minimum norm aimed at every wrong class, and for l2 Carlini & Wagner follow. (4) Attacks that escape from the
    adversarial plateau repel first, match representations, use orthogonal gradients, or transfer from a surrogate.
    (5) The attacks without gradients are Square, or `PatchAttack` for patches, and with the thorough budget Boundary
    for linf and l2. Balls of l2 and l1 also contain every change of a few pixels, so Sparse-RS with as many pixels runs
    second; so it does for l0, where Sparse-PGD and σ-zero follow.
    (6) `Polish` searches from the image itself, and then from the best images of all stages before it.

    Args:
        norm: norm of the ball, a name of `clusterguard.attacks.NORMS`.
        eps: radius of the ball, at least 0; for l0 a number of pixels, for patches the side.
        budget: amount of work, "quick", "standard" or "thorough". "converge" begins as "thorough" does. Then it repeats
            a random start, the search and both kinds of polish, until two rounds in a row break nothing.
        references: benign images (R, C, H, W) and their labels (R,), as starts for attacks; None takes the attacked
            images. Only images that the detector accepts are used.
        surrogates: detectors whose adversarial images are tried too.
        precision: precision of the gradients, as in `IteratedAttack`; "auto" decides once, also for runs
            that continue from a checkpoint.

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

        def apgd(start: str | Start, objective: str = "margin") -> APGD:
            return APGD(start=start, objective=objective, steps=effort.steps, **searched)

        over_pixels = norm.searched_over == "pixels"
        # Fast minimum norm converges slowly in l1; in l0, Sparse-PGD finds more in less time.
        slow = effort.steps * (3 if norm.is_sparse and not over_pixels else 1)
        towards = replace(references, tries=_TRIES)
        stages: dict[str, Attack] = {
            "APGD": apgd("image"),
            **self._few_pixels(effort, norm, references.images.shape[1:]),
            "APGD towards accepted images": apgd(towards),
            **{f"APGD random {index + 1}": apgd("random") for index in range(effort.restarts)},
            "APGD output-diversified": apgd("output_diversified"),
            "APGD suspicion": apgd("image", "suspicion"),
            **(self._sparse(effort, towards) if over_pixels else {}),
            "multi-target APGD": MultiTarget(attack=apgd("image"), max_targets=effort.targets),
            "multi-target APGD towards accepted images": MultiTarget(attack=apgd(towards), max_targets=effort.targets),
            "MIM": MIM(objective="margin", **iterated),
            "PGD towards accepted images": PGD(objective="suspicion", start=towards, **iterated),
            # Each of the two step lengths breaks images that the other misses, but for l0.
            **{
                f"multi-target fast minimum norm, step {length:g}": MultiTarget(
                    attack=FastMinimumNorm(step_size=length, steps=slow, **searched), max_targets=effort.targets
                )
                for length in ((10.0,) if over_pixels else (10.0, 1.0) if norm.grain else (1.0, 0.3))
            },
        }
        if self.norm == CarliniWagner.norm:
            carlini_wagner = CarliniWagner(eps=self.eps, steps=effort.steps, searches=5, batch_size=self.batch_size)
            stages["Carlini-Wagner"] = carlini_wagner
        stages |= self._escapes(detector, effort, iterated, references)
        for index, surrogate in enumerate(self.surrogates):
            stages[f"transfer {index + 1}"] = Transfer(surrogate=surrogate, attack=apgd("image"))
        return stages | self._searches(effort, options, references)

    def _sparse(self, effort: Effort, towards: Towards) -> dict[str, Attack]:
        """The attacks that are made for l0."""
        options: dict[str, Any] = {"eps": self.eps, "batch_size": self.batch_size, "precision": self.precision}
        options |= {"stop_early": True}
        places = {"": SparsePGD(steps=effort.steps, **options)}
        places[" towards accepted images"] = replace(places[""], start=towards)
        return {
            **{f"Sparse-PGD{place}": attack for place, attack in places.items()},
            "σ-zero": SigmaZero(steps=3 * effort.steps, **options),
            **{
                f"multi-target Sparse-PGD{place}": MultiTarget(attack=attack, max_targets=effort.targets)
                for place, attack in places.items()
            },
        }

    def _escapes(
        self, detector: Detector, effort: Effort, iterated: dict[str, Any], references: Towards
    ) -> dict[str, Attack]:
        """The attacks that lead out of the adversarial plateau."""
        stages: dict[str, Attack] = {"selective PGD": OrthogonalPGD(strategy="selective", **iterated)}
        if has_representation(detector):
            matched = {name: value for name, value in iterated.items() if name != "precision"}
            matching = RepresentationMatching(references=references, **matched)
            stages["repel, then minimise"] = RepelThenMinimise(**iterated)
            stages["match representations"] = MultiTarget(attack=matching, max_targets=effort.targets)
        else:
            stages["orthogonal PGD"] = OrthogonalPGD(strategy="orthogonal", **iterated)
        return stages

    def _few_pixels(self, effort: Effort, norm: Norm, shape: Sequence[int]) -> dict[str, Attack]:
        """The search over as many pixels as may change in any way, which is cheap and finds what gradients miss."""
        name, pixels = "Sparse-RS", int(self.eps)
        if norm.searched_over != "pixels":
            name, pixels = f"{name}, few pixels", 0 if norm.grain else norm.pixels_inside(self.eps, shape)
        search = SparseRS(eps=pixels, queries=max(_FEW_PIXEL_QUERIES, effort.queries), batch_size=self.batch_size)
        return {name: search} if pixels else {}

    def _searches(self, effort: Effort, options: dict[str, Any], references: Towards) -> dict[str, Attack]:
        """The last stages, which search without gradients or hardly need them."""
        over = get_norm(self.norm).searched_over
        polish = Polish(rounds=max(1, effort.steps // 20), precision=self.precision, **options)
        stages: dict[str, Attack] = {}
        if over != "pixels":  # that search is the second stage
            stages["Square" if over == "squares" else "patches"] = make_random_search(queries=effort.queries, **options)
        # The search from the best images may be stuck where one from the images is not.
        stages |= {f"{_FROM_IMAGE} {index + 1}": polish for index in range(EFFORTS[self.budget].searches)}
        stages[_POLISH] = polish
        if self.budget in ("thorough", "converge") and not get_norm(self.norm).is_sparse:
            stages["boundary"] = Boundary(queries=effort.queries, references=references, stop_early=True, **options)
        return stages

    def _plan(self, stages: dict[str, Attack], state: SuiteState) -> Iterator[tuple[str, Attack]]:
        """The stages, and with the budget "converge" further rounds until two in a row break nothing."""
        yield from stages.items()
        number, idle = 1, 0
        while self.budget == "converge" and idle < 2:
            number += 1
            names = {f"{name}, round {number}": name for name in _REPEATED if name in stages}
            for name, repeated in names.items():
                yield name, stages[repeated]
            broken = sum(record.broken for record in state.records if record.name in names)
            idle = 0 if broken else idle + 1

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
        with torch.inference_mode(False), evaluation_mode(detector) as detector, only_writer(checkpoint):
            images, labels = images.detach().clone(), labels.long().clone()
            targets = None if targets is None else targets.long().clone()
            state = self._begin(detector, images, labels, targets, checkpoint, generator)
            if self.precision != "auto":
                state.precision = self.precision
            elif state.precision is None:
                state.precision = choose_precision(detector, images, labels)
            if self.references is None:
                accepted = Towards(images[state.eligible], labels[state.eligible])
            else:
                accepted = Towards.accepted(detector, *self.references, batch_size=self.batch_size or 500)
            stages = replace(self, precision=state.precision).stages(detector, accepted)
            shown = bar(self._plan(stages, state), f"{self.norm} {self.eps:g}" * progress, total=len(stages))
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
        return SuiteResult(state.best, tuple(state.records), cost, state.runs, state.precision)

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
        state: SuiteState,
        rows: Tensor,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        generator: Generator | None,
    ) -> StageRecord:
        metered = Metered(detector)
        aims = None if targets is None else targets[rows]
        if name.partition(",")[0] == _POLISH and isinstance(attack, Polish):
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
    @full_precision()
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
    ) -> SuiteState:
        clean = self._margins(detector, images, labels, targets)
        eligible = is_accepted(detector, images, labels, batch_size=self.batch_size or 500)
        state = SuiteState(repr(self), clean, images.clone(), clean.clone(), [], eligible)
        if checkpoint is not None:
            inputs = {"images": images, "labels": labels, "targets": targets, "references": self.references}
            state.inputs = digests_of_inputs(detector, inputs, surrogates=self.surrogates)
            state.load(checkpoint, generator)
        return state
