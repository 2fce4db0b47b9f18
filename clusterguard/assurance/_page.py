"""The evidence about a guard as one page in HTML that needs no other file."""

from collections.abc import Mapping, Sequence
from typing import Any

from clusterguard._support import Markup, escape, html_page, html_table
from clusterguard.assurance._bill import licences_by_package
from clusterguard.assurance._frameworks import NOT_MEASURED
from clusterguard.detection import Rate
from clusterguard.evaluation import Evaluation
from clusterguard.evaluation._internal import attacks_table, rate_cells, sanity_parts, stage_table

_SECTIONS = {
    "system": "What the system does, and for whom",
    "threat_model": "Threat model",
    "atlas": "MITRE ATLAS",
    "benign": "Benign images",
    "attacks": "Attacks",
    "certificate": "Certificate",
    "thresholds": "Thresholds",
    "failure": "When something cannot be judged",
    "monitoring": "Monitoring plan",
    "ai_act": "EU AI Act, article 15",
    "iso_24029": "ISO/IEC 24029",
    "provenance": "Provenance: hashes, versions, options",
    "bill": "Packages and licences",
}
_SOURCES = {
    "threat_model": "In the terms of NIST AI 100-2 E2025, Adversarial Machine Learning: A Taxonomy and Terminology of "
    "Attacks and Mitigations.",
    "atlas": "Techniques and mitigations of MITRE ATLAS, by the names of its release 2026.09.",
    "ai_act": "Regulation (EU) 2024/1689, article 15, by paragraph, in our words. The article is about high-risk "
    "systems. Whether this one is one, and which version of the law is in force, this page does not say.",
    "iso_24029": "ISO/IEC TR 24029-1:2021 (overview) and ISO/IEC 24029-2:2023 (formal methods), in our words.",
}
_RATE = ["rate", "95 % interval", "counts"]
_SUMMARY = {
    "accuracy": "Accuracy on benign images",
    "false positives": "Benign images refused although labelled correctly",
    "attack success": "Attacked images accepted under a wrong label (ASR)",
    "certificate": "Proved upper bound on that",
    "failing closed": "Fails closed",
    "monitor": "Alarm in service",
    "sanity": "Signs that the attacks are weak",
}


def draw_page(content: Mapping[str, Any], bill: Mapping[str, Any], evaluation: Evaluation, as_json: str) -> str:
    """The page.

    Args:
        content: evidence as plain values.
        bill: bill of materials.
        evaluation: evaluation that the evidence rests on, whose tables are those of its own report.
        as_json: the evidence as text in JSON, which the page holds too.
    """
    draw = {
        "system": _system(content["system"]),
        "benign": _benign(content["benign"]),
        "attacks": _attacks(content, evaluation),
        "certificate": _certificate(content["certificate"]),
        "thresholds": _thresholds(content["thresholds"]),
        "failure": _failure(content["failure"]["checks"]),
        "monitoring": _monitoring(content["monitoring"]),
        "provenance": _provenance(content["provenance"]),
        "bill": [html_table(["package", "version", "licence"], licences_by_package(bill))],
    }
    draw |= {name: [f"<p>{escape(text)}</p>", _lines(content[name])] for name, text in _SOURCES.items()}
    links = "".join(f"<li><a href='#{name}'>{escape(title)}</a></li>" for name, title in _SECTIONS.items())
    parts = [
        "<h1>Evidence about a guard against adversarial examples</h1>",
        f"<div class=warning>{escape(content['disclaimer'])}</div>",
        _summary(content),
        f"<nav aria-label='Sections'><ol>{links}</ol></nav>",
    ]
    for name, title in _SECTIONS.items():
        parts += [f"<section id={name}><h2>{escape(title)}</h2>", *draw[name], "</section>"]
    parts += [
        "<section id=json><h2>Everything as JSON</h2><p>The same as the file <code>evidence.json</code>.</p>",
        f"<details><summary>show</summary><pre>{escape(as_json)}</pre></details></section>",
    ]
    return html_page("Evidence about a guard against adversarial examples", parts)


def _summary(content: Mapping[str, Any]) -> str:
    figures = content["figures"]
    rows = [[title, _linked(figures[name]) if name in figures else _missing()] for name, title in _SUMMARY.items()]
    failed = [check["given"] for check in content["failure"]["checks"] if not check["holds"]]
    doubts = "".join(f"<div class=warning>It does not fail closed: {escape(given)}.</div>" for given in failed)
    return html_table(["question", "figure"], rows) + doubts


def _lines(lines: Sequence[Mapping[str, str]]) -> str:
    rows = [
        [line["reference"], line["about"], _linked(line) if line["section"] else _missing(), line["note"]]
        for line in lines
    ]
    head = ["line", "about", "figure", "note"]
    return html_table(head, rows) if any(row[-1] for row in rows) else html_table(head[:-1], [row[:-1] for row in rows])


def _linked(figure: Mapping[str, str]) -> Markup:
    text = escape(figure.get("figure") or figure["text"])
    return Markup(
        f"{text} <a href='#{escape(figure['section'])}'>→\N{NO-BREAK SPACE}{escape(_SECTIONS[figure['section']])}</a>"
    )


def _missing() -> Markup:
    return Markup(f"<span class=bad>{NOT_MEASURED}</span>")


def _system(system: Mapping[str, Any]) -> list[str]:
    purpose = system["purpose"] or "Not stated. Whoever files this page says what the guard is used for, and by whom."
    rows = [
        ["backbone", system["backbone"]],
        ["head", system["head"]],
        [f"{len(system['classes'])} classes", ", ".join(system["classes"])],
        ["data type", system["dtype"]],
        ["trained against", system["training_attack"] or "not recorded"],
        ["licence", system["licence"] or "none is stated"],
    ]
    return [
        f"<p><strong>Purpose, as its owner states it.</strong> {escape(purpose)}</p>",
        f"<p>{escape(system['use'])}</p>",
        html_table([], rows),
        "<h3>Limits</h3><ul>",
        *(f"<li>{escape(text)}</li>" for text in system["limits"]),
        "</ul>",
    ]


def _benign(benign: Mapping[str, Any]) -> list[str]:
    named = {
        "labelled correctly (accuracy)": "accuracy",
        "labelled correctly among those accepted": "accuracy_after_rejection",
        "refused among those labelled correctly (false positives)": "false_positives",
        "refused in all": "refused",
    }
    rows = [[title, *_rate(benign[name])] for title, name in named.items()]
    by_class = [[part["name"], _told(part["accuracy"]), _told(part["false_positives"])] for part in benign["by_class"]]
    return [
        f"<p>All {benign['images']:,} images of the test part. Intervals are Wilson's, at 95 %.</p>",
        html_table(["share of images", *_RATE], rows),
        "<h3>By class</h3>",
        html_table(["class", "accuracy", "false positives"], by_class),
    ]


def _attacks(content: Mapping[str, Any], evaluation: Evaluation) -> list[str]:
    budget = content["figures"].get("budget", {"text": "not recorded"})["text"]
    parts = [
        f"<p>{evaluation.images} images, drawn from the test part. Budget {escape(budget)}. A success rate is a lower "
        "bound: a stronger attack, or more steps, can break more.</p>",
        attacks_table(evaluation, seconds=False),
        "<h3>Has the search converged?</h3>",
    ]
    for result, told in zip(evaluation.results, content["attacks"]["results"], strict=True):
        parts.append(f"<p>{escape(result.name)}: {escape(_converged(told['convergence']))}</p>")
    parts += ["<h3>Do the attacks work?</h3>", *sanity_parts(evaluation)]
    for result in evaluation.results:
        if result.stages:
            parts += [
                f"<h3>Stages of {escape(result.name)}, each on the survivors of those before it</h3>",
                stage_table(result.stages),
            ]
    return parts


def _converged(told: Mapping[str, Any] | None) -> str:
    if told is None:
        return "not measured, because it is one attack and not a suite."
    text = (
        f"the last of {told['stages']} stages, {told['last_stage']}, broke {told['last_stage_broke']} of "
        f"{told['last_stage_attacked']} images"
    )
    if told["last_stage_broke"] == told["last_stage_attacked"]:
        return f"{text}. No image is left."
    if told["last_stage_broke"]:
        return f"{text}. It has not converged: a larger budget is likely to break more."
    last = told["last_stage_that_broke_any"]
    return f"{text}. {f'Stage {last} was the last that broke any' if last else 'No stage broke any'}. More work may."


def _certificate(certificate: Mapping[str, Any] | None) -> list[str]:
    if certificate is None:
        return [f"<p>{_missing()}. <code>clusterguard evidence --certify</code> proves an upper bound.</p>"]
    rows = [
        [f"images without a proof, {certificate['norm']} {certificate['eps']:g}", *_rate(certificate["success"])],
    ]
    return [
        "<p>No attack within the radius, known or not, breaks more of these images than this share. An image without a "
        "proof may still be secure: the method is incomplete.</p>",
        html_table(["share of images", *_RATE], rows),
        f"<p>Proved by {escape(certificate['method'] or 'a method that is not recorded')}, on the device "
        f"{escape(certificate['device'])}. Which arithmetic the proof holds for:</p><ul>",
        *(f"<li>{escape(text)}</li>" for text in certificate["arithmetic"]),
        "</ul>",
    ]


def _thresholds(thresholds: Mapping[str, Any]) -> list[str]:
    plausible = thresholds["plausible"]
    rates = {"in the mix of the calibration images": "same_mix", "in any mix of classes": "any_mix"}
    rows = [
        [f"plausible {name}, at {plausible['confidence']:.0%}", _fraction(plausible[key])]
        for name, key in rates.items()
    ]
    asked = [["asked for", _fraction(thresholds["asked"])]]
    by_class = [
        [
            part["name"],
            f"{part['threshold']:.4f}",
            _told(part["realised"]["calibration"]),
            _told(part["realised"]["test"]),
        ]
        for part in thresholds["by_class"]
    ]
    return [
        f"<p>{escape(thresholds['fit'])}</p>",
        f"<p><strong>Guarantee.</strong> {escape(thresholds['guarantee'])}</p>",
        html_table(["false-positive rate", "value"], asked + rows),
        "<h3>Realised rates by class</h3>",
        html_table(["class", "threshold", "on calibration images", "on test images"], by_class),
    ]


def _failure(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    if not checks:
        return [f"<p>{_missing()}.</p>"]
    rows = [
        [
            check["given"],
            check["expected"],
            Markup("<span class=good>holds</span>" if check["holds"] else "<span class=bad>DOES NOT HOLD</span>"),
            check["tests"],
        ]
        for check in checks
    ]
    return [
        "<p>A guard that fails closed does not accept what it cannot judge. Each line was tried on this guard. The "
        "last column names the tests in the sources of clusterguard that hold the same for guards in general.</p>",
        html_table(["given", "expected", "result", "tests of the library"], rows),
        "<p>What the service does with a refused image is not measured here.</p>",
    ]


def _monitoring(plan: Mapping[str, Any] | None) -> list[str]:
    if plan is None:
        return [f"<p>{_missing()}: a limit needs the record of a calibration.</p>"]
    rows = [
        [f"{delay['factor']:g} times the limit", f"{delay['rate']:.4f}", f"{delay['images']:,.0f}"]
        for delay in plan["delays"]
    ]
    tried = [["benign test images", plan["benign"]["report"]]]
    tried += [[f"after {one['name']}", one["report"]] for one in plan["attacked"]]
    return [
        f"<p>Watch the share of refused images with <code>FalsePositiveMonitor({plan['limit']:.6g}, "
        f"run_length={plan['run_length']:g})</code>, which may be read after every image. The limit is the largest "
        f"rate that chance makes plausible for this calibration, at {plan['confidence']:.0%}.</p>",
        f"<p><strong>False alarms.</strong> As long as the probability of a refusal is at most {plan['limit']:.4f}, a "
        f"false alarm comes once in {plan['run_length']:,.0f} images on average, or less often.</p>",
        "<p><strong>On an alarm.</strong> Look at what was refused. If it is benign, traffic has drifted: calibrate on "
        "recent images of known labels, and measure again. If it is not, somebody attacks. Do not calibrate on images "
        "that were refused until they are known to be benign.</p>",
        "<h3>About how long until a rise is noticed</h3>",
        html_table(["refusal rate", "rate", "images"], rows),
        "<h3>Tried on the images at hand</h3>",
        html_table(["images", "monitor says"], tried),
        "<p>Refusals raise the alarm. An attacker whose images are accepted raises none.</p>",
    ]


def _provenance(provenance: Mapping[str, Any]) -> list[str]:
    hashes = {"weights": "weights", "configuration": "config", "thresholds": "thresholds", "code": "code"}
    rows = [[f"SHA-256, {title}", provenance[f"{name}_sha256"]] for title, name in hashes.items()]
    rows += [[f"data, {name}", _plain(value)] for name, value in provenance["data"].items()]
    rows += [[f"option {name}", _plain(value)] for name, value in provenance["settings"].items()]
    rows += [["saved with", _plain(provenance["saved_with"])], ["measured with", _plain(provenance["measured_with"])]]
    return [
        "<p>The same guard, images, options and packages give the same bytes on the same kind of processor with as "
        "many threads. The page holds no time and no name of a machine.</p>",
        html_table(["what", "value"], [*rows, ["processor", provenance["processor"]]]),
    ]


def _plain(value: Any) -> str:
    """A value of JSON as text for people."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)


def _rate(value: Mapping[str, Any]) -> list[str]:
    return rate_cells(Rate(value["count"], value["total"]))


def _told(value: Mapping[str, Any]) -> str:
    return str(Rate(value["count"], value["total"])) if value["total"] else "no images"


def _fraction(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.4f}"
