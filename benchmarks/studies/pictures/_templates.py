"""The picture of templates: digits, what their pixels cost under two templates, and how many pixels are proved."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from clusterguard import ClusterGuard
from clusterguard.attacks import L0
from clusterguard.certification import certified_radius
from torch import Tensor, nn

from benchmarks.data import load_data_set
from benchmarks.studies.pictures._svg import COLOURS, picture

_GUARD = Path(__file__).parents[3] / "guards" / "mnist-pixels"
_DIGITS = (0, 2, 7)  # of the test set: a seven, a one and a nine
_LEVELS = 5  # shades of a drawn pixel beside none
_SIDE, _PIXEL = 28, 4


def measure_templates() -> list[dict[str, Any]]:
    """For a few test digits, the costs of pixels under the cheapest template of its class and of the nearest other."""
    guard = ClusterGuard.from_pretrained(_GUARD)
    batch = load_data_set("mnist").open_test().head(1 + max(_DIGITS)).floats()
    images, labels = (part[list(_DIGITS)] for part in batch)
    with torch.no_grad():
        distances = guard.distances(images)
    others = distances.scatter(1, labels[:, None], torch.inf).argmin(dim=1)
    radii = certified_radius(guard, images, labels, norm=L0.name, largest=64)
    rows = []
    for index, (image, label, other) in enumerate(zip(images, labels, others, strict=True)):
        sides = [
            {
                "class": int(side),
                "distance": float(distances[index, side]),
                "threshold": float(guard.thresholds[side]),
                "costs": _shades(_costs(guard, image, int(side))),
            }
            for side in (label, other)
        ]
        rows.append({"pixels": _shades(image.flatten()), "sides": sides, "proved": int(radii[index])})
    return rows


def _costs(guard: ClusterGuard, image: Tensor, label: int) -> Tensor:
    """What each pixel adds to the cost of a class's cheapest template, (784,) from 0 to 1."""
    layer = cast(nn.Linear, [*guard.encoder.children()][1])
    each = layer.out_features // guard.num_classes
    shifted = image.flatten() - 0.5
    with torch.no_grad():
        best = label * each + int(layer(shifted)[label * each : (label + 1) * each].argmin())
        return layer.weight[best] * shifted + layer.weight[best].abs() / 2


def _shades(values: Tensor) -> str:
    """Values from 0 to 1 as one figure each, from 0 to `_LEVELS`."""
    return "".join(str(int(value)) for value in (_LEVELS * values).round())


def draw_templates(rows: Sequence[Mapping[str, Any]]) -> str:
    """Three digits in rows: the digit, its pixels' costs under its own class, and under the nearest other class."""
    tile = _SIDE * _PIXEL
    lefts, top, height = (8, 144, 280), 40, tile + 46
    parts = [
        f'<text x="{lefts[0]}" y="20">digit</text>',
        f'<text x="{lefts[1]}" y="20">costs as its class</text>',
        f'<text x="{lefts[2]}" y="20">as the nearest other</text>',
    ]
    said = []
    for number, row in enumerate(rows):
        y = top + number * height
        drawn = [("currentColor", row["pixels"]), *((COLOURS[1], side["costs"]) for side in row["sides"])]
        for left, (colour, shades) in zip(lefts, drawn, strict=True):
            frame = f'x="{left}" y="{y}" width="{tile}" height="{tile}" fill="none" stroke="currentColor"'
            parts += [f'<rect {frame} opacity=".3"/>', *_tile(shades, left, y, colour)]
        for left, side in zip(lefts[1:], row["sides"], strict=True):
            text = f"{side['class']}: {side['distance']:.0f}, limit {side['threshold']:.0f}"
            parts.append(f'<text x="{left}" y="{y + tile + 18}">{text}</text>')
        middle = y + tile // 2
        parts += [
            f'<text x="404" y="{middle - 4}">proved:</text>',
            f'<text x="404" y="{middle + 14}">{row["proved"]} pixels</text>',
        ]
        own, other = row["sides"]
        said.append(
            f"A {own['class']} has distance {own['distance']:.0f} to its class and {other['distance']:.0f} to class "
            f"{other['class']}, whose threshold is {other['threshold']:.0f}; it is proved for {row['proved']} pixels."
        )
    return picture(
        "templates", "Digits and what templates cost", " ".join(said), parts, height=top + len(rows) * height
    )


def _tile(shades: str, left: int, top: int, colour: str) -> Iterator[str]:
    """The pixels of one tile: a path for each shade, of which each part is a run along a row."""
    runs: dict[str, list[str]] = {}
    for line in range(_SIDE):
        column = 0
        for shade, group in groupby(shades[line * _SIDE : (line + 1) * _SIDE]):
            length = len([*group])
            place = f"M{left + column * _PIXEL} {top + line * _PIXEL}h{length * _PIXEL}v{_PIXEL}h-{length * _PIXEL}z"
            runs.setdefault(shade, []).append(place)
            column += length
    for shade in sorted(runs.keys() - {"0"}):
        yield f'<path d="{"".join(runs[shade])}" fill="{colour}" opacity="{int(shade) / _LEVELS:g}"/>'
