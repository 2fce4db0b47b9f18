"""An evaluation as one self-contained HTML page."""

import base64
import html
import json
from pathlib import Path

from clusterguard._support import write_atomically
from clusterguard.attacks import StageRecord
from clusterguard.detection import Rate
from clusterguard.evaluation._plots import evaluation_figures
from clusterguard.evaluation._results import Evaluation, show_number

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:70rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:.7rem 0}td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:left}
.wide{overflow-x:auto}td.n{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}figure{margin:1rem 0}
figcaption{color:#555}.warning{background:#fff3cd;border-left:4px solid #e0a800;padding:.4rem .8rem;margin:.4rem 0}
.good{color:#2a7a2a}code{background:#f4f4f4;padding:0 .2rem}
"""


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
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        "<title>clusterguard: evaluation</title>",
        f"<style>{_STYLE}</style><h1>Evaluation of a detector</h1>",
        _headline(evaluation),
        "<h2>Attacks</h2>",
        _html_table(
            ["attack", "ASR", "95 % interval", "broken / attackable", "EROC", "forward", "gradients", "seconds"],
            [
                [
                    result.name,
                    *_rate_cells(result.success),
                    show_number(result.expected_roc_auc),
                    f"{result.cost.forward:,}",
                    f"{result.cost.backward:,}",
                    f"{result.seconds:.1f}",
                ]
                for result in evaluation.results
            ]
            + [[f"worst of {norm}, per image", *_rate_cells(rate)] for norm, rate in evaluation.worst_by_norm.items()]
            + [["worst case, any attack", *_rate_cells(evaluation.worst_case), show_number(evaluation.eroc)]]
            + [[name, *_rate_cells(rate)] for name, rate in evaluation.proved],
        ),
        "<p>ASR: the share of images accepted under a wrong label after the attack, among those labelled correctly and "
        "accepted before it. EROC: the ROC AUC of each label's suspicion, averaged over labels with the number of "
        "attacked images under each label as its weight.</p>",
        *(f"<p>{html.escape(text)}</p>" for text in evaluation.notes()),
        "<h2>Sanity</h2>",
        *_html_sanity(evaluation),
    ]
    for title, (picture, caption) in evaluation_figures(evaluation).items():
        data = base64.b64encode(picture).decode()
        parts.append(
            f"<h2>{html.escape(title)}</h2><figure><img alt='{html.escape(title)}' src='data:image/png;base64,{data}'>"
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    for result in evaluation.results:
        if result.stages:
            parts += [f"<h2>Stages of {html.escape(result.name)}</h2>", _html_stages(result.stages)]
    names = evaluation.class_names or map(str, range(len(evaluation.thresholds)))
    false_positives = [
        [name, *_rate_cells(rate)] for name, rate in zip(names, evaluation.false_positives_by_class, strict=True)
    ]
    parts += [
        "<h2>False positives by class</h2>",
        _html_table(["class", "rate", "95 % interval", "refused / correct"], false_positives),
        "<h2>Everything as JSON</h2><details><summary>show</summary><pre>",
        html.escape(json.dumps(evaluation.to_dict(), indent=1)),
        "</pre></details></html>",
    ]
    return write_atomically(path, lambda file: file.write_text("\n".join(parts), encoding="utf-8"))


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
    return _html_table([], rows)


def _html_sanity(evaluation: Evaluation) -> list[str]:
    if evaluation.sanity is None:
        return ["<p>Switched off.</p>"]
    warnings = [f"<div class=warning>{html.escape(text)}.</div>" for text in evaluation.sanity.warnings]
    probe = f"<p>{html.escape(evaluation.sanity_lines()[1])}</p>"
    return [*(warnings or ["<p class=good>Nothing suspicious.</p>"]), probe]


def _html_stages(stages: tuple[StageRecord, ...]) -> str:
    return _html_table(
        ["stage", "attacked", "broken", "forward", "gradients"],
        [[s.name, f"{s.attacked:,}", f"{s.broken:,}", f"{s.forward:,}", f"{s.backward:,}"] for s in stages],
    )


def _rate_cells(rate: Rate) -> list[str]:
    low, high = rate.interval
    return [show_number(rate.value), f"{low:.3f} – {high:.3f}", f"{rate.count} / {rate.total}"]


def _html_table(head: list[str], rows: list[list[str]]) -> str:
    cells = [
        "<tr>"
        + "".join(f"<td{' class=n' if index else ''}>{html.escape(cell)}</td>" for index, cell in enumerate(row))
        + "</tr>"
        for row in rows
    ]
    top = "<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in head) + "</tr>" if head else ""
    return f"<div class=wide><table>{top}{''.join(cells)}</table></div>"
