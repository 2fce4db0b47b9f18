"""Whether two runs of the suite foretell what further runs break: capture–recapture, checked on runs held out.

`python -m benchmarks.studies.recapture` runs the quick suite with six seeds on guards that ship with the project. From
each of three pairs of runs it estimates how many images can be broken. What the other four runs broke, and one run of
the standard budget, was not known to the estimate. Counts and a table go to benchmarks/results/recapture. Runs that the
file of counts holds are not repeated. On one core of a CPU all take about an hour.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from clusterguard import ClusterGuard, WorstCaseSuite
from clusterguard.attacks import get_norm
from clusterguard.detection import Verdicts, is_broken, is_eligible
from clusterguard.evaluation import Breakable, estimate_breakable
from clusterguard.samples import load_digits
from torch import Generator, Tensor
from tqdm import tqdm

from benchmarks._support import keep_freed_memory, markdown_table
from benchmarks.running import RESULTS, read_study, write_study

RECAPTURE = RESULTS / "recapture"
GUARDS = ("mnist-certified", "mnist-certified-accurate")
THREATS = (("linf", 0.4), ("l2", 1.0), ("l1", 4.0), ("l0", 4.0))  # where the suite breaks some images, but not all
SEEDS = 6
_FOLDERS = Path(__file__).parents[2] / "guards"
_STANDARD = "standard"


def digits_to_attack(guard: ClusterGuard, count: int) -> tuple[Tensor, Tensor]:
    """The first test digits that a guard accepts under their true label, and their labels."""
    images, labels = load_digits("test").tensors
    rows = is_eligible(Verdicts(guard.detect(images), labels)).nonzero().flatten()[:count]
    return images[rows], labels[rows]


def rows_broken_by(guard: ClusterGuard, norm: str, eps: float, images: Tensor, labels: Tensor, run: str) -> list[int]:
    """The rows that a run breaks. It is named by the seed of the quick budget, or is the one of the standard budget."""
    budget: Literal["quick", "standard"] = "standard" if run == _STANDARD else "quick"
    seed = SEEDS if run == _STANDARD else int(run)
    suite = WorstCaseSuite(norm, eps=eps, budget=budget)
    attacked = suite(guard, images, labels, generator=Generator().manual_seed(seed))
    broken: list[int] = is_broken(Verdicts(guard.detect(attacked), labels)).nonzero().flatten().tolist()
    return broken


def compare_pairs(runs: Mapping[str, Sequence[int]], images: int) -> Iterator[tuple[Breakable, int, int]]:
    """For each pair of runs: the estimate, what all quick runs broke, and what these and the standard run broke.

    Args:
        runs: rows that each run broke, by its name.
        images: number of attacked images.
    """
    masks = {name: torch.zeros(images, dtype=torch.bool) for name in runs}
    for name, rows in runs.items():
        masks[name][list(rows)] = True
    quick = torch.stack([mask for name, mask in masks.items() if name != _STANDARD]).any(dim=0)
    for first in range(0, SEEDS, 2):
        estimate = estimate_breakable(masks[str(first)], masks[str(first + 1)])
        yield estimate, int(quick.sum()), int((quick | masks[_STANDARD]).sum())


def recapture_lines(results: Mapping[str, Any]) -> list[str]:
    """The table in Markdown."""
    head = (
        "guard",
        "norm, radius",
        "runs",
        "broken by either",
        "estimate",
        "by all six",
        "by these and the standard run",
    )
    rows: list[tuple[object, ...]] = []
    for threat, runs in results["runs"].items():
        guard, norm, eps = threat.split("/")
        if len(runs) <= SEEDS:
            continue
        for number, (estimate, quick, both) in enumerate(compare_pairs(runs, results["images"])):
            low, high = estimate.interval
            shown = f"{estimate.total:.1f} [{low:.1f}, {high:.1f}]"
            cells = guard, f"{get_norm(norm).symbol} {eps}", f"{2 * number} and {2 * number + 1}", estimate.either
            rows.append((*cells, shown, quick, both))
    return markdown_table(head, rows)


def main(
    images: Annotated[int, typer.Option(min=1, help="Accepted test digits to attack, the first ones.")] = 100,
    output: Annotated[Path, typer.Option(help="The folder for results.")] = RECAPTURE,
) -> None:
    """Run what is not there yet, and write counts and table after each run."""
    keep_freed_memory()
    torch.set_num_threads(1)
    results = read_study(output, {"images": images, "runs": {}})
    planned = [(guard, norm, eps) for guard in GUARDS for norm, eps in THREATS]
    for name, norm, eps in (bar := tqdm(planned)):
        guard = ClusterGuard.from_pretrained(_FOLDERS / name)
        pictures, labels = digits_to_attack(guard, results["images"])
        runs = results["runs"].setdefault(f"{name}/{norm}/{eps:g}", {})
        for run in [*map(str, range(SEEDS)), _STANDARD]:
            if run in runs:
                continue
            bar.set_postfix_str(f"{name} {norm} {eps:g}, run {run}")
            runs[run] = rows_broken_by(guard, norm, eps, pictures, labels, run)
            write_study(output, results, recapture_lines(results))
    print("\n".join(recapture_lines(results)))


if __name__ == "__main__":
    typer.run(main)
