"""Small detectors and data that several test files share."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import clusterguard
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from clusterguard import FGSM, AdversarialClusterTrainer, Calibrator, ClusterGuard, Evidence
from clusterguard.attacks import EFFORTS, Towards
from effort import FEW_STEPS
from hypothesis import settings
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# What these modules assert shows its values, as in a test.
pytest.register_assert_rewrite("damaging", "exporting", "fuzzing", "norm_problems", "peer_makers", "saving")
settings.register_profile("patient", deadline=None)  # how long an example takes says nothing on a shared machine
settings.load_profile("patient")
torch.set_num_threads(1)  # tests run in parallel processes; more threads than cores stall each other


def pytest_runtest_setup() -> None:
    """Every test begins with the same random state, whichever tests ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture
def light_suites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick suites have all their stages, each of a few steps."""
    monkeypatch.setitem(EFFORTS, "quick", FEW_STEPS)


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


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as image files, one subfolder a class."""
    folder = tmp_path_factory.mktemp("photos")
    images, labels = clusterguard.samples.load_digits("calibration").tensors
    for label in (0, 1, 7):
        (folder / str(label)).mkdir()
        for index, image in enumerate(images[labels == label][:120]):
            Image.fromarray((image[0] * 255).byte().numpy()).save(folder / str(label) / f"{index}.png")
    return folder


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one state a process; each of these tests wants its own."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder that holds a guard around `saving.network`."""
    from saving import make_guard  # not above: its asserts are registered there

    torch.manual_seed(0)
    make_guard().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def trained_guard() -> ClusterGuard:
    """For peers to attack."""
    torch.manual_seed(0)
    train = TensorDataset(*(part[:1500] for part in clusterguard.samples.load_digits("train").tensors))
    guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU()), 10, example=train[0][0][None])
    optimizer = torch.optim.Adam(guard.parameters(), lr=5e-3)
    trainer = AdversarialClusterTrainer(guard, FGSM(eps=0.1), optimizer=optimizer, warmup_epochs=2)
    loader = DataLoader(train, batch_size=100, shuffle=True)
    trainer.fit(loader, loader, epochs=6, calibrate=False, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes that share the pooled threshold
        Calibrator(false_positive_rate=0.05, scarce="pool").fit(
            guard, DataLoader(clusterguard.samples.load_digits("calibration"), batch_size=500)
        )
    return guard.eval()


@pytest.fixture(scope="session")
def clean(trained_guard: ClusterGuard) -> tuple[Tensor, Tensor]:
    """330 test images that the guard accepts, and their labels; the first 30 get attacked."""
    images, labels = clusterguard.samples.load_digits("test").tensors
    verdict = trained_guard.detect(images)
    usable = (verdict.labels == labels) & ~verdict.is_adversarial
    return images[usable][:330], labels[usable][:330]


@pytest.fixture(scope="session")
def images(clean: tuple[Tensor, Tensor]) -> Tensor:
    return clean[0][:30]


@pytest.fixture(scope="session")
def labels(clean: tuple[Tensor, Tensor]) -> Tensor:
    return clean[1][:30]


@pytest.fixture(scope="session")
def references(trained_guard: ClusterGuard, clean: tuple[Tensor, Tensor]) -> Towards:
    return Towards.accepted(trained_guard, clean[0][30:], clean[1][30:])
