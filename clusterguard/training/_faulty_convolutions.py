"""Convolutions whose weights get wrong gradients in bfloat16 on a CPU.

Where the stride exceeds the side of a padded feature map, some weights of a kernel meet only padding, so their gradient
is 0. torch 2.13 returns memory in its place that was never written.
"""

import torch
from clusterguard.detection import Detector
from torch import Tensor, nn


@torch.no_grad()
def find_faulty_convolution(detector: Detector, images: Tensor) -> str | None:
    """Describe the first convolution whose gradients PyTorch would compute wrongly in bfloat16; None if there is none.

    Args:
        detector: detector in eval mode. Only convolutions that are modules are found.
        images: (B, C, H, W), at least one; the first is tried. Nothing is tried on a GPU.

    Example:
        >>> from clusterguard import ClusterGuard
        >>> network = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.Flatten())
        >>> guard = ClusterGuard(network, num_classes=2, example=torch.rand(2, 1, 1, 1)).eval()
        >>> find_faulty_convolution(guard, torch.rand(1, 1, 1, 1))
        'Conv2d(1, 2, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1)) on maps of 1 × 1'
    """
    if images.device.type != "cpu" or not isinstance(detector, nn.Module):
        return None
    found: list[str] = []

    def look(layer: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        size = inputs[0].shape[-2:]
        if any(length < stride for length, stride in zip(size, layer.stride, strict=True)):
            found.append(f"{layer} on maps of {size[0]} × {size[1]}")

    hooks = [
        module.register_forward_pre_hook(look)
        for module in detector.modules()
        if isinstance(module, nn.Conv2d) and max(module.stride) > 1 and module.padding not in ("valid", (0, 0))
    ]
    try:
        if hooks:
            detector.evidence(images[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
