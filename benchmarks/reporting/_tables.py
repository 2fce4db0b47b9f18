"""Estimates as Markdown tables. Each place shows our estimate, its interval and the figure of the paper."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from clusterguard.attacks import NORMS, get_norm

from benchmarks._support import markdown_table
from benchmarks.detectors import RECIPES
from benchmarks.reporting._estimates import (
    ONE_PERCENT,
    Estimate,
    Measure,
    Result,
    Results,
    Slot,
    estimate,
    measure_accuracy,
    measure_area,
    measure_false_positives,
    measure_success,
    worst_per_image,
    worst_row,
    worst_within,
)

NOT_RUN = "not run"


def show_estimate(measured: Estimate, paper: float | None = None) -> str:
    """Show our estimate, its interval, and in parentheses the figure that the paper prints.

    Example:
        >>> show_estimate(Estimate((0.5,), ((0.41, 0.59),)), 0.21)
        '**0.50**<br><small>.41–.59</small><br>(0.21)'
    """
    if not measured.values:
        lines = [NOT_RUN]
    elif math.isnan(measured.mean):
        lines = ["–"]
    else:
        lines = [f"**{measured.bound}{measured.mean:.2f}**"]
        if measured.intervals:
            lines.append(f"<small>{_show_interval(*measured.interval)}</small>")
        if measured.seeds > 1:
            spread = _show_interval(*_smallest_and_largest(measured.values))
            lines.append(f"<small>{len(measured.values)} of {measured.seeds} seeds: {spread}</small>")
    return "<br>".join(lines if paper is None else [*lines, f"({paper:.2f})"])


def _smallest_and_largest(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _show_interval(low: float, high: float) -> str:
    return "–".join(f"{end:.2f}".removeprefix("0") for end in (low, high))


def show_attack(text: str) -> str:
    """The name of an attack for people.

    Example:
        >>> show_attack("PGD linf 0.3 T")
        'PGD ℓ∞ 0.3 T'
    """
    return re.sub(rf"\b({'|'.join(NORMS)})\b", lambda match: NORMS[match[0]].symbol, text)


def show_threat(norm: str, eps: float) -> str:
    """A norm and a radius for people. In sparse norms, ℓ1 and ℓ0, radii are whole numbers.

    Example:
        >>> show_threat("l2", 2), show_threat("linf", 0.03), show_threat("l1", 15.0)
        ('ℓ2 2.0', 'ℓ∞ 0.03', 'ℓ1 15')
    """
    known = get_norm(norm)
    return f"{known.symbol} {eps:g}" if known.is_sparse else f"{known.symbol} {float(eps)}"


def centred_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table in Markdown, with all columns but the first centred."""
    return "\n".join(markdown_table(head, rows, others=":---:"))


def list_metrics(paper: Result) -> list[str]:
    """The metrics that a table of the paper prints: ASR at rates in ascending order, then EROC."""
    names = {name for row in paper.values() if isinstance(row, dict) for name in row}
    return sorted(names, key=lambda name: metric_rate(name) or math.inf)


def metric_rate(metric: str) -> float | None:
    """The false-positive rate of a metric such as "ASR-2". None for EROC."""
    return int(metric.removeprefix("ASR-")) / 100 if metric.startswith("ASR-") else None


def comparison_table(results: Results, paper: Result, metric: str, suite: Results | None = None) -> str:
    """One metric of a table of the paper beside our results. Attacks are rows and detectors are columns.

    Args:
        results: our results.
        paper: table of paper.toml.
        metric: name of the metric, such as "ASR-1" or "EROC".
        suite: results of the worst-case suite on the same detectors. They are shown below attacks of the same norm and
            radius.
    """
    table, rate = results.table, metric_rate(metric)
    measure: Measure = measure_area() if rate is None else measure_success(rate)
    attacks = [attack for attack in table.attacks if metric in paper.get(attack, {})]
    slots = {detector: [results.slot(detector, attack) for attack in attacks] for detector in table.detectors}

    def row(name: str, find: Callable[[str], Estimate], printed: Sequence[float] = ()) -> list[str]:
        known = dict(zip(paper["detectors"], printed, strict=bool(printed)))
        return [name, *(show_estimate(find(detector), known.get(detector)) for detector in table.detectors)]

    def before(rate: float) -> Iterator[list[str]]:
        clean = {detector: _first_of_each_seed(slots[detector]) for detector in table.detectors}
        yield row("accuracy", lambda detector: estimate(clean[detector], measure_accuracy), paper.get("accuracy", ()))
        yield row("false positives", lambda detector: estimate(clean[detector], measure_false_positives(rate)))
        yield ["images counted", *(_count_images(clean[detector], rate) for detector in table.detectors)]

    def stronger(wanted: tuple[str, float]) -> Iterator[list[str]]:
        if suite is None or not suite.finished:
            return
        for attack in suite.table.attacks:
            if suite.threat(attack) == wanted:
                estimates = {detector: estimate(suite.slot(detector, attack), measure) for detector in table.detectors}
                yield row(f"*{show_attack(attack)}*", estimates.__getitem__)

    rows = list(before(rate)) if rate is not None else []
    threats = [results.threat(attack) for attack in attacks]
    for index, attack in enumerate(attacks):
        estimates = {detector: estimate(slots[detector][index], measure) for detector in table.detectors}
        rows.append(row(show_attack(attack), estimates.__getitem__, paper[attack][metric]))
        if rate == ONE_PERCENT and threats[index] not in threats[index + 1 :]:
            rows += stronger(threats[index])

    def worst(detector: str) -> Estimate:
        return worst_row([estimate(slot, measure) for slot in slots[detector]], smallest=rate is None)

    rows.append(row("**worst row**", worst, paper.get("worst case", {}).get(metric, ())))
    if rate is not None:
        rows.append(row("**worst per image**", lambda detector: worst_per_image(slots[detector], rate)))
    learned = {
        RECIPES[detector].title: estimate(_first_of_each_seed(slots[detector]), measure_accuracy)
        for detector in table.detectors
    }
    return centred_table(["", *learned], rows) + _warn_of_untrained(learned)


def attack_table(results: Results) -> str:
    """ASR-1 of cells that the paper does not have. Detectors or variants are rows and attacks are columns."""
    table = results.table
    rows, learned = [], {}
    is_of_suites = all(cell.kind == "suite" for cell in table.cells)
    # The form "unions" shows the union in a second table.
    union = ["any of these"] if is_of_suites and table.form != "unions" else []
    for name, slots in _slots_by_name(results, table.attacks):
        clean = _first_of_each_seed(slots)
        learned[name] = estimate(clean, measure_accuracy)
        shares = [show_estimate(estimate(slot, measure_success(ONE_PERCENT))) for slot in slots]
        shares += [show_estimate(worst_per_image(slots, ONE_PERCENT)) for _ in union]
        counted = _count_images([result for slot in slots for result in slot], ONE_PERCENT)
        rows.append([name, show_estimate(estimate(clean, measure_accuracy)), counted, *shares])
    return centred_table(
        ["", "accuracy", "images counted", *map(show_attack, table.attacks), *union], rows
    ) + _warn_of_untrained(learned)


def area_table(results: Results) -> str:
    """EROC of all attacks except the suite. The suite stops as soon as it succeeds, so its EROC says little."""
    attacks = list(dict.fromkeys(cell.attack for cell in results.table.cells if cell.kind != "suite"))
    rows = [
        [name, *(show_estimate(estimate(slot, measure_area())) for slot in slots)]
        for name, slots in _slots_by_name(results, attacks)
    ]
    return centred_table(["", *map(show_attack, attacks)], rows)


def union_table(suite: Results, every: Sequence[Results]) -> str:
    """The share of images that any attack within a radius broke. "+k" counts those that the suite did not break.

    Args:
        suite: results of the worst-case suite.
        every: results of all tables on the same data.
    """
    table = suite.table
    rows = []
    for detector in table.detectors:
        cells = [(cell, result) for cell, result in suite.cells if cell.detector == detector]
        groups = [[pair for pair in cells if pair[0].attack == attack] for attack in table.attacks]
        unions = [worst_within(group, every) for group in [*groups, cells]]
        shown = [f"{show_estimate(share)}<br>+{left}" if left else show_estimate(share) for share, left in unions]
        rows.append([RECIPES[detector].title, *shown])
    return centred_table(["", *(show_threat(*suite.threat(attack)) for attack in table.attacks), "any of these"], rows)


def stages_table(suite: Results, detector: str) -> str:
    """The number of images that each stage of the suite broke among those that earlier stages had not broken.

    The counts are those of the first seed that has been run.
    """
    table = suite.table
    columns: list[dict[str, int]] = []
    for attack in table.attacks:
        stages = (_first_finished(suite.slot(detector, attack)) or {}).get("stages", [])
        counts = {"images attacked": stages[0]["attacked"]} if stages else {}
        for stage in stages:
            counts[stage["name"]] = counts.get(stage["name"], 0) + stage["broken"]
        columns.append(counts)
    names: list[str] = []
    for counts in columns:  # norms have different stages, and every column keeps its order
        place = 0
        for name in counts:
            if name not in names:
                names.insert(place, name)
            place = names.index(name) + 1
    rows = [[name, *(str(counts.get(name, "")) if counts else NOT_RUN for counts in columns)] for name in names]
    return centred_table(["", *(show_threat(*suite.threat(attack)) for attack in table.attacks)], rows)


def _slots_by_name(results: Results, attacks: Sequence[str]) -> Iterator[tuple[str, list[Slot]]]:
    for variant in results.table.variants:
        for detector in results.table.detectors:
            title = RECIPES[detector].title
            many = len(results.table.detectors) > 1
            name = f"{title}: {variant}" if variant and many else variant or title
            yield name, [results.slot(detector, attack, variant) for attack in attacks]


def _first_of_each_seed(slots: Sequence[Slot]) -> Slot:
    """One result of each seed under any attack, for numbers that do not depend on the attack."""
    return [_first_finished(seed) for seed in zip(*slots, strict=True)]


def _first_finished(results: Iterable[Result | None]) -> Result | None:
    return next((result for result in results if result is not None), None)


def _count_images(slot: Slot, rate: float) -> str:
    totals = [measure_success(rate)(result).total for result in slot if result is not None]
    return "–".join(str(total) for total in sorted({*_smallest_and_largest(totals)})) if totals else NOT_RUN


def _warn_of_untrained(learned: Mapping[str, Estimate]) -> str:
    """A warning below a table if detectors have a low accuracy, so that too few images are left to be attacked."""
    names = [name for name, share in learned.items() if share.mean < 0.5]
    if not names:
        return ""
    says = "has not learned to classify here: its" if len(names) == 1 else "have not learned to classify here: their"
    return f"\n\n**{', '.join(names)} {says} figures say nothing.**"
