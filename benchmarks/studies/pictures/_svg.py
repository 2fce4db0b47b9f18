"""Charts as small SVG files. Text and axes take the colour of the page, so they read in a light and a dark scheme."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#2f86c9", "#d9652b", "#1f9e77")
"""Each has a contrast of at least 3 against white and against the site's dark background."""
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM = 480, 340, 62, 30, 52
_ALONE = (
    "<style>svg.picture:root{color:#24292f;font-family:sans-serif}"
    "@media(prefers-color-scheme:dark){svg.picture:root{color:#e6edf3}}</style>"
)


def picture(name: str, title: str, description: str, parts: Sequence[str], *, height: int = _HEIGHT) -> str:
    """A whole SVG file with a title and a description for people who do not see it.

    Args:
        name: prefix of the identifiers, unique on a page.
        title: what it shows, in a few words.
        description: what there is to see.
        parts: elements of the picture.
        height: height, where the width is 480.
    """
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="picture" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-labelledby="{name}-title {name}-text" fill="currentColor" font-size="14">\n'
        f'<title id="{name}-title">{escape(title)}</title>\n<desc id="{name}-text">{escape(description)}</desc>\n'
        f"{_ALONE}\n" + "\n".join(parts) + "\n</svg>\n"
    )


@dataclass(frozen=True)
class Scale:
    """An axis: what it says, its range, and its ticks.

    Attributes:
        label: text beside the axis.
        low: smallest value.
        high: largest value.
        ticks: texts by value.
        log: whether the scale is logarithmic.
    """

    label: str
    low: float
    high: float
    ticks: Mapping[float, str]
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies between the ends, from 0 to 1; what lies beyond is put at the end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Chart:
    """A plane with two axes, and a legend above it.

    Attributes:
        x: the axis across.
        y: the axis up.
        legend: lines of the legend: colour, dashes and text of each.
    """

    x: Scale
    y: Scale
    legend: Sequence[tuple[str, str, str]]

    def place(self, x: float, y: float) -> tuple[float, float]:
        """The coordinates of a point in the picture."""
        top = 12 + 20 * len(self.legend)
        across = _LEFT + self.x.share(x) * (_WIDTH - _LEFT - _RIGHT)
        return round(across, 1), round(_HEIGHT - _BOTTOM - self.y.share(y) * (_HEIGHT - _BOTTOM - top), 1)

    def frame(self) -> list[str]:
        """Axes, grid, labels and legend."""
        left, bottom = self.place(self.x.low, self.y.low)
        right, top = self.place(self.x.high, self.y.high)
        parts = [f'<path d="M{left} {bottom}H{right}" stroke="currentColor"/>']
        for value, text in self.y.ticks.items():
            _, y = self.place(self.x.low, value)
            parts.append(f'<path d="M{left} {y}H{right}" stroke="currentColor" opacity=".15"/>')
            parts.append(f'<text x="{left - 8}" y="{y + 5}" text-anchor="end">{escape(text)}</text>')
        for value, text in self.x.ticks.items():
            x, _ = self.place(value, self.y.low)
            parts.append(f'<path d="M{x} {bottom}v5" stroke="currentColor"/>')
            parts.append(f'<text x="{x}" y="{bottom + 20}" text-anchor="middle">{escape(text)}</text>')
        middle = (left + right) / 2
        parts.append(f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(self.x.label)}</text>')
        parts.append(
            f'<text transform="translate(14 {(top + bottom) / 2:.1f})rotate(-90)" text-anchor="middle">'
            f"{escape(self.y.label)}</text>"
        )
        for row, (colour, dashes, text) in enumerate(self.legend):
            y = 14 + 20 * row
            parts.append(_path(f"M{left} {y}h28", colour, dashes))
            parts.append(f'<text x="{left + 36}" y="{y + 5}">{escape(text)}</text>')
        return parts

    def line(self, points: Sequence[tuple[float, float]], colour: str, dashes: str = "", *, dots: bool = False) -> str:
        """A line through points, with or without a dot at each."""
        places = [self.place(x, y) for x, y in points]
        drawn = _path("M" + "L".join(f"{x} {y}" for x, y in places), colour, dashes)
        return drawn + "".join(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>' for x, y in places if dots)

    def band(self, points: Sequence[tuple[float, float, float]], colour: str) -> str:
        """The area between the lower and the upper values (x, low, high)."""
        edge = [self.place(x, low) for x, low, _ in points] + [self.place(x, high) for x, _, high in reversed(points)]
        return f'<path d="M{"L".join(f"{x} {y}" for x, y in edge)}Z" fill="{colour}" opacity=".2"/>'


def _path(way: str, colour: str, dashes: str = "") -> str:
    pattern = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<path d="{way}" fill="none" stroke="{colour}" stroke-width="2"{pattern}/>'
