"""What the other packages of clusterguard use of `deployment`, and users of it do not need."""

from clusterguard.deployment._images import FORMATS

__all__ = [
    "FORMATS",
]
