"""Measurements that are not in the paper: peers, coverage, speed and pooling."""
