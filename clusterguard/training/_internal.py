"""What the other packages of clusterguard use of `training`, and users of it do not need."""

from clusterguard.training._reporting import duration

__all__ = [
    "duration",
]
