"""Running experiments: train detectors, attack them, judge the attacked images, keep results, and stop in time."""

from benchmarks.running._clock import Clock, OutOfTimeError
from benchmarks.running._counting import (
    Counts,
    Judge,
    SuiteBudget,
    count_accepted,
    count_broken,
    count_without_proof,
    threat_in_words,
)
from benchmarks.running._guards import load_trained
from benchmarks.running._judging import from_hex
from benchmarks.running._plan import Throughput, find_throughput, measure_throughput, print_experience, print_plan
from benchmarks.running._publish import measure_again, publish_guard
from benchmarks.running._repeat import Repeated, choose_cells, repeat_cell
from benchmarks.running._runner import run_cell
from benchmarks.running._schedule import run_cells
from benchmarks.running._store import RESULTS, Store, provenance, read_chunk, save_chunk
from benchmarks.running._studies import read_study, write_study
from benchmarks.running._training import Trainings

__all__ = [
    "RESULTS",
    "Clock",
    "Counts",
    "Judge",
    "OutOfTimeError",
    "Repeated",
    "Store",
    "SuiteBudget",
    "Throughput",
    "Trainings",
    "choose_cells",
    "count_accepted",
    "count_broken",
    "count_without_proof",
    "find_throughput",
    "from_hex",
    "load_trained",
    "measure_again",
    "measure_throughput",
    "print_experience",
    "print_plan",
    "provenance",
    "publish_guard",
    "read_chunk",
    "read_study",
    "repeat_cell",
    "run_cell",
    "run_cells",
    "save_chunk",
    "threat_in_words",
    "write_study",
]
