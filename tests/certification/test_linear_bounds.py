"""Linear bounds hold for all that a guard computes, and prove what intervals prove and more."""

import pytest
import torch
from certifiable import guard_of
from clusterguard import ClusterGuard, certified_success_rate, certify
from clusterguard.certification import certified_radius
from clusterguard.certification._bounds import as_in_service, ball_in_service, bound_representations
from clusterguard.certification._linear_bounds import LinearBounds
from clusterguard.errors import ConfigurationError
from torch import nn


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, images):
        return torch.relu_(images + self.second(nn.functional.relu(self.norm(self.first(images)))))


def networks():
    dense = [nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU()]
    deep = [nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), Residual(3), nn.AvgPool2d(2)]
    return {"dense": dense, "residual": [*deep, nn.Flatten(), nn.Linear(12, 8), nn.ReLU()]}


def make_guard(name, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    body = nn.Sequential(*networks()[name])
    for layer in body.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, -1, 1)
            layer.running_mean.uniform_(-1, 1)
            layer.running_var.uniform_(0.5, 2)
    guard = ClusterGuard(body, 3, example=torch.rand(1, 1, 4, 4), center_scale=1.0, mean=0.4, std=0.3)
    guard.thresholds = torch.tensor([0.4, 0.6, 0.8])
    return guard.to(dtype).eval()


@pytest.mark.parametrize("name", ["dense", "residual"])
@pytest.mark.parametrize("seed", range(3))
def test_bounds_hold_at_all_points_and_are_tighter_than_intervals_somewhere(name, seed):
    guard = make_guard(name, seed)
    images, radii = torch.rand(3, 1, 4, 4), torch.tensor([0.0, 0.02, 0.1]).double()
    directions = torch.randn(3, 5, 3).double()
    with torch.no_grad(), as_in_service(guard):
        ball = ball_in_service(guard, images, radii)
        box = bound_representations(guard, ball)
        by_lines, by_intervals = LinearBounds(guard, ball).lowest(directions), box.lowest(directions)
        noise = torch.rand(400, 3, 1, 4, 4) * 2 - 1
        noise[:200] = noise[:200].sign()
        points = (images + radii.view(-1, 1, 1, 1) * noise).clamp(0, 1).float()
        values = guard.represent(points.flatten(0, 1)).double().unflatten(0, (400, 3))
    reached = torch.einsum("pbm,bsm->pbs", values, directions).amin(dim=0)
    assert (by_lines <= reached).all()
    torch.testing.assert_close(by_lines[0], reached[0], rtol=1e-4, atol=1e-4)  # a ball of one image
    assert (by_lines > by_intervals - box.slack(directions)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_difference_that_cancels_is_exact_where_intervals_are_wide(dtype):
    guard = ClusterGuard(nn.Flatten(), 2, example=torch.rand(1, 1, 1, 1), center_scale=1.0)
    layers = [nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 2, bias=False), nn.ReLU()]
    for layer in (layers[0], layers[2]):
        nn.init.ones_(layer.weight)
    guard.encoder = nn.Sequential(nn.Flatten(), *layers)
    guard, directions = guard.to(dtype).eval(), torch.tensor([[[1.0, -1.0]]]).double()
    with torch.no_grad(), as_in_service(guard):
        ball = ball_in_service(guard, torch.full((1, 1, 1, 1), 0.5, dtype=dtype), torch.tensor([0.4]).double())
        assert bound_representations(guard, ball).lowest(directions) < -0.7
        assert -1e-5 < LinearBounds(guard, ball).lowest(directions) <= 0


def test_linear_bounds_prove_all_that_intervals_prove_and_more_of_a_guard():
    guard = make_guard("dense")
    guard.thresholds = torch.full((3,), 100.0)
    images = torch.rand(60, 1, 4, 4)
    labels = guard.represent(images).argmax(dim=1)
    proofs = [certify(guard, images, labels, eps=0.05, method=method) for method in ("intervals", "linear")]
    assert (proofs[1].is_secure >= proofs[0].is_secure).all()
    assert proofs[1].is_secure.sum() > proofs[0].is_secure.sum()
    radii = [
        certified_radius(guard, images[:3], labels[:3], tolerance=0.1, method=method)
        for method in ("intervals", "linear")
    ]
    assert (radii[1] >= radii[0]).all()
    rates = [certified_success_rate(guard, [(images, labels)], eps=0.05, method=m) for m in ("intervals", "linear")]
    assert rates[1].count <= rates[0].count
    assert rates[0].total == rates[1].total


class Detached(nn.Module):
    def forward(self, images):
        return images.detach()


class WithoutGradients(nn.Module):
    def forward(self, images):
        with torch.no_grad():
            return torch.relu(images + 1)


class Shared(nn.Module):
    def forward(self, images):
        other = images.flatten(1)
        images += 1.0
        return torch.relu(other)


@pytest.mark.parametrize("layer", [nn.Sigmoid(), nn.MaxPool1d(2), Detached(), WithoutGradients(), Shared()])
def test_steps_without_linear_bounds_are_refused(layer):
    body = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), layer, nn.Flatten())
    guard = ClusterGuard(body, 3, example=torch.rand(1, 1, 2, 2), center_scale=1.0)
    guard.thresholds = torch.full((3,), 5.0)
    images, labels = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])
    certify(guard.eval(), images, labels, eps=0.5)
    with pytest.raises(ConfigurationError, match=r"no linear bounds are known.*"):
        certify(guard, images, labels, eps=0.5, method="linear")


def test_an_unknown_method_is_refused():
    with pytest.raises(ConfigurationError, match=r"'intervals' or 'linear', got 'crown'"):
        certify(guard_of(), torch.rand(1, 1, 2, 2).double(), torch.tensor([0]), eps=0.05, method="crown")
