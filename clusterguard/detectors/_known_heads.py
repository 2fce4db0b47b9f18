"""The heads of this library, which a saved guard is loaded with by name."""

from clusterguard.detectors._feature_gaussians import FeatureGaussians
from clusterguard.detectors._heads import GaussianClusters, Head
from clusterguard.detectors._templates import NearestTemplate

HEADS: dict[str, type[Head]] = {
    kind.__qualname__: kind for kind in (GaussianClusters, FeatureGaussians, NearestTemplate)
}
