"""Small detectors and data that several test files share."""

import clusterguard
import pytest
import torch
from clusterguard import ClusterGuard, Evidence
from hypothesis import settings
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

settings.register_profile("patient", deadline=None)  # how long an example takes says nothing on a shared machine
settings.load_profile("patient")
torch.set_num_threads(1)  # tests run in parallel processes; more threads than cores stall each other


def pytest_runtest_setup() -> None:
    """Every test begins with the same random state, whichever tests ran before it in its process."""
    torch.manual_seed(0)


class LinearDetector(nn.Module):
    """Two classes along one direction w: score of class 1 is w·x − b, suspicion of k is its |distance| to w·x = ±1.

    Its smallest successful perturbation has a closed form in every norm.
    """

    def __init__(self, weight: Tensor, bias: float = 0.0, threshold: float = torch.inf) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.bias = bias
        self.thresholds = torch.full((2,), threshold, dtype=weight.dtype)

    def evidence(self, images: Tensor) -> Evidence:
        activation = images.flatten(1) @ self.weight.flatten() - self.bias
        scores = torch.stack([-activation, activation], dim=1)
        return Evidence(scores, 1 - scores)


@pytest.fixture
def linear_detector() -> LinearDetector:
    generator = torch.Generator().manual_seed(0)
    return LinearDetector(torch.randn(1, 4, 4, generator=generator), bias=0.3)


@pytest.fixture
def small_guard() -> ClusterGuard:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
    guard = ClusterGuard(backbone, num_classes=3, representation_dim=6)
    guard.thresholds = torch.full((3,), 14.0)
    return guard.eval()


@pytest.fixture
def blobs() -> DataLoader[tuple[Tensor, ...]]:
    """Three linearly separable classes of 8 × 8 images: a bright band each."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(600) % 3
    images = torch.rand(600, 1, 8, 8, generator=generator) * 0.3
    for index in range(3):
        images[labels == index, :, 2 * index : 2 * index + 2] += 0.6
    return DataLoader(TensorDataset(images.clamp(0, 1), labels), batch_size=60)


@pytest.fixture(scope="session")
def digits() -> TensorDataset:
    return clusterguard.samples.load_digits("test")
