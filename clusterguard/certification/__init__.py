"""Proofs that no image within a radius is accepted under a wrong label."""

from clusterguard.certification._bounds import Certificate, bound
from clusterguard.certification._certificates import certified_radius, certified_success_rate, certify
from clusterguard.certification._intervals import Interval
from clusterguard.detectors import Bounds

__all__ = [
    "Bounds",
    "Certificate",
    "Interval",
    "bound",
    "certified_radius",
    "certified_success_rate",
    "certify",
]
