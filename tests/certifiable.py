"""A small guard of which much can be proved, and points to try its proofs on."""

import torch
from clusterguard import ClusterGuard
from torch import nn


def points_of(box, count=200):
    """Vertices and inner points."""
    shares = torch.rand(count, *box.lower.shape[1:], dtype=torch.float64)
    shares[: count // 2] = shares[: count // 2].round()
    return torch.lerp(box.lower, box.upper, shares)


def guard_of(seed=0, block=1, dtype=torch.float64):
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3 * block))
    guard = ClusterGuard(body, 3, representation_dim=3 * block, center_scale=1.0, example=torch.rand(1, 1, 2, 2))
    guard.thresholds = torch.tensor([0.4, 0.6, 0.8])
    return guard.to(dtype).eval()
