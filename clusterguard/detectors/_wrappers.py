"""Finds the model inside wrappers that compute the same as the model does, and the normalisation in front of it.

Some wrappers are known to compute the same: `nn.DataParallel`, averaged models and compiled models. Others are tested.
A stand-in takes the place of the model. The wrapper must pass the very tensor that it gets to the stand-in, possibly in
another memory format, and must return the very tensor that the stand-in returns. It may also call the two methods
`forward_features` and `forward_head`, if the `forward` of the model does nothing but call them. The model never runs in
this test, so its size and device do not matter.
"""

import inspect
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from clusterguard._support import copy_module, no_warnings
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

Normalization: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation, one value per channel."""
IsModel: TypeAlias = Callable[[nn.Module], bool]

# Wrapper classes, and the attribute that holds the wrapped module. The classes are given by name because timm and
# torch._dynamo take long to import.
_TRANSPARENT = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "timm.utils.model_ema.ModelEmaV2": "module",
    "timm.utils.model_ema.ModelEmaV3": "module",
}
_GRAPHS = {torch.jit.ScriptModule: "a TorchScript module", GraphModule: "a graph of torch.fx or torch.export"}
_HALVES = ("forward_features", "forward_head")  # methods that make up the forward of timm's models
# Sides of images and shapes of a model's output to test with, because some holders treat a few sizes or ranks
# differently.
_SHAPES = (((32, 32), (7,)), ((28, 28), (5, 3, 3)), ((224, 224), (7,)), ((33, 47), (5, 3, 3)))


class Core(NamedTuple):
    """The module inside the wrappers, and the normalisation that they apply to its images, if any."""

    module: nn.Module
    normalization: Normalization | None = None


def unwrap(module: nn.Module, is_model: IsModel) -> Core:
    """Remove the wrappers around a model that compute the same as the model.

    Args:
        module: model, possibly in wrappers. It is not changed, and neither are modes and random states.
        is_model: function that says whether a module is a model to search for.

    Returns:
        The model, and the normalisation in front of it in an `nn.Sequential`. If no model can be reached, the result is
        the module without those wrappers that are known to compute the same.

    Example:
        >>> network = nn.Sequential(nn.DataParallel(nn.Linear(3, 2)))
        >>> unwrap(network, lambda module: isinstance(module, nn.Linear)).module
        Linear(in_features=3, out_features=2, bias=True)
    """
    return _find_core(module, is_model) or Core(_take_off_known(module))


def _find_core(module: nn.Module, is_model: IsModel) -> Core | None:
    module = _take_off_known(module)
    if is_model(module):
        return Core(module)
    if not any(map(is_model, module.modules())):
        return None
    if type(module) is nn.Sequential and not _is_altered(module):
        *before, last = [part for part in module if type(part) is not nn.Identity]
        core = _find_core(last, is_model)
        if core is not None and not before:
            return core
        if core is not None and core.normalization is None:
            normalization = read_normalization(nn.Sequential(*before), count_channels(core.module))
            return None if normalization is None else Core(core.module, normalization)
    return _find_core_of_holder(module, is_model)


def _take_off_known(module: nn.Module) -> nn.Module:
    while not _is_altered(module):
        attribute = _TRANSPARENT.get(f"{type(module).__module__}.{type(module).__qualname__}")
        if attribute is None:
            break
        module = getattr(module, attribute)
    return module


def _is_altered(module: nn.Module) -> bool:
    """Whether a module has hooks or a replaced `forward`, so that it may compute something else than its class does."""
    has_forward = "forward" in vars(module) and type(module).__name__ != "OptimizedModule"  # which always has one
    return bool(has_forward or module._forward_hooks or module._forward_pre_hooks)


def count_channels(model: nn.Module) -> int:
    """The number of channels of a model's images: that of its first convolution, or three."""
    first = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    channels = getattr(model, "in_chans", None) if first is None else first.in_channels
    return channels if isinstance(channels, int) else 3


def warn_of_graph(lost: str, module: nn.Module, consequence: str) -> None:
    """Warn if a module holds a recorded graph, in which the model's classifier or normalisation cannot be found.

    Args:
        lost: what cannot be found, such as the classifier.
        module: module without the wrappers that compute the same.
        consequence: what happens because it is not known, and what to pass.

    Example:
        >>> with warnings.catch_warnings(record=True, action="always") as given:
        ...     warn_of_graph("classifier", torch.fx.symbolic_trace(nn.Linear(3, 2)), "pass one without")
        >>> str(given[0].message).partition(", ")[0]
        'classifier not found inside a graph of torch.fx or torch.export'
    """
    for part in module.modules():
        kind = next((kind for kind in _GRAPHS if isinstance(part, kind)), None)
        if kind is not None and not _is_extractor(part):
            warnings.warn(
                f"{lost} not found inside {_GRAPHS[kind]}, which does not tell it: {consequence}, or the model that "
                "the graph was made from",
                stacklevel=5,
            )
            return


def _is_extractor(module: nn.Module) -> bool:
    """Whether a graph is one of torchvision's feature extractors, whose user has named the outputs to keep."""
    return any(cls.__module__ == "torchvision.models.feature_extraction" for cls in type(module).__mro__)


def read_normalization(module: nn.Module, channels: int) -> Normalization | None:
    """Find how a module normalises images, if it does nothing else.

    Args:
        module: module to examine. It is not changed; a copy runs in double precision on the CPU.
        channels: number C of channels of the images (B, C, H, W) that it takes.

    Returns:
        Mean and standard deviation if the module computes ``(images - mean) / std`` in train and in eval mode and has
        no trainable parameters; else None.

    Example:
        >>> from torchvision.transforms import Normalize
        >>> read_normalization(Normalize([0.25], [0.5]), 1)
        ((0.25,), (0.5,))
    """
    if any(parameter.requires_grad for parameter in module.parameters()):
        return None
    images = torch.randn(3, channels, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    images[0], images[1] = 0, 1
    try:
        with _undisturbed("cpu"):
            exact = copy_module(module).double().cpu()
            outputs = [exact.train(mode)(images.clone()) for mode in (True, False)]
            if _repeats_channels(exact, images):
                return None
        shift, scale = outputs[0][0, :, :1, :1], (outputs[0][1] - outputs[0][0])[:, :1, :1]
        std, expected = 1 / scale, images * scale + shift
        if not (std > 0).all() or not std.isfinite().all():
            return None
        if {output.shape for output in outputs} != {images.shape}:
            return None
        if not all(torch.allclose(output.double(), expected, atol=1e-5) for output in outputs):
            return None
    except Exception:  # a module may raise anything for images that it does not take
        return None
    # The shortest decimal numbers that give these float32 values, which drops rounding errors of this computation.
    sides = (side.flatten().float().numpy() for side in (-shift * std, std))
    mean, deviation = (tuple(float(str(value)) for value in side) for side in sides)
    return mean, deviation


def _repeats_channels(module: nn.Module, images: Tensor) -> bool:
    """Whether a module only turns grey images into colour images, and leaves colour images unchanged."""
    try:
        return torch.equal(module(images.clone()), images) and module(images[:, :1].clone()).shape[1] != 1
    except Exception:  # a module may raise anything for grey images that it does not take
        return False


def _find_core_of_holder(holder: nn.Module, is_model: IsModel) -> Core | None:
    """The core of the part to which a module only passes its images; None if the module does anything else."""
    # The outermost parts come first, because they may normalise. Then come the models, because a holder may call one
    # inside a part directly.
    for parts in (list(_find_parts(holder, is_model)), list(_find_models(holder, is_model))):
        called = _find_only_called(holder, parts) if parts else None
        if called is not None:
            return next(core for part, core in parts if id(part) == called)
    return None


def _find_parts(module: nn.Module, is_model: IsModel) -> Iterator[tuple[nn.Module, Core]]:
    """The outermost parts that are models, or that compute the same as a model."""
    for part in module.children():
        core = _find_core(part, is_model)
        if core is None:
            yield from _find_parts(part, is_model)
        else:
            yield part, core


def _find_models(module: nn.Module, is_model: IsModel) -> Iterator[tuple[nn.Module, Core]]:
    for part in module.children():
        if is_model(part):
            yield part, Core(part)
        else:
            yield from _find_models(part, is_model)


def _find_only_called(holder: nn.Module, parts: list[tuple[nn.Module, Core]]) -> int | None:
    """The id of the part to which a holder only passes its images, for all tested sizes and both modes."""
    like = next((weight for weight in holder.parameters() if weight.is_floating_point()), torch.empty(0))
    device, dtype = torch.device("cpu") if like.is_meta else like.device, like.dtype
    generator = torch.Generator().manual_seed(0)
    usual = count_channels(parts[0][1].module)
    called = set()
    with _undisturbed(device):
        for training, channels, (sides, features) in product((True, False), {usual, 1, 3}, _SHAPES):
            images = (torch.randn((2, channels, *sides), generator=generator) * 2).to(device, dtype)
            output = torch.randn((2, *features), generator=generator).to(device, dtype)
            try:
                called.add(_find_called(holder, parts, images, output, training=training))
            except Exception:  # a holder may raise anything for images or a stand-in that it does not expect
                if channels == usual:
                    return None
            if len(called) > 1 or None in called:
                return None
    return next(iter(called))


def _find_called(
    holder: nn.Module, parts: list[tuple[nn.Module, Core]], images: Tensor, output: Tensor, *, training: bool
) -> int | None:
    """The id of the one part that gets the images and makes the holder's output; None if there is none."""
    stand_ins = {id(part): _StandIn(core.module, images, output, training=training) for part, core in parts}
    before = output.clone()
    shadow = copy_module(holder, dict(stand_ins))
    shadow.train(training)
    with _MemoryFormats(images) as same:
        for stand_in in stand_ins.values():
            stand_in.same = same.tensors
        returned = shadow(images)
    used = {part: stand_in.calls for part, stand_in in stand_ins.items() if stand_in.calls}
    is_faithful = list(used.values()) == [[True]] and returned is output and torch.equal(output, before)
    return next(iter(used)) if is_faithful else None


class _MemoryFormats(TorchFunctionMode):
    """Collects the copies of a tensor that are made to change its memory format."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensors = [tensor]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, and keep its result if it is the tensor in another memory format."""
        options = kwargs or {}
        result = function(*args, **options)
        is_one = len(args) == 1 and options.keys() <= {"memory_format"} and _is_among(args[0], self.tensors)
        if is_one and function in (Tensor.contiguous, Tensor.to):
            self.tensors.append(result)
        return result


def _is_among(value: Any, tensors: list[Tensor]) -> bool:
    return any(value is tensor for tensor in tensors)


class _StandIn(nn.Module):
    """Takes the place of a model, and records for each call whether images, mode and autocast are as expected."""

    def __init__(self, model: nn.Module, images: Tensor, output: Tensor, *, training: bool) -> None:
        super().__init__()
        self.anchor = nn.Parameter(images.new_zeros(()))  # some holders read the device or dtype of a parameter
        self.calls: list[bool] = []
        self.same = [images]
        self._signature = inspect.signature(model.forward)
        self._has_hooks = bool(model._forward_hooks or model._forward_pre_hooks)
        self._expected = (images, images.clone(), training, _autocast(images))
        self._output = output
        self._has_halves = _has_halves(model)
        self._features = [output.clone(), output.clone()]  # the tensor that is returned, and a copy to compare it with

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append(self._is_expected(self._signature.bind(*args, **kwargs)))
        return self._output

    def _is_expected(self, call: inspect.BoundArguments) -> bool:
        images, values, _, _ = self._expected
        is_alone = len(call.args) == 1 and not call.kwargs and _is_among(call.args[0], self.same)
        is_unchanged = is_alone and torch.equal(call.args[0], values) and torch.equal(images, values)
        return is_unchanged and self._is_as_usual()

    def _is_as_usual(self) -> bool:
        images, _, training, autocast = self._expected
        return (self.training, _autocast(images)) == (training, autocast)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Stands for a call of `forward` that bypasses the hooks of a model."""
        if self._has_hooks:
            raise NotImplementedError
        return self(*args, **kwargs)

    def forward_features(self, images: Tensor) -> Tensor:
        """The first half of the forward of some models. Both halves together count as one call."""
        if not (self._has_halves and self._is_expected(self._signature.bind(images))):
            raise NotImplementedError
        return self._features[0]

    def forward_head(self, features: Tensor) -> Tensor:
        """The second half of the forward of some models."""
        features_given, values = self._features
        self.calls.append(features is features_given and torch.equal(features_given, values) and self._is_as_usual())
        return self._output


def _has_halves(model: nn.Module) -> bool:
    """Whether a model's forward computes forward_head(forward_features(images)) and nothing else."""
    steps = [torch.zeros(2, 3, 1, 1) for _ in range(3)]

    def hand_on(step: int, name: str) -> Callable[..., Tensor]:
        usual = inspect.signature(getattr(model, name)).parameters

        def half(value: Tensor, **options: Any) -> Tensor:
            if value is not steps[step] or any(usual[key].default is not option for key, option in options.items()):
                raise NotImplementedError
            return steps[step + 1]

        return half

    try:
        bare = SimpleNamespace(**{name: hand_on(step, name) for step, name in enumerate(_HALVES)})
        return not _is_altered(model) and type(model).forward(bare, steps[0]) is steps[2]
    except Exception:  # a forward may raise anything if it needs other attributes than these two methods
        return False


def _autocast(images: Tensor) -> bool:
    return torch.is_autocast_enabled(images.device.type)


@contextmanager
def _undisturbed(device: torch.device | str) -> Iterator[None]:
    """Context without gradients and warnings that restores random states."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  # a module may draw from it
    devices = [device] if torch.device(device).type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), no_warnings.on():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
