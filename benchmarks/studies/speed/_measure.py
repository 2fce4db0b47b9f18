"""Time two ways to do the same side by side, so that a change in the speed of the machine favours neither."""

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks._support import write_atomically
from benchmarks.running import RESULTS, provenance

SPEED_RESULTS = RESULTS / "speed"
_MINIMUM = 0.02  # seconds that a measurement lasts at least
_REPEATS = 21  # pairs of measurements
Work = Callable[[], Any]
Check = Callable[[Any, Any], None]


@dataclass(frozen=True)
class Comparison:
    """Two ways to do the same, which are one row of the table.

    Attributes:
        name: name of the row.
        ours: our way.
        theirs: other way.
        target: ratio of their time to ours that we want to reach.
        check: function that compares the results of the two. None if there is nothing to compare.
        gradients: function that counts the gradients behind a result. None counts operators by profiling, which takes
            longer.
    """

    name: str
    ours: Work
    theirs: Work
    target: float
    check: Check | None = None
    gradients: Callable[[Any], int] | None = None


Rows = Callable[[torch.device], list[Comparison]]
"""The comparisons on a device, at sizes that it bears."""


@dataclass(frozen=True)
class Ratio:
    """The ratio of their time to ours.

    Attributes:
        median: median of the ratios of all pairs.
        low: lower end of its interval, which has a level of at least 95 % by the sign test.
        high: upper end of the interval.
        pairs: number of pairs.
    """

    median: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}] ({self.pairs} pairs)"


def time_in_pairs(ours: Work, theirs: Work, *, repeats: int) -> Ratio:
    """Time the two in pairs whose order alternates, and compare each pair.

    Example:
        >>> slow = lambda: sum(range(200_000))
        >>> time_in_pairs(lambda: sum(range(20_000)), slow, repeats=7).median > 2
        True
    """
    calls = {side: max(1, math.ceil(_MINIMUM / max(1e-7, _seconds(side, 1)))) for side in (ours, theirs)}
    ratios = []
    for index in range(repeats):
        order = (ours, theirs) if index % 2 else (theirs, ours)
        times = {side: _seconds(side, calls[side]) / calls[side] for side in order}
        ratios.append(times[theirs] / times[ours])
    return median_ratio(ratios)


def median_ratio(ratios: Sequence[float]) -> Ratio:
    """The median of ratios, and the order statistics that enclose it with a probability of at least 95 %.

    Example:
        >>> median_ratio([3.0, 1.0, 2.0, 5.0, 4.0, 7.0, 6.0])
        Ratio(median=4.0, low=1.0, high=7.0, pairs=7)
    """
    ordered, count, skipped, outside = sorted(ratios), len(ratios), 0, 2 * 0.5 ** len(ratios)
    while True:
        wider = outside + 2 * math.comb(count, skipped + 1) * 0.5**count
        if wider > 0.05:
            break
        skipped, outside = skipped + 1, wider
    return Ratio(statistics.median(ordered), ordered[skipped], ordered[-1 - skipped], count)


def count_operators(work: Work) -> dict[str, float]:
    """Count the torch operators and GPU kernels that one call launches, and the megabytes that it allocates in all.

    Unlike times, these figures do not depend on the speed of the machine.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiled:
        work()
    events = profiled.key_averages()
    operators = sum(event.count for event in events if event.key.startswith("aten::"))
    kernels = sum(event.count for event in events if event.device_type.name == "CUDA")
    allocated = (event.self_cpu_memory_usage + event.self_device_memory_usage for event in events)
    megabytes = sum(max(0, memory) for memory in allocated) / 2**20
    return {"operators": operators, "kernels": kernels, "megabytes": round(megabytes, 2)}


def measure_group(name: str, rows: Rows, device: torch.device) -> None:
    """Check, time and count rows. Print them, and write a file for the device to benchmarks/results/speed."""
    torch.set_num_threads(1)
    measured = {}
    for row in rows(device):
        ours, theirs = row.ours(), row.theirs()  # warm-up, too
        if row.check is not None:
            row.check(ours, theirs)
        ratio = time_in_pairs(row.ours, row.theirs, repeats=_REPEATS)
        reached = "reached" if ratio.median >= row.target else "missed"
        print(f"{row.name}: {ratio}, target {row.target:.3g} {reached}", flush=True)
        measured[row.name] = {
            "ratio": asdict(ratio),
            "target": row.target,
            "ours": {"gradients": row.gradients(ours)} if row.gradients else count_operators(row.ours),
            "theirs": {"gradients": row.gradients(theirs)} if row.gradients else count_operators(row.theirs),
        }
    content = {"rows": measured, "provenance": provenance(device)}
    file = SPEED_RESULTS / f"{name}-{device.type}.json"
    write_atomically(file, lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))


def _seconds(work: Work, calls: int) -> float:
    """The seconds that some calls take. On a GPU they are measured between two of its events."""
    if not torch.cuda.is_available():
        started = time.perf_counter()
        for _ in range(calls):
            work()
        return time.perf_counter() - started
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1000
