"""What the other packages of clusterguard use of `deployment`, and users of it do not need."""

from clusterguard.deployment._images import FORMATS
from clusterguard.deployment._monitoring import FACTORS

__all__ = [
    "FACTORS",
    "FORMATS",
]
