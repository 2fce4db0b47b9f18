"""How much of an attack's time its convolutions alone would take, and at what rate they compute."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from clusterguard import PGD
from torch import Tensor, nn

from benchmarks.studies.speed._attack import Victim, bare_loops, our_sides, train_on_digits, untrained
from benchmarks.studies.speed._race import Race

_STEPS = 4
CONVOLUTIONS = ("convolutions alone, float32", "convolutions alone, bfloat16")


class _Call(NamedTuple):
    """A convolution with its input (B, C, H, W) and the gradient of its output."""

    layer: nn.Conv2d
    images: Tensor
    gradient: Tensor


def record_convolutions(model: nn.Module, images: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> list[Any]:
    """The convolutions that a forward pass calls, with inputs of a data type and a layout."""
    calls: list[Any] = []

    def note(layer: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        given, made = (part.detach().to(dtype=dtype, memory_format=layout) for part in (inputs[0], output))
        alone = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            bias=False,
        )
        alone = alone.to(images.device, dtype).requires_grad_(False)
        alone.weight.data = alone.weight.data.to(memory_format=layout)
        calls.append(_Call(alone, given, torch.randn_like(made)))

    hooks = [part.register_forward_hook(note) for part in model.modules() if isinstance(part, nn.Conv2d)]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return calls


def run_convolutions(calls: list[Any]) -> None:
    """Run each convolution forward, and back to the gradient of its input, as often as an attack has steps."""
    for layer, images, gradient in _STEPS * calls:
        layer(images)
        torch.ops.aten.convolution_backward(
            gradient,
            images,
            layer.weight,
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            False,
            [0, 0],
            layer.groups,
            [True, False, False],
        )


def count_gflop(calls: list[Any]) -> float:
    """The number of operations in 10⁹ that the convolutions take, forward and back to the input."""
    return float(sum(4 * layer.weight[0].numel() * gradient.numel() for layer, _, gradient in calls)) / 1e9


def compare_to_convolutions(device: torch.device) -> Iterator[Race]:
    """Race PGD and bare loops against the convolutions alone, on three networks."""
    on_gpu = device.type == "cuda"
    victims: dict[str, Callable[[], Victim]] = {
        "SmallCNN": lambda: train_on_digits(device, 500 if on_gpu else 64),
        "ResNet-18": lambda: untrained("ResNet-18", device, 128 if on_gpu else 8),
        "ResNet-50 at 224": lambda: untrained("ResNet-50", device, 64 if on_gpu else 1),
    }
    attack = PGD(eps=0.1, step_size=0.02, steps=_STEPS, objective="cross_entropy", keep="last")
    for network, build in victims.items():
        victim = build()
        sides = our_sides(attack, victim) | bare_loops(victim, _STEPS)
        kinds = (torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last)
        for side, (dtype, layout) in zip(CONVOLUTIONS, kinds, strict=True):
            calls = record_convolutions(victim.model, victim.images, dtype, layout)
            sides[side] = partial(run_convolutions, calls)
        count = len(victim.images)
        yield Race(
            f"PGD-{_STEPS}, {network}, batch {count}",
            sides,
            gradients=_STEPS * count,
            facts={"GFLOP of a gradient": count_gflop(calls) / count},
        )
