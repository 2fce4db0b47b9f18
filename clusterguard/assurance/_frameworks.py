"""What published frameworks ask for, line by line, with the name of the figure that answers it, or without any.

Names and numbers are those of NIST AI 100-2 E2025, MITRE ATLAS 2026.09, Regulation (EU) 2024/1689,
ISO/IEC TR 24029-1:2021 and ISO/IEC 24029-2:2023.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

NOT_MEASURED = "not measured"


class Figure(NamedTuple):
    """A figure in words, and the section of the page that holds it."""

    text: str
    section: str


class Line(NamedTuple):
    """A line of a framework.

    Attributes:
        reference: where the framework says it.
        about: what it is about, in our words.
        figure: name of the figure that answers it; empty if nothing does.
        note: what to know about the answer.
    """

    reference: str
    about: str
    figure: str = ""
    note: str = ""


NIST = (
    Line("system", "Predictive AI: an image classifier that may refuse to answer.", "system"),
    Line("stage of the attack", "Deployment. The guard is trained, calibrated and fixed.", "digests"),
    Line(
        "goal: integrity violation (NISTAML.02), by evasion (NISTAML.022)",
        "A changed image is accepted under a wrong label. Being refused is failure.",
        "attack success",
    ),
    Line(
        "goal: availability breakdown (NISTAML.01)",
        "Not in this model. An attacker can cause refusals; the service must bear them.",
        note="Outside the threat model.",
    ),
    Line("goal: privacy compromise (NISTAML.03)", "Not in this model.", note="Outside the threat model."),
    Line(
        "knowledge: white-box",
        "The attacker knows network, weights, thresholds, calibration and method, and takes gradients of them.",
        "attack success",
    ),
    Line(
        "knowledge: black-box (NISTAML.025)",
        "The attacker may only ask. The suite has stages that take no gradient.",
        "gradient-free attacks",
    ),
    Line(
        "capability: testing data control",
        "The attacker changes one image at a time, within a ball around it, cut to [0, 1].",
        "domain",
    ),
    Line("capability: query access", "As many steps and queries as the budget allows.", "budget"),
    Line("capability: training data control", "Not in this model.", note="Outside the threat model."),
    Line("capability: label limit", "Not in this model.", note="Outside the threat model."),
    Line("capability: model control", "Not in this model. Changed files are noticed.", "digests"),
    Line("capability: source code control", "Not in this model. Hashes tell which code ran.", "digests"),
)
ATLAS = (
    Line("AML.T0015 Evade AI Model", "A changed image is accepted under a wrong label.", "attack success"),
    Line("AML.T0043 Craft Adversarial Data", "All ways below together, for each image the best.", "attack success"),
    Line("AML.T0043.000 White-Box Optimization", "Attacks with gradients through the guard.", "gradient attacks"),
    Line("AML.T0043.001 Black-Box Optimization", "Attacks that take no gradient.", "gradient-free attacks"),
    Line("AML.T0043.002 Black-Box Transfer", "Attacks made on another model."),
    Line("AML.T0043.003 Manual Modification", "Changes by hand."),
    Line("AML.T0043.004 Insert Backdoor Trigger", "A trigger that training data have planted."),
    Line("AML.M0015 Predictive AI Adversarial Input Detection", "The guard itself.", "detection"),
    Line("AML.M0003 Predictive AI Model Hardening", "Training against attacks.", "training attack"),
    Line("AML.M0008 Validate AI Model", "Benign figures and attacks on test images.", "accuracy"),
    Line(
        "AML.M0014 Verify AI Artifacts", "Digests of weights and configuration, checked on loading.", "failing closed"
    ),
    Line("AML.M0023 AI Bill of Materials", "The file sbom.cdx.json beside this page.", "bill"),
    Line("AML.M0024 AI Telemetry Logging", "The alarm for refusals; logging is the service's task.", "monitor"),
    Line("AML.M0004 Limit AI Service Query Volume and Rate", "A task of the service."),
)
AI_ACT = (
    Line("15(1)", "Appropriate level of accuracy", "accuracy", "What is appropriate is the provider's judgement."),
    Line("15(1)", "Appropriate level of robustness", "attack success", "A lower bound: other attacks may find more."),
    Line(
        "15(1)", "Appropriate level of cybersecurity", "failing closed", "The guard alone, not the service around it."
    ),
    Line("15(1)", "Consistent performance throughout the lifecycle", "monitor", "A plan; nothing was watched yet."),
    Line("15(2)", "Benchmarks and methods of measuring", note="Addressed to the Commission."),
    Line(
        "15(3)",
        "Accuracy and its metrics are declared in the instructions of use",
        "accuracy",
        "Whether they are declared is not.",
    ),
    Line("15(4)", "Resilience against errors and faults within the system", "failing closed"),
    Line("15(4)", "Resilience against inconsistencies of the environment, such as noise, blur or weather"),
    Line("15(4)", "Redundancy, such as backup or fail-safe plans", "failing closed", "Refusing is the guard's part."),
    Line("15(4)", "Feedback loops of systems that go on learning", note="The guard does not learn in service."),
    Line("15(5)", "Attempts of third parties to alter use, outputs or performance", "attack success"),
    Line("15(5)", "Data poisoning"),
    Line("15(5)", "Model poisoning, also of pre-trained components", note="Digests tell changes, not their intent."),
    Line("15(5)", "Adversarial examples or model evasion: prevent", "attack success"),
    Line("15(5)", "Adversarial examples or model evasion: detect", "detection"),
    Line("15(5)", "Adversarial examples or model evasion: respond", "monitor"),
    Line("15(5)", "Confidentiality attacks"),
    Line("15(5)", "Model flaws"),
)
ISO_24029 = (
    Line("TR 24029-1, statistical methods", "Performance on test data, with uncertainty", "accuracy"),
    Line("TR 24029-1, statistical methods", "Performance on adversarial examples", "attack success"),
    Line("TR 24029-1, formal methods", "Proof for a set of inputs", "certificate"),
    Line("TR 24029-1, empirical methods", "Field trial"),
    Line("24029-2, 5.2 domain", "The inputs that the assessment is about", "domain"),
    Line("24029-2, 5.3 stability", "The decision does not turn wrong within the domain", "certificate"),
    Line("24029-2, 5.4 sensitivity", "How much outputs vary within the domain"),
    Line("24029-2, 5.5 relevance", "Which inputs decide"),
    Line(
        "24029-2, 5.6 reachability", "States that a system of several steps can reach", note="The guard has one step."
    ),
    Line("24029-2, 6.2.1.2 completeness", "The verifier is incomplete: no proof is no attack", "certificate"),
    Line("24029-2, 6.2.1.3 determinism", "The verifier answers the same each time", "certificate"),
    Line("24029-2, 6.2.1.5 arithmetic", "Rounding of the computer is part of the proof", "proof arithmetic"),
    Line("24029-2, 7 life cycle", "Robustness in operation", "monitor", "A plan; nothing was watched yet."),
)


def fill_in(lines: Sequence[Line], figures: Mapping[str, Figure]) -> list[dict[str, Any]]:
    """Lines with the figures that answer them, as plain values.

    Args:
        lines: lines of a framework.
        figures: figures by name. A line whose figure is not there says "not measured".
    """
    filled = []
    for reference, about, name, note in lines:
        figure = figures.get(name, Figure(NOT_MEASURED, ""))
        entry = {"reference": reference, "about": about, "figure": figure.text, "section": figure.section, "note": note}
        filled.append(entry)
    return filled
