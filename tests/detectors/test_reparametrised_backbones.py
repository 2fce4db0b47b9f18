"""Weights that are computed before each call: by weight and spectral normalisation, parametrisations, pruning."""

import copy
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
from clusterguard import ClusterGuard, export_onnx, load_onnx
from clusterguard._support import settle_weights
from clusterguard.deployment import export_program
from clusterguard.detectors import find_num_classes, make_encoder
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torchvision import models

Change = Callable[[nn.Module], nn.Module]


class Doubled(nn.Module):
    """Has no inverse, and holds a layer that is no part of what it parametrises."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(5, 6)

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def doubled(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Doubled().to(layer.weight))
    return layer


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.3)


def normalised(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # an old name that people still use
        return weight_norm(layer)


CHANGES: dict[str, Change] = {
    "weight_norm": normalised,
    "spectral_norm": spectral_norm,
    "parametrised weight_norm": parametrizations.weight_norm,
    "parametrised spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "of one's own": doubled,
    "two": lambda layer: parametrizations.spectral_norm(doubled(layer)),
    "pruned": pruned,
}
changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def network(change: Change) -> nn.Module:
    return nn.Sequential(change(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@changes
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_such_a_backbone_is_trained_copied_saved_and_exported(change: Change, trained: bool, tmp_path) -> None:
    images, backbone = torch.rand(3, 3, 8, 8), network(change)
    if trained:
        backbone(images).sum().backward()
    guard = ClusterGuard(backbone, 2)
    optimizer = torch.optim.SGD(guard.parameters(), lr=0.01)
    before = [parameter.clone() for parameter in guard.parameters()]
    guard.train().distances(images).sum().backward()
    optimizer.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, guard.parameters(), strict=True))
    guard.distances(images)  # whose graph the weights now keep
    twin = copy.deepcopy(guard).eval()
    guard.eval().thresholds = torch.full((2,), 11.0)
    expected = guard.detect(images)
    assert torch.equal(twin.distances(images).gather(1, expected.labels[:, None])[:, 0], expected.distances)
    guard.save_pretrained(tmp_path)
    again = ClusterGuard.from_pretrained(tmp_path, backbone=backbone)
    assert torch.equal(again.detect(images).distances, expected.distances)
    _, distances, _ = export_program(guard, images).module()(images)
    assert torch.allclose(distances, expected.distances)
    assert torch.equal(guard.detect(images).distances, expected.distances)  # an export changes nothing


def test_what_torch_cannot_write_as_onnx_is_settled_first(tmp_path) -> None:
    pytest.importorskip("onnxscript")
    guard, images = ClusterGuard(network(parametrizations.orthogonal), 2).eval(), torch.rand(3, 3, 8, 8)
    guard.thresholds = torch.full((2,), 11.0)
    detector = load_onnx(export_onnx(guard, tmp_path / "guard.onnx", images))
    assert torch.allclose(detector.detect(images).distances, guard.detect(images).distances, atol=1e-4)


@changes
@pytest.mark.parametrize(
    ("build", "path"),
    [
        (lambda: timm.create_model("test_resnet", num_classes=6), "fc"),
        (lambda: models.shufflenet_v2_x0_5(num_classes=6), "fc"),
        (lambda: models.squeezenet1_1(num_classes=6), "classifier.1"),
    ],
    ids=["timm", "linear", "convolution"],
)
def test_such_a_classifier_is_replaced_by_a_plain_layer(
    change: Change, build: Callable[[], nn.Module], path: str
) -> None:
    model = build().double().eval()
    model.set_submodule(path, change(model.get_submodule(path)))
    assert find_num_classes(model) == 6
    encoder = make_encoder(model, 12)
    layer = encoder.get_submodule(path)
    assert type(layer) in (nn.Linear, nn.Conv2d)
    assert (layer.weight.dtype, layer.weight.requires_grad, layer.training) == (torch.float64, True, False)
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    assert encoder(images).shape == (2, 12)
    assert model(images).shape == (2, 6)


def test_tensors_that_a_module_keeps_of_its_last_call_are_copied_by_value() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 5)
            self.seen: list[Tensor] = []

        def forward(self, images: Tensor) -> Tensor:
            self.seen = [self.layer(images.flatten(1))]
            return self.seen[0]

    module = Remembers()
    output = module(torch.rand(2, 3, 2, 2))
    kept = make_encoder(module, 4)[0].seen[0]
    assert torch.equal(kept, output)
    assert kept.is_leaf


@changes
def test_settled_weights_are_plain_and_compute_the_same(change: Change) -> None:
    images, module = torch.rand(3, 3, 8, 8), network(change).eval()
    expected, twin = module(images), make_encoder(module, 2)
    settle_weights(twin)
    assert torch.allclose(twin[0](images), expected)
    assert torch.equal(module(images), expected)  # though copies share a class with their original
    if change is not pruned:
        assert dict(twin[0][0].named_parameters()).keys() == {"weight", "bias"}
