"""Attacks on detectors; an attack is a callable from (detector, images, labels) to attacked images."""

from clusterguard.attacks._auto_pgd import APGD
from clusterguard.attacks._base import (
    Attack,
    BuiltInAttack,
    WrappingAttack,
    attack_checked_images,
    check_attack_input,
    check_radius,
    find_representation,
    has_representation,
    ramp,
    scale,
)
from clusterguard.attacks._boundary import Boundary
from clusterguard.attacks._carlini_wagner import CarliniWagner
from clusterguard.attacks._descent import Gradient, ObjectiveValues, Problem, Rule, backpropagate, descend
from clusterguard.attacks._interop import (
    DetectorAsClassifier,
    PeerAttack,
    as_classifier,
    as_rejecting_classifier,
    from_art,
    from_autoattack,
    from_foolbox,
    from_torchattacks,
)
from clusterguard.attacks._metering import Cost, Metered
from clusterguard.attacks._minimum_norm import FastMinimumNorm
from clusterguard.attacks._norm_base import Norm
from clusterguard.attacks._norms import L0, L1, L2, NORMS, LInf, dense_l1_direction, get_norm
from clusterguard.attacks._objectives import (
    OBJECTIVES,
    Objective,
    adaptive,
    cross_entropy,
    get_objective,
    logit,
    margin,
    suspicion,
)
from clusterguard.attacks._orthogonal import OrthogonalPGD
from clusterguard.attacks._paper import PaperProtocol, RandomTarget, at_step_sizes, draw_targets
from clusterguard.attacks._patch_attack import PatchAttack
from clusterguard.attacks._patch_norm import Patch
from clusterguard.attacks._pgd import (
    BIM,
    FGSM,
    MIM,
    NES,
    PGD,
    FixedSchedule,
    IteratedAttack,
    SteepestDescent,
    SteppedAttack,
)
from clusterguard.attacks._polish import Polish
from clusterguard.attacks._precision import Precision, check_precision, choose_precision, in_precision
from clusterguard.attacks._primal_dual import PDPGD
from clusterguard.attacks._random_search import RandomSearch, SparseRS, Square, make_random_search
from clusterguard.attacks._representation import RepelThenMinimise, RepresentationMatching
from clusterguard.attacks._sigma_zero import SigmaZero
from clusterguard.attacks._sparse_pgd import SparsePGD
from clusterguard.attacks._starts import (
    STARTS,
    AtPoints,
    Start,
    Towards,
    at_image,
    at_random,
    get_start,
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
    "OBJECTIVES",
    "PDPGD",
    "PGD",
    "STARTS",
    "AtPoints",
    "Attack",
    "Boundary",
    "BuiltInAttack",
    "CarliniWagner",
    "Cost",
    "DetectorAsClassifier",
    "FastMinimumNorm",
    "FixedSchedule",
    "Gradient",
    "IteratedAttack",
    "LInf",
    "Metered",
    "MixedAttack",
    "MultiTarget",
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
    "Rule",
    "SigmaZero",
    "SparsePGD",
    "SparseRS",
    "Square",
    "StageRecord",
    "Start",
    "SteepestDescent",
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
    "attack_checked_images",
    "backpropagate",
    "check_attack_input",
    "check_precision",
    "check_radius",
    "choose_precision",
    "cross_entropy",
    "dense_l1_direction",
    "descend",
    "draw_targets",
    "find_representation",
    "from_art",
    "from_autoattack",
    "from_foolbox",
    "from_torchattacks",
    "get_norm",
    "get_objective",
    "get_start",
    "has_representation",
    "in_precision",
    "logit",
    "make_random_search",
    "margin",
    "output_diversified",
    "ramp",
    "scale",
    "suspicion",
    "towards_batch",
]
