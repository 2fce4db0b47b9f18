"""What the other packages of clusterguard use of `detectors`, and users of it do not need."""

from clusterguard.detectors._base import guarded_evidence
from clusterguard.detectors._guard_files import CARD, CONFIG, check_overwritable, read_config, read_guard
from clusterguard.detectors._model_card import describe_thresholds

__all__ = [
    "CARD",
    "CONFIG",
    "check_overwritable",
    "describe_thresholds",
    "guarded_evidence",
    "read_config",
    "read_guard",
]
