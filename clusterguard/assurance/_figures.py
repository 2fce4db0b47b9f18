"""The figures that lines of the frameworks point to, by name, in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from clusterguard.assurance._facts import describe_budgets
from clusterguard.assurance._frameworks import Figure
from clusterguard.attacks import StageRecord
from clusterguard.evaluation import Evaluation


def name_figures(content: Mapping[str, Any], evaluation: Evaluation, packages: int) -> dict[str, Figure]:
    """The figures by name. What was not measured is not there.

    Args:
        content: evidence so far, with rates as `Rate`.
        evaluation: evaluation that it rests on.
        packages: number of packages in the bill of materials.
    """
    benign, system = content["benign"], content["system"]
    figures = {
        "accuracy": Figure(str(benign["accuracy"]), "benign"),
        "accuracy after rejection": Figure(str(benign["accuracy_after_rejection"]), "benign"),
        "false positives": Figure(str(benign["false_positives"]), "benign"),
        "system": Figure(f"{system['backbone']}, {len(system['classes'])} classes", "system"),
        "attack success": Figure(_success(evaluation), "attacks"),
        "detection": Figure(f"EROC {evaluation.eroc:.3f}", "attacks"),
        "domain": Figure(f"{evaluation.images} test images; {', '.join(_balls(evaluation))}", "attacks"),
        "digests": Figure("SHA-256 of weights, thresholds, data and code", "provenance"),
        "bill": Figure(f"{packages} packages, CycloneDX 1.6", "bill"),
    }
    budget = content["provenance"]["settings"].get("budget")
    if budget in describe_budgets():
        effort = describe_budgets()[budget]
        targets = "all" if effort["targets"] is None else effort["targets"]
        text = f"{budget}: steps {effort['steps']}, random starts {effort['restarts']}, targets {targets}, "
        figures["budget"] = Figure(text + f"queries {effort['queries']:,}", "attacks")
    if system["training_attack"]:
        figures["training attack"] = Figure(system["training_attack"], "system")
    stages = [stage for result in evaluation.results for stage in result.stages]
    figures |= _by_gradient("gradient attacks", [stage for stage in stages if stage.backward])
    figures |= _by_gradient("gradient-free attacks", [stage for stage in stages if not stage.backward])
    if evaluation.sanity is not None:
        count = len(evaluation.sanity.warnings)
        figures["sanity"] = Figure(f"warnings of the sanity probe: {count}", "attacks")
    if evaluation.certified is not None:
        proved, radius = evaluation.certified.success, f"{evaluation.certified.norm} {evaluation.certified.eps:g}"
        figures["certificate"] = Figure(f"no attack at {radius} breaks more than {proved}", "certificate")
        figures["proof arithmetic"] = Figure("IEEE floating point, rounding included", "certificate")
    checks = content["failure"]["checks"]
    if checks:
        held = sum(check["holds"] for check in checks)
        figures["failing closed"] = Figure(f"{held} of {len(checks)} checks hold", "failure")
    plan = content["monitoring"]
    if plan:
        alarm = f"a false alarm in {plan['run_length']:,.0f} images or more on average"
        figures["monitor"] = Figure(f"{alarm}, limit {plan['limit']:.4f}", "monitoring")
    return figures


def _balls(evaluation: Evaluation) -> list[str]:
    """The norms and radii of attacks that state them, without repetition."""
    return [*dict.fromkeys(f"{one.norm} {one.eps:g}" for one in evaluation.results if one.norm and one.eps is not None)]


def _success(evaluation: Evaluation) -> str:
    return "; ".join(f"{one.name}: {one.success}" for one in evaluation.results)


def _by_gradient(name: str, stages: Sequence[StageRecord]) -> dict[str, Figure]:
    """How much some stages of suites broke of what the stages before them had left; nothing without such stages."""
    if not any(stage.attacked for stage in stages):
        return {}
    broken = sum(stage.broken for stage in stages)
    return {name: Figure(f"broke {broken} images that stages before had left; stages: {len(stages)}", "attacks")}
