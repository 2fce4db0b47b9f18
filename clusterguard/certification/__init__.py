"""Proofs that no image within a radius is accepted under a wrong label."""

from clusterguard.certification._certificates import (
    Bounds,
    Certificate,
    bound,
    certified_radius,
    certified_success_rate,
    certify,
    check_bounds,
)
from clusterguard.certification._intervals import Interval

__all__ = [
    "Bounds",
    "Certificate",
    "Interval",
    "bound",
    "certified_radius",
    "certified_success_rate",
    "certify",
    "check_bounds",
]
