"""Attacks on any detector: callables from (detector, images, labels) to attacked images."""

from clusterguard.attacks._auto_pgd import APGD
from clusterguard.attacks._base import (
    Attack,
    BuiltInAttack,
    WrappingAttack,
    check_attack_input,
    check_radius,
    ramp,
    scale,
)
from clusterguard.attacks._boundary import Boundary
from clusterguard.attacks._carlini_wagner import CarliniWagner
from clusterguard.attacks._fixed_schedule import BIM, FGSM, FixedSchedule
from clusterguard.attacks._gradients import backpropagate
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
from clusterguard.attacks._iterative import MIM, NES, PGD, IteratedAttack, SteepestDescent, SteppedAttack
from clusterguard.attacks._loop import Gradient, ObjectiveValues, Problem, Rule, descend
from clusterguard.attacks._metering import Cost, Metered
from clusterguard.attacks._minimum_norm import FastMinimumNorm
from clusterguard.attacks._mixed import MixedAttack
from clusterguard.attacks._multi_target import MultiTarget
from clusterguard.attacks._norms import L0, L1, L2, LInf, Norm, dense_l1_direction, get_norm
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
from clusterguard.attacks._paper import PaperProtocol, RandomTarget, at_step_sizes, random_targets
from clusterguard.attacks._random_search import RandomSearch, SparseRS, Square
from clusterguard.attacks._representation import (
    RepelThenMinimise,
    RepresentationMatching,
    find_representation,
    has_representation,
)
from clusterguard.attacks._starts import (
    STARTS,
    Start,
    Towards,
    at_image,
    at_random,
    get_start,
    output_diversified,
    towards_batch,
)
from clusterguard.attacks._suite import EFFORTS, WorstCaseSuite
from clusterguard.attacks._suite_state import StageRecord, SuiteResult
from clusterguard.attacks._transfer import Transfer

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
    "OBJECTIVES",
    "PGD",
    "STARTS",
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
    "PeerAttack",
    "Problem",
    "RandomSearch",
    "RandomTarget",
    "RepelThenMinimise",
    "RepresentationMatching",
    "Rule",
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
    "backpropagate",
    "check_attack_input",
    "check_radius",
    "cross_entropy",
    "dense_l1_direction",
    "descend",
    "find_representation",
    "from_art",
    "from_autoattack",
    "from_foolbox",
    "from_torchattacks",
    "get_norm",
    "get_objective",
    "get_start",
    "has_representation",
    "logit",
    "margin",
    "output_diversified",
    "ramp",
    "random_targets",
    "scale",
    "suspicion",
    "towards_batch",
]
