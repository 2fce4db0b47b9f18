"""`python -m benchmarks.studies.speed`: time comparisons, measure memory, and write tables of the results."""

from typing import Annotated

import torch
import typer

from benchmarks._support import write_atomically
from benchmarks.studies.speed._attack import compare_attacks, compare_on_resnet18, compare_on_resnet50
from benchmarks.studies.speed._batches import compare_batches
from benchmarks.studies.speed._compiled import compare_compiled
from benchmarks.studies.speed._detection import compare_detection
from benchmarks.studies.speed._float32 import compare_in_float32
from benchmarks.studies.speed._freed_memory import measure_freed_memory
from benchmarks.studies.speed._harm import measure_harm
from benchmarks.studies.speed._head import compare_heads
from benchmarks.studies.speed._measure import measure_group
from benchmarks.studies.speed._memory import measure_memory
from benchmarks.studies.speed._operators import compare_stages
from benchmarks.studies.speed._projection import compare_projections
from benchmarks.studies.speed._race import computes_bfloat16, run_races
from benchmarks.studies.speed._roofline import compare_to_convolutions
from benchmarks.studies.speed._suite import compare_suites
from benchmarks.studies.speed._tables import TABLE, table_lines
from benchmarks.studies.speed._training import compare_certified_steps, compare_training_steps

RACES = {
    "attack": compare_attacks,
    "resnet18": compare_on_resnet18,
    "resnet50": compare_on_resnet50,
    "training": compare_training_steps,
    "batches": compare_batches,
    "roofline": compare_to_convolutions,
    "compiled": compare_compiled,
    "float32": compare_in_float32,
    "certified": compare_certified_steps,
}
GROUPS = {
    "suite": compare_suites,
    "head": compare_heads,
    "projection": compare_projections,
    "detection": compare_detection,
}

_ONLY_IN_BFLOAT16 = ("compiled", "profile", "harm")  # these compare it with float32, or with itself

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
_DEVICE = typer.Option(help="cpu or cuda.")


@app.command()
def run(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join([*RACES, *GROUPS])}; else all.")] = None,
    device: Annotated[str, _DEVICE] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Time groups of comparisons on a device.

    Example: python -m benchmarks.studies.speed run head --device cpu
    """
    for name in names or [*RACES, *GROUPS]:
        if _has_to_skip(name, device):
            continue
        if name in RACES:
            run_races(name, RACES[name](torch.device(device)), torch.device(device))
        else:
            measure_group(name, GROUPS[name], torch.device(device))


@app.command()
def profile(device: Annotated[str, _DEVICE] = "cpu") -> None:
    """Count operators and memory of a step of PGD in float32, under autocast alone and on a working copy.

    Example: python -m benchmarks.studies.speed profile --device cpu
    """
    if not _has_to_skip("profile", device):
        run_races("profile", compare_stages(torch.device(device)), torch.device(device))


@app.command()
def memory(device: Annotated[str, _DEVICE] = "cpu") -> None:
    """Measure peak memory by batch size.

    Example: python -m benchmarks.studies.speed memory --device cpu
    """
    measure_memory(torch.device(device))


@app.command("freed-memory")
def freed_memory(device: Annotated[str, _DEVICE] = "cpu") -> None:
    """Time attacks while the C library keeps freed memory, and while it hands it back.

    Example: python -m benchmarks.studies.speed freed-memory
    """
    measure_freed_memory(torch.device(device))


@app.command()
def harm(device: Annotated[str, _DEVICE] = "cpu") -> None:
    """Count what PGD breaks in float32, under autocast alone and on a working copy.

    Example: python -m benchmarks.studies.speed harm
    """
    if not _has_to_skip("harm", device):
        measure_harm(torch.device(device))


@app.command()
def table() -> None:
    """Write the tables that docs/performance.md shows. Comparisons that have not been measured are shown as not run.

    Example: python -m benchmarks.studies.speed table
    """
    write_atomically(TABLE, lambda file: file.write_text("\n".join(table_lines()) + "\n"))


def _has_to_skip(group: str, device: str) -> bool:
    """Whether a group needs instructions for bfloat16 that a device lacks. If so, say that its results stay."""
    skipped = group in _ONLY_IN_BFLOAT16 and not computes_bfloat16(torch.device(device))
    if skipped:
        print(
            f"{group}: skipped, because this processor has no instructions for bfloat16; its results stay as they are"
        )
    return skipped


if __name__ == "__main__":
    app()
