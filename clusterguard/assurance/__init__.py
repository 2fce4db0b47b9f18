"""The evidence about a guard that a reviewer, an auditor or a customer files."""

from clusterguard.assurance._dossier import Dossier, assemble_dossier
from clusterguard.assurance._failing_closed import FailureCheck, check_failing_closed

__all__ = [
    "Dossier",
    "FailureCheck",
    "assemble_dossier",
    "check_failing_closed",
]
