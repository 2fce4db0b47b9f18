"""`python -m benchmarks.studies.speed`: time comparisons, measure memory, and write tables of the results."""

import json
from collections.abc import Iterator
from typing import Annotated

import torch
import typer

from benchmarks._support import write_atomically
from benchmarks.studies.speed._attack import compare_attacks
from benchmarks.studies.speed._detection import compare_detection
from benchmarks.studies.speed._head import compare_heads
from benchmarks.studies.speed._measure import SPEED_RESULTS, measure_group
from benchmarks.studies.speed._memory import BATCHES, measure_memory
from benchmarks.studies.speed._projection import compare_projections
from benchmarks.studies.speed._suite import compare_suites
from benchmarks.studies.speed._training import compare_training_steps

GROUPS = {
    "attack": compare_attacks,
    "suite": compare_suites,
    "training": compare_training_steps,
    "head": compare_heads,
    "projection": compare_projections,
    "detection": compare_detection,
}
TABLE = SPEED_RESULTS / "table.md"

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def run(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(GROUPS)}; else all.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Time groups of comparisons on a device.

    Example: python -m benchmarks.studies.speed run head --device cpu
    """
    for name in names or GROUPS:
        measure_group(name, GROUPS[name], torch.device(device))


@app.command()
def memory(device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu") -> None:
    """Measure peak memory by batch size.

    Example: python -m benchmarks.studies.speed memory --device cpu
    """
    measure_memory(torch.device(device))


@app.command()
def table() -> None:
    """Write the tables that docs/performance.md shows. Comparisons that have not been measured are shown as not run.

    Example: python -m benchmarks.studies.speed table
    """
    write_atomically(TABLE, lambda file: file.write_text("\n".join(table_lines()) + "\n"))


def table_lines() -> Iterator[str]:
    """The lines of the tables in Markdown."""
    yield from _ratios()
    yield ""
    yield from _memory()


def _memory() -> Iterator[str]:
    yield f"| peak megabytes, ResNet-50 at 224 | {' | '.join(f'batch {batch}' for batch in BATCHES)} |"
    yield "| --- |" + " --- |" * len(BATCHES)
    for device in ("cpu", "cuda"):
        file = SPEED_RESULTS / f"memory-{device}.json"
        if not file.exists():
            yield f"| *{device}* | not run |" + " |" * (len(BATCHES) - 1)
            continue
        for work, peaks in json.loads(file.read_text())["megabytes"].items():
            yield f"| {work}, {device} | {' | '.join(f'{peaks[str(batch)]:,.0f}' for batch in BATCHES)} |"


def _ratios() -> Iterator[str]:
    yield "| comparison | their time over ours | target | operators or gradients, ours and theirs | MB allocated |"
    yield "| --- | --- | --- | --- | --- |"
    for device in ("cpu", "cuda"):
        for name in GROUPS:
            file = SPEED_RESULTS / f"{name}-{device}.json"
            if not file.exists():
                yield f"| *{name}, {device}* | not run | | | |"
                continue
            for title, row in json.loads(file.read_text())["rows"].items():
                ratio = row["ratio"]
                interval = f"{ratio['median']:.3g} [{ratio['low']:.3g}, {ratio['high']:.3g}]"
                mark = "reached" if ratio["median"] >= row["target"] else "missed"
                sides = row["ours"], row["theirs"]
                unit = "gradients" if "gradients" in row["ours"] else "operators"
                launched = " / ".join(f"{side[unit]:,}" for side in sides) + (
                    " gradients" if unit == "gradients" else ""
                )
                megabytes = " / ".join(f"{side['megabytes']:,.0f}" for side in sides if "megabytes" in side)
                yield f"| {title}, {device} | {interval} | {row['target']:.3g}: {mark} | {launched} | {megabytes} |"


if __name__ == "__main__":
    app()
