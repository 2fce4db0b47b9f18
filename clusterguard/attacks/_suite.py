"""Ordered attacks, later ones on survivors only: the worst case that an honest evaluation needs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import torch
from clusterguard._support import evaluation_mode
from clusterguard.attacks._auto_pgd import APGD
from clusterguard.attacks._base import Attack, BuiltInAttack, check_attack_input, check_budget, check_radius
from clusterguard.attacks._boundary import Boundary
from clusterguard.attacks._carlini_wagner import CarliniWagner
from clusterguard.attacks._iterative import MIM, PGD
from clusterguard.attacks._metering import Metered
from clusterguard.attacks._minimum_norm import FastMinimumNorm
from clusterguard.attacks._multi_target import MultiTarget
from clusterguard.attacks._norms import get_norm
from clusterguard.attacks._orthogonal import OrthogonalPGD
from clusterguard.attacks._random_search import SparseRS, Square
from clusterguard.attacks._representation import RepelThenMinimise, RepresentationMatching, has_representation
from clusterguard.attacks._starts import Start, Towards
from clusterguard.attacks._suite_state import StageRecord, SuiteResult, SuiteState
from clusterguard.attacks._transfer import Transfer
from clusterguard.detection import Detector, success_margin
from clusterguard.errors import ConfigurationError
from torch import Generator, Tensor
from tqdm.auto import tqdm

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

    def stages(self, detector: Detector, references: Towards) -> dict[str, Attack]:
        """The attacks by name, in order; those that the detector has no use for are left out.

        Args:
            detector: under attack.
            references: accepted benign images.
        """
        effort = EFFORTS[self.budget]
        # Sparse norms change few coordinates at a time, each as far as it may go.
        coordinates = float(references.images.shape[1:].numel())
        step = {"l1": self.eps, "l0": coordinates}.get(self.norm, 2 * self.eps / max(10, effort.steps // 5))
        step = step or 1.0  # eps = 0

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
                for length in ((10.0, 1.0) if self.norm == "l0" else (1.0, 0.3))
            },
        }
        if self.norm == "l2":
            stages["Carlini-Wagner"] = CarliniWagner(
                eps=self.eps, steps=effort.steps, searches=5, batch_size=self.batch_size
            )
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
        if self.norm == "l0":
            stages["Sparse-RS"] = SparseRS(eps=int(self.eps), queries=effort.queries, batch_size=self.batch_size)
        else:
            stages["Square"] = Square(queries=effort.queries, **options)
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
            PersistenceError: the checkpoint is damaged, or no state of a suite.
        """
        check_attack_input(detector, images, labels, targets)
        check_radius(self, images)
        with torch.inference_mode(False), evaluation_mode(detector):
            images, labels = images.detach().clone(), labels.long().clone()
            targets = None if targets is None else targets.long().clone()
            benign = (images, labels) if self.references is None else self.references
            stages = self.stages(detector, Towards.accepted(detector, *benign, batch_size=self.batch_size or 500))
            state = self._begin(detector, images, labels, targets, checkpoint, generator)
            bar = tqdm(stages.items(), desc=f"{self.norm} {self.eps:g}", disable=not progress, leave=False)
            for name, attack in bar:
                rows = (state.margins > 0).nonzero().squeeze(1)
                if not len(rows):
                    break
                if any(record.name == name for record in state.records):
                    continue
                record = self._run_stage(name, attack, state, rows, detector, images, labels, targets, generator)
                state.records.append(record)
                bar.set_postfix(broken=int((state.margins <= 0).sum()))
                if checkpoint is not None:
                    state.save(checkpoint, generator)
                if on_stage is not None:
                    on_stage(record)
        return SuiteResult(state.best, tuple(state.records))

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
        if checkpoint is not None and Path(checkpoint).exists():
            state.load(checkpoint, generator)
        return state
