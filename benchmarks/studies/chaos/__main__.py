"""Damage everything that clusterguard writes and shares, and count what goes unnoticed: `make chaos`.

The counts go to `benchmarks/results/chaos/chaos.json`, and a table for the documentation beside it. The exit status is
1 if anything was silent, lost or wrong.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks._support import markdown_table
from benchmarks.running import RESULTS
from benchmarks.studies.chaos._damage import cut_off, exchange_files, flip_bits, kill_writers, read_meanwhile
from benchmarks.studies.chaos._requests import send_requests
from benchmarks.studies.chaos._threads import share_between_threads
from benchmarks.studies.chaos._writers import all_writers

CHAOS_RESULTS = RESULTS / "chaos"
_HARMLESS = ("refused", "same")
_OF_FILES = {
    "flips": "one bit flipped",
    "cuts": "cut off",
    "exchanges": "a file of another version",
    "kills": "writer killed",
    "readers": "read while a process writes",
    "writers": "read while two processes write",
}
_WHOLE = ("kills", "readers", "writers")  # a reader must get one of the versions


def run(*, flips: int, cuts: int, kills: int, reads: int, batches: int, hostile: int, benign: int, seed: int) -> Any:
    """All counts, by experiment and by what was damaged."""
    counts: dict[str, Any] = {part: {} for part in _OF_FILES} | {"threads": {}, "requests": {}}

    def note(part: str, name: str, count: Counter[str]) -> None:
        counts[part][name] = dict(count)
        print(f"{_OF_FILES[part]}, {name}: {counts[part][name]}", flush=True)

    for name, writer in all_writers().items():
        if writer.is_checked:
            note("flips", name, flip_bits(writer, flips, seed))
            note("cuts", name, cut_off(writer, cuts, seed))
        if len(writer.files) > 1 and (exchanged := exchange_files(writer)):
            note("exchanges", name, exchanged)
        if not writer.is_resumed:
            note("readers", name, read_meanwhile(writer, reads))
            if writer.is_shared:
                note("writers", name, read_meanwhile(writer, reads, writers=2))
    for name, writer in all_writers(epochs=10).items():
        note("kills", name, kill_writers(writer, kills, seed))
    for train in (False, True):
        mode = "train mode" if train else "eval mode"
        counts["threads"][mode] = dict(share_between_threads(threads=4, batches=batches, train=train))
        print(f"4 threads, {mode}: {counts['threads'][mode]}", flush=True)
    counts["requests"] = dict(send_requests(hostile, benign, seed))
    print(f"requests: {counts['requests']}", flush=True)
    return counts


def faults(counts: dict[str, Any]) -> int:
    """How often something was silent, lost, left over, wrong, or an error of another library."""
    files = [count for part in _OF_FILES for count in counts.get(part, {}).values()]
    silent: int = sum(number for count in files for name, number in count.items() if name not in _HARMLESS)
    lost = sum(count.get("refused", 0) for part in _WHOLE for count in counts.get(part, {}).values())
    shared = sum(count["wrong"] + count["changed"] for count in counts["threads"].values())
    requests = counts["requests"]
    answered = sum(number for name, number in requests.items() if name.endswith("5xx"))
    unfair = sum(number for name, number in requests.items() if name.startswith("ordinary") and name != "ordinary 2xx")
    missed: int = requests.get("wrong", 0) + requests.get("health missed", 0)
    return sum((silent, lost, shared, answered, unfair, missed))


def chaos_lines(counts: dict[str, Any]) -> list[str]:
    """The counts as a table in Markdown."""
    head = "what happens", "to what", "how often", "noticed and refused", "no effect", "silent, lost or wrong"
    return markdown_table(head, _rows(counts), others="---:")


def _rows(counts: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for part, what in _OF_FILES.items():
        for name, count in counts.get(part, {}).items():
            refused, same = count.get("refused", 0), count.get("same", 0)
            bad = sum(number for outcome, number in count.items() if outcome not in _HARMLESS)
            total = sum(number for outcome, number in count.items() if outcome != "left over")
            if part in _WHOLE:
                refused, bad = 0, bad + refused
            yield what, name, f"{total:,}", f"{refused:,}", f"{same:,}", f"{bad:,}"
    for name, count in counts["threads"].items():
        bad = count["wrong"] + count["changed"]
        number = count["batches"]
        yield "four threads share a guard", name, f"{number:,} batches", "", f"{number - count['wrong']:,}", f"{bad:,}"
    requests = counts["requests"]
    for kind in ("hostile", "ordinary"):
        by_status = {name[-3:]: number for name, number in requests.items() if name.startswith(kind)}
        bad = by_status.get("5xx", 0) + (requests.get("wrong", 0) if kind == "ordinary" else 0)
        numbers = sum(by_status.values()), by_status.get("4xx", 0), by_status.get("2xx", 0), bad
        yield f"{kind} request", "example service", *(f"{number:,}" for number in numbers)


def main() -> None:
    """Run everything, write the counts and the table, and fail if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the usual number of trials")
    parser.add_argument("--to", type=Path, default=CHAOS_RESULTS, help="folder of the counts and the table")
    given = parser.parse_args()
    sizes = {"flips": 200, "cuts": 50, "kills": 20, "reads": 100, "batches": 20, "hostile": 2000, "benign": 4000}
    trials = {name: max(1, round(number * given.scale)) for name, number in sizes.items()}
    counts = run(**trials, seed=given.seed)
    given.to.mkdir(parents=True, exist_ok=True)
    (given.to / "chaos.json").write_text(json.dumps({"seed": given.seed, **counts}, indent=1) + "\n")
    (given.to / "table.md").write_text("\n".join(chaos_lines(counts)) + "\n")
    if number := faults(counts):
        raise SystemExit(f"{number} faults")


if __name__ == "__main__":
    main()
