"""An evaluation as JSON, as Markdown, and as one self-contained HTML page."""

import base64
import html
import json
import math
import platform
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from clusterguard.files import write_atomically
from clusterguard.metrics import Rate

if TYPE_CHECKING:
    from clusterguard.attacks.suite_state import StageRecord
    from clusterguard.results import Evaluation


def to_plain(evaluation: "Evaluation") -> dict[str, Any]:
    """Plain values for JSON: rates with count, total, value and 95 % interval, and the versions used."""
    from clusterguard import __version__

    versions = {"clusterguard": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return {**plain(evaluation), "versions": versions, "machine": platform.machine()}


def write_json(evaluation: "Evaluation", path: str | Path) -> Path:
    """Write `to_plain` to a file, whole or not at all."""
    text = json.dumps(to_plain(evaluation), indent=2, allow_nan=False) + "\n"
    return write_atomically(path, lambda file: file.write_text(text))


def to_markdown(evaluation: "Evaluation") -> str:
    """The figures as Markdown tables, n and 95 % intervals with them, sanity report last."""
    lines = [
        f"n = {evaluation.images}; accuracy {evaluation.accuracy}; after rejection "
        f"{evaluation.accuracy_after_rejection}; false positives {evaluation.false_positives}",
        "",
        "| attack | ASR [95 %] (n) | EROC | forward | gradients |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {result.name} | {result.success} | {_number(result.expected_roc_auc)} "
        f"| {result.cost.forward:,} | {result.cost.backward:,} |"
        for result in evaluation.results
    ]
    if len(evaluation.worst_by_norm) > 1:
        lines += [f"| worst of {norm}, per image | {rate} | | | |" for norm, rate in evaluation.worst_by_norm.items()]
    lines.append(f"| worst case per image | {evaluation.worst_case} | {_number(evaluation.eroc)} | | |")
    lines += [f"| {name} | {rate} | | | |" for name, rate in _proved(evaluation)]
    for result in evaluation.results:
        if result.stages:
            lines += ["", f"Stages of {result.name}, each on the survivors of those before it:", ""]
            lines += ["| stage | attacked | broken | forward | gradients |", "|---|---|---|---|---|"]
            lines += [
                f"| {stage.name} | {stage.attacked} | {stage.broken} | {stage.forward:,} | {stage.backward:,} |"
                for stage in result.stages
            ]
    return "\n".join(lines + _sanity_lines(evaluation))


def _sanity_lines(evaluation: "Evaluation") -> list[str]:
    sanity = evaluation.sanity
    if sanity is None:
        return []
    curve = ", ".join(f"{eps:g}: {rate.value:.2f}" for eps, rate in sanity.by_eps)
    return [
        "",
        f"Sanity, a probe of {sanity.images} images at {sanity.norm} {sanity.eps:g}: ASR by eps {curve}; "
        f"gradient-free {sanity.black_box.value:.2f} against white-box {sanity.white_box.value:.2f}; "
        f"{sanity.zero_gradients:.1%} of gradients 0, {sanity.non_finite_gradients:.1%} not finite; "
        f"{sanity.still_falling:.0%} of losses still falling; {sanity.lost_again:.0%} broken earlier, not at the end.",
        *(f"WARNING: {warning}." for warning in sanity.warnings),
    ]


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:70rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:.7rem 0}td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}figure{margin:1rem 0}
figcaption{color:#555}.warning{background:#fff3cd;border-left:4px solid #e0a800;padding:.4rem .8rem;margin:.4rem 0}
.good{color:#2a7a2a}code{background:#f4f4f4;padding:0 .2rem}
"""


def write_html(evaluation: "Evaluation", path: str | Path) -> Path:
    """One page that needs nothing else: tables, curves, histograms, the worst-broken images, the JSON itself.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    from clusterguard.plots import evaluation_figures

    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>clusterguard: evaluation</title>",
        f"<style>{_STYLE}</style><h1>Evaluation of a detector</h1>",
        _headline(evaluation),
        "<h2>Attacks</h2>",
        _html_table(
            ["attack", "ASR", "95 % interval", "broken / attackable", "EROC", "forward", "gradients", "seconds"],
            [
                [
                    result.name,
                    *_rate_cells(result.success),
                    _number(result.expected_roc_auc),
                    f"{result.cost.forward:,}",
                    f"{result.cost.backward:,}",
                    f"{result.seconds:.1f}",
                ]
                for result in evaluation.results
            ]
            + [[f"worst of {norm}, per image", *_rate_cells(rate)] for norm, rate in evaluation.worst_by_norm.items()]
            + [["worst case, any attack", *_rate_cells(evaluation.worst_case), _number(evaluation.eroc)]]
            + [[name, *_rate_cells(rate)] for name, rate in _proved(evaluation)],
        ),
        "<p>ASR: of the images labelled correctly and accepted before the attack, the share accepted under a wrong "
        "label after it. EROC: ROC AUC of each label's suspicion, weighted by how many attacked images got it.</p>",
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
    false_positives = [
        [str(index), *_rate_cells(rate)] for index, rate in enumerate(evaluation.false_positives_by_class)
    ]
    parts += [
        "<h2>False positives by class</h2>",
        _html_table(["class", "rate", "95 % interval", "refused / correct"], false_positives),
        "<h2>Everything as JSON</h2><details><summary>show</summary><pre>",
        html.escape(json.dumps(to_plain(evaluation), indent=1)),
        "</pre></details></html>",
    ]
    return write_atomically(path, lambda file: file.write_text("\n".join(parts), encoding="utf-8"))


def _proved(evaluation: "Evaluation") -> list[tuple[str, Rate]]:
    bound = evaluation.certified
    return [] if bound is None else [(f"proved upper bound, linf {bound.eps:g}", bound.success)]


def _headline(evaluation: "Evaluation") -> str:
    rows = [
        ["images", str(evaluation.images)],
        ["accuracy", str(evaluation.accuracy)],
        ["accuracy after rejection", str(evaluation.accuracy_after_rejection)],
        ["false positives", str(evaluation.false_positives)],
        ["worst case per image (ASR)", str(evaluation.worst_case)],
        ["largest ASR of one attack", _number(evaluation.largest_mean_asr)],
        ["seed", "none" if evaluation.seed is None else str(evaluation.seed)],
    ]
    return _html_table([], rows)


def _html_sanity(evaluation: "Evaluation") -> list[str]:
    if evaluation.sanity is None:
        return ["<p>Switched off.</p>"]
    warnings = [f"<div class=warning>{html.escape(text)}.</div>" for text in evaluation.sanity.warnings]
    probe = f"<p>{html.escape(_sanity_lines(evaluation)[1])}</p>"
    return [*(warnings or ["<p class=good>Nothing suspicious.</p>"]), probe]


def _html_stages(stages: "tuple[StageRecord, ...]") -> str:
    return _html_table(
        ["stage", "attacked", "broken", "forward", "gradients"],
        [[s.name, f"{s.attacked:,}", f"{s.broken:,}", f"{s.forward:,}", f"{s.backward:,}"] for s in stages],
    )


def _rate_cells(rate: Rate) -> list[str]:
    low, high = rate.interval
    return [_number(rate.value), f"{low:.3f} – {high:.3f}", f"{rate.count} / {rate.total}"]


def _html_table(head: list[str], rows: list[list[str]]) -> str:
    cells = [
        "<tr>"
        + "".join(f"<td{' class=n' if index else ''}>{html.escape(cell)}</td>" for index, cell in enumerate(row))
        + "</tr>"
        for row in rows
    ]
    top = "<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in head) + "</tr>" if head else ""
    return f"<table>{top}{''.join(cells)}</table>"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def plain(value: Any) -> Any:
    """Only what JSON has: rates spelled out, and null where there is no number."""
    if isinstance(value, Rate):
        return plain({"count": value.count, "total": value.total, "value": value.value, "interval": value.interval})
    if is_dataclass(value):
        shown = (own for own in fields(value) if own.metadata.get("json", True))
        return {own.name: plain(getattr(value, own.name)) for own in shown}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
