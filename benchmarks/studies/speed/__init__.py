"""How fast clusterguard is compared with other ways to do the same. Both are timed in turns in one process."""

from benchmarks.studies.speed._measure import (
    Comparison,
    Ratio,
    count_operators,
    measure_group,
    median_ratio,
    time_in_pairs,
)

__all__ = ["Comparison", "Ratio", "count_operators", "measure_group", "median_ratio", "time_in_pairs"]
