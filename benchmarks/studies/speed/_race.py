"""Races: several ways to do the same, timed in turns in one process."""

import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from clusterguard.attacks import Precision

from benchmarks._support import write_json
from benchmarks.running import provenance
from benchmarks.studies.speed._measure import SPEED_RESULTS, Ratio, Work, median_ratio, seconds_of

Seconds = dict[str, list[float]]
"""The seconds that each side took in each round."""
OUR_SIDES = ("clusterguard, float32", "clusterguard, bfloat16")
OUR_PRECISIONS: dict[str, Precision] = {OUR_SIDES[0]: "float32", OUR_SIDES[1]: "bf16"}
BARE = ("bare loop, float32", "bare loop, bfloat16")
_NO_INSTRUCTIONS = "no instructions for bfloat16"


@dataclass(frozen=True)
class Race:
    """Several ways to do the same.

    Attributes:
        name: name of the race.
        sides: works by the names of their sides.
        gradients: number of gradients for single images that one call takes.
        success: function of a result that returns the share of images that the attack has broken. None is for works
            that are no attacks.
        rounds: number of rounds, in each of which every side runs once; at least 6, for an interval of 95 %.
        facts: other figures that belong to the race.
    """

    name: str
    sides: dict[str, Work]
    gradients: int
    success: Callable[[Any], float] | None = None
    rounds: int = 6
    facts: dict[str, Any] = field(default_factory=dict)


def time_in_rounds(sides: dict[str, Work], rounds: int) -> Seconds:
    """Time every side once in each round, after a call of each that does not count.

    The order is turned around from round to round.

    Example:
        >>> seconds = time_in_rounds({"short": lambda: sum(range(100)), "long": lambda: sum(range(10_000))}, 3)
        >>> {name: len(taken) for name, taken in seconds.items()}
        {'short': 3, 'long': 3}
    """
    seconds: Seconds = {name: [] for name in sides}
    for index in range(rounds):
        for name in list(sides) if index % 2 else reversed(sides):
            seconds[name].append(seconds_of(sides[name], 1))
    return seconds


def ratio_of(seconds: Seconds, theirs: str, ours: str) -> Ratio:
    """Their time over ours, round by round."""
    return median_ratio([their / our for their, our in zip(seconds[theirs], seconds[ours], strict=True)])


def run_races(name: str, races: Iterator[Race], device: torch.device) -> None:
    """Run races, print their results, and write them to a file in benchmarks/results/speed.

    Sides in bfloat16 are left out on a processor without instructions for it.

    Args:
        name: name of the group.
        races: races, each of which is made when the one before is done.
        device: device of the works. Its type is a part of the file's name.
    """
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for race in races:
        sides = race.sides if computes_bfloat16(device) else _in_float32(race.sides)
        outcomes = {side: work() for side, work in sides.items()}  # warm-up, too
        attacks = {} if race.success is None else {side: outcomes[side] for side in outcomes if side not in BARE}
        success = {side: race.success(result) for side, result in attacks.items() if race.success is not None}
        seconds = time_in_rounds(sides, race.rounds)
        results[race.name] = {
            "gradients": race.gradients,
            "success": success,
            "seconds": rounded(seconds),
            "facts": race.facts,
        }
        print(race.name, flush=True)
        for side, taken in seconds.items():
            speed, ratio = race.gradients / statistics.median(taken), ratio_of(seconds, side, next(iter(seconds)))
            print(f"  {side}: {speed:,.1f} gradients/s, {ratio} of the first, success {success.get(side)}", flush=True)
        write_results(name, {"races": results}, device)  # after each race, so that a killed run leaves something


def rounded(seconds: Seconds) -> Seconds:
    """The same seconds with four significant digits."""
    return {side: [float(f"{value:.4g}") for value in taken] for side, taken in seconds.items()}


def write_results(name: str, content: dict[str, Any], device: torch.device) -> None:
    """Write results with the date and the machine to a file in benchmarks/results/speed."""
    source = provenance(device) | {"processor": processor_name(), "date": date.today().isoformat()}
    file = SPEED_RESULTS / f"{name}-{device.type}.json"
    write_json(file, content | {"provenance": source})


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16. Without them it takes many times as long as float32."""
    return device.type != "cpu" or has_instructions(processor_name())


def has_instructions(processor: str) -> bool:
    """Whether a processor, named as by `processor_name`, has instructions for bfloat16."""
    return not processor.endswith(_NO_INSTRUCTIONS)


def processor_name() -> str:
    """The processor's name, and its instructions for bfloat16 as Linux calls them."""
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    found = {name.strip(): value.strip() for name, value in fields.items()}
    units = [unit for unit in ("avx512_bf16", "amx_bf16") if unit in found.get("flags", "").split()]
    return f"{found.get('model name', platform.processor())}, {' and '.join(units) or _NO_INSTRUCTIONS}"


def _in_float32(sides: dict[str, Work]) -> dict[str, Work]:
    return {name: work for name, work in sides.items() if "bfloat16" not in name}
