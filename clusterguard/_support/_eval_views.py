"""Views of modules in eval mode, for reading a module that stays in train mode."""

from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import suppress
from types import FunctionType, MethodType
from typing import Any, TypeVar

from clusterguard._support._copying import copy_module, shorten
from clusterguard._support._mode_flags import overrides_mode_methods, to_eval_mode
from clusterguard._support._tracing import call_untraced
from clusterguard.errors import ConfigurationError
from torch import nn

Viewed = TypeVar("Viewed", bound=nn.Module)

_DICTS = (dict, OrderedDict)


def view_in_eval_mode(module: Viewed) -> Viewed:
    """Copy a module into eval mode. The copy shares parameters with the module, which does not change.

    Buffers are copied, because a thread that trains the module changes batch statistics in every forward pass. A module
    that overrides `train` or `eval` may merge weights there. So its part of the copy has its own parameters, too.

    Args:
        module: module in any mode.

    Raises:
        ConfigurationError: an attribute cannot be copied, or the copy would still use a module in train mode.

    Example:
        >>> layer = nn.Sequential(nn.Linear(3, 2), nn.Dropout())
        >>> view = view_in_eval_mode(layer)
        >>> view.training, layer.training, view[0].weight is layer[0].weight
        (False, True, True)
    """
    return call_untraced(_view, module)  # deepcopy cannot be compiled


def _view(module: Viewed) -> Viewed:
    modules = dict.fromkeys(module.modules())
    held = {id(part) for part in modules}
    for function, name in _functions_of(modules):
        if _uses(function, held):
            raise _not_copied(module, f"a {name} has a function that holds on to a module")
    switching = {part for root in modules if overrides_mode_methods(root) for part in root.modules()}
    own = {id(weight) for part in switching for weight in part.parameters(recurse=False)}
    memo: dict[int, Any] = {id(weight): weight for weight in module.parameters() if id(weight) not in own}
    for part in modules:  # for speed: a module has ten dicts of hooks, which are nearly always empty
        memo |= {id(value): type(value)() for value in vars(part).values() if type(value) in _DICTS and not value}
    try:
        view = copy_module(module, memo)
    except Exception as error:  # an attribute that cannot be copied may raise anything
        raise _not_copied(module, f"copying it raised {shorten(error)}") from error
    for part in view.modules():
        if part in modules and part.training:
            raise _not_copied(module, f"a {type(part).__name__} is shared by copies")
    to_eval_mode(view)
    return view


def _functions_of(modules: Collection[nn.Module]) -> Iterator[tuple[FunctionType, str]]:
    """The functions that copies of modules share, each with the name of the module's class.

    They are methods of classes, attributes, and hooks around `forward`.
    """
    for part in modules:
        for value in (*vars(part).values(), *part._forward_hooks.values(), *part._forward_pre_hooks.values()):
            if isinstance(value, FunctionType):
                yield value, type(part).__name__
    for cls in {cls for part in modules for cls in type(part).__mro__}:
        for value in vars(cls).values():
            if isinstance(value, FunctionType) and not cls.__module__.startswith("torch."):
                yield value, cls.__name__


def _uses(function: FunctionType, held: Collection[int]) -> bool:
    """Whether a name that a function takes from outside stands for a module of one of these ids, or its method."""
    values = [function.__globals__.get(name) for name in function.__code__.co_names]
    values += function.__defaults__ or ()
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a cell may be empty
            values.append(cell.cell_contents)
    return any(id(value.__self__ if isinstance(value, MethodType) else value) in held for value in values)


def _not_copied(module: nn.Module, reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"expected a {type(module).__name__} in eval mode, or one of which a copy can be read while it is in train "
        f"mode, got one in train mode, and {reason}; call its eval() first"
    )
