"""The rule that turns evidence into verdicts, thresholds for it, and rates of verdicts."""

from clusterguard.detection._arithmetic import Arithmetic, full_precision
from clusterguard.detection._calibration import Calibration, Calibrator, fit_thresholds
from clusterguard.detection._decision import Detection, Detector, Evidence, class_margins, decide, success_margin
from clusterguard.detection._judging import judge
from clusterguard.detection._loaders import Loader, Pairs, Unpack, unpack_batch
from clusterguard.detection._metrics import (
    Rate,
    Verdicts,
    accuracy,
    accuracy_after_rejection,
    attack_success_rate,
    expected_roc_auc,
    false_positive_rate,
    is_broken,
    is_eligible,
    roc_auc,
    wilson_interval,
)
from clusterguard.detection._thresholds import allowed_refusals, fit_shared_threshold, minimum_examples

__all__ = [
    "Arithmetic",
    "Calibration",
    "Calibrator",
    "Detection",
    "Detector",
    "Evidence",
    "Loader",
    "Pairs",
    "Rate",
    "Unpack",
    "Verdicts",
    "accuracy",
    "accuracy_after_rejection",
    "allowed_refusals",
    "attack_success_rate",
    "class_margins",
    "decide",
    "expected_roc_auc",
    "false_positive_rate",
    "fit_shared_threshold",
    "fit_thresholds",
    "full_precision",
    "is_broken",
    "is_eligible",
    "judge",
    "minimum_examples",
    "roc_auc",
    "success_margin",
    "unpack_batch",
    "wilson_interval",
]
