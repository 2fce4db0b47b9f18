"""A head that the library does not have goes every way that the paper's goes."""

import warnings

import pytest
import torch
from clusterguard import PGD, AdversarialClusterTrainer, Calibrator, ClusterGuard, certify, export_onnx, load_onnx
from clusterguard.detectors import Head
from clusterguard.errors import ConfigurationError, PersistenceError
from torch import Tensor, nn


class DiagonalGaussians(Head):
    """Gaussians with fixed centres on the axes, each with a learned variance per coordinate."""

    centers: Tensor

    def __init__(self, num_classes: int, representation_dim: int, *, scale: float = 10.0) -> None:
        super().__init__(num_classes, representation_dim)
        self.scale = scale
        self.register_buffer("centers", scale * torch.eye(num_classes, representation_dim))
        self.log_deviations = nn.Parameter(torch.zeros(num_classes, representation_dim))

    def distances(self, representations: Tensor) -> Tensor:
        return self._squared(representations).clamp_min(1e-30).sqrt()

    def energies(self, representations: Tensor) -> Tensor:
        return self._squared(representations) + 2 * self.log_deviations.sum(dim=1)

    def adversarial_energy(self, representations: Tensor) -> Tensor:
        return representations.square().sum(dim=1)

    @property
    def half_way(self) -> Tensor:
        return self.centers.new_tensor(self.scale * 2**-0.5)

    def options(self) -> dict[str, object]:
        return {**super().options(), "scale": self.scale}

    def _squared(self, representations: Tensor) -> Tensor:
        gaps = (representations[:, None] - self.centers) * (-self.log_deviations).exp()
        return gaps.square().sum(dim=2)


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())


@pytest.fixture
def trained(blobs) -> ClusterGuard:
    torch.manual_seed(0)
    guard = ClusterGuard(network(), head=DiagonalGaussians(3, 5))
    attack = PGD(eps=0.1, step_size=0.05, steps=2, keep="last")
    optimizer = torch.optim.Adam(guard.parameters(), lr=1e-2)
    trainer = AdversarialClusterTrainer(guard, attack, optimizer=optimizer, warmup_epochs=8)
    trainer.fit(blobs, blobs, epochs=12, calibrate=False, progress=False)
    Calibrator(0.05).fit(guard, blobs)
    return guard


def test_another_head_trains_and_calibrates(trained, blobs):
    images, labels = next(iter(blobs))
    verdict = trained.detect(images)
    assert (verdict.labels == labels).float().mean() > 0.9
    assert verdict.is_adversarial.float().mean() < 0.2
    assert trained.head.log_deviations.abs().min() > 0  # all of them have learned
    assert trained.detect(torch.rand_like(images)).is_adversarial.float().mean() > 0.9


def test_another_head_is_saved_with_its_card_and_loaded(trained, blobs, tmp_path):
    images, _ = next(iter(blobs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing rebuilds this backbone
        trained.save_pretrained(tmp_path)
    assert "DiagonalGaussians in 5 dimensions" in (tmp_path / "README.md").read_text()
    again = ClusterGuard.from_pretrained(tmp_path, backbone=network(), head=DiagonalGaussians(3, 5))
    assert torch.equal(again.distances(images), trained.distances(images))
    assert again.calibration == trained.calibration
    with pytest.raises(PersistenceError, match="DiagonalGaussians; pass a head"):
        ClusterGuard.from_pretrained(tmp_path, backbone=network())


def test_another_head_is_exported(trained, blobs, tmp_path):
    images, _ = next(iter(blobs))
    export_onnx(trained, tmp_path / "guard.onnx")
    found, expected = load_onnx(tmp_path / "guard.onnx").detect(images), trained.detect(images)
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.is_adversarial, expected.is_adversarial)


def test_what_has_no_bounds_is_not_certified(trained, blobs):
    with pytest.raises(ConfigurationError, match="head"):
        certify(trained, *next(iter(blobs)), eps=0.1)


def test_a_head_is_copied_and_brings_its_own_options():
    head = DiagonalGaussians(3, 5)
    guard = ClusterGuard(network(), head=head)
    assert guard.num_classes == 3
    assert guard.head is not head
    for options in ({"representation_dim": 5}, {"center_scale": 3.0}, {"num_classes": 4}):
        with pytest.raises(ConfigurationError, match="expected"):
            ClusterGuard(network(), head=head, **options)
    with pytest.raises(ConfigurationError, match="Head"):
        ClusterGuard(network(), head=nn.Linear(5, 3))


def test_state_dicts_of_guards_that_had_clusters_load():
    guard, other = ClusterGuard(network(), 3, center_scale=2.0), ClusterGuard(network(), 3)
    old = {name.replace("head.", "clusters."): value for name, value in guard.state_dict().items()}
    other.load_state_dict(old)
    assert float(other.head.center_scale) == 2.0
