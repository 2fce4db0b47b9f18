"""The tables of docs/performance.md, which are made of the results in benchmarks/results/speed and of nothing else."""

import json
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks._support import markdown_table
from benchmarks.studies.speed._harm import harm_lines
from benchmarks.studies.speed._measure import SPEED_RESULTS, Ratio
from benchmarks.studies.speed._memory import BATCHES
from benchmarks.studies.speed._peers import PEER_NAMES
from benchmarks.studies.speed._race import BARE, OUR_SIDES, Seconds, ratio_of

TABLE = SPEED_RESULTS / "table.md"
_DEVICES = ("cpu", "cuda")
_PAIRED = ("suite", "head", "projection", "detection")


class SpeedTarget(NamedTuple):
    """A ratio that we want to reach.

    Attributes:
        group: group of races.
        race: beginning of the race's name.
        ours: our side.
        theirs: the other side, or "best peer".
        least: smallest ratio of their time to ours.
        unit: instructions that the target presupposes, as Linux calls them; "" for none.
    """

    group: str
    race: str
    ours: str
    theirs: str
    least: float
    unit: str = ""


SPEED_TARGETS = (
    SpeedTarget("attack", "PGD-40 linf, SmallCNN", OUR_SIDES[0], "best peer", 1.0),
    SpeedTarget("attack", "PGD-40 linf, SmallCNN", OUR_SIDES[1], "best peer", 4.0, "amx_bf16"),
    SpeedTarget("resnet18", "PGD-20 linf, ResNet-18", OUR_SIDES[1], "best peer", 4.0, "amx_bf16"),
    SpeedTarget("training", "training step, SmallCNN", OUR_SIDES[1], OUR_SIDES[0], 3.0, "amx_bf16"),
    SpeedTarget("training", "training step, ResNet-18", OUR_SIDES[1], OUR_SIDES[0], 3.5, "amx_bf16"),
    SpeedTarget("roofline", "PGD-4, SmallCNN", OUR_SIDES[1], BARE[1], 0.9),
    SpeedTarget("roofline", "PGD-4, ResNet-18", OUR_SIDES[1], BARE[1], 0.9),
    SpeedTarget("attack", "PGD-40 linf, SmallCNN", OUR_SIDES[1], BARE[1], 0.9),
    SpeedTarget("resnet18", "PGD-20 linf, ResNet-18", OUR_SIDES[1], BARE[1], 0.9),
)


def table_lines() -> Iterator[str]:
    """The lines of the tables in Markdown."""
    yield from _targets()
    for title, group, lines in (
        ("Attacks on the paper's network", "attack", _race_lines),
        ("Attacks on ResNet-18", "resnet18", _race_lines),
        ("Attacks on ResNet-50", "resnet50", _race_lines),
        ("Training steps", "training", _race_lines),
        ("Steps of training for certificates", "certified", _race_lines),
        ("Batch sizes", "batches", _batch_lines),
        ("The limit", "roofline", _roof_lines),
        ("Compiled", "compiled", _compiled_lines),
        ("Before and after the working copy", "profile", _profile_lines),
        ("Folded, and in channels last, in float32", "float32", _plain_lines),
        ("Harm in each precision", "harm", harm_lines),
        ("Freed memory", "freed-memory", _kept_lines),
    ):
        yield from ("", f"### {title}", "")
        contents = {device: _read(group, device) for device in _DEVICES}
        for content in filter(None, contents.values()):
            yield from lines(content["races"])
        missing = [device for device, content in contents.items() if not content]
        if missing:
            yield f"*Not run: {' and '.join(missing)}.*"
    yield from ("", "### Other comparisons", "")
    yield from _paired_lines()
    yield from ("", "### Peak memory", "")
    yield from _memory_lines()
    yield from ("", "### Settings", "")
    yield from _setting_lines()


def _read(group: str, device: str) -> Any:
    file = SPEED_RESULTS / f"{group}-{device}.json"
    return json.loads(file.read_text()) if file.exists() else None


def _short(ratio: Ratio) -> str:
    return f"{ratio.median:.3g} [{ratio.low:.3g}, {ratio.high:.3g}]"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def best_peer(seconds: Seconds) -> str:
    """The peer that takes the least time."""
    return min((side for side in seconds if side in PEER_NAMES), key=lambda side: statistics.median(seconds[side]))


def _targets() -> Iterator[str]:
    yield from markdown_table(("what", "ours", "against", "their time over ours", "target"), _rows_of_targets())


def _rows_of_targets() -> Iterator[tuple[str, ...]]:
    for target in SPEED_TARGETS:
        content = _read(target.group, "cpu")
        names = [name for name, race in content["races"].items() if target.ours in race["seconds"]] if content else []
        name = next((name for name in names if name.startswith(target.race)), None)
        if name is None:
            yield target.race, target.ours, target.theirs, "not run", f"≥ {target.least:g}"
            continue
        seconds = content["races"][name]["seconds"]
        theirs = best_peer(seconds) if target.theirs == "best peer" else target.theirs
        ratio = ratio_of(seconds, theirs, target.ours)
        reached = "reached" if ratio.median >= target.least else "missed"
        lacks = target.unit and target.unit not in content["provenance"]["processor"]
        note = f", set for {target.unit}, which this processor lacks" if lacks else ""
        shown = f"{theirs} (best peer)" if target.theirs == "best peer" else theirs
        yield name, target.ours, shown, _short(ratio), f"≥ {target.least:g}: {reached}{note}"


def _race_lines(races: dict[str, Any]) -> Iterator[str]:
    for name, race in races.items():
        seconds: Seconds = race["seconds"]
        ours = [side for side in OUR_SIDES if side in seconds]
        head = [name, "gradients/s", *(f"its time over that of {side}" for side in ours)]
        rows = []
        for side, taken in seconds.items():
            speed = race["gradients"] / statistics.median(taken)
            ratios = ["1" if side == our else _short(ratio_of(seconds, side, our)) for our in ours]
            success = [f"{race['success'][side]:.3f}" if side in race["success"] else ""] if race["success"] else []
            rows.append([side, _rate(speed), *ratios, *success])
        yield from markdown_table([*head, "success"] if race["success"] else head, rows)
        yield ""


def _batch_lines(races: dict[str, Any]) -> Iterator[str]:
    rows = []
    for name, race in races.items():
        taken = [race["seconds"][side] for side in OUR_SIDES if side in race["seconds"]]
        speeds = [_rate(race["gradients"] / statistics.median(seconds)) for seconds in taken]
        ratio = _short(ratio_of(race["seconds"], *OUR_SIDES)) if len(taken) == len(OUR_SIDES) else ""
        rows.append([name, *[*speeds, "–"][:2], ratio])
    yield from markdown_table(("attack", "gradients/s, float32", "bfloat16", "float32's time over bfloat16's"), rows)
    yield ""


def _roof_lines(races: dict[str, Any]) -> Iterator[str]:
    speeds = "GFLOP/s of the convolutions alone", "GFLOP/s of our attack"
    shares_of = "our share of the convolutions' time", "our share of the bare loop's"
    rows = []
    for name, race in races.items():
        work = race["gradients"] * race["facts"]["GFLOP of a gradient"]
        for ours, bare in zip(OUR_SIDES, BARE, strict=True):
            if ours not in race["seconds"]:
                continue
            precision = ours.split(", ")[1]
            alone = f"convolutions alone, {precision}"
            rates = [work / statistics.median(race["seconds"][side]) for side in (alone, ours)]
            shares = [_short(ratio_of(race["seconds"], side, ours)) for side in (alone, bare)]
            rows.append([name, precision, *(f"{rate:.0f}" for rate in rates), *shares])
    yield from markdown_table(("attack", "precision", *speeds, *shares_of), rows)
    yield ""


def _compiled_lines(races: dict[str, Any]) -> Iterator[str]:
    rows = []
    for name, race in races.items():
        plain, compiled = race["seconds"]
        agree = "yes" if race["facts"]["gradients agree"] else "no"
        rows.append([name, _short(ratio_of(race["seconds"], plain, compiled)), agree])
    head = "loop in bfloat16 with channels last", "eager time over compiled time", "gradients agree"
    yield from markdown_table(head, rows)
    yield ""


def _plain_lines(races: dict[str, Any]) -> Iterator[str]:
    rows = []
    for name, race in races.items():
        first = next(iter(race["seconds"]))
        for side, taken in race["seconds"].items():
            ratio = "1" if side == first else _short(ratio_of(race["seconds"], first, side))
            rows.append([name, side, _rate(race["gradients"] / statistics.median(taken)), ratio])
    yield from markdown_table(("loop", "network", "gradients/s", "its gain over the first"), rows)
    yield ""


def _kept_lines(races: dict[str, Any]) -> Iterator[str]:
    rows = []
    for name, race in races.items():
        speeds = [_rate(race["gradients"] / statistics.median(taken)) for taken in race["seconds"].values()]
        rows.append([name, *speeds, _short(ratio_of(race["seconds"], *race["seconds"]))])
    yield from markdown_table(("attack", "gradients/s, freed memory handed back", "kept", "gain"), rows)
    yield ""


def _profile_lines(races: dict[str, Any]) -> Iterator[str]:
    head = (
        "attack",
        "stage",
        "operators of a step",
        "MB written by a step",
        "seconds of the attack",
        "float32's over its",
    )
    rows = []
    for name, race in races.items():
        for stage, taken in race["seconds"].items():
            counts = race["facts"]["of one step"][stage]
            ratio = _short(ratio_of(race["seconds"], "float32", stage))
            figures = f"{counts['operators']:,.0f}", f"{counts['megabytes']:,.1f}", f"{statistics.median(taken):.2f}"
            rows.append([name, stage, *figures, ratio])
    yield from markdown_table(head, rows)
    yield ""


def _paired_lines() -> list[str]:
    head = "comparison", "their time over ours", "target", "operators or gradients, ours and theirs", "MB allocated"
    return markdown_table(head, _paired_rows())


def _paired_rows() -> Iterator[tuple[str, ...]]:
    for device in _DEVICES:
        for name in _PAIRED:
            content = _read(name, device)
            if not content:
                yield f"*{name}, {device}*", "not run", "", "", ""
                continue
            for title, row in content["rows"].items():
                ratio = Ratio(**row["ratio"])
                mark = "reached" if ratio.median >= row["target"] else "missed"
                sides = row["ours"], row["theirs"]
                unit = "gradients" if "gradients" in row["ours"] else "operators"
                launched = " / ".join(f"{side[unit]:,}" for side in sides) + (
                    " gradients" if unit == "gradients" else ""
                )
                megabytes = " / ".join(f"{side['megabytes']:,.0f}" for side in sides if "megabytes" in side)
                target = f"{row['target']:.3g}: {mark}"
                yield f"{title}, {device}", _short(ratio), target, launched, megabytes


def _memory_lines() -> list[str]:
    head = "peak megabytes, ResNet-50 at 224", *(f"batch {batch}" for batch in BATCHES)
    rows = []
    for device in _DEVICES:
        content = _read("memory", device)
        if not content:
            rows.append([f"*{device}*", "not run", *[""] * (len(BATCHES) - 1)])
            continue
        for work, peaks in content["megabytes"].items():
            rows.append([f"{work}, {device}", *(f"{peaks[str(batch)]:,.0f}" for batch in BATCHES)])
    return markdown_table(head, rows)


def _setting_lines() -> list[str]:
    rows = []
    for file in sorted(SPEED_RESULTS.glob("*.json")):
        source = json.loads(file.read_text())["provenance"]
        machine = source.get("processor", source["device"])
        cells = source.get("date", ""), machine, source["threads"], source["versions"]["torch"], source["commit"]
        rows.append((f"`{file.name}`", *cells))
    return markdown_table(("file", "date", "processor", "threads", "torch", "commit"), rows)
