"""What the other packages of clusterguard use of `certification`, and users of it do not need."""

from clusterguard.certification._trial import check_bounds

__all__ = [
    "check_bounds",
]
