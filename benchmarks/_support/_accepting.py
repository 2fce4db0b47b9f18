"""Guards that accept everything, for figures of the network alone."""

import copy

import torch
from clusterguard import ClusterGuard


def without_refusal(guard: ClusterGuard) -> ClusterGuard:
    """A guard with the same network that accepts every image."""
    accepting = copy.deepcopy(guard)
    accepting.thresholds = torch.full_like(guard.thresholds, torch.inf)
    return accepting
