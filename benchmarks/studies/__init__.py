"""Measurements that are not in the paper: peers, coverage, speed and pooling. Each is a command of its own."""

__all__: list[str] = []
