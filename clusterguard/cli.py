"""The command line: `clusterguard --help`."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Put a guard in front of an image classifier: it detects adversarial examples."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the guard, the report and two pictures.")] = Path(
        "runs/demo"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of training.")] = 12,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Dry run on that many images only.")] = None,
) -> None:
    """Train a classifier and a guard on real digits, attack both, print one table. Offline, minutes on a CPU.

    Example: clusterguard demo --output runs/demo
    """
    import torch
    from clusterguard.demo import run_demo

    torch.set_num_threads(1)  # a network this small waits longer for a second core than it gains from it
    report = run_demo(output, epochs=epochs, seed=seed, limit=limit)
    typer.echo(f"\n{report['table']}\n\n{report['note']}\n")
    if "pictures" in report:
        typer.echo(f"No pictures: {report['pictures']}")
    typer.echo(f"{report['seconds']:.0f} s in all. The guard, report.json and pictures are in {output}")
