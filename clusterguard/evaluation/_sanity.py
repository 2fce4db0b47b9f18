"""The sanity probe, which looks for signs that the attacks of an evaluation failed although the detector is weak."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from clusterguard._support import evaluation_mode
from clusterguard.attacks import (
    PGD,
    Attack,
    MultiTarget,
    ObjectiveValues,
    Problem,
    StageRecord,
    Start,
    Towards,
    get_norm,
    get_objective,
)
from clusterguard.attacks._internal import (
    SteepestDescent,
    attack_checked_images,
    backpropagate,
    descend,
    make_random_search,
)
from clusterguard.detection import Detection, Detector, Rate, Verdicts, decide, full_precision, is_broken, is_eligible
from torch import Generator, Tensor

_STEPS = 40


@final
@dataclass(frozen=True)
class Sanity:
    """The report of a quick probe with attacks of clusterguard, which shows whether an evaluation can be trusted.

    Attributes:
        images: number of probed images, all labelled correctly and accepted before any attack.
        norm: norm of the probe, which is that of the first evaluated attack that states one.
        eps: radius of the probe.
        by_eps: (eps, ASR) pairs at fractions of eps, at eps, and at a radius that allows the whole box [0, 1].
        by_step: ASR after each step of PGD at eps.
        white_box: ASR of several gradient attacks at eps, with starts from other images and with several targets.
        black_box: ASR of a gradient-free attack at eps.
        zero_gradients: share of gradients that were exactly 0.
        non_finite_gradients: share of gradients that were not finite.
        still_falling: share of unbroken images whose best margin made more than 2 % of its total decrease in the last
            tenth of the steps.
        lost_again: share of images that an earlier iterate broke but the last one did not.
        warnings: problems in words; empty if there are none.
    """

    images: int
    norm: str
    eps: float
    by_eps: tuple[tuple[float, Rate], ...]
    by_step: tuple[Rate, ...]
    white_box: Rate
    black_box: Rate
    zero_gradients: float
    non_finite_gradients: float
    still_falling: float
    lost_again: float
    warnings: tuple[str, ...]


class EvaluatedAttack(Protocol):
    """The part of an evaluated attack's result that the probe needs."""

    @property
    def name(self) -> str:
        """The name of the attack."""

    @property
    def norm(self) -> str | None:
        """The norm that the attack states."""

    @property
    def eps(self) -> float | None:
        """The radius that the attack states."""

    @property
    def stages(self) -> tuple[StageRecord, ...]:
        """The stages of a suite; empty for other attacks."""

    @property
    def verdict(self) -> Detection:
        """The verdicts on the attacked images."""


def examine(
    detector: Detector,
    images: Tensor,
    labels: Tensor,
    results: Sequence[EvaluatedAttack],
    generator: Generator | None = None,
) -> Sanity | None:
    """Probe a detector with quick attacks.

    Args:
        detector: calibrated detector.
        images: (B, C, H, W) clean images in [0, 1], a part of the evaluated ones. They have been checked.
        labels: (B,) true labels of the images.
        results: results of the evaluated attacks.
        generator: randomness, on the images' device.

    Returns:
        The report; None if no attack states its norm and eps, or if no image is labelled correctly and accepted.
    """
    stated = [result for result in results if result.norm is not None and result.eps]
    with torch.no_grad(), evaluation_mode(detector) as seen, full_precision():
        usable = is_eligible(Verdicts(decide(seen.evidence(images), detector.thresholds), labels))
    if not stated or not usable.any():
        return None
    norm, eps = str(stated[0].norm), float(stated[0].eps or 0)
    probed, truth = images[usable], labels[usable]
    references = Towards(probed, truth)

    def broken(attack: Attack) -> Tensor:
        attacked = attack_checked_images(attack, detector, probed, truth, generator=generator)
        with torch.no_grad(), evaluation_mode(detector) as seen, full_precision():
            return is_broken(Verdicts(decide(seen.evidence(attacked), detector.thresholds), truth))

    def pgd(radius: float, start: Start | str) -> PGD:
        step = get_norm(norm).step_size(radius, images.shape[1:], share=0.1)
        options: dict[str, Any] = {"steps": _STEPS, "start": start, "objective": "margin", "stop_early": True}
        return PGD(norm=norm, eps=radius, step_size=step, **options)

    trace = _Trace()
    rule = SteepestDescent(pgd(eps, "image").step_size, sparsity=0.05)
    with evaluation_mode(detector) as seen:
        problem = Problem(seen, probed, truth, None, get_norm(norm), eps, get_objective("margin"), generator)
        last = descend(problem, probed, rule, gradient=trace.gradient, steps=_STEPS, keep="last")
        trace.margins.append(problem.margin(last))
    margins = torch.stack(trace.margins)
    best = margins.cummin(dim=0).values
    late = best[-1 - _STEPS // 10] - best[-1]
    ever = best[-1] <= 0
    white = ever | broken(pgd(eps, references)) | broken(MultiTarget(attack=pgd(eps, references), max_targets=5))
    black = broken(make_random_search(norm, eps=eps, queries=200))

    whole = float(get_norm(norm).size(torch.ones_like(images[:1]))[0])
    smaller = [get_norm(norm).round_radius(radius) for radius in (eps / 4, eps / 2, eps * 3 / 4)]
    curve, so_far = [], torch.zeros_like(white)
    for radius in [*smaller, None, whole]:
        hits = [white, black] if radius is None else [broken(pgd(radius, at)) for at in ("image", references)]
        so_far = so_far | hits[0] | hits[1]
        curve.append((eps if radius is None else radius, _rate(so_far)))
    report = Sanity(
        images=len(probed),
        norm=norm,
        eps=eps,
        by_eps=tuple(curve),
        by_step=tuple(_rate(row <= 0) for row in best),
        white_box=_rate(white),
        black_box=_rate(black),
        zero_gradients=trace.zero / trace.total,
        non_finite_gradients=trace.non_finite / trace.total,
        still_falling=_share((late > 0.02 * (best[0] - best[-1]))[~ever]),
        lost_again=_share(ever & (margins[-1] > 0)),
        warnings=(),
    )
    alike = [result.verdict for result in results if result.norm == norm and result.eps == eps]
    missed = white.cpu() & _unbroken(alike, usable.cpu(), truth.cpu())
    judgements = [*_judgements(report, int((black & ~white).sum()), int(missed.sum())), *map(_unfinished, results)]
    return Sanity(**{**report.__dict__, "warnings": tuple(text for is_wrong, text in judgements if is_wrong)})


def _unbroken(verdicts: Sequence[Detection], usable: Tensor, truth: Tensor) -> Tensor:
    """(b,) whether each usable image is broken in none of the verdicts.

    Args:
        verdicts: verdicts on the attacked images, of which the first B are those of the probe.
        usable: (B,) whether each image was probed.
        truth: (b,) labels of the b probed images.
    """
    unbroken = torch.ones_like(truth, dtype=torch.bool)
    for verdict in verdicts:
        unbroken &= ~is_broken(Verdicts(Detection(*(part[: len(usable)][usable] for part in verdict)), truth))
    return unbroken


class _Trace:
    """Backpropagation that keeps all margins and counts gradients that are 0 or not finite."""

    def __init__(self) -> None:
        self.margins: list[Tensor] = []
        self.total = self.zero = self.non_finite = 0

    def gradient(self, problem: Problem, iterates: Tensor) -> ObjectiveValues:
        evaluation = backpropagate(problem, iterates)
        flat = evaluation.gradient.flatten(1)
        self.margins.append(evaluation.margin)
        self.total += len(flat)
        self.zero += int((flat == 0).all(dim=1).sum())
        self.non_finite += int((~flat.isfinite()).any(dim=1).sum())
        return evaluation


def _judgements(report: Sanity, only_black: int, missed: int) -> list[tuple[bool, str]]:
    whole = report.by_eps[-1][1]
    return [
        (
            whole.value < 0.99,
            f"attacks that may choose any image break only {whole}, so they fail for a reason other than a robust "
            "detector",
        ),
        (
            only_black > 0,
            f"a gradient-free attack breaks {only_black} images that gradient attacks do not: gradients are masked",
        ),
        (
            missed > 0,
            f"a quick probe breaks {missed} of {report.images} images that the evaluated attacks do not break, so they "
            "are too weak",
        ),
        (report.zero_gradients > 0.01, f"{report.zero_gradients:.1%} of gradients are exactly 0: the loss saturates"),
        (report.non_finite_gradients > 0, f"{report.non_finite_gradients:.1%} of gradients are not finite"),
        (report.still_falling > 0.1, f"{report.still_falling:.0%} of losses still fell at the end: take more steps"),
    ]


def _unfinished(result: EvaluatedAttack) -> tuple[bool, str]:
    """Whether the last stage of a suite broke some of its images and left others, and what this means."""
    last = result.stages[-1] if result.stages else StageRecord("", 0, 0, 0, 0)
    return 0 < last.broken < last.attacked, (
        f"{result.name} has not converged: its last stage, {last.name}, still broke {last.broken} of {last.attacked} "
        "images; a larger budget is likely to break more"
    )


def _share(hits: Tensor) -> float:
    return float(hits.double().mean()) if len(hits) else 0.0


def _rate(hits: Tensor) -> Rate:
    return Rate(int(hits.sum()), hits.numel())
