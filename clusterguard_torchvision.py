"""Lets `import torchvision` (and so `import timm`) work where its compiled operators cannot load.

A torchvision wheel built for CUDA cannot load its extension beside a CPU-only torch. Its import then stops at
"operator torchvision::nms does not exist", because it registers shape functions for two detection operators
that the extension would have declared. Classification uses neither, so declaring their schemas is enough.

This is no part of the package, because `import torch` runs `on_torch_import` too, as an entry point of the group
`torch.backends`: so timm may be imported before clusterguard, and importing torch alone stays as fast as it was.
"""

import importlib.util
import sys
from contextlib import suppress
from pathlib import Path

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None  # declarations live as long as this object


def declare_missing_operators() -> None:
    """Declare torchvision's `nms` and `qnms`, and only if its own import would fail for want of them.

    Does not import torchvision, and does nothing where it has been imported already, is absent, or can load its
    operators itself.
    """
    global _library
    if _library is not None or "torchvision._meta_registrations" in sys.modules:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return
    extensions = [
        path
        for location in spec.submodule_search_locations
        for pattern in ("_C*.so", "_C*.pyd", "_C*.dylib")
        for path in Path(location).glob(pattern)
    ]
    try:
        if not extensions:
            raise OSError("torchvision has no compiled operators")
        torch.ops.load_library(str(extensions[0]))  # as torchvision itself will; the second load is free
    except OSError:
        _library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            _library.define(operator + _SCHEMA)


def on_torch_import() -> None:
    """Declare the operators beside a torch without CUDA; whatever goes wrong here must not fail `import torch`."""
    if torch.version.cuda is None:
        with suppress(Exception):
            declare_missing_operators()
