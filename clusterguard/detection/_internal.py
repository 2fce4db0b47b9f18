"""What the other packages of clusterguard use of `detection`, and users of it do not need."""

from clusterguard.detection._arithmetic import without_autocast
from clusterguard.detection._class_names import learn_class_names, list_classes, name_class
from clusterguard.detection._decision import check_goal, is_finite
from clusterguard.detection._judging import check_evidence
from clusterguard.detection._loaders import (
    check_loader,
    check_passes,
    have_common_images,
    is_one_pass_iterator,
    number_of_batches,
    set_epoch,
)
from clusterguard.detection._metrics import guessing_advice

__all__ = [
    "check_evidence",
    "check_goal",
    "check_loader",
    "check_passes",
    "guessing_advice",
    "have_common_images",
    "is_finite",
    "is_one_pass_iterator",
    "learn_class_names",
    "list_classes",
    "name_class",
    "number_of_batches",
    "set_epoch",
    "without_autocast",
]
