"""Time two ways to do the same in turns, so that a machine that becomes slower or faster favours neither."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks._support import write_json
from benchmarks.running import RESULTS, provenance

SPEED_RESULTS = RESULTS / "speed"
_MINIMUM = 0.02  # seconds that a measurement lasts at least
Work = Callable[[], Any]
"""What is timed. Its result is only used to check and to count."""
Check = Callable[[Any, Any], None]
"""A function that raises an error unless two results are the same, or as good as each other."""


@dataclass(frozen=True)
class Comparison:
    """Two ways to do the same. They are one row of the table.

    Attributes:
        name: name of the comparison.
        ours: work of clusterguard.
        theirs: work of the other side, such as another library.
        target: ratio of the other side's time to ours that we want to reach.
        check: function that gets both results and checks that they agree. None does not check.
        gradients: function that returns how many gradients a result took. If it is None, the operators of torch are
            counted instead.
        pairs: number of pairs of measurements, at least 6, for an interval of 95 %.
    """

    name: str
    ours: Work
    theirs: Work
    target: float
    check: Check | None = None
    gradients: Callable[[Any], int] | None = None
    pairs: int = 13


Compare = Callable[[torch.device], list[Comparison]]
"""A function that makes a group of comparisons for a device, at sizes that suit the device."""


@dataclass(frozen=True)
class Ratio:
    """The ratio of the other side's time to ours.

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
    """Time both works again and again, and take the ratio of their times in each pair.

    The order within the pairs alternates.

    Example:
        >>> slow = lambda: sum(range(200_000))
        >>> time_in_pairs(lambda: sum(range(20_000)), slow, repeats=7).median > 2
        True
    """
    calls = {side: max(1, math.ceil(_MINIMUM / max(1e-7, seconds_of(side, 1)))) for side in (ours, theirs)}
    ratios = []
    for index in range(repeats):
        order = (ours, theirs) if index % 2 else (theirs, ours)
        times = {side: seconds_of(side, calls[side]) / calls[side] for side in order}
        ratios.append(times[theirs] / times[ours])
    return median_ratio(ratios)


def median_ratio(ratios: Sequence[float]) -> Ratio:
    """The median of ratios with an interval for it, which has a level of at least 95 % by the sign test.

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


def measure_group(name: str, compare: Compare, device: torch.device) -> None:
    """Check and time a group of comparisons. Print them, and write them to a file in benchmarks/results/speed.

    Args:
        name: name of the group.
        compare: function that makes the comparisons.
        device: device to run them on. Its type is a part of the file's name.
    """
    torch.set_num_threads(1)
    measured = {}
    for comparison in compare(device):
        ours, theirs = comparison.ours(), comparison.theirs()  # warm-up, too
        if comparison.check is not None:
            comparison.check(ours, theirs)
        ratio = time_in_pairs(comparison.ours, comparison.theirs, repeats=comparison.pairs)
        reached = "reached" if ratio.median >= comparison.target else "missed"
        print(f"{comparison.name}: {ratio}, target {comparison.target:.3g} {reached}", flush=True)
        measured[comparison.name] = {
            "ratio": asdict(ratio),
            "target": comparison.target,
            "ours": {"gradients": comparison.gradients(ours)}
            if comparison.gradients
            else count_operators(comparison.ours),
            "theirs": {"gradients": comparison.gradients(theirs)}
            if comparison.gradients
            else count_operators(comparison.theirs),
        }
    content = {"rows": measured, "provenance": provenance(device)}
    file = SPEED_RESULTS / f"{name}-{device.type}.json"
    write_json(file, content)


def seconds_of(work: Work, calls: int) -> float:
    """The seconds that some calls take.

    On a GPU they are measured between two of its events. Elsewhere they are the processor time of this process, which
    other processes on a shared machine disturb less than they disturb the clock.
    """
    if not torch.cuda.is_available():
        started = time.process_time()
        for _ in range(calls):
            work()
        return time.process_time() - started
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1000
