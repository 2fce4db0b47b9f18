"""`python -m benchmarks.studies.pictures`: measure and draw the pictures of the documentation.

`measure` asks the guards that ship, and L-Ben, with fixed seeds. It needs MNIST: `python -m benchmarks data mnist`. One
core takes about a quarter of an hour for the part "paper", and a minute for the others. `draw` makes SVG files of these
figures and of those of the study of speed, in a second.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from clusterguard.errors import ConfigurationError

from benchmarks._support import write_atomically, write_json
from benchmarks.running import RESULTS, provenance
from benchmarks.studies.pictures._draw import draw_cost, draw_drift, draw_paper, draw_radii, draw_thresholds
from benchmarks.studies.pictures._measure import measure_paper, measure_radii, measure_service
from benchmarks.studies.pictures._method import draw_method
from benchmarks.studies.pictures._templates import draw_templates, measure_templates

MEASURED = RESULTS / "pictures.json"
PICTURES = Path(__file__).parents[3] / "docs" / "pictures"
_OUTPUT = typer.Option(help="Where to write.")

MEASUREMENTS: dict[str, Callable[[int], Any]] = {
    "radii": measure_radii,
    "paper": measure_paper,
    "service": lambda images: measure_service(),
    "templates": lambda images: measure_templates(),
}
"""What is measured, by name, each for a number of attacked images."""

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


@app.command("measure")
def measure_guards(
    parts: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(MEASUREMENTS)}; else all.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Test digits that are attacked, the first ones.")] = 200,
    output: Annotated[Path, _OUTPUT] = MEASURED,
) -> None:
    """Measure what the pictures show. Parts that are not asked for stay as they are.

    Example: python -m benchmarks.studies.pictures measure radii
    """
    torch.set_num_threads(1)
    content = json.loads(output.read_text()) if output.exists() else {}
    for part in parts or MEASUREMENTS:
        if part not in MEASUREMENTS:
            raise ConfigurationError(f"expected a part among {', '.join(MEASUREMENTS)}, got {part!r}")
        content[part] = {"figures": MEASUREMENTS[part](images), "provenance": provenance(torch.device("cpu"))}
        write_json(output, content)


@app.command("draw")
def write_pictures(output: Annotated[Path, _OUTPUT] = PICTURES) -> None:
    """Draw all pictures from the results.

    Example: python -m benchmarks.studies.pictures draw
    """
    for name, content in draw_pictures().items():
        write_atomically(output / f"{name}.svg", partial(Path.write_text, data=content, encoding="utf-8"))


def draw_pictures() -> dict[str, str]:
    """All pictures by name, as SVG."""
    measured = {part: content["figures"] for part, content in json.loads(MEASURED.read_text()).items()}
    speed = json.loads((RESULTS / "speed" / "detection-cpu.json").read_text())
    return {
        "method": draw_method(),
        "radii": draw_radii(measured["radii"]),
        "paper": draw_paper(measured["paper"]),
        "thresholds": draw_thresholds(measured["service"]["thresholds"]),
        "drift": draw_drift(measured["service"]["drift"]),
        "cost": draw_cost(speed["rows"]),
        "templates": draw_templates(measured["templates"]),
    }


if __name__ == "__main__":
    app()
