"""Makes `import torchvision`, and so `import timm`, work where its compiled operators cannot be loaded.

A torchvision wheel built for CUDA cannot load its extension beside a CPU-only torch. Its import then stops at
"operator torchvision::nms does not exist", because it registers shape functions for two detection operators
that the extension would have declared. Classification uses neither, so declaring their schemas is enough.

`on_torch_import` is an entry point of the group `torch.backends`, so `import torch` runs it. This allows timm to be
imported before clusterguard. It waits for an import of torchvision, so that a program may still declare the operators
itself. The module lies outside the package, so that importing torch does not import clusterguard
and stays as fast as before.
"""

import importlib.util
import sys
from contextlib import suppress
from pathlib import Path

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None  # the declarations exist as long as this object


def declare_missing_operators() -> None:
    """Declare torchvision's `nms` and `qnms` if its import would fail without them.

    This does not import torchvision. It does nothing if torchvision has been imported already, is not installed, or can
    load its operators itself.
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
        torch.ops.load_library(str(extensions[0]))  # torchvision will load it again, which costs nothing
    except OSError:
        # A fragment, because another program's workaround may declare the namespace itself, before or after.
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            with suppress(RuntimeError):  # it is declared already
                _library.define(operator + _SCHEMA)


class _BeforeTorchvision:
    """Declares the operators when torchvision is about to be imported; it finds no module itself."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Look at the name of a module that is being imported."""
        if name == "torchvision":
            sys.meta_path.remove(self)
            with suppress(Exception):
                declare_missing_operators()


def on_torch_import() -> None:
    """Prepare for an import of torchvision if torch has no CUDA; programs without torchvision notice nothing."""
    if torch.version.cuda is not None or any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path):
        return
    waiting = _BeforeTorchvision()
    sys.meta_path.insert(0, waiting)
    if "torchvision" in sys.modules:  # it is being imported, and imports torch
        waiting.find_spec("torchvision")
