"""Estimates as Markdown tables: ours over its interval, then the paper's; what has not been run is said to be so."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from benchmarks.detectors import RECIPES
from benchmarks.reporting.estimates import (
    ONE_PERCENT,
    Estimate,
    Measure,
    Result,
    Results,
    Slot,
    area,
    clean_accuracy,
    estimate,
    false_positives,
    success,
    worst_per_image,
    worst_row,
    worst_within,
)

NORMS = {"linf": "ℓ∞", "l2": "ℓ2", "l1": "ℓ1", "l0": "ℓ0"}
NOT_RUN = "not run"


def show(measured: Estimate, paper: float | None = None) -> str:
    """A table's cell: ours, its interval, and in parentheses what the paper prints.

    Example:
        >>> show(Estimate((0.5,), ((0.41, 0.59),)), 0.21)
        '**0.50**<br><small>.41–.59</small><br>(0.21)'
    """
    if not measured.values:
        lines = [NOT_RUN]
    elif math.isnan(measured.mean):
        lines = ["–"]
    else:
        lines = [f"**{measured.bound}{measured.mean:.2f}**"]
        if measured.intervals:
            lines.append(f"<small>{_span(*measured.interval)}</small>")
        if measured.seeds > 1:
            lines.append(
                f"<small>{len(measured.values)} of {measured.seeds} seeds: {_span(*_range(measured.values))}</small>"
            )
    return "<br>".join(lines if paper is None else [*lines, f"({paper:.2f})"])


def _range(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _span(low: float, high: float) -> str:
    return "–".join(f"{end:.2f}".removeprefix("0") for end in (low, high))


def label(text: str) -> str:
    """An attack's name for people.

    Example:
        >>> label("PGD linf 0.3 T")
        'PGD ℓ∞ 0.3 T'
    """
    return re.sub(r"\b(linf|l[012])\b", lambda match: NORMS[match[0]], text)


def threat_label(norm: str, eps: float) -> str:
    """A norm and a radius for people; in ℓ1 and ℓ0 radii are whole numbers.

    Example:
        >>> threat_label("l2", 2), threat_label("linf", 0.03), threat_label("l1", 15.0)
        ('ℓ2 2.0', 'ℓ∞ 0.03', 'ℓ1 15')
    """
    is_whole = norm in ("l1", "l0")
    return f"{NORMS[norm]} {eps:g}" if is_whole else f"{NORMS[norm]} {float(eps)}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, the first column to the left, the others centred."""
    lines = [head, ["---"] + [":---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def metrics(paper: Result) -> list[str]:
    """What a table of the paper prints, rates in ascending order first."""
    names = {name for row in paper.values() if isinstance(row, dict) for name in row}
    return sorted(names, key=lambda name: metric_rate(name) or math.inf)


def metric_rate(metric: str) -> float | None:
    """The false-positive rate that "ASR-2" is measured at; None for EROC."""
    return int(metric.removeprefix("ASR-")) / 100 if metric.startswith("ASR-") else None


def comparison_table(results: Results, paper: Result, metric: str, suite: Results | None = None) -> str:
    """A table of the paper, one metric: a row an attack, a column a detector.

    Args:
        results: ours.
        paper: the table of paper.toml.
        metric: such as "ASR-1" or "EROC".
        suite: results of the worst-case suite on the same detectors, for rows of the same norm and radius.
    """
    table, rate = results.table, metric_rate(metric)
    measure: Measure = area() if rate is None else success(rate)
    attacks = [attack for attack in table.attacks if metric in paper.get(attack, {})]
    slots = {detector: [results.slot(detector, attack) for attack in attacks] for detector in table.detectors}

    def row(name: str, find: Callable[[str], Estimate], printed: Sequence[float] = ()) -> list[str]:
        known = dict(zip(paper["detectors"], printed, strict=bool(printed)))
        return [name, *(show(find(detector), known.get(detector)) for detector in table.detectors)]

    def before(rate: float) -> Iterator[list[str]]:
        clean = {detector: _any(slots[detector]) for detector in table.detectors}
        yield row("accuracy", lambda detector: estimate(clean[detector], clean_accuracy), paper.get("accuracy", ()))
        yield row("false positives", lambda detector: estimate(clean[detector], false_positives(rate)))
        yield ["images counted", *(_counted(clean[detector], rate) for detector in table.detectors)]

    def stronger(wanted: tuple[str, float]) -> Iterator[list[str]]:
        if suite is None or not suite.finished:
            return
        for attack in suite.table.attacks:
            if suite.threat(attack) == wanted:
                estimates = {detector: estimate(suite.slot(detector, attack), measure) for detector in table.detectors}
                yield row(f"*{label(attack)}*", estimates.__getitem__)

    rows = list(before(rate)) if rate is not None else []
    threats = [results.threat(attack) for attack in attacks]
    for index, attack in enumerate(attacks):
        estimates = {detector: estimate(slots[detector][index], measure) for detector in table.detectors}
        rows.append(row(label(attack), estimates.__getitem__, paper[attack][metric]))
        if rate == ONE_PERCENT and threats[index] not in threats[index + 1 :]:
            rows += stronger(threats[index])

    def worst(detector: str) -> Estimate:
        return worst_row([estimate(slot, measure) for slot in slots[detector]], smallest=rate is None)

    rows.append(row("**worst row**", worst, paper.get("worst case", {}).get(metric, ())))
    if rate is not None:
        rows.append(row("**worst per image**", lambda detector: worst_per_image(slots[detector], rate)))
    learned = {RECIPES[detector].title: estimate(_any(slots[detector]), clean_accuracy) for detector in table.detectors}
    return markdown_table(["", *learned], rows) + _beginners(learned)


def attack_table(results: Results) -> str:
    """ASR-1, for what the paper does not have: a row a detector or variant, a column an attack."""
    table = results.table
    rows, learned = [], {}
    is_of_suites = all(cell.kind == "suite" for cell in table.cells)
    # The form "unions" shows the union in a second table.
    union = ["any of these"] if is_of_suites and table.form != "unions" else []
    for name, slots in _lines(results, table.attacks):
        clean = _any(slots)
        learned[name] = estimate(clean, clean_accuracy)
        shares = [show(estimate(slot, success(ONE_PERCENT))) for slot in slots]
        shares += [show(worst_per_image(slots, ONE_PERCENT)) for _ in union]
        counted = _counted([result for slot in slots for result in slot], ONE_PERCENT)
        rows.append([name, show(estimate(clean, clean_accuracy)), counted, *shares])
    return markdown_table(["", "accuracy", "images counted", *map(label, table.attacks), *union], rows) + _beginners(
        learned
    )


def area_table(results: Results) -> str:
    """EROC of the attacks that go on after success; of those that stop it says little."""
    attacks = list(dict.fromkeys(cell.attack for cell in results.table.cells if cell.kind != "suite"))
    rows = [[name, *(show(estimate(slot, area())) for slot in slots)] for name, slots in _lines(results, attacks)]
    return markdown_table(["", *map(label, attacks)], rows)


def union_table(suite: Results, every: Sequence[Results]) -> str:
    """Images that any attack within a radius broke, and "+k" for those of them that the suite had left.

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
        shown = [f"{show(share)}<br>+{left}" if left else show(share) for share, left in unions]
        rows.append([RECIPES[detector].title, *shown])
    return markdown_table(
        ["", *(threat_label(*suite.threat(attack)) for attack in table.attacks), "any of these"], rows
    )


def stages_table(suite: Results, detector: str) -> str:
    """How many images each stage of the suite broke that the stages before it had left; the first seed there is."""
    table = suite.table
    columns: list[dict[str, int]] = []
    for attack in table.attacks:
        stages = (_either(suite.slot(detector, attack)) or {}).get("stages", [])
        counts = {"images attacked": stages[0]["attacked"]} if stages else {}
        for stage in stages:
            counts[stage["name"]] = counts.get(stage["name"], 0) + stage["broken"]
        columns.append(counts)
    names: list[str] = []
    for counts in columns:  # norms differ in stages; each comes after the one before it
        place = 0
        for name in counts:
            if name not in names:
                names.insert(place, name)
            place = names.index(name) + 1
    rows = [[name, *(str(counts.get(name, "")) if counts else NOT_RUN for counts in columns)] for name in names]
    return markdown_table(["", *(threat_label(*suite.threat(attack)) for attack in table.attacks)], rows)


def _lines(results: Results, attacks: Sequence[str]) -> Iterator[tuple[str, list[Slot]]]:
    for variant in results.table.variants:
        for detector in results.table.detectors:
            title = RECIPES[detector].title
            many = len(results.table.detectors) > 1
            name = f"{title}: {variant}" if variant and many else variant or title
            yield name, [results.slot(detector, attack, variant) for attack in attacks]


def _any(slots: Sequence[Slot]) -> Slot:
    """A seed's first result, for what does not depend on the attack."""
    return [_either(seed) for seed in zip(*slots, strict=True)]


def _either(results: Iterable[Result | None]) -> Result | None:
    return next((result for result in results if result is not None), None)


def _counted(slot: Slot, rate: float) -> str:
    totals = [success(rate)(result).total for result in slot if result is not None]
    return "–".join(str(total) for total in sorted({*_range(totals)})) if totals else NOT_RUN


def _beginners(learned: Mapping[str, Estimate]) -> str:
    """A warning below a table: what labels hardly anything rightly has hardly anything to be broken."""
    names = [name for name, share in learned.items() if share.mean < 0.5]
    if not names:
        return ""
    says = "has not learned to classify here: its" if len(names) == 1 else "have not learned to classify here: their"
    return f"\n\n**{', '.join(names)} {says} figures say nothing.**"
