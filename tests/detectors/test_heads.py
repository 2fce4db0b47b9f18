"""A head that the library does not have goes every way that the paper's goes."""

import warnings

import pytest
import torch
from clusterguard import (
    PGD,
    AdversarialClusterTrainer,
    Calibrator,
    CertifiedTrainer,
    ClusterGuard,
    certify,
    export_onnx,
    load_onnx,
)
from clusterguard.certification import Interval, certified_radius
from clusterguard.detectors import Bounds, Head, RepresentationBox
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
    def packing_radius(self) -> Tensor:
        return self.centers.new_tensor(self.scale * 2**-0.5)

    def options(self) -> dict[str, object]:
        return {**super().options(), "scale": self.scale}

    def bound_distances(self, box: RepresentationBox, labels: Tensor) -> Bounds:
        error = torch.zeros_like(box.lower) if box.error is None else box.error
        lower, upper = (box.lower - error)[:, None], (box.upper + error)[:, None]
        centers, factors = self.centers.to(lower), (-self.log_deviations).exp().to(lower)
        nearest = (torch.maximum(lower - centers, centers - upper).clamp_min(0) * factors).square().sum(dim=2)
        farthest = (torch.maximum(upper - centers, centers - lower) * factors).square().sum(dim=2)
        if box.arithmetic is not None:  # every computed term is at least 0, so errors are relative ones
            share, smallest = box.arithmetic.gamma(self.representation_dim + 12), box.arithmetic.smallest
            nearest = nearest * (1 - share) - self.representation_dim * smallest
            farthest = farthest * (1 + share) + self.representation_dim * smallest
            farthest = torch.where(farthest < box.arithmetic.largest, farthest, torch.inf)
        low, high = nearest.clamp_min(1e-30).sqrt(), farthest.clamp_min(1e-30).sqrt()
        return Bounds.between(low * (1 - 1e-7), high * (1 + 1e-7), labels)

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
    card = (tmp_path / "README.md").read_text()
    assert "DiagonalGaussians in 5 dimensions" in card
    assert "head=your_head" in card
    assert "The class of the head defines what `distances` are" in card
    assert "center" not in card.lower()
    again = ClusterGuard.from_pretrained(tmp_path, backbone=network(), head=DiagonalGaussians(3, 5))
    assert torch.equal(again.distances(images), trained.distances(images))
    assert again.calibration == trained.calibration
    with pytest.raises(PersistenceError, match="DiagonalGaussians; pass a head"):
        ClusterGuard.from_pretrained(tmp_path, backbone=network())


def test_another_head_is_exported(trained, blobs, tmp_path):
    images, _ = next(iter(blobs))
    export_onnx(trained, tmp_path / "guard.onnx")
    exported, expected = load_onnx(tmp_path / "guard.onnx").detect(images), trained.detect(images)
    assert torch.equal(exported.labels, expected.labels)
    assert torch.equal(exported.is_adversarial, expected.is_adversarial)


def test_another_head_is_certified_by_its_own_bounds(trained, blobs):
    images, labels = next(iter(blobs))
    radii = certified_radius(trained, images, labels)
    assert (radii > 0).float().mean() > 0.5
    for objective in ("margin", "cross_entropy"):
        attacked = PGD(eps=1.0, step_size=0.02, steps=1, objective=objective, keep="last")(trained, images, labels)
        inside = (images + (attacked - images).clamp(-radii.view(-1, 1, 1, 1), radii.view(-1, 1, 1, 1))).float()
        verdict = trained.detect(inside)
        assert ((verdict.labels == labels) | verdict.is_adversarial)[radii > 0].all()


def test_bounds_of_another_head_hold_for_points_of_a_box(trained):
    head, labels = trained.head, torch.arange(3)
    lower = 10 * torch.eye(3, 5, dtype=torch.float64) - 1.5
    box = Interval(lower, lower + torch.rand(3, 5, dtype=torch.float64))
    bounds = head.bound_distances(box, labels)
    for share in torch.rand(100, 3, 5, dtype=torch.float64).round(decimals=1):
        distances = head.distances(box.lower + (box.upper - box.lower) * share)
        near = distances.gather(1, labels[:, None])
        assert (distances >= bounds.nearest).all()
        assert (near.squeeze(1) <= bounds.farthest).all()
        assert (distances.square() - near.square() >= bounds.leads - 1e-9).all()


def test_another_head_is_trained_for_certificates(blobs):
    torch.manual_seed(0)
    guard = ClusterGuard(network(), head=DiagonalGaussians(3, 5))
    optimizer = torch.optim.Adam(guard.parameters(), lr=1e-2)
    trainer = CertifiedTrainer(guard, eps=0.02, warmup_epochs=1, ramp_epochs=2, optimizer=optimizer)
    trainer.fit(blobs, blobs, epochs=4, calibrate=False, progress=False)
    Calibrator(0.05).fit(guard, blobs)
    assert certify(guard, *next(iter(blobs)), eps=0.01).is_secure.any()


class Prejudiced(DiagonalGaussians):
    """Its energies, and so the logits, favour class 1, whatever the distances, and so the labels, are."""

    bound_distances = DiagonalGaussians.bound_distances

    def energies(self, representations: Tensor) -> Tensor:
        return super().energies(representations) + torch.tensor([1e4, 0.0, 1e4])


@pytest.mark.parametrize("kind", [AdversarialClusterTrainer, CertifiedTrainer])
def test_trainings_record_labels_by_distances(kind, blobs):
    torch.manual_seed(0)
    guard = ClusterGuard(network(), head=Prejudiced(3, 5))
    options = {"eps": 0.1} if kind is CertifiedTrainer else {"attack": PGD(eps=0.1, step_size=0.1), "warmup_epochs": 1}
    images, _ = next(iter(blobs))
    labels = guard.detect(images, check=False).labels
    assert (guard(images).argmax(dim=1) == 1).all()
    assert (labels != 1).any()
    assert int(kind(guard, **options).training_step(images, labels, None).correct) == len(labels)


class Doubled(DiagonalGaussians):
    def distances(self, representations: Tensor) -> Tensor:
        return 2 * super().distances(representations)


class Boundless(DiagonalGaussians):
    bound_distances = Head.bound_distances


@pytest.mark.parametrize("kind", [Doubled, Boundless])
def test_what_has_no_bounds_is_not_certified(kind, blobs):
    guard = ClusterGuard(network(), head=kind(3, 5))
    guard.thresholds = torch.ones(3)
    with pytest.raises(ConfigurationError, match=f"no bounds are known for the head {kind.__name__}"):
        certify(guard, *next(iter(blobs)), eps=0.1)


class Optimist(DiagonalGaussians):
    def bound_distances(self, box: RepresentationBox, labels: Tensor) -> Bounds:
        return Bounds.between(*2 * [self.distances(box.lower) + 3], labels)


def test_bounds_that_do_not_hold_are_noticed(blobs):
    guard = ClusterGuard(network(), head=Optimist(3, 5))
    guard.thresholds = torch.ones(3)
    with pytest.raises(ConfigurationError, match="outside the bounds"):
        certify(guard, *next(iter(blobs)), eps=0.1)


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


def test_a_saved_guard_tells_a_head_of_other_options(tmp_path, blobs):
    def new_guard(scale):
        torch.manual_seed(0)
        layers = nn.Flatten(), nn.Linear(64, 16), nn.ReLU()
        return ClusterGuard(nn.Sequential(*layers), head=DiagonalGaussians(3, 6, scale=scale))

    guard = new_guard(10.0)
    guard.save_pretrained(tmp_path)
    again = ClusterGuard.from_pretrained(tmp_path, head=DiagonalGaussians(3, 6, scale=10.0))
    images, _ = next(iter(blobs))
    assert torch.equal(again.distances(images), guard.distances(images))
    with pytest.raises(PersistenceError, match=r"of other options \(scale 10.0, now 5.0\)"):
        ClusterGuard.from_pretrained(tmp_path, head=DiagonalGaussians(3, 6, scale=5.0))
    with pytest.raises(PersistenceError, match="saved with the head DiagonalGaussians; pass a head"):
        ClusterGuard.from_pretrained(tmp_path)
    assert "head=your_head" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("value", [torch.ones(2), float("nan"), {1, 2}], ids=["tensor", "nan", "set"])
def test_options_of_a_head_that_json_does_not_have_are_refused_before_anything_is_written(tmp_path, value):
    class Odd(DiagonalGaussians):
        def options(self):
            return {**super().options(), "odd": value}

    guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(64, 16)), head=Odd(3, 6))
    with pytest.raises(ConfigurationError, match=r"expected options\(\) of the head Odd to hold"):
        guard.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_options_named_like_those_of_the_guard_do_not_get_in_their_way(tmp_path):
    class Named(DiagonalGaussians):
        def options(self):
            return {**super().options(), "mean": [1.0], "num_classes": 7}

    guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(64, 16)), head=Named(3, 6))
    guard.save_pretrained(tmp_path)
    assert ClusterGuard.from_pretrained(tmp_path, head=Named(3, 6)).num_classes == 3
