"""The answer of a page in one table: what the paper claims, what we measured, and whether the claim holds."""

from collections.abc import Iterator

from benchmarks.detectors import RECIPES
from benchmarks.reporting._estimates import ONE_PERCENT, Estimate, Result, Results, estimate, measure_success
from benchmarks.reporting._tables import NOT_RUN, centred_table, show_attack

TOLERANCE = 0.05
_METRIC = "ASR-1"


def verdict_table(results: Results, paper: Result, suite: Results | None) -> str:
    """The success of untargeted attacks on the first detector, in the paper and here, with verdicts.

    The first detector of the table is the paper's own, and the second one is its ablation.

    Args:
        results: our results of a table that the paper prints.
        paper: that table, of paper.toml.
        suite: results of the worst-case suite on the same detectors.
    """
    head = ["the paper's claim", "the paper's figure", "the same attack here", "our worst-case suite", "verdict"]
    return centred_table(head, _rows(results, paper, suite))


def _rows(results: Results, paper: Result, suite: Results | None) -> Iterator[list[str]]:
    ours, *others = results.table.detectors
    title = RECIPES[ours].title
    measured = {}
    for attack in (name for name in results.table.attacks if name.endswith(" U") and name in paper):
        printed = dict(zip(paper["detectors"], paper[attack][_METRIC], strict=True))
        figures = _measure(results, suite, ours, attack)
        measured[attack] = printed, figures
        claim = f"{show_attack(attack)} breaks few images of {title}"
        yield [claim, f"{printed[ours]:.2f}", *map(_show, figures), _judge(printed[ours], *figures)]
    if measured and others:
        other = others[0]
        attack = max(measured, key=lambda name: measured[name][0][other] - measured[name][0][ours])
        printed, figures = measured[attack]
        theirs = _measure(results, suite, other, attack)
        pairs = [f"{_show(one)} against {_show(two)}" for one, two in zip(figures, theirs, strict=True)]
        claim = f"{show_attack(attack)} breaks fewer images of {title} than of {RECIPES[other].title}"
        yield [claim, f"{printed[ours]:.2f} against {printed[other]:.2f}", *pairs, _compare(figures, theirs)]


def _measure(results: Results, suite: Results | None, detector: str, attack: str) -> tuple[Estimate, Estimate]:
    """The success of an attack on a detector, and that of the suite at the same norm and radius."""
    measure, threat = measure_success(ONE_PERCENT), results.threat(attack)
    found = [name for name in suite.table.attacks if suite.threat(name) == threat] if suite is not None else []
    of_suite = estimate(suite.slot(detector, found[0]), measure) if suite is not None and found else Estimate(())
    return estimate(results.slot(detector, attack), measure), of_suite


def _show(measured: Estimate) -> str:
    if not measured.values:
        return NOT_RUN
    low, high = (f"{end:.2f}".removeprefix("0") for end in measured.interval)
    return f"{measured.mean:.2f} [{low}, {high}]"


def _judge(printed: float, attack: Estimate, suite: Estimate) -> str:
    """Whether a claimed rate of success holds, which may be exceeded by the tolerance and the interval."""
    if not attack.values:
        return NOT_RUN
    if attack.interval[0] > printed + TOLERANCE:
        return "**does not hold**"
    if not suite.values:
        return "reproduces; the suite is not run"
    return "**holds**" if suite.interval[0] <= printed + TOLERANCE else "**in part**: not against stronger attacks"


def _compare(ours: tuple[Estimate, Estimate], theirs: tuple[Estimate, Estimate]) -> str:
    """Whether ours is broken less, beyond the intervals."""
    pairs = [(one, two) for one, two in zip(ours, theirs, strict=True) if one.values and two.values]
    if not pairs:
        return NOT_RUN
    fewer = [one.interval[1] < two.interval[0] for one, two in pairs]
    return "**holds**" if all(fewer) else "**in part**" if any(fewer) else "**does not hold**"


def explain_verdicts() -> str:
    """How the verdicts come about, and where they are discussed."""
    return (
        "Cells are shares of images, at 1 % false positives and with 95 % intervals. A claim holds if neither "
        "the paper's attack nor our suite breaks clearly more images than the paper prints. Clearly more means that "
        f"the lower end of the interval is more than {TOLERANCE:.2f} above it. A claim holds in part if only the suite "
        "breaks clearly more. [Does it reproduce, does it hold?](findings.md) discusses this."
    )
