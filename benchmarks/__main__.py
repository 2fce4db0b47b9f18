"""`python -m benchmarks`: fetch data, plan, run, look at and report the paper's experiments."""

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, get_args

import torch
import typer
from clusterguard.errors import ClusterGuardError, ConfigurationError

from benchmarks._support import keep_freed_memory
from benchmarks.data import DATA_SETS, fetch_data_set
from benchmarks.detectors import CompileChoice
from benchmarks.experiments import Cell, Profile, all_cells, list_experiments, load_experiment
from benchmarks.reporting import write_report
from benchmarks.running import (
    RESULTS,
    Clock,
    Store,
    Trainings,
    choose_cells,
    find_throughput,
    measure_again,
    measure_throughput,
    print_experience,
    print_plan,
    publish_guard,
    repeat_cell,
    run_cells,
)

DOWNLOADED = ", ".join(name for name, data_set in DATA_SETS.items() if data_set.downloads)
UNFINISHED = 3  # exit status of a run that stopped in time, with work left
Names = Annotated[list[str], typer.Argument(help=f"all, {DOWNLOADED}, or of {', '.join(list_experiments())}.")]
ProfileOption = Annotated[Profile, typer.Option(help="quick: wiring; cpu, short: for a CPU, a GPU; full: the paper's.")]
OutOption = Annotated[Path | None, typer.Option(help="Folder of results; else benchmarks/results or runs/quick.")]
OnlyOption = Annotated[str, typer.Option(help="Cells whose title matches, such as 'ours*linf*'.")]
DataOption = Annotated[Path | None, typer.Option(help="Folder of data sets; else $CLUSTERGUARD_DATA or data.")]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def data(names: Annotated[list[str], typer.Argument(help=f"{DOWNLOADED}.")], data: DataOption = None) -> None:
    """Fetch data sets and verify their checksums.

    Example: python -m benchmarks data mnist cifar10
    """
    for name in names:
        print(f"{name}: complete in {fetch_data_set(name, data)}")


@app.command()
def run(
    names: Names,
    profile: ProfileOption = "full",
    device: Annotated[str, typer.Option(help="Such as cuda or cpu.")] = "cuda" if torch.cuda.is_available() else "cpu",
    time_budget: Annotated[float | None, typer.Option(help="Seconds after which to stop cleanly.")] = None,
    out: OutOption = None,
    only: OnlyOption = "*",
    data: DataOption = None,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
    compiled: Annotated[
        CompileChoice | None,
        typer.Option("--compile", help="Run networks through torch.compile; auto: in the mode that pays, if any."),
    ] = None,
) -> None:
    """Run the cells that have no result yet. A killed run is resumed. Exit status 3 says that work is left.

    Example: python -m benchmarks run table2-mnist --device cuda --time-budget 540
    """
    keep_freed_memory()
    store = Store(_folder(out, profile), profile)
    cells = [cell for cell in _cells(names, profile, only) if store.read_cell(cell.key) is None]
    trainings = Trainings(
        store,
        device=torch.device(device),
        data=data,
        clock=Clock(time_budget),
        progress=progress,
        compiled=compiled,
    )
    left = run_cells(cells, trainings)
    if left:
        print(f"out of time; {len(left)} of {len(cells)} cells are left, and will go on where they were")
        print_plan(left, find_throughput(device), trained=store.has_weights)
        raise typer.Exit(UNFINISHED)
    print(f"{len(cells)} cells run, nothing is left")


@app.command()
def status(profile: ProfileOption = "full", out: OutOption = None) -> None:
    """Print how many cells are done, and the results that no experiment uses any more.

    Example: python -m benchmarks status
    """
    store = Store(_folder(out, profile), profile)
    for name in list_experiments():
        keys = [cell.key for cell in load_experiment(name, profile).cells]
        done = sum(key in store.cell_keys() for key in keys)
        print(f"{name:20} {done:4} of {len(keys):4} cells done")
    wanted = {every: {cell.key for _, cell in all_cells(every)} for every in get_args(Profile)}
    for other, known in wanted.items():
        if done := len((known - wanted[profile]) & store.cell_keys()):
            print(f"profile {other}: {done} of {len(known)} cells done; --profile {other} shows them")
    for key in sorted(store.cell_keys().difference(*wanted.values())):
        print(f"stale: {key} {(store.read_cell(key) or {})['title']}")


@app.command()
def plan(
    names: Annotated[list[str] | None, typer.Argument(help="As for run; by default all.")] = None,
    profile: ProfileOption = "full",
    device: Annotated[str, typer.Option(help="One that has been measured, or cpu, cuda, or h200.")] = "h200",
    calibrate: Annotated[bool, typer.Option(help="Measure this machine's throughput first.")] = False,
    out: OutOption = None,
    only: OnlyOption = "*",
) -> None:
    """Print the cells that are left, their gradient evaluations and the time that they should take.

    If cells are done on the same device, it ends with the time that they took, and with what the plan says of them.

    Example: python -m benchmarks plan table2-mnist --device h200
    """
    store = Store(_folder(out, profile), profile)
    matching, results = _cells(names or ["all"], profile, only), store.read_cells()
    cells = [cell for cell in matching if cell.key not in results]
    if calibrate:
        measure_throughput(cells, torch.device(device))
    speed = find_throughput(device)
    print_plan(cells, speed, trained=store.has_weights)
    print_experience(matching, results, speed, device)
    if profile == "full" and cells:
        print("This is the paper's setting, for a GPU. --profile short and --profile cpu plan what a CPU can do.")


@app.command()
def report(
    profile: ProfileOption = "full",
    out: OutOption = None,
    pages: Annotated[Path, typer.Option(help="Folder for Markdown and figures.")] = Path("docs/results"),
) -> None:
    """Write the tables and figures from the results.

    Example: python -m benchmarks report
    """
    for page in write_report(Store(_folder(out, profile), profile), profile, pages):
        print(page)


@app.command()
def publish(
    name: Annotated[str, typer.Argument(help="An experiment.")],
    to: Annotated[Path, typer.Option(help="Folder to save to.")],
    profile: ProfileOption = "full",
    device: Annotated[str, typer.Option(help="Such as cuda or cpu.")] = "cuda" if torch.cuda.is_available() else "cpu",
    out: OutOption = None,
    only: OnlyOption = "*",
    data: DataOption = None,
) -> None:
    """Save the guard of the first matching cell as a folder that `ClusterGuard.from_pretrained` loads.

    Example: python -m benchmarks publish certified-mnist --profile cpu --to guards/mnist-certified
    """
    cells = _cells([name], profile, only)
    if not cells:
        raise ConfigurationError(f"expected a cell whose title matches {only!r}, got none")
    trainings = Trainings(Store(_folder(out, profile), profile), device=torch.device(device), data=data, progress=True)
    publish_guard(cells[0], trainings, to)
    print(f"saved in {to}")


@app.command()
def remeasure(
    folder: Annotated[Path, typer.Argument(help="Folder of a guard that `publish` saved.", exists=True)],
    device: Annotated[str, typer.Option(help="Such as cuda or cpu.")] = "cuda" if torch.cuda.is_available() else "cpu",
    data: DataOption = None,
) -> None:
    """Attack a published guard with the suite of today, and write the figures into its folder.

    Example: python -m benchmarks remeasure guards/mnist-certified
    """
    keep_freed_memory()
    measure_again(folder, device=torch.device(device), data=data, progress=True)
    print(f"saved in {folder}")


@app.command()
def repeat(
    names: Names,
    profile: ProfileOption = "full",
    count: Annotated[int, typer.Option(min=1, help="Number of cells, drawn at random.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    device: Annotated[str, typer.Option(help="Such as cuda or cpu.")] = "cuda" if torch.cuda.is_available() else "cpu",
    out: OutOption = None,
    only: OnlyOption = "*",
    data: DataOption = None,
) -> None:
    """Run a few finished cells again from the weights that are kept, and compare the verdicts of all images.

    Results stay as they are. Exit status 1 says that some verdict differs, as it may on another processor.

    Example: python -m benchmarks repeat mnist --profile cpu --only '*PGD linf*'
    """
    keep_freed_memory()
    store = Store(_folder(out, profile), profile)
    changed = 0
    for cell in choose_cells(_cells(names, profile, only), store, count, seed):
        for repeated in repeat_cell(cell, store, device=torch.device(device), data=data):
            print(repeated, flush=True)
            changed += repeated.changed
    if changed:
        raise typer.Exit(1)


def _folder(out: Path | None, profile: Profile) -> Path:
    return out or (Path("runs/quick") if profile == "quick" else RESULTS)


def _cells(names: Iterable[str], profile: Profile, only: str) -> list[Cell]:
    """The matching cells, each once. Cells of the same training follow each other."""
    about = {name: load_experiment(name).dataset for name in list_experiments()}
    groups = {dataset: [name for name in about if about[name] == dataset] for dataset in {*about.values()}}
    groups["all"] = [*about]
    names = [name for given in names for name in groups.get(given, [given])]
    cells = {cell.key: cell for name in names for cell in load_experiment(name, profile).cells}
    matching = [cell for cell in cells.values() if fnmatch(cell.title, only)]
    order = {key: index for index, key in enumerate(dict.fromkeys(cell.training.key for cell in matching))}
    return sorted(matching, key=lambda cell: order[cell.training.key])


def main() -> None:
    """Run the command line and report clusterguard's errors in one line."""
    try:
        app()
    except ClusterGuardError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
