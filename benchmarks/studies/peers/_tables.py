"""Tables of the comparison as Markdown."""

from collections.abc import Iterable, Mapping
from typing import Any

from clusterguard.attacks import get_norm
from clusterguard.detection import Rate

from benchmarks._support import markdown_table
from benchmarks.studies.peers._attacks import OUR_ATTACKS, PLAIN, SUITE, THOROUGH

ByAttack = Mapping[str, Mapping[str, Any]]
"""What each attack did to the images of one case, by the attack's name."""


def summary_lines(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One row for each guard, norm and seed that the suite has attacked.

    Args:
        cases: contents of the results files, by the guard's title.
    """
    head = (
        "guard",
        "norm, radius",
        "seed",
        "our PGD",
        "strongest other",
        "suite",
        "others only",
        "left by the thorough suite",
    )
    rows = []
    for title, case in cases.items():
        for threat, results in case["results"].items():
            if SUITE in results:
                norm, seed = threat.split("/")
                radius = f"{get_norm(norm).symbol} {case['radii'][norm]:g}"
                rows.append((title, radius, seed, *_summarise(results)))
    return markdown_table(head, rows)


def _summarise(results: ByAttack) -> Iterable[str]:
    others = _of_others(results)
    missed = set(list_missed(results))
    yield _share(results, PLAIN)
    if others:
        strongest = max(others, key=lambda name: len(others[name]["broken"]))
        yield f"{_share(results, strongest)} {strongest}"
    else:
        yield "–"
    yield _share(results, SUITE)
    yield str(len(missed))
    yield str(len(missed - set(results[THOROUGH]["broken"]))) if THOROUGH in results else "0" if not missed else "–"


def list_missed(results: ByAttack) -> list[int]:
    """The images that another attack broke and the suite did not; none if the suite has not run."""
    if SUITE not in results:
        return []
    broken = {row for result in _of_others(results).values() for row in result["broken"]}
    return sorted(broken - set(results[SUITE]["broken"]))


def _of_others(results: ByAttack) -> ByAttack:
    return {name: result for name, result in results.items() if name not in OUR_ATTACKS}


def _share(results: ByAttack, name: str) -> str:
    return str(Rate(len(results[name]["broken"]), len(results[name]["attacked"]))) if name in results else "–"


def attack_lines(results: ByAttack) -> list[str]:
    """One row for each attack of a case, the strongest attack first.

    Args:
        results: what each attack did.
    """
    suite = set(results[SUITE]["broken"]) if SUITE in results else set()
    head = "attack", "broken", "suite left", "outside budget", "gradients an image", "judged an image", "CPU seconds"
    rows = []
    for name, result in sorted(results.items(), key=lambda item: -len(item[1]["broken"])):
        count = len(result["attacked"])
        figures = [name, Rate(len(result["broken"]), count), len(set(result["broken"]) - suite), result["invalid"]]
        figures += [f"{result[key] / count:,.0f}" for key in ("gradients", "judged")]
        rows.append([*figures, f"{result['cpu_seconds']:,.0f}"])
    return markdown_table(head, rows)
