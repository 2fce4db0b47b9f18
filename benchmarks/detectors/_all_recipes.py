"""The recipes of all detectors of the comparison, by the names that experiments use."""

from typing import Any

from clusterguard.errors import ConfigurationError

from benchmarks.detectors._ccat import CCAT
from benchmarks.detectors._certified import CERTIFIED
from benchmarks.detectors._fs import FS
from benchmarks.detectors._lid import LID
from benchmarks.detectors._madry import MADRY
from benchmarks.detectors._maha import MAHA
from benchmarks.detectors._ours import L_BEN, OURS
from benchmarks.detectors._recipe import Recipe
from benchmarks.detectors._rectified_rejection import RECTIFIED_REJECTION
from benchmarks.detectors._resisting import RESISTING
from benchmarks.detectors._trades import TRADES
from benchmarks.detectors._vanilla import VANILLA

RECIPES: dict[str, Recipe] = {
    "ours": OURS,
    "l-ben": L_BEN,
    "vanilla": VANILLA,
    "resisting": RESISTING,
    "fs": FS,
    "lid": LID,
    "madry": MADRY,
    "trades": TRADES,
    "maha": MAHA,
    "ccat": CCAT,
    "rectified-rejection": RECTIFIED_REJECTION,
    "certified": CERTIFIED,
}


def make_recipe(name: str, options: dict[str, Any]) -> Recipe:
    """Make the recipe of a detector.

    Args:
        name: key of `RECIPES`.
        options: options that an experiment names. {} takes the recipe as it is.

    Raises:
        ConfigurationError: the name is unknown, or the recipe does not have the options.
    """
    if name not in RECIPES:
        raise ConfigurationError(f"expected a detector among {', '.join(RECIPES)}, got {name!r}")
    recipe = RECIPES[name]
    if not options:
        return recipe
    if recipe.with_options is None:
        raise ConfigurationError(f"{name} has no options, got {options}")
    try:
        return recipe.with_options(**options)
    except TypeError as error:
        raise ConfigurationError(f"{name}: {error}") from error
