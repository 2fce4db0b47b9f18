"""Pictures of what a detector sees; needs matplotlib (`pip install "clusterguard[plots]"`)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from clusterguard.decision import Detection
from clusterguard.errors import MissingDependencyError
from clusterguard.files import write_atomically
from clusterguard.metrics import is_broken
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


class Panel(NamedTuple):
    """One detector's view of n benign images and of their attacked versions.

    Attributes:
        labels: (n,) true labels.
        benign: verdicts on the benign images.
        attacked: verdicts on the attacked images.
        benign_points: (n, 2), see `star_coordinates`.
        attacked_points: (n, 2).
        thresholds: (K,).
    """

    labels: Tensor
    benign: Detection
    attacked: Detection
    benign_points: Tensor
    attacked_points: Tensor
    thresholds: Tensor


def star_coordinates(block_means: Tensor) -> Tensor:
    """A linear view of K axes in the plane: axis k points to angle 2πk/K, the origin stays the origin.

    In units of the centre scale a guard's class centres fall on the unit circle and its adversarial centre at 0.

    Args:
        block_means: (n, K) mean of each class's block of the representation, divided by the centre scale.

    Returns:
        (n, 2).

    Example:
        >>> star_coordinates(torch.eye(4)).round().abs().tolist()
        [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    """
    angles = torch.arange(block_means.shape[1], device=block_means.device) * (2 * math.pi / block_means.shape[1])
    return block_means @ torch.stack([angles.cos(), angles.sin()], dim=1)


def plot_representations(panels: Mapping[str, Panel], path: str | Path) -> Path:
    """Benign and attacked representations side by side, one panel a detector, coloured by predicted label.

    Args:
        panels: by title.
        path: of the PNG.

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
        refused, broken = panel.attacked.is_adversarial.cpu(), is_broken(panel.attacked, panel.labels).cpu()
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
    """Histograms of suspicion divided by the label's threshold: above 1 an image is refused.

    Args:
        panels: by title.
        path: of the PNG.

    Returns:
        The path.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure, axes = _figure(len(panels), height=3.9)
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        ratios = [
            (verdict.distances / panel.thresholds[verdict.labels]).clamp(1e-4, 1e4).log10().cpu().numpy()
            for verdict in (panel.benign, panel.attacked)
        ]
        low, high = min(ratio.min() for ratio in ratios), max(max(ratio.max() for ratio in ratios), 0.1)
        bins = [low + (high - low) * step / 50 for step in range(51)]
        for ratio, label, colour in zip(ratios, ("benign", "attacked"), ("tab:blue", "tab:red"), strict=True):
            axis.hist(ratio, bins=bins, alpha=0.6, label=label, color=colour)
        axis.axvline(0, color="black", linewidth=1, label="τ")
        axis.set(title=title, xlabel="suspicion ÷ τ of the predicted label (log scale)", ylabel="images")
        steps = (0.0001, 0.001, 0.01, 0.1, 0.3, 1, 3, 10, 100)
        ticks = [step for step in steps if low <= math.log10(step) <= high]
        axis.set_xticks([math.log10(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])
        axis.legend(frameon=False)
    return _save(figure, path)


def _figure(columns: int, *, height: float) -> "tuple[Figure, list[Axes]]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError('pictures need matplotlib: pip install "clusterguard[plots]"') from error
    figure = Figure(figsize=(4.8 * columns, height), dpi=150, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(axes)


def _xy(points: Tensor) -> tuple[Tensor, Tensor]:
    return points[:, 0], points[:, 1]


def _marker(marker: str, colour: str, label: str) -> "Line2D":
    from matplotlib.lines import Line2D

    return Line2D([], [], marker=marker, color=colour, linestyle="", label=label)


def _save(figure: "Figure", path: str | Path) -> Path:
    return write_atomically(path, lambda file: figure.savefig(file, format="png"))
