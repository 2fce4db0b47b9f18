"""Copies of modules, including those whose weights are computed before each call, as by weight normalisation."""

import copy
import inspect
from types import FunctionType
from typing import Any, TypeVar

import torch
from clusterguard.errors import UnsupportedBackboneError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

Module = TypeVar("Module", bound=nn.Module)

_COMPUTED = "parametrizations"  # attribute in which torch.nn.utils.parametrize keeps the computation of weights

_QUANTISED = {torch.int8, torch.uint8, torch.qint8, torch.quint8, torch.qint32}


class CopiedValues(TorchFunctionMode):
    """Context in which `copy.deepcopy` can copy tensors that have a gradient history.

    Weights under `torch.nn.utils.weight_norm` have such a history, and so do activations that a module keeps. The copy
    has the same values but no history. It does not need one, because hooks compute the weight again before its next
    use, and nothing takes a gradient through a kept activation.

    Example:
        >>> import torch
        >>> kept = torch.ones(2, requires_grad=True) * 3
        >>> with CopiedValues():
        ...     copy.deepcopy([kept])
        [tensor([3., 3.])]
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Copy the values where torch would raise an error, and call torch as usual everywhere else."""
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


def copy_module(module: Module, memo: dict[int, Any] | None = None) -> Module:
    """Copy a module with everything in it, tensors with a gradient history included.

    Args:
        module: module to copy; it is not changed.
        memo: memo of `copy.deepcopy`, which maps the id of an object to the object that replaces it in the copy.

    Returns:
        The copy. Its hooks and attributes are copies too.

    Example:
        >>> copy_module(nn.Linear(3, 2)).weight.shape
        torch.Size([2, 3])
    """
    copied: Module = copy_values(module, {} if memo is None else memo, of=module)
    return copied


def copy_values(values: Any, memo: dict[int, Any], *, of: nn.Module) -> Any:
    """Copy a module or its state by `copy.deepcopy`, so that it shares no parameters with the original.

    TorchScript copies its parameters by operations with a gradient history. Such a copy could not be trained, and
    gradients would flow back to the original.

    Args:
        values: module or state to copy.
        memo: memo of `copy.deepcopy`.
        of: the module itself, or the module that the state belongs to.

    Returns:
        The copy, in which the same parameters require gradients.

    Example:
        >>> layer = nn.Linear(3, 2).requires_grad_(False)
        >>> copy_values(layer, {}, of=layer).weight.requires_grad
        False
    """
    with CopiedValues(), torch.no_grad():
        copied = copy.deepcopy(values, memo)
    for part in of.modules():
        twin = memo.get(id(part))
        if isinstance(part, torch.jit.ScriptModule) and isinstance(twin, torch.jit.ScriptModule):
            for old, new in zip(part.parameters(), twin.parameters(), strict=True):
                new.requires_grad_(old.requires_grad)
    return copied


def settle_weights(module: nn.Module) -> None:
    """Replace weights that are computed before each call by plain parameters of the same value, in place.

    Args:
        module: module in eval mode. It still computes the same function, but can no longer be trained as before.

    Example:
        >>> from torch.nn.utils.parametrizations import orthogonal
        >>> layer = orthogonal(nn.Linear(3, 3))
        >>> settle_weights(layer)
        >>> type(layer.weight).__name__
        'Parameter'
    """
    for part in list(module.modules()):
        if parametrize.is_parametrized(part):
            names = list(getattr(part, _COMPUTED))
            weights = {name: nn.Parameter(getattr(part, name).detach(), False) for name in names}
            # Torch's remove_parametrizations would change the class, which a copy shares with its original.
            part.__class__ = type(part).__bases__[0]
            del part._modules[_COMPUTED]
            for name, weight in weights.items():
                part.register_parameter(name, weight)
        for hook in list(part._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(part, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(part, hook.name)


def refuse_unusable(backbone: nn.Module) -> None:
    """Refuse a backbone whose weights cannot be trained here.

    Raises:
        UnsupportedBackboneError: the weights are quantised, spread over processes, or constants of frozen TorchScript.
            The message names the layer.

    Example:
        >>> refuse_unusable(nn.Linear(3, 2))
    """
    for path, part in backbone.named_modules():
        homes = [cls.__module__ for cls in type(part).__mro__]
        kinds = {type(weight).__name__ for weight in part.parameters(recurse=False)}
        dtypes = {weight.dtype for weight in part.parameters(recurse=False) if not is_lazy(weight)}
        place = f"{type(part).__name__} at {path!r}" if path else type(part).__name__
        if isinstance(part, torch.jit.ScriptModule) and not hasattr(part, "training"):
            raise UnsupportedBackboneError(
                f"expected a backbone with weights, got frozen TorchScript ({place}), whose weights are constants; "
                "pass the module as it was before torch.jit.freeze or optimize_for_inference"
            )
        if any(home.startswith("torch.distributed.fsdp") for home in homes) or "DTensor" in kinds:
            raise UnsupportedBackboneError(
                f"expected a backbone with complete weights, got one with weights spread over processes ({place}); "
                "make the guard before the model is sharded, or load its full state dict into a new model"
            )
        if any(".quantized" in home and home.startswith("torch.") for home in homes) or dtypes & _QUANTISED:
            raise UnsupportedBackboneError(
                f"expected a backbone with floating-point weights, got quantised ones ({place}), which have no "
                "gradients; pass the model as it was before quantisation, and quantise the exported guard"
            )


def copy_backbone(module: nn.Module) -> nn.Module:
    """Copy a user's backbone, or raise an error that says why it cannot be copied.

    Raises:
        UnsupportedBackboneError: an attribute cannot be copied, or a module's `forward` was replaced by a function that
            refers to the original.

    Example:
        >>> copy_backbone(nn.Linear(3, 2)).weight.shape
        torch.Size([2, 3])
    """
    for path, part in module.named_modules():
        forward = vars(part).get("forward") if type(part).__name__ != "OptimizedModule" else None
        if isinstance(forward, FunctionType) and _holds_module(forward):
            raise UnsupportedBackboneError(
                f"expected modules with the forward of their class, got {path or 'the'} {type(part).__name__} with a "
                "function in its place that holds on to a module, so that a copy would still use the original's "
                "weights; write a subclass with that forward, or assign types.MethodType(function, module)"
            )
    try:
        return copy_module(module)
    except Exception as error:  # an attribute that cannot be copied may raise anything
        raise UnsupportedBackboneError(
            f"expected a backbone that copy.deepcopy can copy, got {shorten(error)}; remove attributes that "
            "cannot be copied, such as open files, locks or generators"
        ) from error


def _holds_module(function: FunctionType) -> bool:
    kept = inspect.getclosurevars(function)
    values = [*kept.nonlocals.values(), *kept.globals.values()]
    return any(isinstance(getattr(value, "__self__", value), nn.Module) for value in values)


def shorten(error: Exception) -> str:
    """An error as text on one line, cut after 300 characters."""
    text = " ".join(repr(error).split())
    return text if len(text) <= 300 else f"{text[:300]} …"
