"""Attacks on any detector: callables from (detector, images, labels) to attacked images."""

from clusterguard.attacks.auto_pgd import APGD
from clusterguard.attacks.base import Attack
from clusterguard.attacks.boundary import Boundary
from clusterguard.attacks.carlini_wagner import CarliniWagner
from clusterguard.attacks.fixed_schedule import BIM, FGSM
from clusterguard.attacks.iterative import MIM, NES, PGD
from clusterguard.attacks.minimum_norm import FastMinimumNorm
from clusterguard.attacks.mixed import MixedAttack
from clusterguard.attacks.multi_target import MultiTarget
from clusterguard.attacks.orthogonal import OrthogonalPGD
from clusterguard.attacks.paper import PaperProtocol, RandomTarget
from clusterguard.attacks.random_search import SparseRS, Square
from clusterguard.attacks.representation import RepelThenMinimise, RepresentationMatching
from clusterguard.attacks.starts import Towards
from clusterguard.attacks.suite import WorstCaseSuite
from clusterguard.attacks.transfer import Transfer

__all__ = [
    "APGD",
    "BIM",
    "FGSM",
    "MIM",
    "NES",
    "PGD",
    "Attack",
    "Boundary",
    "CarliniWagner",
    "FastMinimumNorm",
    "MixedAttack",
    "MultiTarget",
    "OrthogonalPGD",
    "PaperProtocol",
    "RandomTarget",
    "RepelThenMinimise",
    "RepresentationMatching",
    "SparseRS",
    "Square",
    "Towards",
    "Transfer",
    "WorstCaseSuite",
]
