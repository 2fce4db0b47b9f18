"""What the other packages of clusterguard use of `detectors`, and users of it do not need."""

from clusterguard.detectors._base import guarded_evidence
from clusterguard.detectors._folders import check_saved, drop_infinite_thresholds
from clusterguard.detectors._guard_files import (
    CARD,
    CONFIG,
    WEIGHTS,
    check_overwritable,
    digest_of_config,
    read_card,
    read_config,
    read_guard,
)
from clusterguard.detectors._model_card import INTENDED_USE, LIMITS, describe_image_shape, describe_thresholds
from clusterguard.detectors._records import check_evaluated
from clusterguard.detectors._template_guard import project_templates

__all__ = [
    "CARD",
    "CONFIG",
    "INTENDED_USE",
    "LIMITS",
    "WEIGHTS",
    "check_evaluated",
    "check_overwritable",
    "check_saved",
    "describe_image_shape",
    "describe_thresholds",
    "digest_of_config",
    "drop_infinite_thresholds",
    "guarded_evidence",
    "project_templates",
    "read_card",
    "read_config",
    "read_guard",
]
