"""Plots of a detector's representations and suspicion; they need matplotlib (`pip install "clusterguard[plots]"`)."""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from clusterguard._support import check_tensor, write_atomically
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
    """

    labels: Tensor
    benign: Detection
    attacked: Detection
    benign_points: Tensor
    attacked_points: Tensor
    thresholds: Tensor


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
            axis.annotate(str(index), spot, ha="center", va="center", color="0.4")
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
    """Plot histograms of suspicion divided by the label's threshold; an image is refused above 1.

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
        _histogram(axis, {name: _ratio(verdict, panel.thresholds) for name, verdict in verdicts.items()})
        axis.set_title(title)
    return _save(figure, path)


def evaluation_figures(evaluation: Evaluation) -> dict[str, tuple[bytes, str]]:
    """The plots of an evaluation's HTML page: title -> (PNG, caption).

    Args:
        evaluation: result of `evaluate`.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    thresholds = torch.tensor(evaluation.thresholds)
    clean = _ratio(evaluation.clean, thresholds)[evaluation.clean.labels == evaluation.labels]
    figure, (roc, histogram) = _figure(2, height=4.0)
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
    _histogram(histogram, {"benign": clean, **{r.name: _ratio(r.verdict, thresholds) for r in evaluation.results}})
    pictures = {
        "ROC curves and suspicion": (
            _png(figure),
            "Left: ROC curves with all thresholds scaled together; the dotted line marks the thresholds in use. An "
            "attacked image that is still labelled correctly counts as caught. Right: suspicion divided by the "
            "predicted label's threshold; an image is refused above 1.",
        )
    }
    if evaluation.sanity is not None:
        sanity = evaluation.sanity
        figure, (radius, steps) = _figure(2, height=3.4)
        points = [(eps, rate.value, *rate.interval) for eps, rate in sanity.by_eps]
        values = [value for _, value, _, _ in points]
        below, above = zip(*((value - low, high - value) for _, value, low, high in points), strict=True)
        radius.errorbar([eps for eps, *_ in points], values, [below, above], marker="o", capsize=3, color="tab:red")
        radius.set_xscale("log")
        radius.set(xlabel=f"eps ({sanity.norm}); the last point is the whole box", ylabel="ASR", ylim=(-0.02, 1.02))
        steps.plot([rate.value for rate in sanity.by_step], color="tab:red")
        steps.set(xlabel=f"step of PGD at {sanity.norm} {sanity.eps:g}", ylabel="ASR so far", ylim=(-0.02, 1.02))
        caption = f"Results of the sanity probe on {sanity.images} images; bars are 95 % intervals."
        pictures["ASR against eps and steps"] = (_png(figure), caption)
    gallery = evaluation.gallery
    if gallery is not None and len(gallery.labels):
        count = len(gallery.labels)
        figure, axes = _figure(count, height=2.8, width=1.2, rows=2)
        for axis, image in zip(axes, torch.cat([gallery.clean, gallery.attacked]), strict=True):
            axis.imshow(image.permute(1, 2, 0).clamp(0, 1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        for index, axis in enumerate(axes):
            row = gallery.labels if index < count else gallery.predicted
            axis.set_title(f"{row[index % count]}", fontsize=9)
        axes[0].set_ylabel("clean")
        axes[count].set_ylabel("attacked")
        caption = (
            "Clean images are titled with the true label, attacked ones with the label under which they are accepted. "
            "The image with the smallest suspicion over threshold comes first."
        )
        pictures["Worst-broken images"] = (_png(figure), caption)
    return pictures


def _ratio(verdict: Detection, thresholds: Tensor) -> Tensor:
    return verdict.distances.cpu() / thresholds[verdict.labels.cpu()]


def _histogram(axis: "Axes", ratios: Mapping[str, Tensor]) -> None:
    """Draw suspicion over threshold on a log scale, with the histograms of all sets in one plot."""
    logs = {name: ratio.clamp(1e-4, 1e4).log10().numpy() for name, ratio in ratios.items()}
    low, high = min(values.min() for values in logs.values()), max(0.1, *(values.max() for values in logs.values()))
    bins = [low + (high - low) * step / 50 for step in range(51)]
    for name, values in logs.items():
        axis.hist(values, bins=bins, alpha=0.6 if name == "benign" else 0.45, label=_plain(name))
    axis.axvline(0, color="black", linewidth=1, label="τ")
    axis.set(xlabel="suspicion ÷ τ of the predicted label (log scale)", ylabel="images")
    ticks = [step for step in (0.0001, 0.001, 0.01, 0.1, 0.3, 1, 3, 10, 100) if low <= math.log10(step) <= high]
    axis.set_xticks([math.log10(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])
    axis.legend(frameon=False, fontsize=8)


def _plain(name: str) -> str:
    """Escape a name, so that matplotlib reads no formula in it and does not hide it for a leading underscore."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _figure(columns: int, *, height: float, width: float = 4.8, rows: int = 1) -> "tuple[Figure, list[Axes]]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError('pictures need matplotlib: pip install "clusterguard[plots]"') from error
    figure = Figure(figsize=(width * columns, height), dpi=150, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _xy(points: Tensor) -> tuple[Tensor, Tensor]:
    return points[:, 0], points[:, 1]


def _marker(marker: str, colour: str, label: str) -> "Line2D":
    from matplotlib.lines import Line2D

    return Line2D([], [], marker=marker, color=colour, linestyle="", label=label)


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _save(figure: "Figure", path: str | Path) -> Path:
    picture = _png(figure)
    return write_atomically(path, lambda file: file.write_bytes(picture))
