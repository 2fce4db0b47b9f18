"""Detectors that are modules: the guard, its heads and backbones, and other detectors around it or beside it."""

from clusterguard._support import CompiledCall
from clusterguard.detectors._alignment import Alignment, align
from clusterguard.detectors._backbones import find_normalization, find_num_classes, make_encoder
from clusterguard.detectors._base import DetectorModule, Normalize, WithThresholds
from clusterguard.detectors._confidence import ConfidenceDetector
from clusterguard.detectors._consistency import ConsistentDetector
from clusterguard.detectors._feature_fit import FeatureFit, fit_feature_gaussians
from clusterguard.detectors._feature_gaussians import FeatureGaussians
from clusterguard.detectors._guard import ClusterGuard
from clusterguard.detectors._head_bounds import Bounds, RepresentationBox
from clusterguard.detectors._heads import GaussianClusters, Head
from clusterguard.detectors._local_costs import LocalCosts, Windows
from clusterguard.detectors._local_guard import make_local_guard
from clusterguard.detectors._model_card import CardDetails
from clusterguard.detectors._template_guard import make_template_guard
from clusterguard.detectors._templates import NearestTemplate
from clusterguard.detectors._unanimity import UnanimousDetector

__all__ = [
    "Alignment",
    "Bounds",
    "CardDetails",
    "ClusterGuard",
    "CompiledCall",
    "ConfidenceDetector",
    "ConsistentDetector",
    "DetectorModule",
    "FeatureFit",
    "FeatureGaussians",
    "GaussianClusters",
    "Head",
    "LocalCosts",
    "NearestTemplate",
    "Normalize",
    "RepresentationBox",
    "UnanimousDetector",
    "Windows",
    "WithThresholds",
    "align",
    "find_normalization",
    "find_num_classes",
    "fit_feature_gaussians",
    "make_encoder",
    "make_local_guard",
    "make_template_guard",
]
