"""The figures of the paper as PNG and SVG, made from results alone. They say which cells have not been run."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from clusterguard.errors import MissingDependencyError

from benchmarks._support import write_atomically
from benchmarks.detectors import RECIPES
from benchmarks.experiments import Cell
from benchmarks.reporting._estimates import (
    ONE_PERCENT,
    Estimate,
    Result,
    Results,
    estimate,
    measure_area,
    measure_success,
    threat_of,
)
from benchmarks.reporting._tables import NOT_RUN, show_attack, show_threat

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# These colours are from Okabe & Ito, and colour-blind readers can tell them apart. Markers and dashes differ in grey.
STYLES: tuple[tuple[str, str, Any], ...] = (
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", (0, (5, 1.5))),
    ("#009E73", "^", (0, (1.5, 1.2))),
    ("#CC79A7", "D", (0, (6, 1.5, 1.5, 1.5))),
    ("#000000", "v", (0, (3, 3))),
)
# These ten colours are from Petroff, "Accessible color sequences for data visualization" (2021). Digits in the plot
# name the classes as well.
CLASSES = ["#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"]


class Point(NamedTuple):
    """One setting of an attack.

    Attributes:
        x: step size or number of steps.
        rate: estimate of ASR-1.
        area: estimate of EROC.
    """

    x: float
    rate: Estimate
    area: Estimate


def draw_figure(results: Results, path: Path, remark: str = "") -> list[Path]:
    """Draw a figure in the form that its table names.

    Args:
        results: results to draw.
        path: path of the figure, without suffix.
        remark: warning below the title.

    Returns:
        The PNG and the SVG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    table = results.table
    title = f"{table.title}\n{remark}".strip()
    if table.form == "step sizes":
        return draw_lines(lines_by_step_size(results), path, xlabel="step size", title=title)
    if table.form == "iterations":
        return draw_lines(lines_by_iterations(results), path, xlabel="steps", title=title)
    panels = {_panel_title(cell): result for cell, result in results.cells if cell.seed == results.cells[0][0].seed}
    return draw_points(panels, path, title=title)


def _panel_title(cell: Cell) -> str:
    alone = cell.training.recipe == "ours" and cell.training.warmup_epochs >= cell.training.epochs
    return RECIPES[cell.detector].title + (", benign training only" if alone else "")


def lines_by_step_size(results: Results) -> dict[str, list[Point]]:
    """The lines of the paper's figure 6: for each attack, a point for each step size."""
    lines = {}
    for attack in results.table.attacks:
        cell = _cell(results, attack)
        slot = results.slot(cell.detector, attack)
        settings = {size: f"step {size:g}" for size in sorted(cell.options["step_sizes"])}
        lines[show_attack(attack)] = [
            Point(size, estimate(slot, measure_success(ONE_PERCENT, name)), estimate(slot, measure_area(name)))
            for size, name in settings.items()
        ]
    return lines


def lines_by_iterations(results: Results) -> dict[str, list[Point]]:
    """The lines of the paper's figure 7: for each attack, a point for each number of steps."""
    lines: dict[str, list[Point]] = {}
    for attack in results.table.attacks:
        cell = _cell(results, attack)
        slot = results.slot(cell.detector, attack)
        point = Point(
            cell.options["steps"], estimate(slot, measure_success(ONE_PERCENT)), estimate(slot, measure_area())
        )
        goal = "T" if cell.options.get("targeted") else "U"
        lines.setdefault(f"{cell.kind.upper()} {show_threat(*threat_of(cell))} {goal}", []).append(point)
    return lines


def _cell(results: Results, attack: str) -> Cell:
    return next(cell for cell, _ in results.cells if cell.attack == attack)


def draw_lines(lines: Mapping[str, Sequence[Point]], path: Path, *, xlabel: str, title: str) -> list[Path]:
    """Draw ASR-1, with intervals, and EROC side by side.

    Args:
        lines: points by attack.
        path: path of the figure, without suffix.
        xlabel: label of the x axis.
        title: title of the figure.
    """
    figure, axes = _figure(2, width=4.0, height=3.5)
    for axis, name in zip(axes, ("ASR-1, lower is better", "EROC, higher is better"), strict=True):
        axis.set(xscale="log", xlabel=xlabel, title=name, ylim=(-0.03, 1.03))
        axis.grid(color="0.9", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    for (name, points), (colour, marker, dashes) in zip(lines.items(), cycle(STYLES), strict=False):
        known = [point for point in points if point.rate.values]
        text = name if len(known) == len(points) else f"{name}, {len(known) or NOT_RUN}"
        text += f" of {len(points)} run" if 0 < len(known) < len(points) else ""
        xs = [point.x for point in points]  # a line has a gap where a point has not been run
        style: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "linestyle": dashes,
            "linewidth": 1.4,
            "markersize": 4.5,
        }
        axes[0].plot(xs, [point.rate.mean for point in points], label=text, **style)
        low, high = zip(*(point.rate.interval for point in points), strict=True)
        axes[0].fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
        axes[1].plot(xs, [point.area.mean for point in points], **style)
    xs = [point.x for points in lines.values() for point in points]
    for axis in axes:
        axis.set_xlim(min(xs) / 1.5, max(xs) * 1.5)  # the range of all points, whether they have been run or not
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        if not any(point.rate.values for points in lines.values() for point in points):
            _say_not_run(axis)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title, fontsize=10)
    return _save(figure, path)


def draw_points(panels: Mapping[str, Result | None], path: Path, *, title: str) -> list[Path]:
    """Draw benign and attacked representations in the plane, coloured by predicted label, a panel for each detector.

    Args:
        panels: results of cells by the title of the panel. None for a cell that has not been run.
        path: path of the figure, without suffix.
        title: title of the figure.
    """
    columns = min(3, len(panels))
    figure, axes = _figure(columns, rows=math.ceil(len(panels) / columns), width=8 / columns, height=8 / columns + 0.3)
    spare = axes[len(panels) :]
    for axis in spare:
        axis.set_axis_off()
    for axis, (name, result) in zip(axes, panels.items(), strict=False):
        axis.set(title=name, xticks=[], yticks=[])
        if result is None:
            _say_not_run(axis)
        else:
            _scatter(axis, result["points"])
    if spare:
        spare[-1].legend(handles=_handles(), loc="center", frameon=False, fontsize=9)
    else:
        figure.legend(handles=_handles(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return _save(figure, path)


def _scatter(axis: "Axes", points: Result) -> None:
    """Draw the points of one detector, and the number of each class at the median of its benign images."""
    from matplotlib import patheffects

    benign, attacked = np.array(points["benign"]), np.array(points["attacked"])
    before, after = np.array(points["benign_labels"]), np.array(points["attacked_labels"])
    labels, accepted = np.array(points["labels"]), np.array(points["accepted"])
    broken, unchanged = accepted & (after != labels), accepted & (after == labels)
    colours = np.array([CLASSES[index % len(CLASSES)] for index in range(max(before.max(), after.max()) + 1)])

    def put(points: Any, colour: Any, **style: Any) -> None:
        axis.scatter(points[:, 0], points[:, 1], c=colour, rasterized=True, **style)  # without this, the SVG takes 1 MB

    put(benign, colours[before], s=9, alpha=0.45, linewidths=0)
    put(attacked[unchanged], colours[after[unchanged]], marker="^", s=9, linewidths=0)
    put(attacked[~accepted], colours[after[~accepted]], marker="+", s=14, linewidths=0.7)
    put(attacked[broken], "black", marker="+", s=42, linewidths=2.4)
    put(attacked[broken], colours[after[broken]], marker="+", s=32, linewidths=1.2)
    halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    for index in np.unique(before):
        x, y = np.median(benign[before == index], axis=0)
        axis.text(x, y, str(index), ha="center", va="center", weight="bold", path_effects=halo)
    axis.set_xlabel(f"{broken.sum()} of {len(broken)} accepted under a wrong label", fontsize=9)


def _handles() -> list[Any]:
    from matplotlib.lines import Line2D

    kinds: dict[str, dict[str, Any]] = {
        "benign": {"marker": "o", "color": "0.6", "markersize": 4},
        "attacked, still labelled rightly": {"marker": "^", "color": "0.3", "markersize": 4},
        "attacked, refused": {"marker": "+", "color": "0.3", "markersize": 5, "markeredgewidth": 0.7},
        "accepted under a wrong label": {"marker": "+", "color": "0", "markersize": 7, "markeredgewidth": 2.4},
    }
    return [Line2D([], [], linestyle="", label=text, **style) for text, style in kinds.items()]


def _say_not_run(axis: "Axes") -> None:
    axis.text(0.5, 0.5, NOT_RUN, ha="center", va="center", transform=axis.transAxes, fontsize=12, color="0.4")


def _figure(columns: int, *, width: float, height: float, rows: int = 1) -> "tuple[Figure, list[Axes]]":
    """Make an empty figure with axes.

    All figures should be eight inches wide, so that their text has the same size on a page.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError('figures need matplotlib: pip install "clusterguard[plots]"') from error
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _save(figure: "Figure", path: Path) -> list[Path]:
    """Save a figure as PNG and SVG, without dates and random names, so that the same results give the same bytes."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "clusterguard"}):
        return [
            write_atomically(path.with_suffix(suffix), partial(figure.savefig, dpi=200, metadata=metadata))
            for suffix, metadata in ((".png", None), (".svg", {"Date": None}))
        ]
