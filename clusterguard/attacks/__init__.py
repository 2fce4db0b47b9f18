"""Attacks on detectors; an attack is a callable from (detector, images, labels) to attacked images."""

from clusterguard.attacks._auto_pgd import APGD
from clusterguard.attacks._base import Attack, BuiltInAttack, WrappingAttack, ramp, shorten_steps
from clusterguard.attacks._boundary import Boundary
from clusterguard.attacks._carlini_wagner import CarliniWagner
from clusterguard.attacks._descent import ObjectiveValues, Problem
from clusterguard.attacks._encoders import find_representation, has_representation
from clusterguard.attacks._interop import (
    DetectorAsClassifier,
    PeerAttack,
    as_classifier,
    as_rejecting_classifier,
    from_adv_lib,
    from_art,
    from_autoattack,
    from_foolbox,
    from_torchattacks,
)
from clusterguard.attacks._metering import Cost, Metered
from clusterguard.attacks._minimum_norm import FastMinimumNorm
from clusterguard.attacks._norm_base import Norm
from clusterguard.attacks._norms import L0, L1, L2, NORMS, LInf, get_norm
from clusterguard.attacks._objectives import Objective, adaptive, cross_entropy, get_objective, logit, margin, suspicion
from clusterguard.attacks._orthogonal import OrthogonalPGD
from clusterguard.attacks._paper import PaperProtocol, RandomTarget, at_step_sizes, draw_targets
from clusterguard.attacks._patch_attack import PatchAttack
from clusterguard.attacks._patch_norm import Patch
from clusterguard.attacks._pgd import BIM, FGSM, MIM, NES, PGD, FixedSchedule, IteratedAttack, NoisyFGSM, SteppedAttack
from clusterguard.attacks._polish import Polish
from clusterguard.attacks._primal_dual import PDPGD
from clusterguard.attacks._random_search import RandomSearch, SparseRS, Square
from clusterguard.attacks._representation import RepelThenMinimise, RepresentationMatching
from clusterguard.attacks._search_precision import Precision, in_precision
from clusterguard.attacks._sigma_zero import SigmaZero
from clusterguard.attacks._sparse_pgd import SparsePGD
from clusterguard.attacks._starts import (
    AtPoints,
    Start,
    Towards,
    at_image,
    at_random,
    output_diversified,
    towards_batch,
)
from clusterguard.attacks._suite import EFFORTS, SuiteResult, WorstCaseSuite
from clusterguard.attacks._suite_state import StageRecord
from clusterguard.attacks._wrapping import MixedAttack, MultiTarget, Transfer

__all__ = [
    "APGD",
    "BIM",
    "EFFORTS",
    "FGSM",
    "L0",
    "L1",
    "L2",
    "MIM",
    "NES",
    "NORMS",
    "PDPGD",
    "PGD",
    "AtPoints",
    "Attack",
    "Boundary",
    "BuiltInAttack",
    "CarliniWagner",
    "Cost",
    "DetectorAsClassifier",
    "FastMinimumNorm",
    "FixedSchedule",
    "IteratedAttack",
    "LInf",
    "Metered",
    "MixedAttack",
    "MultiTarget",
    "NoisyFGSM",
    "Norm",
    "Objective",
    "ObjectiveValues",
    "OrthogonalPGD",
    "PaperProtocol",
    "Patch",
    "PatchAttack",
    "PeerAttack",
    "Polish",
    "Precision",
    "Problem",
    "RandomSearch",
    "RandomTarget",
    "RepelThenMinimise",
    "RepresentationMatching",
    "SigmaZero",
    "SparsePGD",
    "SparseRS",
    "Square",
    "StageRecord",
    "Start",
    "SteppedAttack",
    "SuiteResult",
    "Towards",
    "Transfer",
    "WorstCaseSuite",
    "WrappingAttack",
    "adaptive",
    "as_classifier",
    "as_rejecting_classifier",
    "at_image",
    "at_random",
    "at_step_sizes",
    "cross_entropy",
    "draw_targets",
    "find_representation",
    "from_adv_lib",
    "from_art",
    "from_autoattack",
    "from_foolbox",
    "from_torchattacks",
    "get_norm",
    "get_objective",
    "has_representation",
    "in_precision",
    "logit",
    "margin",
    "output_diversified",
    "ramp",
    "shorten_steps",
    "suspicion",
    "towards_batch",
]
