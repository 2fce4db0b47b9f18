"""The method in four steps, as one picture. Its points are made up; no network is asked."""

import math

from benchmarks.studies.pictures._svg import COLOURS, picture

_NAMES, _RADIUS, _REACH = "ABC", 30, 68
_MOVE = """<style>
.method .walk{opacity:0}
@media (prefers-reduced-motion:no-preference){
.method .walk{opacity:1;animation:method-walk 6s ease-in-out infinite}
.method .end{animation:method-end 6s ease-in-out infinite}
@keyframes method-walk{0%,15%{transform:none;opacity:1}
70%{transform:var(--way);opacity:1}72%,100%{transform:var(--way);opacity:0}}
@keyframes method-end{0%,69%{opacity:0}71%,100%{opacity:1}}
}
</style>"""


def draw_method() -> str:
    """Clusters before and after training, an attacked image on its way, and the circles of the thresholds."""
    texts = [
        ["1  An ordinary classifier", "The attacked image lands among", "images of another class."],
        ["2  Places and thresholds", "Each class has a place, and a circle.", "Inside the circle it is accepted."],
        ["3  Training", "What gets into a wrong circle", "is moved to the middle."],
        ["4  In use", "The attacked image ends in the", "middle, and the guard refuses it."],
    ]
    drawings = [_before(), _placed(), _trained(), _used()]
    panels = [_panel(*step) for step in zip((0, 1, 0, 1), (0, 0, 1, 1), texts, drawings, strict=True)]
    return picture(
        "method",
        "The method in four steps",
        "Three classes A, B and C are clusters of points. 1: an attack moves an image of class A into the cluster of "
        "class B of an ordinary classifier. 2: the guard gives each class a fixed place, and a circle around it, the "
        "threshold; an attacked image inside a wrong circle is accepted. 3: training moves such images to a cluster of "
        "their own in the middle. 4: after training, an attacked image on its way from A to B ends in the middle, "
        "outside of all circles, and is refused.",
        [_MOVE, '<g class="method">', *panels, "</g>"],
        height=560,
    )


def _panel(column: int, row: int, words: list[str], parts: list[str]) -> str:
    heading, *lines = words
    text = f'<text x="6" y="18" font-weight="bold">{heading}</text>'
    text += "".join(
        f'<text x="6" y="{38 + 17 * index}" font-size="13">{line}</text>' for index, line in enumerate(lines)
    )
    place = f"translate({240 * column} {280 * row})"
    return f'<g transform="{place}">{text}<g transform="translate(120 178)">{"".join(parts)}</g></g>'


def _centre(index: int, reach: float = _REACH) -> tuple[float, float]:
    angle = math.tau * index / 3 + math.pi / 2 + math.tau / 6
    return round(reach * math.cos(angle), 1), round(reach * math.sin(angle) + 8, 1)


def _cluster(x: float, y: float, colour: str, spread: float, count: int = 26) -> str:
    """Points in a spiral of golden angles, which fills a disc evenly."""
    dots = []
    for index in range(count):
        radius, angle = spread * math.sqrt((index + 0.5) / count), index * 2.39996
        dots.append(f'<circle cx="{x + radius * math.cos(angle):.1f}" cy="{y + radius * math.sin(angle):.1f}" r="2"/>')
    return f'<g fill="{colour}" opacity=".75">{"".join(dots)}</g>'


def _crosses(x: float, y: float, spread: float, count: int = 12) -> str:
    """Attacked images: crosses around a place."""
    marks = []
    for index in range(count):
        radius, angle = spread * math.sqrt((index + 0.5) / count), index * 2.39996 + 1
        place = f"{x + radius * math.cos(angle) - 3:.1f} {y + radius * math.sin(angle) - 3:.1f}"
        marks.append(f"M{place}l6 6m0-6l-6 6")
    return f'<path d="{"".join(marks)}" stroke="currentColor" stroke-width="1.4" fill="none"/>'


def _classes(spread: float, reach: float = _REACH, *, circles: bool = False) -> list[str]:
    parts = []
    for index, (name, colour) in enumerate(zip(_NAMES, COLOURS, strict=True)):
        x, y = _centre(index, reach)
        parts.append(_cluster(x, y, colour, spread))
        if circles:
            ring = 'fill="none" stroke-width="1.5" stroke-dasharray="4 3"'
            parts.append(f'<circle cx="{x}" cy="{y}" r="{_RADIUS}" stroke="{colour}" {ring}/>')
        label_x, label_y = _centre(index, reach + _RADIUS + 12)
        parts.append(f'<text x="{label_x}" y="{label_y + 4}" text-anchor="middle" font-weight="bold">{name}</text>')
    return parts


def _walk(start: tuple[float, float], end: tuple[float, float]) -> str:
    """The way of an attacked image: a trail, an image that moves along it, and the image at its end."""
    (x, y), (to_x, to_y) = start, end
    way = f"translate({to_x - x:.1f}px,{to_y - y:.1f}px)"
    diamond = 'd="M0-7l7 7-7 7-7-7z" fill="currentColor"'
    return (
        f'<path d="M{x} {y}L{to_x} {to_y}" stroke="currentColor" stroke-width="2" stroke-dasharray="2 4" fill="none"/>'
        f'<g transform="translate({x} {y})"><path {diamond} class="walk" style="--way:{way}"/></g>'
        f'<g transform="translate({to_x} {to_y})"><path {diamond} class="end"/></g>'
    )


def _before() -> list[str]:
    (x, y), (to_x, to_y) = _centre(0, 52), _centre(1, 52)
    return [*_classes(34, 52), _crosses(to_x, to_y, 26), _walk((x, y), (to_x, to_y))]


def _placed() -> list[str]:
    (x, y), (to_x, to_y) = _centre(0), _centre(1)
    return [*_classes(25, circles=True), _crosses(to_x + 4, to_y + 6, 18, 8), _walk((x, y), (to_x + 6, to_y + 8))]


def _trained() -> list[str]:
    arrows = []
    for index in range(3):
        (x, y), (to_x, to_y) = _centre(index, 50), _centre(index, 20)
        arrows.append(f"M{x} {y}L{to_x} {to_y}")
        back = math.atan2(y - to_y, x - to_x)
        for turn in (0.5, -0.5):
            tip = f"{to_x + 8 * math.cos(back + turn):.1f} {to_y + 8 * math.sin(back + turn):.1f}"
            arrows.append(f"M{to_x} {to_y}L{tip}")
    return [
        *_classes(22, circles=True),
        *(_crosses(*_centre(index, 56), 9, 4) for index in range(3)),
        f'<path d="{"".join(arrows)}" stroke="currentColor" stroke-width="2.5" fill="none"/>',
        _crosses(0, 8, 12, 6),
    ]


def _used() -> list[str]:
    return [*_classes(20, circles=True), _crosses(0, 8, 22, 14), _walk(_centre(0), (0, 8))]
