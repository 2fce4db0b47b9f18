"""What folded batch normalisation and channels last, which attacks in bfloat16 use, would save in float32."""

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from benchmarks.studies.speed._attack import put_channels_last, run_gradients, train_on_digits, untrained
from benchmarks.studies.speed._measure import Work
from benchmarks.studies.speed._race import Race

_STEPS = 3


def compare_in_float32(device: torch.device) -> Iterator[Race]:
    """Race loops of input gradients in float32 on two networks as they are, folded, and in channels last."""
    from torch.fx.experimental.optimization import fuse  # warns of torch's own deprecated code

    victims = {
        "SmallCNN": partial(train_on_digits, device, 32),
        "ResNet-18": partial(untrained, "ResNet-18", device, 4),
    }
    for network, build in victims.items():
        victim = build()
        models: dict[str, nn.Module] = {"as it is": victim.model}
        if any(isinstance(part, nn.BatchNorm2d) for part in victim.model.modules()):
            models["folded"] = fuse(victim.model)
        for name in list(models):
            models[f"{name}, channels last"] = put_channels_last(copy.deepcopy(models[name]))
        sides: dict[str, Work] = {}
        for name, model in models.items():
            layout = torch.channels_last if "last" in name else torch.contiguous_format
            images = victim.images.contiguous(memory_format=layout)
            sides[name] = partial(run_gradients, model, images, victim.labels, steps=_STEPS, half=False)
        count = len(victim.images)
        name = f"input gradients in float32, {network}, batch {count}"
        yield Race(name, sides, gradients=_STEPS * count)
