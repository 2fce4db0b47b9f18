"""Put a guard in front of an image classifier. It detects adversarial examples, also those of an attacker who knows it.

Shapes in all docstrings: B images in a batch, C channels, H × W pixels in [0, 1]; m dimensions of the
representation; K classes. Rates are fractions, distances Euclidean, ε in pixel units of [0, 1].
"""

import importlib
from importlib.metadata import version

import clusterguard_command  # noqa: F401  # before all that takes time: it heeds signals to python -m clusterguard.cli

# isort: split
from clusterguard import attacks, errors, samples
from clusterguard.attacks import APGD, FGSM, PGD, WorstCaseSuite
from clusterguard.certification import certified_success_rate, certify
from clusterguard.deployment import FalsePositiveMonitor, export_onnx, load_onnx
from clusterguard.detection import Calibration, Calibrator, Detection, Detector, Evidence, decide, success_margin
from clusterguard.detectors import ClusterGuard, DetectorModule, align
from clusterguard.evaluation import Evaluation, evaluate
from clusterguard.training import AdversarialClusterTrainer, CertifiedTrainer, DetectorTrainer, TrainingOptions, recipes

__version__ = version("clusterguard")


def __getattr__(name: str) -> object:
    """Raise an error that says which package has a name that the top level had in version 0.1."""
    for package in (
        *("assurance", "attacks", "certification", "deployment"),
        *("detection", "detectors", "evaluation", "training"),
    ):
        if name in importlib.import_module(f"clusterguard.{package}").__all__:
            raise AttributeError(f"clusterguard has no {name}, but clusterguard.{package} has; import it from there")
    raise AttributeError(f"module 'clusterguard' has no attribute {name!r}")


__all__ = [
    "APGD",
    "FGSM",
    "PGD",
    "AdversarialClusterTrainer",
    "Calibration",
    "Calibrator",
    "CertifiedTrainer",
    "ClusterGuard",
    "Detection",
    "Detector",
    "DetectorModule",
    "DetectorTrainer",
    "Evaluation",
    "Evidence",
    "FalsePositiveMonitor",
    "TrainingOptions",
    "WorstCaseSuite",
    "align",
    "attacks",
    "certified_success_rate",
    "certify",
    "decide",
    "errors",
    "evaluate",
    "export_onnx",
    "load_onnx",
    "recipes",
    "samples",
    "success_margin",
]
