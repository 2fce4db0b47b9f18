"""The worst case over many attacks, and the state from which an interrupted one goes on."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import torch
from clusterguard._support import evaluation_mode, only_writer, read_progress, save_progress
from clusterguard.attacks._auto_pgd import APGD
from clusterguard.attacks._base import Attack, BuiltInAttack, check_attack_input, check_budget, check_radius
from clusterguard.attacks._boundary import Boundary
from clusterguard.attacks._carlini_wagner import CarliniWagner
from clusterguard.attacks._metering import Cost, Metered
from clusterguard.attacks._minimum_norm import FastMinimumNorm
from clusterguard.attacks._norms import get_norm
from clusterguard.attacks._orthogonal import OrthogonalPGD
from clusterguard.attacks._pgd import MIM, PGD
from clusterguard.attacks._random_search import Square, random_search
from clusterguard.attacks._representation import RepelThenMinimise, RepresentationMatching, has_representation
from clusterguard.attacks._starts import Start, Towards
from clusterguard.attacks._wrapping import MultiTarget, Transfer
from clusterguard.detection import Detector, success_margin
from clusterguard.errors import ConfigurationError, PersistenceError, in_one_line
from torch import Generator, Tensor
from tqdm.auto import tqdm

_KIND = "suite"
_KEYS = {"suite", "clean_margins", "best", "margins", "records", "generator", "cost", "runs"}


@dataclass(frozen=True)
class StageRecord:
    """What one stage of a suite did.

    Attributes:
        name: of the stage.
        attacked: how many images had survived until then.
        broken: how many of those it broke.
        forward: images judged.
        backward: gradients taken.
    """

    name: str
    attacked: int
    broken: int
    forward: int
    backward: int


class SuiteResult(NamedTuple):
    """What a suite found.

    Attributes:
        images: (B, C, H, W), each image's attacked version with the smallest success margin.
        stages: one record per stage, in order.
        cost: what all of it took, earlier runs that this one went on from included.
        runs: how many runs that were.
    """

    images: Tensor
    stages: tuple[StageRecord, ...]
    cost: Cost
    runs: int


@dataclass
class SuiteState:
    """What an interrupted suite goes on from.

    Attributes:
        suite: how it prints.
        clean_margins: (B,), by which another detector, other images or labels are noticed.
        best: (B, C, H, W) strongest images so far.
        margins: (B,) their success margins.
        records: of the stages that are done.
        spent: what earlier runs took.
        runs: how many runs there have been, this one included.
    """

    suite: str
    clean_margins: Tensor
    best: Tensor
    margins: Tensor
    records: list[StageRecord]
    spent: Cost = field(default_factory=Cost)
    runs: int = 1

    def save(self, path: str | Path, generator: Generator | None, cost: Cost) -> None:
        """Write the state, whole or not at all; `cost` is that of this run so far."""
        state = {
            "suite": self.suite,
            "clean_margins": self.clean_margins,
            "best": self.best,
            "margins": self.margins,
            "records": [asdict(record) for record in self.records],
            "generator": None if generator is None else generator.get_state(),
            "cost": list(self.spent + cost),
            "runs": self.runs,
        }
        save_progress(path, _KIND, state)

    def load(self, path: str | Path, generator: Generator | None) -> None:
        """Take over a state that `save` wrote for the same suite, detector, images and labels.

        Raises:
            ConfigurationError: it is of something else.
            PersistenceError: it is damaged, or no state of a suite.
        """
        again = f"delete {path} to begin the suite anew, or choose another checkpoint"
        progress = read_progress(path, _KIND, hint=again, device=self.best.device)
        if progress is None:
            return
        state = progress.state
        if set(state) != _KEYS or not _is_state(state):
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
        self.spent, self.runs = Cost(*state["cost"]), state["runs"] + 1


def _is_state(state: dict[str, Any]) -> bool:
    """Whether an archive holds what `SuiteState.save` writes: its kinds, its shapes, and no margin that is NaN."""
    clean, best, margins, generator = (state[name] for name in ("clean_margins", "best", "margins", "generator"))
    if not all(isinstance(own, Tensor) and own.is_floating_point() for own in (clean, best, margins)):
        return False
    if clean.ndim != 1 or margins.shape != clean.shape or best.ndim != 4 or len(best) != len(clean):
        return False
    if clean.isnan().any() or margins.isnan().any() or not best.isfinite().all():
        return False
    kinds = {"name": str, "attacked": int, "broken": int, "forward": int, "backward": int}
    return (
        isinstance(state["suite"], str)
        and isinstance(state["cost"], list)
        and [type(count) for count in (*state["cost"], state["runs"])] == [int, int, int]
        and (generator is None or isinstance(generator, Tensor))
        and isinstance(state["records"], list)
        and all(
            isinstance(record, dict) and {k: type(v) for k, v in record.items()} == kinds for record in state["records"]
        )
    )


Budget = Literal["quick", "standard", "thorough"]


class Effort(NamedTuple):
    """What a budget buys: steps per gradient attack, random starts, targets per image, queries per image."""

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
    """Everything we know against ourselves, in one norm: an image counts as broken if anything breaks it.

    Stages: (1) APGD on the success margin from the image, random, output-diversified, and towards accepted images of
    other classes; (2) APGD aimed at every wrong class, from the image and from an accepted image of that class;
    (3) MIM, fast minimum norm aimed at every wrong class, and Carlini & Wagner for l2; (4) escapes from the
    adversarial plateau: repel first, match representations, orthogonal gradients, transfer; (5) gradient-free: Square,
    or Sparse-RS for l0, and if thorough in linf and l2 Boundary. Images that are broken leave.

    Args:
        norm: "linf", "l2", "l1" or "l0".
        eps: radius of the ball, at least 0; for l0 a number of pixels.
        budget: "quick", "standard" or "thorough".
        references: benign images to start towards; None takes those under attack. Only accepted ones are used.
        surrogates: detectors whose adversarial images are tried too.

    Raises:
        ConfigurationError: an option out of its range.

    Reference:
        Croce & Hein (2020) for the idea of a fixed, parameter-free ensemble; Tramer et al., "On adaptive attacks to
        adversarial example defenses" (2020) for why each stage is there.

    Example:
        >>> WorstCaseSuite("linf", eps=0.3, budget="quick")
        WorstCaseSuite(batch_size=None, norm='linf', eps=0.3, budget='quick')
    """

    norm: str = field(kw_only=False)
    eps: float
    budget: Budget = "standard"
    references: tuple[Tensor, Tensor] | None = field(default=None, repr=False, compare=False)
    surrogates: tuple[Detector, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        check_budget(eps=self.eps, norm=self.norm, batch_size=self.batch_size)
        get_norm(self.norm)
        if self.budget not in EFFORTS:
            raise ConfigurationError(f"expected a budget among {', '.join(EFFORTS)}, got {self.budget!r}")
        if self.references is not None:  # without them, the size of images is seen at the first call
            check_radius(self, self.references[0])

    def stages(self, detector: Detector, references: Towards) -> dict[str, Attack]:
        """The attacks by name, in order; those that the detector has no use for are left out.

        Args:
            detector: under attack.
            references: accepted benign images.
        """
        effort = EFFORTS[self.budget]
        norm, share = get_norm(self.norm), 2 / max(10, effort.steps // 5)
        step = norm.step_size(self.eps, references.images.shape[1:], share=share) or 1.0  # eps = 0

        def apgd(start: str | Start, objective: str = "margin", steps: int = effort.steps) -> APGD:
            return APGD(
                norm=self.norm,
                eps=self.eps,
                steps=steps,
                start=start,
                objective=objective,
                stop_early=True,
                batch_size=self.batch_size,
            )

        options: dict[str, Any] = {"norm": self.norm, "eps": self.eps, "batch_size": self.batch_size}
        iterated: dict[str, Any] = options | {"steps": effort.steps, "step_size": step, "stop_early": True}
        stages: dict[str, Attack] = {
            "APGD": apgd("image"),
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
            # Two lengths of step, for each finds what the other misses; many steps, for it converges slowly.
            **{
                f"multi-target fast minimum norm, step {length:g}": MultiTarget(
                    attack=FastMinimumNorm(step_size=length, steps=3 * effort.steps, stop_early=True, **options),
                    max_targets=effort.targets,
                )
                for length in ((10.0, 1.0) if norm.grain else (1.0, 0.3))
            },
        }
        if self.norm == "l2":
            carlini_wagner = CarliniWagner(eps=self.eps, steps=effort.steps, searches=5, batch_size=self.batch_size)
            stages["Carlini-Wagner"] = carlini_wagner
        stages["selective PGD"] = OrthogonalPGD(strategy="selective", **iterated)
        if has_representation(detector):
            stages["repel, then minimise"] = RepelThenMinimise(**iterated)
            stages["match representations"] = MultiTarget(
                attack=RepresentationMatching(references=references, **iterated), max_targets=effort.targets
            )
        else:
            stages["orthogonal PGD"] = OrthogonalPGD(strategy="orthogonal", **iterated)
        for index, surrogate in enumerate(self.surrogates):
            stages[f"transfer {index + 1}"] = Transfer(surrogate=surrogate, attack=apgd("image"))
        search = random_search(queries=effort.queries, **options)
        stages["Square" if isinstance(search, Square) else "Sparse-RS"] = search
        if self.budget == "thorough" and self.norm in ("linf", "l2"):
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
    ) -> SuiteResult:
        """Run the stages and say what each did.

        Args:
            detector: whatever yields evidence and thresholds.
            images: (B, C, H, W), finite, in [0, 1].
            labels: (B,) true labels.
            targets: (B,) wrong labels to aim at; None aims at any wrong label.
            generator: randomness, on the images' device.
            checkpoint: a file written after every stage; if it exists, the run goes on from it.
            progress: show a progress bar.
            on_stage: called after every stage.

        Returns:
            The strongest image found for each, and one record per stage.

        Raises:
            InputError: images, labels or targets of a wrong shape, dtype, range or device.
            NotCalibratedError: the detector has no thresholds.
            ConfigurationError: the checkpoint is of another suite or of other images.
            PersistenceError: the checkpoint is damaged, no state of a suite, or being written by another run.
        """
        check_attack_input(detector, images, labels, targets)
        check_radius(self, images)
        metered = Metered(detector)
        with torch.inference_mode(False), evaluation_mode(detector), only_writer(checkpoint):
            images, labels = images.detach().clone(), labels.long().clone()
            targets = None if targets is None else targets.long().clone()
            benign = (images, labels) if self.references is None else self.references
            stages = self.stages(detector, Towards.accepted(metered, *benign, batch_size=self.batch_size or 500))
            state = self._begin(metered, images, labels, targets, checkpoint, generator)
            bar = tqdm(stages.items(), desc=f"{self.norm} {self.eps:g}", disable=not progress, leave=False)
            for name, attack in bar:
                rows = (state.margins > 0).nonzero().squeeze(1)
                if not len(rows):
                    break
                if any(record.name == name for record in state.records):
                    continue
                record = self._run_stage(name, attack, state, rows, metered, images, labels, targets, generator)
                state.records.append(record)
                bar.set_postfix(broken=int((state.margins <= 0).sum()))
                if checkpoint is not None:
                    state.save(checkpoint, generator, metered.cost)
                if on_stage is not None:
                    on_stage(record)
        return SuiteResult(state.best, tuple(state.records), state.spent + metered.cost, state.runs)

    def __call__(
        self,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        *,
        targets: Tensor | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """The images of `run`."""
        return self.run(detector, images, labels, targets=targets, generator=generator).images

    def _perturb(
        self,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        generator: Generator | None,
    ) -> Tensor:
        return self.run(detector, images, labels, targets=targets, generator=generator).images

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
        attacked = attack(metered, images[rows], labels[rows], targets=aims, generator=generator)
        margins = self._margins(detector, attacked, labels[rows], aims)
        # No stage is trusted: what left ball or box is worth nothing.
        size = get_norm(self.norm).size(attacked - images[rows])
        inside = (size <= self.eps * (1 + 1e-5) + 1e-6) & ((attacked >= 0) & (attacked <= 1)).flatten(1).all(dim=1)
        margins = margins.masked_fill(~inside, torch.inf)
        better = margins < state.margins[rows]
        state.best[rows[better]], state.margins[rows[better]] = attacked[better], margins[better]
        return StageRecord(name, len(rows), int((margins <= 0).sum()), *metered.cost)

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
        state = SuiteState(repr(self), clean, images.clone(), clean.clone(), [])
        if checkpoint is not None:
            state.load(checkpoint, generator)
        return state
