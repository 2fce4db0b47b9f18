"""Attacks on any detector: callables from (detector, images, labels) to attacked images."""

from clusterguard.attacks.base import Attack
from clusterguard.attacks.fixed_schedule import BIM, FGSM
from clusterguard.attacks.iterative import MIM, NES, PGD
from clusterguard.attacks.multi_target import MultiTarget
from clusterguard.attacks.starts import Towards

__all__ = ["BIM", "FGSM", "MIM", "NES", "PGD", "Attack", "MultiTarget", "Towards"]
