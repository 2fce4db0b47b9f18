"""Which rule bounds which function of torch: each maps a box through an operation, with its rounding errors."""

from functools import partial
from typing import Any

import torch
from clusterguard.certification import _interval_activations as activations
from clusterguard.certification import _interval_layers as layers
from clusterguard.certification._interval_arithmetic import IntervalRule, add, multiply, subtract
from torch import Tensor
from torch.nn import functional

IN_PLACE = {"relu_"}
"""Names of functions that change their argument in place."""
_VIEWS = (
    *("flatten", "unflatten", "reshape", "view", "squeeze", "unsqueeze"),
    *("contiguous", "permute", "transpose", "detach"),
)
METHODS: dict[str, IntervalRule] = {
    **{name: partial(layers.view, name) for name in _VIEWS},
    **{
        "mean": layers.mean,
        "clone": layers.clone,
        "to": layers.to,
        "clamp": activations.clamp,
        "sigmoid": activations.sigmoid,
        "tanh": activations.tanh,
    },
    **{"relu": activations.relu, "relu_": activations.relu},
    **{name: partial(layers.to, dtype=dtype) for name, dtype in (("float", torch.float32), ("double", torch.float64))},
}
CASTS = {"to", "float", "double"}
"""Names of functions that can only change the data type or the device."""
VIEWS = {*_VIEWS, *CASTS, "dropout", "dropout2d"}
"""Names of functions whose result may share the memory of their argument."""
_POOLS = {
    1: (torch.avg_pool1d, functional.adaptive_avg_pool1d),
    2: (functional.avg_pool2d, functional.adaptive_avg_pool2d),
    3: (functional.avg_pool3d, functional.adaptive_avg_pool3d),
}
_MAX_POOLS = (
    *(torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, functional.max_pool1d, functional.max_pool2d),
    *(functional.max_pool3d, functional.adaptive_max_pool1d, functional.adaptive_max_pool2d),
    functional.adaptive_max_pool3d,
)
RULES: dict[Any, IntervalRule] = {
    **{getattr(torch, name): partial(layers.view, name) for name in _VIEWS if name not in ("view", "contiguous")},
    **{pool: partial(layers.average, pool, axes) for axes, pools in _POOLS.items() for pool in pools},
    **{pool: partial(layers.largest, pool) for pool in _MAX_POOLS},
    **{layer: partial(layers.affine, layer) for layer in (functional.linear, torch.conv1d, torch.conv2d, torch.conv3d)},
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__), add),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__), subtract),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__), multiply),
    **dict.fromkeys((functional.dropout, functional.dropout2d), layers.dropout),
    **dict.fromkeys((functional.relu, torch.relu), activations.relu),
    torch.relu_: activations.relu,
    functional.relu6: partial(activations.clamp, min=0.0, max=6.0),
    functional.hardtanh: activations.hardtanh,
    torch.clamp: activations.clamp,
    torch.sigmoid: activations.sigmoid,
    torch.tanh: activations.tanh,
    functional.softplus: activations.softplus,
    functional.leaky_relu: activations.leaky_relu,
    functional.elu: activations.elu,
    functional.selu: activations.selu,
    functional.celu: activations.celu,
    functional.logsigmoid: activations.log_sigmoid,
    functional.prelu: activations.prelu,
    functional.gelu: activations.gelu,
    functional.silu: activations.silu,
    functional.mish: activations.mish,
    functional.hardswish: activations.hardswish,
    functional.hardsigmoid: activations.hardsigmoid,
    functional.batch_norm: layers.batch_norm,
    torch.mean: layers.mean,
    torch.cat: partial(layers.join, torch.cat),
    torch.stack: partial(layers.join, torch.stack),
    functional.pad: layers.pad,
}
