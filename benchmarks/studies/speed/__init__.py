"""Speed as the ratio of two ways to do the same, measured side by side. Each module makes one group of comparisons."""

from benchmarks.studies.speed._measure import (
    Comparison,
    Ratio,
    count_operators,
    measure_group,
    median_ratio,
    time_in_pairs,
)

__all__ = ["Comparison", "Ratio", "count_operators", "measure_group", "median_ratio", "time_in_pairs"]
