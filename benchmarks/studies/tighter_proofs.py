"""What the suite breaks of the guards with certificates, and what intervals, linear bounds and branches cannot prove.

`python -m benchmarks.studies.tighter_proofs` goes through the first test digits of MNIST, a hundred at a time, and
writes counts and a table to benchmarks/results/tighter-proofs after each. It goes on from the counts that are there. A
hundred digits take about 25 minutes on one slow core of a CPU, most of it for the suite.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from clusterguard import ClusterGuard, WorstCaseSuite, evaluate
from clusterguard.attacks import LInf
from clusterguard.certification import certify
from clusterguard.detection import Verdicts, is_broken, is_eligible
from torch import Tensor
from tqdm import tqdm

from benchmarks._support import keep_freed_memory, markdown_table
from benchmarks.data import load_data_set
from benchmarks.running import RESULTS, read_study, write_study

TIGHTER_PROOFS = RESULTS / "tighter-proofs"
_FOLDERS = Path(__file__).parents[2] / "guards"
_CASES = tuple((name, eps) for name in ("mnist-certified-accurate", "mnist-certified") for eps in (0.4, 0.3))
_METHODS = ("intervals", "linear", "branching")
_AT_ONCE = 100


def count_broken_and_unproved(guard: ClusterGuard, images: Tensor, labels: Tensor, eps: float) -> dict[str, Any]:
    """How many images the suite breaks, and each method cannot prove, of those with the right label and accepted.

    `found` counts images that the suite breaks although a method proved them. It must stay 0.
    """
    rows = is_eligible(Verdicts(guard.detect(images), labels))
    images, labels = images[rows], labels[rows]
    counts: dict[str, Any] = {"of": int(rows.sum())}

    def measure(name: str, find: Callable[[], Tensor]) -> Tensor:
        start = time.process_time()
        found = find()
        counts[name], counts[f"{name}_seconds"] = int(found.sum()), round(time.process_time() - start, 1)
        return found

    def attack() -> Tensor:
        suite, generator = WorstCaseSuite(LInf.name, eps=eps, budget="standard"), torch.Generator().manual_seed(0)
        report = evaluate(guard, {"suite": suite}, [(images, labels)], generator=generator, sanity_images=0)
        return is_broken(Verdicts(report.results[0].verdict, labels))

    def fail_to_prove(method: Any) -> Tensor:
        return ~certify(guard, images, labels, eps=eps, method=method).is_secure

    broken = measure("suite", attack)
    unproved = [measure(method, partial(fail_to_prove, method)) for method in _METHODS]
    counts["found"] = int((broken & ~torch.stack(unproved)).any(dim=0).sum())
    return counts


def add_counts(rows: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The sums of two sets of counts, by case."""
    return {
        case: {name: round(value + rows.get(case, {}).get(name, 0), 1) for name, value in counts.items()}
        for case, counts in new.items()
    }


def tighter_lines(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table in Markdown."""
    attacked = "guard", "ℓ∞", "accepted, label right", "broken by the suite"
    proved = "not proved by intervals", "by linear bounds", "by branches", "seconds an image for branches"
    table: list[tuple[object, ...]] = []
    for case, counts in rows.items():
        guard, eps = case.split("/")
        seconds = counts["branching_seconds"] / max(1, counts["intervals"])
        found = (counts[name] for name in ("of", "suite", *_METHODS))
        table.append((f"`{guard}`", eps, *found, f"{seconds:.1f}"))
    return markdown_table(attacked + proved, table)


def main(
    images: Annotated[int, typer.Option(min=1, help="Test digits, the first ones.")] = 1000,
    output: Annotated[Path, typer.Option(help="The folder for results.")] = TIGHTER_PROOFS,
) -> None:
    """Attack and prove what has not been tried yet, and write counts and table."""
    keep_freed_memory()
    torch.set_num_threads(1)
    content = read_study(output, {"images": 0, "cases": {}})
    pixels, labels = load_data_set("mnist").open_test().head(images).floats()
    guards = {name: ClusterGuard.from_pretrained(_FOLDERS / name) for name, _ in _CASES}
    for start in tqdm(range(content["images"], images, _AT_ONCE)):
        part = slice(start, min(start + _AT_ONCE, images))
        new = {
            f"{name}/{eps}": count_broken_and_unproved(guards[name], pixels[part], labels[part], eps)
            for name, eps in _CASES
        }
        content = {"images": part.stop, "cases": add_counts(content["cases"], new)}
        write_study(output, content, tighter_lines(content["cases"]))
    print("\n".join(tighter_lines(content["cases"])))


if __name__ == "__main__":
    typer.run(main)
