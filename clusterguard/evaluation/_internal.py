"""What the other packages of clusterguard use of `evaluation`, and users of it do not need."""

from clusterguard.evaluation._html import attacks_table, rate_cells, sanity_parts, stage_table
from clusterguard.evaluation._results import to_json_value

__all__ = [
    "attacks_table",
    "rate_cells",
    "sanity_parts",
    "stage_table",
    "to_json_value",
]
