"""What the other packages of clusterguard use of `attacks`, and users of it do not need."""

from clusterguard.attacks._base import attack_checked_images, check_attack_input, check_radius, scale
from clusterguard.attacks._descent import backpropagate, descend
from clusterguard.attacks._fitting_search import make_random_search
from clusterguard.attacks._pgd import SteepestDescent
from clusterguard.attacks._search_precision import (
    check_precision,
    choose_precision,
    has_bfloat16,
    precisions_of,
    searches_in_bfloat16,
)

__all__ = [
    "SteepestDescent",
    "attack_checked_images",
    "backpropagate",
    "check_attack_input",
    "check_precision",
    "check_radius",
    "choose_precision",
    "descend",
    "has_bfloat16",
    "make_random_search",
    "precisions_of",
    "scale",
    "searches_in_bfloat16",
]
