"""A picture of the packages and a table of their modules, made from the code whenever the site is built."""

import ast
import re
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
_WIDTH, _ROW, _BOX = 760, 92, (132, 46)


def read_imports() -> tuple[dict[str, int], dict[str, set[str]]]:
    """Lines of every room, and the rooms that it imports; imports in functions and for type checkers count."""
    lines: dict[str, int] = {}
    below: dict[str, set[str]] = {}
    for path in (*(ROOT / "clusterguard").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")):
        room = _room(path.relative_to(ROOT).with_suffix("").parts)
        text = path.read_text(encoding="utf-8")
        lines[room] = lines.get(room, 0) + text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "clusterguard":
                other = _room(tuple(node.module.split(".")))
                names = {alias.name for alias in node.names} if other == "clusterguard" else set()
                rooms = {name for name in names if any((ROOT / "clusterguard").glob(f"{name}*"))}
                below.setdefault(room, set()).update((rooms or {other}) - {room})
    return lines, below


def _room(parts: tuple[str, ...]) -> str:
    return parts[0] if parts[0] == "benchmarks" or parts[1:] in ((), ("__init__",)) else parts[1]


def floors_of(below: dict[str, set[str]]) -> dict[str, int]:
    """A room stands one floor above the highest that it imports; the ground is 1."""
    floors: dict[str, int] = {}
    for room in TopologicalSorter(below).static_order():
        floors[room] = 1 + max((floors[other] for other in below.get(room, ())), default=0)
    return floors


def draw_plan() -> str:
    """An SVG: rooms by floor, with arrows to what they import; what another arrow's way implies is left out."""
    lines, below = read_imports()
    floors = floors_of(below)
    rows = [sorted(room for room in floors if floors[room] == floor) for floor in range(max(floors.values()), 0, -1)]
    places = {
        room: (_WIDTH * (index + 1) / (len(row) + 1), 10 + _ROW * level)
        for level, row in enumerate(rows)
        for index, room in enumerate(row)
    }
    parts = [_arrow(places[room], places[other]) for room in sorted(below) for other in sorted(_direct(room, below))]
    parts += [_box(room, places[room], lines.get(room, 0)) for row in rows for room in row]
    height = 10 + _ROW * (len(rows) - 1) + _BOX[1] + 10
    return (
        f'<svg class="plan" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="Packages, and what they import">'
        f"{''.join(parts)}</svg>"
    )


def _direct(room: str, below: dict[str, set[str]]) -> set[str]:
    """The rooms below one that are not also below another of them."""

    def reach(start: str) -> set[str]:
        reached = set(below.get(start, ()))
        for other in below.get(start, ()):
            reached |= reach(other)
        return reached

    return below[room] - set().union(*(reach(other) for other in below[room]))


def _box(room: str, place: tuple[float, float], lines: int) -> str:
    (x, y), (width, height) = place, _BOX
    return (
        f'<rect x="{x - width / 2:.0f}" y="{y}" width="{width}" height="{height}" rx="6"/>'
        f'<text x="{x:.0f}" y="{y + 20}">{escape(room)}</text>'
        f'<text class="lines" x="{x:.0f}" y="{y + 37}">{lines:,} lines</text>'
    )


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x, y), (to_x, to_y) = (start[0], start[1] + _BOX[1]), end
    middle = (y + to_y) / 2
    return f'<path d="M{x:.0f} {y}C{x:.0f} {middle:.0f} {to_x:.0f} {middle:.0f} {to_x:.0f} {to_y}"/>'


def list_modules() -> str:
    """A table in HTML of the modules in each package, with the first paragraph of their docstrings."""
    rows = []
    for path in sorted((ROOT / "clusterguard").rglob("_*.py")):
        if not path.name.startswith("__"):
            said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            first = re.sub("`(.+?)`", r"<code>\1</code>", escape(" ".join(said.split("\n\n")[0].split()), quote=False))
            name = f"<code>{path.parent.name}/{path.stem}</code>"
            rows.append(f"<tr><td>{name}</td><td>{first}</td></tr>")
    return f"<table><thead><tr><th>module</th><th>what it holds</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"


if __name__ == "__main__":
    print(draw_plan())
