"""Training of detectors: the loop, the objectives of the paper and of certified training, recipes."""

from clusterguard.training import _recipes as recipes
from clusterguard.training._adversarial import AdversarialClusterTrainer, Relabel
from clusterguard.training._certified import CertifiedTrainer, initialise
from clusterguard.training._checkpoints import EpochRecord
from clusterguard.training._engine import TrainingStep
from clusterguard.training._losses import AdversarialTarget, cluster_loss
from clusterguard.training._options import TrainingOptions
from clusterguard.training._trainer import DetectorTrainer

__all__ = [
    "AdversarialClusterTrainer",
    "AdversarialTarget",
    "CertifiedTrainer",
    "DetectorTrainer",
    "EpochRecord",
    "Relabel",
    "TrainingOptions",
    "TrainingStep",
    "cluster_loss",
    "initialise",
    "recipes",
]
