"""Distances to all class centres, compared with `torch.cdist`.

There are as many classes as in ImageNet and in ImageNet-21k, and representations have a dimension for each class.
"""

from functools import partial

import torch
from clusterguard.detectors import GaussianClusters

from benchmarks.studies.speed._measure import Comparison


def compare_heads(
    device: torch.device, sizes: tuple[tuple[int, int], ...] = ((1000, 64), (21_841, 8))
) -> list[Comparison]:
    """Compare the head with `torch.cdist`. `sizes` are pairs of a number of classes and a number of images."""
    comparisons = []
    for classes, batch in sizes:
        clusters = GaussianClusters(classes).to(device)
        representations = torch.randn(batch, classes, generator=torch.Generator().manual_seed(0)).to(device)
        comparisons.append(
            Comparison(
                f"head, K = m = {classes:,}, batch {batch}, against torch.cdist",
                partial(clusters.distances, representations),
                partial(torch.cdist, representations, clusters.center_scale * torch.eye(classes, device=device)),
                target=10,
                check=partial(torch.testing.assert_close, rtol=1e-3, atol=1e-2),
            )
        )
    return comparisons
