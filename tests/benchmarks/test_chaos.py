"""The study that damages everything: it must notice a reader that notices nothing."""

import json
from pathlib import Path

import pytest

from benchmarks.studies.chaos.__main__ import CHAOS_RESULTS, chaos_lines, faults, run
from benchmarks.studies.chaos._damage import cut_off, exchange_files, flip_bits, kill_writers, read_meanwhile
from benchmarks.studies.chaos._threads import share_between_threads
from benchmarks.studies.chaos._writers import Writer


def write_slowly(folder: Path, version: int) -> None:
    with (folder / "note").open("w") as file:
        for _ in range(2000):
            file.write(str(version))
            file.flush()


CARELESS = Writer(("note",), write_slowly, lambda folder: (folder / "note").read_bytes())


def write_both(folder: Path, version: int) -> None:
    for name in ("note", "other"):
        (folder / name).write_text(str(version))


def test_a_careless_reader_is_caught():
    assert flip_bits(CARELESS, 5, seed=0) == {"silent": 5}
    assert cut_off(CARELESS, 5, seed=0) == {"silent": 5}
    assert kill_writers(CARELESS, 5, seed=0)["silent"] > 0
    assert read_meanwhile(CARELESS, 20)["silent"] > 0
    both = Writer(("note", "other"), write_both, lambda folder: [file.read_text() for file in sorted(folder.iterdir())])
    assert exchange_files(both) == {"silent": 4}


def test_a_reader_with_errors_of_its_own_is_caught():
    strict = Writer(("note",), write_slowly, lambda folder: int((folder / "note").read_text(errors="strict")) % 7)
    assert flip_bits(strict, 20, seed=0)["raw error"] > 0


def fail(*_: object) -> None:
    raise ValueError


def test_a_writer_or_reader_that_never_works_is_no_proof():
    with pytest.raises(RuntimeError, match="reads undamaged files"):
        flip_bits(Writer(("note",), write_slowly, fail), 1, seed=0)
    calls = []

    def write_twice(folder: Path, version: int) -> None:
        calls.append(version)
        write_slowly(folder, version) if len(calls) < 6 else fail()

    with pytest.raises(RuntimeError, match="failed before"):
        kill_writers(Writer(("note",), write_twice, CARELESS.read), 1, seed=0)


def test_threads_that_share_a_guard_get_what_each_gets_alone():
    for train in (False, True):
        assert share_between_threads(threads=2, batches=2, train=train) == {"batches": 4, "wrong": 0, "changed": 0}


def test_what_is_published_has_no_fault_and_is_what_was_counted():
    counts = json.loads((CHAOS_RESULTS / "chaos.json").read_text())
    assert faults(counts) == 0
    assert (CHAOS_RESULTS / "table.md").read_text().splitlines() == chaos_lines(counts)
    for count in counts["flips"].values():
        assert sum(count.values()) >= 200
    counts["kills"]["guard folder"] = {"refused": 1}
    counts["requests"]["hostile 5xx"] = 2
    assert faults(counts) == 3


@pytest.mark.slow
def test_everything_in_small():
    assert faults(run(flips=10, cuts=5, kills=2, reads=5, batches=2, hostile=100, benign=100, seed=1)) == 0
