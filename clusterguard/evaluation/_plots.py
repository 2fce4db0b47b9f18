"""Plots of a detector's representations and suspicion; they need matplotlib."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from clusterguard._support import check_tensor, visible, write_atomically
from clusterguard.detection import Detection, Verdicts, is_broken
from clusterguard.errors import InputError, MissingDependencyError
from clusterguard.evaluation._results import Evaluation
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


class Panel(NamedTuple):
    """One detector's verdicts on n benign images and their attacked versions, with points to plot.

    Attributes:
        labels: (n,) true labels.
        benign: verdicts on the benign images.
        attacked: verdicts on the attacked images.
        benign_points: (n, 2) plane coordinates of the benign images, see `star_coordinates`.
        attacked_points: (n, 2) plane coordinates of the attacked images.
        thresholds: (K,) thresholds of the detector.
        class_names: K names of the classes; None if they are not known.
    """

    labels: Tensor
    benign: Detection
    attacked: Detection
    benign_points: Tensor
    attacked_points: Tensor
    thresholds: Tensor
    class_names: Sequence[str] | None = None


def star_coordinates(block_means: Tensor) -> Tensor:
    """The coordinates of points with K axes in the plane, by a linear map that sends axis k to the angle 2πk/K.

    The origin stays the origin. With block means in units of the centre scale, a guard's class centres lie on the unit
    circle and its adversarial centre lies at 0.

    Args:
        block_means: (n, K) mean of each class's block of the representation, divided by the centre scale.

    Returns:
        Points in the plane (n, 2).

    Example:
        >>> star_coordinates(torch.eye(4)).round().abs().tolist()
        [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    """
    check_tensor(block_means, "block_means", "n", "K")
    if not block_means.shape[1]:
        raise InputError("expected block_means of at least one class, got none")
    angles = torch.arange(block_means.shape[1], device=block_means.device) * (2 * math.pi / block_means.shape[1])
    return block_means @ torch.stack([angles.cos(), angles.sin()], dim=1).to(block_means.dtype)


def plot_representations(panels: Mapping[str, Panel], path: str | Path) -> Path:
    """Plot benign and attacked representations, one panel for each detector, coloured by predicted label.

    Args:
        panels: panels by title, drawn side by side.
        path: path of the PNG.

    Returns:
        The path.

    Raises:
        MissingDependencyError: matplotlib is not installed.

    Reference:
        arXiv 2012.03483, figure 1.
    """
    figure, axes = _figure(len(panels), height=6.1)
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        labels, predicted = panel.labels.cpu(), panel.attacked.labels.cpu()
        points, benign, classes = panel.attacked_points.cpu(), panel.benign_points.cpu(), len(panel.thresholds)
        refused, broken = panel.attacked.is_adversarial.cpu(), is_broken(Verdicts(panel.attacked, panel.labels)).cpu()
        unchanged = ~refused & ~broken
        reach = 1.15 * float(torch.cat([benign, points]).norm(dim=1).quantile(0.98))
        colours: dict[str, Any] = {"cmap": "tab10", "vmin": -0.5, "vmax": max(classes, 10) - 0.5}
        axis.scatter(*_xy(benign), c=panel.benign.labels.cpu(), s=14, alpha=0.35, linewidths=0, **colours)
        axis.scatter(*_xy(points[unchanged]), c=labels[unchanged], marker="^", s=12, linewidths=0, **colours)
        axis.scatter(*_xy(points[broken]), c=predicted[broken], marker="+", s=50, linewidths=1.2, **colours)
        axis.scatter(*_xy(points[refused]), c="black", marker="x", s=18, linewidths=0.8)
        for index, angle in enumerate(2 * math.pi * k / classes for k in range(classes)):
            spot = 1.12 * reach * math.cos(angle), 1.12 * reach * math.sin(angle)
            axis.annotate(_class_name(index, panel.class_names), spot, ha="center", va="center", color="0.4")
        limits = (-1.22 * reach, 1.22 * reach)
        axis.set(title=title, xlim=limits, ylim=limits, aspect="equal", xticks=[], yticks=[])
        axis.set_xlabel(f"{int(broken.sum())} of {len(broken)} attacked images accepted under a wrong label")
    handles = [
        _marker("o", "0.6", "benign"),
        _marker("^", "0.3", "attacked, label unchanged"),
        _marker("+", "0.3", "attacked, accepted under a wrong label"),
        _marker("x", "black", "attacked, refused"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, title="colour: predicted label")
    return _save(figure, path)


def plot_distances(panels: Mapping[str, Panel], path: str | Path) -> Path:
    """Plot suspicion divided by the label's threshold, a histogram for each set of images; above 1 one is refused.

    Args:
        panels: panels by title, drawn side by side.
        path: path of the PNG.

    Returns:
        The path.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure, axes = _figure(len(panels), height=3.9)
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        verdicts = {"benign": panel.benign, "attacked": panel.attacked}
        _ridgelines(axis, {name: _ratio(verdict, panel.thresholds) for name, verdict in verdicts.items()})
        axis.set_title(title)
    return _save(figure, path)


def evaluation_figures(evaluation: Evaluation) -> dict[str, tuple[str, str]]:
    """The plots of an evaluation's HTML page: title -> (SVG element, caption).

    Text and axes have the colour of the page around them, and the background is transparent.

    Args:
        evaluation: result of `evaluate`.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figures = {**_verdict_figures(evaluation), **_sanity_figures(evaluation), **_gallery_figures(evaluation)}
    return {title: (_svg(figure, title), caption) for title, (figure, caption) in figures.items()}


def _verdict_figures(evaluation: Evaluation) -> "dict[str, tuple[Figure, str]]":
    thresholds = torch.tensor(evaluation.thresholds)
    clean = _ratio(evaluation.clean, thresholds)[evaluation.clean.labels == evaluation.labels]
    curves, (roc,) = _figure(1, height=4.0)
    for result in evaluation.results:
        attacked = _ratio(result.verdict, thresholds)
        caught = attacked.masked_fill(result.verdict.labels == evaluation.labels, torch.inf)
        cuts = torch.cat([clean, clean.new_tensor([0.0])]).sort().values
        rates = [(float((clean > cut).double().mean()), float((caught > cut).double().mean())) for cut in cuts]
        roc.plot(*zip(*rates, strict=True), label=_plain(result.name), linewidth=1.3)
    roc.axvline(max(evaluation.false_positives.value, 1e-4), color="black", linewidth=0.8, linestyle=":")
    roc.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="false-positive rate", ylabel="attacked images caught")
    roc.set_xscale("symlog", linthresh=0.01)
    roc.legend(frameon=False, fontsize=8)
    sets = {"benign": clean, **{r.name: _ratio(r.verdict, thresholds) for r in evaluation.results}}
    ridges, (axis,) = _figure(1, height=1.2 + 0.5 * len(sets))
    _ridgelines(axis, sets)
    return {
        "ROC curves": (
            curves,
            "All thresholds are scaled together; the dotted line marks the thresholds in use. An attacked image "
            "that is still labelled correctly counts as caught.",
        ),
        "Suspicion": (
            ridges,
            "Suspicion divided by the predicted label's threshold, a histogram for each set of images. An image is "
            "refused above 1.",
        ),
    }


def _sanity_figures(evaluation: Evaluation) -> "dict[str, tuple[Figure, str]]":
    sanity = evaluation.sanity
    if sanity is None:
        return {}
    by_radius, (radius,) = _figure(1, height=3.4)
    by_step, (steps,) = _figure(1, height=3.4)
    points = [(eps, rate.value, *rate.interval) for eps, rate in sanity.by_eps]
    values = [value for _, value, _, _ in points]
    below, above = zip(*((value - low, high - value) for _, value, low, high in points), strict=True)
    radius.errorbar([eps for eps, *_ in points], values, [below, above], marker="o", capsize=3, color="tab:red")
    radius.set_xscale("log")
    radius.set(xlabel=f"eps ({sanity.norm}); the last point is the whole box", ylabel="ASR", ylim=(-0.02, 1.02))
    steps.plot([rate.value for rate in sanity.by_step], color="tab:red")
    steps.set(xlabel=f"step of PGD at {sanity.norm} {sanity.eps:g}", ylabel="ASR so far", ylim=(-0.02, 1.02))
    caption = f"Results of the sanity probe on {sanity.images} images"
    return {
        "ASR against eps": (by_radius, f"{caption}; bars are 95 % intervals."),
        "ASR against steps": (by_step, f"{caption}."),
    }


def _gallery_figures(evaluation: Evaluation) -> "dict[str, tuple[Figure, str]]":
    gallery = evaluation.gallery
    if gallery is None or not len(gallery.labels):
        return {}
    columns = min(5, len(gallery.labels))  # so few that titles can be read on a phone
    blocks = math.ceil(len(gallery.labels) / columns)
    figure, axes = _figure(columns, height=2.8 * blocks, width=1.2, rows=2 * blocks)
    rows = [("clean", gallery.clean, gallery.labels), ("attacked", gallery.attacked, gallery.predicted)]
    for index, axis in enumerate(axes):
        row, column = divmod(index, columns)
        name, images, labels = rows[row % 2]
        place = row // 2 * columns + column
        if place >= len(labels):
            axis.set_axis_off()
            continue
        image = images[place].permute(1, 2, 0).clamp(0, 1).squeeze(-1).numpy()
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[], ylabel="" if column else name)
        axis.set_title(_class_name(int(labels[place]), evaluation.class_names), fontsize=9)
    caption = (
        "Clean images are titled with the true label, attacked ones with the label under which they are accepted. "
        "The image with the smallest suspicion over threshold comes first."
    )
    return {"Worst-broken images": (figure, caption)}


def _ratio(verdict: Detection, thresholds: Tensor) -> Tensor:
    return verdict.distances.cpu() / thresholds[verdict.labels.cpu()]


def _ridgelines(axis: "Axes", ratios: Mapping[str, Tensor]) -> None:
    """Draw suspicion over threshold on a log scale, the histogram of each set on a line of its own."""
    logs = {name: ratio.clamp(1e-4, 1e4).log10().numpy() for name, ratio in ratios.items()}
    low, high = min(values.min() for values in logs.values()), max(0.1, *(values.max() for values in logs.values()))
    bins = [low + (high - low) * step / 50 for step in range(51)]
    for row, values in enumerate(reversed(logs.values())):
        counts = [((values >= start) & (values < end)).sum() for start, end in pairwise([*bins[:-1], math.inf])]
        heights = [row + 0.9 * float(count) / max(1, *counts) for count in counts]
        axis.stairs(heights, bins, baseline=row, fill=True, color="tab:blue" if row == len(logs) - 1 else "tab:red")
    axis.axvline(0, color="black", linewidth=1)
    axis.annotate("τ", (0, len(logs)), ha="center", va="bottom", annotation_clip=False)
    axis.set(xlabel="suspicion ÷ τ of the predicted label (log scale)", ylim=(0, len(logs)))
    axis.set_yticks(range(len(logs)), [_plain(name) for name in reversed(logs)], va="bottom")
    axis.spines[["top", "left", "right"]].set_visible(False)
    ticks = [step for step in (0.0001, 0.001, 0.01, 0.1, 0.3, 1, 3, 10, 100) if low <= math.log10(step) <= high]
    axis.set_xticks([math.log10(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])


def _class_name(index: int, names: Sequence[str] | None) -> str:
    return _plain(names[index] if names else str(index))


def _plain(name: str) -> str:
    """Escape a name, so that matplotlib reads no formula in it and does not hide it for a leading underscore."""
    return (" " if name.startswith("_") else "") + visible(name).replace("$", r"\$")


def _figure(columns: int, *, height: float, width: float = 4.8, rows: int = 1) -> "tuple[Figure, list[Axes]]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("pictures need matplotlib; run: pip install matplotlib") from error
    figure = Figure(figsize=(width * columns, height), dpi=150, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _xy(points: Tensor) -> tuple[Tensor, Tensor]:
    return points[:, 0], points[:, 1]


def _marker(marker: str, colour: str, label: str) -> "Line2D":
    from matplotlib.lines import Line2D

    return Line2D([], [], marker=marker, color=colour, linestyle="", label=label)


def _svg(figure: "Figure", title: str) -> str:
    """The figure as an SVG element for a page, with transparent ground and whatever is black in the page's colour."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": title, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    picture = re.sub(r"(?s)^.*?(?=<svg)| *<metadata>.*?</metadata>\n", "", buffer.getvalue())
    prefix = re.sub(r"\W+", "-", title.lower())
    picture = re.sub(r' id="|\(#|href="#', lambda found: found[0] + f"{prefix}-", picture)
    picture = picture.replace("#000000", "currentColor")
    return picture.replace("<svg ", f"<svg role='img' aria-label='{title}' fill='currentColor' ", 1)


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _save(figure: "Figure", path: str | Path) -> Path:
    picture = _png(figure)
    return write_atomically(path, lambda file: file.write_bytes(picture))
