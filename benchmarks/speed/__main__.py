"""`python -m benchmarks.speed`: time rows, and write the table of those that have been timed."""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated

import torch
import typer
from clusterguard.files import write_atomically

from benchmarks.speed.measure import FOLDER, measure

ROWS = ("attack", "suite", "training", "head", "projection", "detection")
TABLE = Path(__file__).parents[2] / "docs" / "speed.md.table"

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def run(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(ROWS)}; else all.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Time rows on a device, side by side with what they are compared to.

    Example: python -m benchmarks.speed run head --device cpu
    """
    for name in names or ROWS:
        measure(name, import_module(f"benchmarks.speed.{name}").rows, torch.device(device))


@app.command()
def table() -> None:
    """Write the table in docs/performance.md from what has been timed; what has not is shown as not run.

    Example: python -m benchmarks.speed table
    """
    write_atomically(TABLE, lambda file: file.write_text("\n".join(_lines()) + "\n"))


def _lines() -> Iterator[str]:
    yield "| comparison | their time over ours | target | operators, ours and theirs | MB allocated |"
    yield "| --- | --- | --- | --- | --- |"
    for device in ("cpu", "cuda"):
        for name in ROWS:
            file = FOLDER / f"{name}-{device}.json"
            if not file.exists():
                yield f"| *{name}, {device}* | not run | | | |"
                continue
            for title, row in json.loads(file.read_text())["rows"].items():
                ratio = row["ratio"]
                interval = f"{ratio['median']:.3g} [{ratio['low']:.3g}, {ratio['high']:.3g}]"
                mark = "reached" if ratio["median"] >= row["target"] else "missed"
                sides = row["ours"], row["theirs"]
                operators = " / ".join(f"{side['operators']:,}" for side in sides)
                megabytes = " / ".join(f"{side['megabytes']:,.0f}" for side in sides)
                yield f"| {title}, {device} | {interval} | {row['target']:.3g}: {mark} | {operators} | {megabytes} |"


if __name__ == "__main__":
    app()
