"""Training of detectors: the training loop, adversarial and certified training, and recipes."""

from clusterguard.training import _recipes as recipes
from clusterguard.training._adversarial import AdversarialClusterTrainer
from clusterguard.training._certified import CertifiedTrainer, initialise
from clusterguard.training._checkpoints import EpochRecord
from clusterguard.training._losses import (
    ClusterLoss,
    Opposite,
    Origin,
    Outside,
    RelabelledBatch,
    Target,
    negative_log_likelihood,
)
from clusterguard.training._options import TrainingOptions
from clusterguard.training._overfitting import OverfittingCheck
from clusterguard.training._relabelling import Graded, Original, Relabel, Separate
from clusterguard.training._sampling import EachImage, balanced_sampler, crop_and_flip
from clusterguard.training._step import TrainingStep
from clusterguard.training._templates import TemplateTrainer
from clusterguard.training._trainer import DetectorTrainer
from clusterguard.training._validation import Validation

__all__ = [
    "AdversarialClusterTrainer",
    "CertifiedTrainer",
    "ClusterLoss",
    "DetectorTrainer",
    "EachImage",
    "EpochRecord",
    "Graded",
    "Opposite",
    "Origin",
    "Original",
    "Outside",
    "OverfittingCheck",
    "Relabel",
    "RelabelledBatch",
    "Separate",
    "Target",
    "TemplateTrainer",
    "TrainingOptions",
    "TrainingStep",
    "Validation",
    "balanced_sampler",
    "crop_and_flip",
    "initialise",
    "negative_log_likelihood",
    "recipes",
]
