"""Gaussians that are fitted to features: against NumPy, and all ways that the paper's head goes."""

import json

import numpy as np
import pytest
import timm
import torch
from clusterguard import Calibrator, ClusterGuard, align, certify, export_onnx, load_onnx
from clusterguard.certification import Interval, certified_radius
from clusterguard.detectors import FeatureGaussians, fit_feature_gaussians
from clusterguard.errors import ConfigurationError, InputError, PersistenceError
from quadrants import Xor, quadrants
from saving import read_config
from torch import nn
from torchvision import models

K = 3


def network(width=16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, K))


def trained(blobs):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(5):
        for images, labels in blobs:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model


@pytest.fixture
def fitted(blobs):
    guard = ClusterGuard(trained(blobs), K)
    guard.result = fit_feature_gaussians(guard, blobs)
    Calibrator(0.05).fit(guard, blobs)
    return guard


def test_distances_are_those_of_mahalanobis(blobs, fitted):
    model, (images, labels) = trained(blobs), (torch.cat(parts) for parts in zip(*blobs, strict=True))
    features = model[:-1](images).detach().double().numpy()
    means = np.stack([features[labels == index].mean(axis=0) for index in range(K)])
    within = features - means[labels]
    covariance = within.T @ within / len(features)
    covariance += fitted.result.shrinkage * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    gaps = features[:, None] - means
    expected = np.sqrt(np.einsum("nkd,de,nke->nk", gaps, np.linalg.inv(covariance), gaps))
    assert fitted.distances(images).detach().numpy() == pytest.approx(expected, rel=2e-3, abs=1e-3)
    assert fitted.result.images == 600
    assert fitted.result.held_out == pytest.approx(120, abs=1)
    assert fitted.result.features == 16
    assert fitted.result.accuracy_after >= fitted.result.accuracy_before - 0.02


def test_the_held_out_images_choose_the_shrinkage(blobs, fitted):
    """Few images, whose own covariance has no inverse, need more of it than many."""
    few = [(images[:3], labels[:3]) for images, labels in blobs]
    with_few = fit_feature_gaussians(ClusterGuard(trained(blobs), K), few)
    assert with_few.shrinkage > fitted.result.shrinkage


@pytest.mark.parametrize("size", [7, 600])
def test_the_batches_do_not_matter(blobs, size):
    images, labels = (torch.cat(parts) for parts in zip(*blobs, strict=True))
    guards = [ClusterGuard(trained(blobs), K) for _ in range(2)]
    fit_feature_gaussians(guards[0], blobs)
    fit_feature_gaussians(guards[1], [*zip(images.split(size), labels.split(size), strict=True)])
    assert torch.allclose(guards[0].distances(images), guards[1].distances(images), rtol=1e-3)


def test_what_is_unlike_the_classes_is_refused(blobs, fitted):
    images, labels = next(iter(blobs))
    verdict = fitted.detect(images)
    assert (verdict.labels == labels).float().mean() > 0.9
    assert verdict.is_adversarial.float().mean() < 0.2
    assert fitted.detect((images + 0.4 * torch.randn_like(images)).clamp(0, 1)).is_adversarial.float().mean() > 0.5


def test_it_is_saved_and_loaded_without_anything_else(fitted, blobs, tmp_path):
    images, _ = next(iter(blobs))
    fitted.save_pretrained(tmp_path)
    again = ClusterGuard.from_pretrained(tmp_path)
    assert torch.equal(again.distances(images), fitted.distances(images))
    assert again.calibration == fitted.calibration
    card = (tmp_path / "README.md").read_text()
    assert "fitted to 16 features" in card
    assert "head=" not in card
    config = json.dumps(read_config(tmp_path))
    (tmp_path / "config.json").write_text(config.replace('"representation_dim": 16', '"representation_dim": 9'))
    with pytest.raises(PersistenceError, match="does not fit"):
        ClusterGuard.from_pretrained(tmp_path)


def test_it_is_exported(fitted, blobs, tmp_path):
    images, _ = next(iter(blobs))
    export_onnx(fitted, tmp_path / "guard.onnx")
    exported, expected = load_onnx(tmp_path / "guard.onnx").detect(images), fitted.detect(images)
    assert torch.equal(exported.labels, expected.labels)
    assert torch.equal(exported.is_adversarial, expected.is_adversarial)


def test_certificates_bound_it(fitted, blobs):
    images, labels = next(iter(blobs))
    assert certify(fitted, images, labels, eps=1e-3).is_secure.any()
    radii = certified_radius(fitted, images, labels)
    assert (radii > 0).float().mean() > 0.5
    for _ in range(20):
        signs = torch.randn_like(images).sign() * radii.view(-1, 1, 1, 1)
        verdict = fitted.detect((images + signs).clamp(0, 1).float())
        assert ((verdict.labels == labels) | verdict.is_adversarial)[radii > 0].all()


def test_bounds_hold_for_points_of_a_box():
    generator = torch.Generator().manual_seed(0)
    head, labels = FeatureGaussians(K, 5).double(), torch.arange(K)
    head.centers = 3 * torch.randn(K, 5, generator=generator, dtype=torch.float64)
    lower = head.centers - torch.rand(K, 5, generator=generator, dtype=torch.float64)
    box = Interval(lower, lower + 2 * torch.rand(K, 5, generator=generator, dtype=torch.float64))
    bounds = head.bound_distances(box, labels)
    for share in torch.rand(200, K, 5, generator=generator, dtype=torch.float64).round(decimals=1):
        distances = head.distances(box.lower + (box.upper - box.lower) * share)
        near = distances.gather(1, labels[:, None])
        assert (distances >= bounds.nearest - 1e-9).all()
        assert (near.squeeze(1) <= bounds.farthest + 1e-9).all()
        assert (distances.square() - near.square() >= bounds.leads - 1e-9).all()
    assert (head.packing_radius > 0).all()
    closest = torch.cdist(head.centers, head.centers).fill_diagonal_(torch.inf).amin(dim=1)
    assert head.packing_radius == pytest.approx(closest / 2)


@pytest.mark.filterwarnings("ignore:before the Gaussians were fitted only")
@pytest.mark.filterwarnings("ignore:labels by the nearest Gaussian")
@pytest.mark.parametrize(
    "build",
    [
        lambda: models.shufflenet_v2_x0_5(num_classes=K),
        lambda: timm.create_model("test_resnet", num_classes=K),
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, K)),
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ],
    ids=["torchvision", "timm", "plain", "features"],
)
def test_all_kinds_of_models_keep_their_features_and_can_be_rebuilt(build, tmp_path):
    torch.manual_seed(0)
    model = build().eval()
    guard = ClusterGuard(model, K).train()
    labels = torch.arange(30) % K
    images = (labels[:, None, None, None] / K + 0.3 * torch.rand(30, 3, 32, 32)).clamp(0, 1)
    guard.thresholds = torch.ones(K)
    fit = fit_feature_gaussians(guard, [(images, labels)])
    assert all(module.training for module in guard.modules() if module is not guard.head)
    assert guard.thresholds.isnan().all()
    assert guard.head.representation_dim == fit.features
    before = model.state_dict()
    after = {name.removeprefix("0."): tensor for name, tensor in guard.encoder.state_dict().items()}
    kept = [name for name in before if name in after and before[name].shape == after[name].shape]
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert len(kept) >= len(before) - 2
    guard.eval()
    # Within classes, whitened features are no larger than those of the identity.
    white = guard.represent(images).detach() - guard.head.centers[labels]
    assert 0 < white.square().sum() <= 30 * fit.features * 1.01
    guard.save_pretrained(tmp_path)
    again = ClusterGuard.from_pretrained(tmp_path)
    assert torch.equal(again.distances(images), guard.distances(images))


def test_what_cannot_be_fitted_is_refused_and_nothing_changes(blobs):
    guard, (images, labels) = ClusterGuard(trained(blobs), K), next(iter(blobs))
    before, head = guard.distances(images), guard.head
    for wrong, error, message in (
        ([(images[labels < 2], labels[labels < 2])], InputError, "none of class 2"),
        ([(images[:4], labels[:4])], InputError, "at least 5 images"),
        (blobs.dataset, ConfigurationError, "got a data set of single images"),
    ):
        with pytest.raises(error, match=message):
            fit_feature_gaussians(guard, wrong)
    assert torch.equal(guard.distances(images), before)
    assert guard.head is head
    fit_feature_gaussians(guard, blobs)
    with pytest.raises(ConfigurationError, match="expected a guard with GaussianClusters as its head"):
        align(guard, blobs)
    again = fit_feature_gaussians(guard, blobs)  # whitened features are features too
    assert again.accuracy_after == pytest.approx(again.accuracy_before, abs=0.02)


def test_lost_accuracy_is_said():
    """A Gaussian for each class is wrong more often than a line between them."""
    images, labels = quadrants(400)
    guard = ClusterGuard(Xor(), 2)
    with pytest.warns(UserWarning, match=r"right for 0.9\d* of 80 held-out images, those of the classifier for 1.000"):
        fit_feature_gaussians(guard, [(images, labels)])
