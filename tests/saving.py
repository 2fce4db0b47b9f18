"""Guards to save, and what of them has to come back."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from clusterguard import ClusterGuard
from clusterguard.detectors import find_num_classes
from clusterguard.errors import PersistenceError
from safetensors.torch import load, save
from torch import nn


class OwnNetwork(nn.Sequential):
    """A class that nothing rebuilds from its settings alone."""


def network() -> nn.Module:
    return OwnNetwork(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.ReLU())


def make_guard(backbone: nn.Module | None = None, num_classes: int | None = None) -> ClusterGuard:
    """Of the backbone's own number of classes, if it has one, else of three."""
    module = backbone or network()
    guard = ClusterGuard(module, num_classes or find_num_classes(module) or 3)
    guard.thresholds = torch.linspace(9, 11, guard.num_classes)
    return guard.eval()


def bits(guard: ClusterGuard) -> dict[str, tuple[torch.dtype, bytes]]:
    return {
        name: (tensor.dtype, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in guard.state_dict().items()
    }


def assert_equal(guard: ClusterGuard, again: ClusterGuard, images: torch.Tensor) -> None:
    assert bits(again) == bits(guard)
    assert again.calibration == guard.calibration
    assert not any(module.training for module in again.modules())
    for ours, theirs in zip(guard.detect(images, check=False), again.detect(images, check=False), strict=True):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def read_config(folder: Path) -> dict[str, Any]:
    """The config without its digest, so that changes of it are taken for another save."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    del config["content_sha256"]
    return config


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("content_sha256", None)  # an older version's config has none
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def put_weights(folder: Path, **tensors: torch.Tensor) -> None:
    """Weights in which some differ, and that the config vouches for."""
    content = save(load((folder / "model.safetensors").read_bytes()) | tensors)
    (folder / "model.safetensors").write_bytes(content)
    edit_config(folder, weights_sha256=hashlib.sha256(content).hexdigest())


def assert_refused(folder: Path, message: str, backbone: nn.Module | None = None) -> None:
    """The folder is an error of ours, in one line that tells which folder and what is wrong."""
    with pytest.raises(PersistenceError, match=message) as caught:
        ClusterGuard.from_pretrained(folder, backbone=backbone)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
