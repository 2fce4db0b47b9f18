"""`torch.compile` in bfloat16 with channels last, with its gradients checked, against the same loop without it."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.studies.speed._attack import bare_loops, run_gradients, train_on_digits, untrained
from benchmarks.studies.speed._measure import Work
from benchmarks.studies.speed._race import Race

_STEPS = 4
SIDES = ("as it is, bfloat16", "compiled, bfloat16")


def have_same_gradients(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two loops have moved the images by gradients that differ by at most 2 % of the largest."""
    return bool((ours - theirs).abs().max() <= 0.02 * theirs.abs().max())


def compare_compiled(device: torch.device) -> Iterator[Race]:
    """Race a compiled loop of input gradients against the same loop without compilation, on two networks."""
    on_gpu = device.type == "cuda"
    victims = {
        "SmallCNN": partial(train_on_digits, device, 500 if on_gpu else 32),
        "ResNet-18": partial(untrained, "ResNet-18", device, 128 if on_gpu else 8),
    }
    for network, build in victims.items():
        victim = build()
        loop = bare_loops(victim, _STEPS)["bare loop, bfloat16"]
        model, images, labels = loop.args  # type: ignore[attr-defined]
        compiled: nn.Module = torch.compile(model, mode="reduce-overhead" if on_gpu else "default")  # type: ignore[assignment]
        works: list[Work] = [
            partial(run_gradients, run, images, labels, steps=_STEPS, half=True) for run in (model, compiled)
        ]
        plain, other = (work() - images for work in works)
        yield Race(
            f"input gradients, {network}, batch {len(images)}",
            dict(zip(SIDES, works, strict=True)),
            gradients=_STEPS * len(images),
            facts={"gradients agree": have_same_gradients(other, plain)},
        )
