"""`python -m benchmarks.studies.pictures`: measure and draw the pictures of the documentation.

`measure` asks the guards that ship, with fixed seeds, and takes about a minute of one core. It needs MNIST's test set:
`python -m benchmarks data mnist`. `draw` makes SVG files of that and of the study of speed, in a second.
"""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks._support import write_atomically, write_json
from benchmarks.running import RESULTS, provenance
from benchmarks.studies.pictures._draw import draw_cost, draw_drift, draw_radii, draw_thresholds
from benchmarks.studies.pictures._measure import measure_radii, measure_service
from benchmarks.studies.pictures._method import draw_method
from benchmarks.studies.pictures._templates import draw_templates, measure_templates

MEASURED = RESULTS / "pictures.json"
PICTURES = Path(__file__).parents[3] / "docs" / "pictures"
_OUTPUT = typer.Option(help="Where to write.")

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


@app.command("measure")
def measure_guards(
    images: Annotated[int, typer.Option(min=1, help="Test digits that are attacked, the first ones.")] = 200,
    output: Annotated[Path, _OUTPUT] = MEASURED,
) -> None:
    """Measure what the pictures show.

    Example: python -m benchmarks.studies.pictures measure
    """
    torch.set_num_threads(1)
    content = {"radii": measure_radii(images), **measure_service(), "templates": measure_templates()}
    write_json(output, content | {"provenance": provenance(torch.device("cpu"))})


@app.command("draw")
def write_pictures(output: Annotated[Path, _OUTPUT] = PICTURES) -> None:
    """Draw all pictures from the results.

    Example: python -m benchmarks.studies.pictures draw
    """
    for name, content in draw_pictures().items():
        write_atomically(output / f"{name}.svg", partial(Path.write_text, data=content, encoding="utf-8"))


def draw_pictures() -> dict[str, str]:
    """All pictures by name, as SVG."""
    measured = json.loads(MEASURED.read_text())
    speed = json.loads((RESULTS / "speed" / "detection-cpu.json").read_text())
    return {
        "method": draw_method(),
        "radii": draw_radii(measured["radii"]),
        "thresholds": draw_thresholds(measured["thresholds"]),
        "drift": draw_drift(measured["drift"]),
        "cost": draw_cost(speed["rows"]),
        "templates": draw_templates(measured["templates"]),
    }


if __name__ == "__main__":
    app()
