"""What the other packages of clusterguard use of `certification`, and users of it do not need."""

from clusterguard.certification._boxes import Box
from clusterguard.certification._interval_activations import followed_activations
from clusterguard.certification._pixel_balls import linear_layer_of
from clusterguard.certification._trial import check_bounds
from clusterguard.certification._window_balls import window_parts

__all__ = [
    "Box",
    "check_bounds",
    "followed_activations",
    "linear_layer_of",
    "window_parts",
]
