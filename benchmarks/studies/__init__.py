"""Measurements beside the paper: peers, coverage, speed, pooling."""
