"""Tells whether a module computes what its class says."""

from torch import nn
from torch.nn.modules import module as torch_module


def changed_in_place(module: nn.Module) -> list[str]:
    """The names of a module's methods that this one object has of its own, such as another `forward`."""
    return [name for name in vars(module) if callable(getattr(type(module), name, None))]


def is_changed(module: nn.Module) -> bool:
    """Whether a module may compute something else than its class says: by hooks, or by a method of its own."""
    of_all = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    return any((module._forward_hooks, module._forward_pre_hooks, *of_all, changed_in_place(module)))
