"""Everything that a reviewer files about a guard: a page, the same as JSON, and a bill of materials."""

import hashlib
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

from clusterguard._support import check_place, write_atomically
from clusterguard.assurance._bill import bill_of_materials, needed_packages
from clusterguard.assurance._facts import (
    describe_attacks,
    describe_benign,
    describe_certificate,
    describe_monitoring,
    describe_system,
    describe_threshold_fit,
    digest_of_code,
)
from clusterguard.assurance._failing_closed import FailureCheck
from clusterguard.assurance._figures import name_figures
from clusterguard.assurance._frameworks import AI_ACT, ATLAS, ISO_24029, NIST, fill_in
from clusterguard.assurance._page import draw_page
from clusterguard.detection import Verdicts
from clusterguard.detectors import ClusterGuard
from clusterguard.detectors._internal import CARD, CONFIG, check_evaluated, check_saved, digest_of_config, read_config
from clusterguard.errors import ConfigurationError
from clusterguard.evaluation import Evaluation
from clusterguard.evaluation._internal import to_json_value

PAGE, CONTENT, BILL, SUMS = "evidence.html", "evidence.json", "sbom.cdx.json", "SHA256SUMS"
DISCLAIMER = (
    "This document reports measurements. It promises no compliance with any law or standard, and it is no certificate "
    "of conformity. Whether a figure is good enough for a purpose is for those to judge who answer for the system."
)


@final
@dataclass(frozen=True)
class Dossier:
    """The evidence about one guard. `assemble_dossier` makes it.

    Attributes:
        content: everything as plain values for JSON.
        page: the same as one page in HTML that needs no other file.
        bill: bill of materials, CycloneDX 1.6.
    """

    content: Mapping[str, Any]
    page: str
    bill: Mapping[str, Any]

    def write(self, folder: str | Path) -> list[Path]:
        """Write `evidence.html`, `evidence.json`, `sbom.cdx.json` and `SHA256SUMS` into a folder.

        Each file is written completely or not at all. `SHA256SUMS` is removed first and written last, so a folder that
        has it holds files that belong together; ``sha256sum --check SHA256SUMS`` verifies them.

        Args:
            folder: folder, which is created. Older files of these names are replaced.

        Returns:
            The paths of the files.

        Raises:
            PersistenceError: a file cannot be written.
            ConfigurationError: the folder cannot be written to.
        """
        texts = {PAGE: self.page, CONTENT: _as_json(self.content), BILL: _as_json(self.bill)}
        folder = Path(folder)
        check_place(folder / SUMS)
        (folder / SUMS).unlink(missing_ok=True)
        texts[SUMS] = "".join(f"{_sha256(text)}  {name}\n" for name, text in texts.items())
        return [_write(folder / name, text) for name, text in texts.items()]


def assemble_dossier(
    guard: ClusterGuard,
    folder: str | Path,
    evaluation: Evaluation,
    benign: Verdicts,
    *,
    checks: Sequence[FailureCheck] = (),
    data: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    purpose: str | None = None,
    run_length: float = 1_000_000,
) -> Dossier:
    """Assemble the evidence about a guard from results that were measured before. Nothing is measured here.

    The same arguments and the same installed packages give the same bytes: there is no time, no name of a machine and
    no path in it.

    Args:
        guard: calibrated guard, as it was evaluated.
        folder: folder that the guard was saved in.
        evaluation: result of `evaluate`, perhaps with a `CertifiedBound`.
        benign: verdicts on all benign test images, as `judge` returns them.
        checks: what `check_failing_closed` found; without them the page says that this was not measured.
        data: description of the images with their digests, in types that JSON has.
        settings: options that the figures depend on, in types that JSON has.
        purpose: what the guard is used for and by whom, in the words of those who answer for it.
        run_length: mean number of images until a false alarm of the monitor.

    Returns:
        The evidence.

    Raises:
        ConfigurationError: the evaluation or the folder is of other thresholds or weights, `run_length` is out of its
            range, or JSON cannot represent `data` or `settings`.
        PersistenceError: the folder holds no guard.

    Example:
        >>> import tempfile, torch
        >>> from clusterguard import FGSM, evaluate
        >>> from clusterguard.detection import judge
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 1, 2)).eval()
        >>> guard.thresholds = torch.tensor([30.0, 30.0])
        >>> images = torch.rand(4, 1, 1, 2)
        >>> batches = [(images, guard.detect(images).labels)]
        >>> measured = evaluate(guard, FGSM(eps=0.1), batches, sanity_images=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     guard.save_pretrained(folder)
        ...     dossier = assemble_dossier(guard, folder, measured, judge(guard, batches))
        >>> dossier.content["benign"]["accuracy"]["value"]
        1.0
    """
    check_evaluated(guard, evaluation)
    check_saved(guard, Path(folder))
    config = read_config(Path(folder) / CONFIG)
    record = guard.current_record()
    extras = ["transformers"] if config["backbone"]["source"] == "transformers" else []
    packages = needed_packages("clusterguard", extras)
    names = guard.class_names or tuple(map(str, range(guard.num_classes)))
    content: dict[str, Any] = {
        "format": "clusterguard evidence",
        "format_version": 1,
        "disclaimer": DISCLAIMER,
        "system": describe_system(config, _licence(Path(folder)), names, purpose),
        "benign": describe_benign(benign, names),
        "attacks": describe_attacks(evaluation),
        "certificate": describe_certificate(guard, evaluation, settings or {}),
        "thresholds": describe_threshold_fit(guard, record, benign, names),
        "failure": {"checks": [check._asdict() for check in checks]},
        "monitoring": describe_monitoring(record, evaluation, benign, run_length),
        "provenance": {
            "weights_sha256": config["weights_sha256"],
            "config_sha256": digest_of_config(config),
            "thresholds_sha256": _sha256(str(list(evaluation.thresholds))),
            "code_sha256": digest_of_code(),
            "data": dict(data or {}),
            "settings": dict(settings or {}),
            "saved_with": config["versions"],
            "measured_with": {"python": platform.python_version(), "clusterguard": version("clusterguard")}
            | {name: version(name) for name in ("torch", "timm", "torchvision")},
            "processor": platform.machine(),
        },
    }
    figures = name_figures(content, evaluation, len(packages))
    content["figures"] = {name: figure._asdict() for name, figure in figures.items()}
    frameworks = {"threat_model": NIST, "atlas": ATLAS, "ai_act": AI_ACT, "iso_24029": ISO_24029}
    content |= {name: fill_in(lines, figures) for name, lines in frameworks.items()}
    try:
        content = to_json_value(json.loads(json.dumps(to_json_value(content), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"expected data and settings in types that JSON has, got others: {error}") from error
    bill = bill_of_materials(_component(content), packages)
    return Dossier(content, draw_page(content, bill, evaluation, _as_json(content)), bill)


def _component(content: Mapping[str, Any]) -> dict[str, Any]:
    """The guard as a component of its bill of materials, with a short model card."""
    system, provenance, benign = content["system"], content["provenance"], content["benign"]
    rates = {"accuracy": benign["accuracy"], "false positives": benign["false_positives"]}
    rates |= {f"attack success, {one['name']}": one["success"] for one in content["attacks"]["results"]}
    licences = {"licenses": [{"license": {"name": system["licence"]}}]} if system["licence"] else {}
    return {
        "type": "machine-learning-model",
        "bom-ref": f"guard@{provenance['weights_sha256'][:16]}",
        "name": f"guard of {system['backbone']}",
        "version": provenance["weights_sha256"][:16],
        "description": system["use"],
        "hashes": [{"alg": "SHA-256", "content": provenance["weights_sha256"]}],
        **licences,
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "supervised"},
                "task": "image classification with refusal of adversarial examples",
                "modelArchitecture": system["backbone"],
            },
            "quantitativeAnalysis": {
                "performanceMetrics": [
                    {
                        "type": name,
                        "value": str(rate["value"]),
                        "confidenceInterval": dict(
                            zip(("lowerBound", "upperBound"), map(str, rate["interval"]), strict=True)
                        ),
                    }
                    for name, rate in rates.items()
                ]
            },
            "considerations": {"useCases": [system["use"]], "technicalLimitations": system["limits"]},
        },
    }


def _licence(folder: Path) -> str | None:
    """The licence in the header of a guard's card; None if it states none."""
    card = folder / CARD
    header = card.read_text(encoding="utf-8", errors="replace").split("\n---")[0] if card.is_file() else ""
    stated = re.search(r"^license: *(\S+)$", header, re.MULTILINE)
    return stated[1] if stated else None


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write(path: Path, text: str) -> Path:
    return write_atomically(path, lambda file: file.write_bytes(text.encode()))
