"""An evaluation as one self-contained HTML page."""

import json
from pathlib import Path

from clusterguard._support import escape, html_page, html_table, write_atomically
from clusterguard.attacks import StageRecord
from clusterguard.detection import Rate
from clusterguard.evaluation._plots import evaluation_figures
from clusterguard.evaluation._results import STAGE_HEAD, Evaluation, show_number, stage_figures


def to_html(evaluation: Evaluation, path: str | Path) -> Path:
    """Write an evaluation as one self-contained HTML page with tables, curves, the worst-broken images and the JSON.

    Args:
        evaluation: result of `evaluate`.
        path: path of the file; its folder is created.

    Returns:
        The path.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    parts = [
        "<h1>Evaluation of a detector</h1>",
        _headline(evaluation),
        "<h2>Attacks</h2>",
        attacks_table(evaluation, seconds=True),
        *(f"<p>{escape(text)}</p>" for text in evaluation.notes()),
        "<h2>Sanity</h2>",
        *sanity_parts(evaluation),
    ]
    for title, (picture, caption) in evaluation_figures(evaluation).items():
        parts.append(f"<h2>{escape(title)}</h2><figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>")
    for result in evaluation.results:
        if result.stages:
            parts += [f"<h2>Stages of {escape(result.name)}</h2>", stage_table(result.stages)]
    names = evaluation.class_names or map(str, range(len(evaluation.thresholds)))
    false_positives = [
        [name, *rate_cells(rate)] for name, rate in zip(names, evaluation.false_positives_by_class, strict=True)
    ]
    parts += [
        "<h2>False positives by class</h2>",
        html_table(["class", "rate", "95 % interval", "refused / correct"], false_positives),
        "<h2>Everything as JSON</h2><details><summary>show</summary><pre>",
        escape(json.dumps(evaluation.to_dict(), indent=1)),
        "</pre></details>",
    ]
    page = html_page("clusterguard: evaluation", parts)
    return write_atomically(path, lambda file: file.write_text(page, encoding="utf-8"))


def _headline(evaluation: Evaluation) -> str:
    rows = [
        ["images", str(evaluation.images)],
        ["accuracy", str(evaluation.accuracy)],
        ["accuracy after rejection", str(evaluation.accuracy_after_rejection)],
        ["false positives", str(evaluation.false_positives)],
        ["worst case per image (ASR)", str(evaluation.worst_case)],
        ["largest ASR of one attack", show_number(evaluation.largest_mean_asr)],
        ["seed", "none" if evaluation.seed is None else str(evaluation.seed)],
    ]
    return html_table([], rows)


def attacks_table(evaluation: Evaluation, *, seconds: bool) -> str:
    """The table of attacks as HTML, with what its columns mean.

    Args:
        evaluation: result of `evaluate`.
        seconds: whether to show how long each attack took.
    """
    head = ["attack", "ASR", "95 % interval", "broken / attackable", "EROC", "forward", "gradients"]
    rows = [
        [
            result.name,
            *rate_cells(result.success),
            show_number(result.expected_roc_auc),
            f"{result.cost.forward:,}",
            f"{result.cost.backward:,}",
            *([f"{result.seconds:.1f}"] if seconds else []),
        ]
        for result in evaluation.results
    ]
    rows += [[f"worst of {norm}, per image", *rate_cells(rate)] for norm, rate in evaluation.worst_by_norm.items()]
    rows += [["worst case, any attack", *rate_cells(evaluation.worst_case), show_number(evaluation.eroc)]]
    rows += [[name, *rate_cells(rate)] for name, rate in evaluation.proved]
    return html_table([*head, *(["seconds"] if seconds else [])], rows) + (
        "<p>ASR: the share of images accepted under a wrong label after the attack, among those labelled correctly and "
        "accepted before it. EROC: the ROC AUC of each label's suspicion, averaged over labels with the number of "
        "attacked images under each label as its weight.</p>"
    )


def sanity_parts(evaluation: Evaluation) -> list[str]:
    """The warnings and measurements of the sanity probe as pieces of HTML."""
    if evaluation.sanity is None:
        return ["<p>Switched off.</p>"]
    warnings = [f"<div class=warning>{escape(text)}.</div>" for text in evaluation.sanity.warnings]
    probe = f"<p>{escape(evaluation.sanity_lines()[1])}</p>"
    return [*(warnings or ["<p class=good>Nothing suspicious.</p>"]), probe]


def stage_table(stages: tuple[StageRecord, ...]) -> str:
    """The stages of a suite as a table in HTML."""
    return html_table([*STAGE_HEAD], [[stage.name, *stage_figures(stage)] for stage in stages])


def rate_cells(rate: Rate) -> list[str]:
    """A rate as three cells of a table: its value, its 95 % interval, and its counts."""
    low, high = rate.interval
    return [show_number(rate.value), f"{low:.3f} – {high:.3f}", f"{rate.count} / {rate.total}"]
