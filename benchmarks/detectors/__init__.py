"""The detectors of the comparison: recipes that build, train and finish them, and the networks that they share."""

from benchmarks.detectors._all_recipes import RECIPES, make_recipe
from benchmarks.detectors._compiling import CompileChoice, CompileMode, quickest_mode
from benchmarks.detectors._networks import MODELS, Features, build_network
from benchmarks.detectors._one_cycle import OneCycle
from benchmarks.detectors._recipe import Recipe, Schedule, add_classifier

__all__ = [
    "MODELS",
    "RECIPES",
    "CompileChoice",
    "CompileMode",
    "Features",
    "OneCycle",
    "Recipe",
    "Schedule",
    "add_classifier",
    "build_network",
    "make_recipe",
    "quickest_mode",
]
