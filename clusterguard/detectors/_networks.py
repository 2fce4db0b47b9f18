"""Runs a network on images, and says what to do about images that it does not take."""

from collections.abc import Callable

import torch
from clusterguard._support import is_traced
from clusterguard.errors import InputError
from torch import Tensor

CHANNELS_FIRST = "images.permute(0, 3, 1, 2) puts the channels first"


def run_network(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The output of a network for images (B, C, H, W).

    Raises:
        InputError: the network fails on images of this size, dtype or device.
    """
    if is_traced():
        return network(images)
    raised = (RuntimeError, NotImplementedError, AssertionError, ValueError, IndexError)
    try:
        return network(images)
    except raised as error:
        if type(error) not in raised:
            raise  # an error of memory or the device, for which the images are not to blame
        raise InputError(
            f"expected images that the network can take, got {images.dtype} of shape {tuple(images.shape)} on "
            f"{images.device}; {_advice_after(error, images)}it failed with: {error}"
        ) from error


def _advice_after(error: Exception, images: Tensor) -> str:
    """What to do about images on which a network failed, as far as it can be guessed."""
    if images.dtype == torch.float64:
        return "images.float() makes float32 of them; "
    usual = (1, 3, 4)  # numbers of channels
    if images.shape[3] in usual and images.shape[1] not in usual:
        return f"{CHANNELS_FIRST}; "
    if images.dtype == torch.float32 and any(name in str(error) for name in ("BFloat16", "Half")):
        return "guard.float() makes float32 of the guard, which must then be calibrated anew; "
    return ""
