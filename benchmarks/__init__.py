"""The experiments of the paper. `python -m benchmarks` runs them."""

__all__: list[str] = []
