"""Estimates from results: rates and areas with their uncertainty, the worst attack, and unions image by image."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from clusterguard.detection import Rate

from benchmarks.experiments import Cell, Table
from benchmarks.running import from_hex

ONE_PERCENT = 0.01  # the false-positive rate of the suite, and of all results that are compared with it
Result = dict[str, Any]
Slot = Sequence[Result | None]
"""One result for each seed. None for a seed that has not been run."""
Measure = Callable[[Result], Rate | float]


class Results:
    """A table with the results of its cells.

    Args:
        table: table whose cells are read.
        read: function of the key of a cell that returns its result, or None if there is none.

    Attributes:
        cells: pairs of a cell and its result, or None.
        finished: results of the cells that have been run.
    """

    def __init__(self, table: Table, read: Callable[[str], Result | None]) -> None:
        self.table = table
        self.cells = [(cell, read(cell.key)) for cell in table.cells]
        self.finished = [result for _, result in self.cells if result is not None]

    def slot(self, detector: str, attack: str, variant: str | None = None) -> Slot:
        """The results of one place in a table. The first variant is taken if none is named."""
        wanted = detector, attack, self.table.variants[0] if variant is None else variant
        return [result for cell, result in self.cells if (cell.detector, cell.attack, cell.variant) == wanted]

    def threat(self, attack: str) -> tuple[str, float]:
        """The norm and the radius of an attack."""
        return next(threat_of(cell) for cell, _ in self.cells if cell.attack == attack)


def threat_of(cell: Cell) -> tuple[str, float]:
    """The norm and the radius of a cell's attack."""
    return cell.norm, float(cell.options["eps"])


@dataclass(frozen=True)
class Estimate:
    """An estimate over seeds.

    Attributes:
        values: one value for every seed that has been run.
        intervals: 95 % intervals, one for each value. Areas have none.
        seeds: number of seeds in the experiment.
        bound: "≥ " or "≤ " if results are missing that could only raise or only lower the estimate. Else "".
    """

    values: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...] = ()
    seeds: int = 1
    bound: str = ""

    @property
    def mean(self) -> float:
        """The mean over seeds. NaN if none has been run."""
        return sum(self.values) / len(self.values) if self.values else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The interval from the lowest to the highest end of the intervals of all seeds.

        Seeds share images, so their counts must not be added up.
        """
        lows, highs = [low for low, _ in self.intervals], [high for _, high in self.intervals]
        return min(lows, default=math.nan), max(highs, default=math.nan)


def estimate(slot: Slot, measure: Measure) -> Estimate:
    """Measure each result that is there."""
    figures = [measure(result) for result in slot if result is not None]
    values = tuple(figure.value if isinstance(figure, Rate) else figure for figure in figures)
    return Estimate(values, tuple(figure.interval for figure in figures if isinstance(figure, Rate)), len(slot))


def measure_success(rate: float, setting: str | None = None) -> Callable[[Result], Rate]:
    """Measure ASR at a false-positive rate.

    Args:
        rate: false-positive rate.
        setting: setting to measure, such as a step size. None takes the largest ASR over settings.
    """

    def measure(result: Result) -> Rate:
        chosen = [verdict for name, verdict in result["results"].items() if setting in (None, name)]
        return max(
            (Rate(*verdict["rates"][f"{rate:g}"]["success"]) for verdict in chosen), key=lambda share: share.value
        )

    return measure


def measure_area(setting: str | None = None) -> Callable[[Result], float]:
    """Measure EROC, which is NaN where it is undefined.

    Args:
        setting: setting to measure, such as a step size. None takes the smallest EROC over settings.
    """

    def measure(result: Result) -> float:
        areas = [verdict["eroc"] for name, verdict in result["results"].items() if setting in (None, name)]
        return min((value for value in areas if value is not None), default=math.nan)

    return measure


def measure_accuracy(result: Result) -> Rate:
    """The share of clean images labelled correctly."""
    return Rate(*result["accuracy"])


def measure_false_positives(rate: float) -> Callable[[Result], Rate]:
    """Measure the false-positive rate on clean test images, with thresholds for `rate`."""
    return lambda result: Rate(*next(iter(result["results"].values()))["rates"][f"{rate:g}"]["false_positives"])


def worst_row(rows: Sequence[Estimate], *, smallest: bool = False) -> Estimate:
    """The worst case as in the paper: the row with the largest or smallest mean. A bound if rows are missing."""
    known = [row for row in rows if not math.isnan(row.mean)]
    if not known:
        return rows[0]
    missing = any(len(row.values) < row.seeds for row in rows)
    bound = ("≤ " if smallest else "≥ ") if missing else ""
    return replace((min if smallest else max)(known, key=lambda row: row.mean), bound=bound)


def worst_per_image(slots: Sequence[Slot], rate: float) -> Estimate:
    """The share of images that at least one of several attacks broke. A bound if results are missing."""
    seeds = [[result for result in seed if result is not None] for seed in zip(*slots, strict=True)]
    missing = any(len(seed) < len(slots) for seed in seeds)
    return _estimate_over_seeds([union_of(seed, rate) for seed in seeds if seed], len(seeds), missing)


def worst_within(suite: Sequence[tuple[Cell, Result | None]], every: Iterable[Results]) -> tuple[Estimate, int]:
    """The share of images that any attack within the radii of the suite broke.

    Args:
        suite: cells of the worst-case suite against one detector, with their results, for one or several radii and all
            seeds.
        every: results of all tables on the same data.

    Returns:
        The share, and the number of these images that the suite did not break.
    """
    known = {cell.key: (cell, result) for results in every for cell, result in results.cells if result is not None}
    seeds = dict.fromkeys(cell.seed for cell, _ in suite)
    unions, left = [], 0
    for seed in seeds:
        finished = {cell.key: (cell, result) for cell, result in suite if cell.seed == seed and result is not None}
        if finished:
            others = [
                result
                for cell, result in known.values()
                if ONE_PERCENT in cell.rates and any(_is_within(cell, other) for other, _ in finished.values())
            ]
            unions.append(union_of([*others, *(result for _, result in finished.values())], ONE_PERCENT))
            left += unions[-1].count - union_of([result for _, result in finished.values()], ONE_PERCENT).count
    return _estimate_over_seeds(unions, len(seeds), any(result is None for _, result in suite)), left


def _is_within(cell: Cell, suite: Cell) -> bool:
    """Whether a cell attacks the same detector on the same images within the radius of the suite.

    A certificate is not an attack.
    """
    if cell.kind == "certificate":
        return False
    if cell.training.key != suite.training.key or cell.detector != suite.detector:
        return False
    (norm, eps), (suite_norm, radius) = threat_of(cell), threat_of(suite)
    return (cell.images, cell.seed, norm) == (suite.images, suite.seed, suite_norm) and eps <= radius


def _estimate_over_seeds(rates: Sequence[Rate], seeds: int, missing: bool) -> Estimate:
    values, intervals = tuple(rate.value for rate in rates), tuple(rate.interval for rate in rates)
    return Estimate(values, intervals, seeds, "≥ " if missing else "")


def union_of(results: Iterable[Result], rate: float) -> Rate:
    """The share of images that at least one setting of at least one attack broke.

    Args:
        results: results of one detector under several attacks on the same images.
        rate: false-positive rate.
    """
    verdicts = [
        [from_hex(verdict["rates"][f"{rate:g}"][bits], result["images"]) for bits in ("broken", "eligible")]
        for result in results
        for verdict in result["results"].values()
    ]
    broken, eligible = (reduce(torch.logical_or, bits) for bits in zip(*verdicts, strict=True))
    return Rate(int(broken.sum()), int(eligible.sum()))
