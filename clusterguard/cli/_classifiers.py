"""Makes the classifiers that a user names on the command line, and gives them weights from files."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from clusterguard._support import check_archive, open_ordinary
from clusterguard.detectors import make_encoder
from clusterguard.errors import ConfigurationError, PersistenceError, in_one_line
from safetensors.torch import load
from torch import nn


def make_backbone(name: str, *, num_classes: int, channels: int, pretrained: bool) -> nn.Module:
    """Make a classifier of timm or torchvision.

    Args:
        name: name such as "timm:resnet18" or "torchvision:resnet50".
        num_classes: number K of classes.
        channels: number of channels of the images; torchvision's models take 3.
        pretrained: whether to download weights instead of drawing random ones.

    Raises:
        ConfigurationError: the library does not know the name, or the model cannot have this number of channels.

    Example:
        >>> type(make_backbone("timm:test_resnet", num_classes=10, channels=1, pretrained=False)).__name__
        'ResNet'
    """
    library, _, model = name.partition(":")
    if library == "timm":
        import timm

        if not timm.is_model(model):
            raise ConfigurationError(f"expected a model of timm, got {model!r}; timm.list_models() lists them")
        with _explained_downloads(name) if pretrained else nullcontext():
            return timm.create_model(model, pretrained=pretrained, num_classes=num_classes, in_chans=channels)
    if library != "torchvision":
        raise ConfigurationError(f"expected a backbone such as timm:resnet18 or torchvision:resnet50, got {name!r}")
    from torchvision import models

    if model not in models.list_models(module=models):
        raise ConfigurationError(f"expected a classifier of torchvision, got {model!r}; torchvision.models lists them")
    if channels != 3:
        raise ConfigurationError(f"torchvision's models take 3 channels, got {channels}; pass --channels 3")
    if pretrained:  # the downloaded classifier has other classes
        with _explained_downloads(name):
            return make_encoder(models.get_model(model, weights="DEFAULT"), num_classes)
    return models.get_model(model, weights=None, num_classes=num_classes)  # type: ignore[no-any-return]


@contextmanager
def _explained_downloads(name: str) -> Iterator[None]:
    """Context in which a download that fails becomes an error that says what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # those of urllib and of the Hub are OSErrors
        raise ConfigurationError(
            f"the weights of {name} cannot be downloaded ({in_one_line(error)}); go online, or leave out --pretrained "
            "(`clusterguard guard` takes --weights FILE)"
        ) from error


_STATE_DICTS = ("state_dict", "model_state_dict", "model")  # names under which checkpoints hold a state dict
_WRAPPERS = ("module.", "_orig_mod.", "model.")  # what wrappers put before the names of all weights


def load_weights(network: nn.Module, file: Path) -> None:
    """Give a network the weights in a file. Nothing in the file is run, and checksums of `torch.save` are verified.

    Args:
        network: network whose weights are replaced.
        file: file of safetensors, or a state dict that `torch.save` wrote, perhaps under the name "state_dict",
            "model_state_dict" or "model" in a checkpoint, or with the prefix of a wrapper before all names, such as
            "module." of a parallel training, "_orig_mod." of a compiled model or "model." of a Lightning module.

    Raises:
        PersistenceError: the file is damaged, holds no state dict, or does not fit the network.
    """
    content = _read_weights(file)
    try:
        weights = next((content[key] for key in _STATE_DICTS if isinstance(content.get(key), dict)), content)
        while weights and (prefix := next((p for p in _WRAPPERS if all(name.startswith(p) for name in weights)), "")):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
        network.load_state_dict(weights)
    except Exception as error:  # torch has errors of many kinds
        raise PersistenceError(
            f"{file} does not fit {type(network).__name__} with as many classes as the images have; name the model "
            f"that was trained. What went wrong: {in_one_line(error)}"
        ) from error


def _read_weights(file: Path) -> Any:
    try:
        with open_ordinary(file) as stream:
            if file.suffix == ".safetensors":
                return load(stream.read())
            if zipfile.is_zipfile(stream):  # torch has written archives since version 1.6
                check_archive(stream, file)
            stream.seek(0)
            return torch.load(stream, "cpu", weights_only=True)
    except UnpicklingError as error:
        raise PersistenceError(
            f"{file} is damaged or holds other things than tensors, such as a whole model, which could run code; save "
            "model.state_dict() instead"
        ) from error
    except PersistenceError as error:
        raise PersistenceError(f"{error}; save the weights again") from error
    except Exception as error:  # safetensors and torch have errors of many kinds
        raise PersistenceError(
            f"{file} is damaged or holds no weights; save them again. What went wrong: {in_one_line(error)}"
        ) from error
