"""What the other packages of clusterguard use of `evaluation`, and users of it do not need."""

from clusterguard.evaluation._results import to_json_value

__all__ = [
    "to_json_value",
]
