"""Importing adv-lib where visdom is not installed."""

import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def import_adv_lib() -> Any:
    """The attacks of adv-lib.

    adv-lib imports visdom, which draws plots on request. An empty module takes its place where it is not installed.
    It also compares versions in a way that is deprecated.
    """
    if "visdom" not in sys.modules and find_spec("visdom") is None:
        sys.modules["visdom"] = ModuleType("visdom")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return import_module("adv_lib.attacks")
