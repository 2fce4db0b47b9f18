"""The head against `torch.cdist` to all centres, at the sizes of ImageNet and of ImageNet-21k, m = K."""

from functools import partial

import torch
from clusterguard import GaussianClusters

from benchmarks.speed.measure import Row, measure


def rows() -> list[Row]:
    """The comparisons."""
    found = []
    for classes, batch, repeats in ((1000, 64, 21), (21_841, 8, 7)):
        clusters = GaussianClusters(classes)
        representations = torch.randn(batch, classes, generator=torch.Generator().manual_seed(0))
        found.append(
            Row(
                f"head, K = m = {classes:,}, batch {batch}, against torch.cdist",
                partial(clusters.distances, representations),
                partial(torch.cdist, representations, clusters.center_scale * torch.eye(classes)),
                target=10,
                check=partial(torch.testing.assert_close, rtol=1e-3, atol=1e-2),
                repeats=repeats,
            )
        )
    return found


if __name__ == "__main__":
    measure("head", rows())
