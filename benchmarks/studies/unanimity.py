"""What two guards prove together that each proves in other norms, and what that costs on benign images.

`python -m benchmarks.studies.unanimity` takes the guard that ships with certificates in l∞, the one with certificates
against changed pixels, and a `UnanimousDetector` of both. It counts what each accepts of the test digits of MNIST, what
it proves of the first ones, and what the suite breaks of the first ones. Counts and a table go to
benchmarks/results/unanimity. It goes on where it stopped. On one core of a CPU it takes about an hour.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from clusterguard import ClusterGuard
from clusterguard.detectors import UnanimousDetector
from tqdm import tqdm

from benchmarks._support import keep_freed_memory, markdown_table
from benchmarks.data import load_data_set
from benchmarks.running import (
    RESULTS,
    Counts,
    Judge,
    count_accepted,
    count_broken,
    count_without_proof,
    read_study,
    threat_in_words,
    write_study,
)

UNANIMITY = RESULTS / "unanimity"
_FOLDERS = Path(__file__).parents[2] / "guards"
_IN_LINF = "mnist-certified"  # has no bounds in other norms
_PROVED = (("linf", 0.3), ("l0", 5), ("l0", 10), ("l1", 10), ("patch", 3), ("patch", 5))
_ATTACKED = (("linf", 0.3), ("l2", 2.0), ("l1", 10), ("l0", 10), ("l0", 25), ("patch", 5))


def load_judges() -> dict[str, Judge]:
    """Both guards, and both together."""
    guards: dict[str, Judge] = {
        name: ClusterGuard.from_pretrained(_FOLDERS / name) for name in (_IN_LINF, "mnist-pixels")
    }
    return guards | {"both": UnanimousDetector(*guards.values())}


def planned_counts(proved: int, attacked: int) -> dict[str, Callable[[], Counts]]:
    """What to count, by name: accepted images of all test digits, and of the first ones those not proved and broken."""
    images, labels = load_data_set("mnist").open_test().floats()
    plan: dict[str, Callable[[], Counts]] = {}
    for name, judge in load_judges().items():
        plan[f"{name}/benign"] = partial(count_accepted, judge, images, labels)
        for norm, eps in _PROVED if name != _IN_LINF else _PROVED[:1]:
            batch = images[:proved], labels[:proved]
            plan[f"{name}/proof/{norm}/{eps:g}"] = partial(count_without_proof, judge, *batch, norm, eps)
        for norm, eps in _ATTACKED:
            batch = images[:attacked], labels[:attacked]
            plan[f"{name}/suite/{norm}/{eps:g}"] = partial(count_broken, judge, *batch, norm, eps, "standard")
    return plan


def unanimity_lines(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """The counts as a table in Markdown, with a column for each detector."""
    names = dict.fromkeys(key.partition("/")[0] for key in counts)
    benign = [counts[f"{name}/benign"] for name in names]
    rows = [
        ["refused benign images", *(f"{1 - x['accepted'] / x['images']:.3f}" for x in benign)],
        ["accepted under the right label", *(f"{x['eligible'] / x['images']:.3f}" for x in benign)],
    ]
    for kind, words, threats in (("proof", "not proved", _PROVED), ("suite", "the suite breaks", _ATTACKED)):
        for norm, eps in threats:
            found = [counts.get(f"{name}/{kind}/{norm}/{eps:g}") for name in names]
            missing = "no bounds" if kind == "proof" else "not run"
            shares = [f"{x['count'] / x['of']:.3f} ({x['count']} of {x['of']})" if x else missing for x in found]
            rows.append([f"{words}, {threat_in_words(norm, eps)}", *shares])
    return markdown_table(["", *(name if name == "both" else f"`{name}`" for name in names)], rows)


def main(
    proved: Annotated[int, typer.Option(min=1, help="Test digits to prove something about, the first ones.")] = 500,
    attacked: Annotated[int, typer.Option(min=1, help="Test digits to attack, the first ones.")] = 100,
    output: Annotated[Path, typer.Option(help="The folder for results.")] = UNANIMITY,
) -> None:
    """Count what has not been counted yet, and write counts and table."""
    keep_freed_memory()
    torch.set_num_threads(1)
    content = read_study(output, {"proved": proved, "attacked": attacked, "counts": {}})
    for name, count in tqdm(planned_counts(content["proved"], content["attacked"]).items()):
        if name not in content["counts"]:
            content["counts"][name] = count()
            write_study(output, content, unanimity_lines(content["counts"]))
    print("\n".join(unanimity_lines(content["counts"])))


if __name__ == "__main__":
    typer.run(main)
