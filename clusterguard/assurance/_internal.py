"""What the command line uses of `assurance`, and users of it do not need."""

from clusterguard.assurance._dossier import BILL, CONTENT, PAGE, SUMS
from clusterguard.assurance._facts import trained_radius

__all__ = [
    "BILL",
    "CONTENT",
    "PAGE",
    "SUMS",
    "trained_radius",
]
