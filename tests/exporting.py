"""Guards to export, and what is left of them where only the file is."""

from pathlib import Path

import onnxruntime
import torch
from clusterguard import ClusterGuard, Detection, DetectorModule
from clusterguard._support import evaluation_mode
from torch import Tensor, nn


def run_alone(path: Path, images: Tensor) -> Detection:
    """What a user gets who has the file and onnxruntime, and no clusterguard."""
    session = onnxruntime.InferenceSession(path)
    assert [port.name for port in session.get_inputs()] == ["images"]
    assert [port.name for port in session.get_outputs()] == ["labels", "distances", "is_adversarial"]
    return Detection(*map(torch.from_numpy, session.run(None, {"images": images.numpy()})))


def assert_same(actual: Detection, expected: Detection, *, rtol: float = 1e-4) -> None:
    assert torch.equal(actual.labels, expected.labels)
    assert torch.equal(actual.is_adversarial, expected.is_adversarial)
    torch.testing.assert_close(actual.distances, expected.distances, rtol=rtol, atol=0, equal_nan=True)


def set_thresholds(detector: DetectorModule, images: Tensor) -> None:
    """About half of the images are refused, and none lies so close to its threshold that rounding decides."""
    detector.reset_calibration()
    distances = detector.detect(images, check=False).distances.sort().values
    middle = distances[len(images) // 4 : -len(images) // 4]
    widest = middle.diff().argmax()
    detector.thresholds = torch.full_like(detector.thresholds, float(middle[widest : widest + 2].mean()))


def spread(guard: ClusterGuard, images: Tensor) -> None:
    """Let the representations of these images vary as if the guard were trained, so that labels differ."""
    last = [layer for layer in guard.encoder.modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        with evaluation_mode(guard) as read:
            representations = read.represent(images)
        scale = 5 / representations.std(dim=0)
        last.bias.copy_((last.bias - representations.mean(dim=0)) * scale + 3)
        last.weight.mul_(scale[:, None])


def flat_guard() -> ClusterGuard:
    torch.manual_seed(0)
    guard, images = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU()), 3), torch.rand(200, 1, 4, 4)
    spread(guard, images)
    set_thresholds(guard, images)
    return guard
