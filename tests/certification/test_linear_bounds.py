"""Linear bounds hold for all that a guard computes, and prove what intervals prove and more."""

import itertools

import pytest
import torch
from certifiable import guard_of
from clusterguard import PGD, ClusterGuard, certified_success_rate, certify
from clusterguard.certification import Interval, certified_radius
from clusterguard.certification._bounds import as_in_service, ball_in_service, bound_representations
from clusterguard.certification._linear_bounds import Branches, LinearBounds
from clusterguard.detectors import FeatureGaussians, GaussianClusters
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_branches_meet_the_lowest_value_and_no_image_lies_below(seed, dtype):
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Flatten(), nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU())
    guard = ClusterGuard(body, 3, example=torch.rand(1, 1, 1, 3), center_scale=1.0).to(dtype).eval()
    images, radii = torch.rand(2, 1, 1, 3).to(dtype), torch.tensor([0.2, 0.5]).double()
    directions = torch.randn(2, 3).double()
    steps = torch.linspace(-1, 1, 41).double()
    grid = torch.cartesian_prod(steps, steps, steps).view(-1, 1, 1, 1, 3)
    points = (images + radii.view(-1, 1, 1, 1) * grid).clamp(0, 1)
    with torch.no_grad(), as_in_service(guard):
        values = guard.represent(points.flatten(0, 1).to(dtype)).double().unflatten(0, (-1, 2))
        lines = LinearBounds(guard, ball_in_service(guard, images, radii))
        branches = lines.improve(lines.whole(torch.arange(2)), directions)
        at_first = branches.bounds
        for _ in range(11):  # ReLUs
            can_split = branches.choices >= 0
            if not can_split.any():
                break
            parts = branches[can_split].split()
            parts = lines.improve(parts, directions[parts.rows], iterations=40, rate=0.05)
            branches = Branches.join([branches[~can_split], parts])
    reached = torch.einsum("pbm,bm->pb", values, directions).amin(dim=0)
    lowest = torch.stack([branches.bounds[branches.rows == row].amin() for row in range(2)])
    assert (lowest <= reached).all()
    torch.testing.assert_close(lowest, reached, rtol=0, atol=0.02)
    assert (lowest >= at_first).all()


@pytest.mark.parametrize(("head", "eps"), [("clusters", 0.03), ("features", 0.2)])
def test_each_method_proves_all_that_the_one_before_proves_and_more(head, eps):
    methods = ("intervals", "linear", "branching")
    guard = make_guard("dense", seed=2)
    if head == "features":
        guard.head = FeatureGaussians(3, guard.head.representation_dim)
        guard.head.centers = torch.randn(3, guard.head.representation_dim)
    guard.thresholds = torch.full((3,), 100.0)
    images = torch.rand(12, 1, 4, 4)
    labels = guard.detect(images).labels
    options = {"eps": eps, "branches": 60}
    proved = [certify(guard, images, labels, method=method, **options).is_secure for method in methods]
    attacked = PGD(norm="linf", eps=eps, step_size=eps / 6, steps=40)(guard, images, labels)
    assert not proved[2][guard.detect(attacked).labels != labels].any()
    for weak, strong in itertools.pairwise(proved):
        assert (strong >= weak).all()
        assert strong.sum() > weak.sum()
    few = certify(guard, images, labels, eps=eps, method="branching", branches=2).is_secure
    assert few.sum() < proved[2].sum()
    rate = certified_success_rate(guard, [(images[:4], labels[:4])], method="branching", **options)
    assert rate.count == 4 - proved[2][:4].sum()
    one = images[:1], labels[:1]
    radii = [
        certified_radius(guard, *one, largest=eps, tolerance=eps / 4, method=method, branches=60) for method in methods
    ]
    assert radii[2] >= radii[1] >= radii[0]


def test_branching_takes_a_radius_of_0_and_images_that_are_not_accepted():
    guard = make_guard("dense")
    images, labels = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
    detection = guard.detect(images)
    is_harmless = detection.is_adversarial | (detection.labels == labels)
    assert certify(guard, images, labels, eps=0, method="branching").is_secure.equal(is_harmless)
    radii = torch.tensor([0, 0.01, 0.02, 0.03, 0.04, 1]).double()
    proved = [
        certify(guard, images, labels, eps=radii, method=method, branches=30).is_secure
        for method in ("linear", "branching")
    ]
    assert (proved[1] >= proved[0]).all()


class TwoDirections(GaussianClusters):
    def bound_distances(self, box, labels):
        bounds = super().bound_distances(box, labels)
        box.lowest(torch.zeros(len(labels), 2, self.representation_dim).double())
        return bounds


class NoDirections(GaussianClusters):
    def bound_distances(self, box, labels):
        return super().bound_distances(bound_only(box), labels)


def bound_only(box):
    return Interval(box.lower, box.upper, error=box.error, arithmetic=box.arithmetic)


@pytest.mark.parametrize("head", [TwoDirections, NoDirections])
def test_branching_proves_what_linear_bounds_prove_if_directions_are_not_those_of_classes(head):
    guard = make_guard("dense")
    guard.head = head(3, guard.head.representation_dim, center_scale=1.0)
    guard.thresholds = torch.full((3,), 100.0)
    images = torch.rand(8, 1, 4, 4)
    labels = guard.detect(images).labels
    linear, branching = (
        certify(guard, images, labels, eps=0.02, method=method).is_secure for method in ("linear", "branching")
    )
    assert linear.equal(branching)


class Transposed(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.layer, self.order = nn.Linear(16, 12), order

    def forward(self, images):
        values = self.layer(images.flatten(1)).unflatten(1, (-1, 4))
        return torch.relu(values.permute(*self.order)).permute(*(self.order.index(axis) for axis in range(3)))


class Ensemble(nn.Module):
    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(nn.Linear(16, 6) for _ in range(members))

    def forward(self, images):
        return torch.relu(torch.stack([member(images.flatten(1)) for member in self.members])).mean(0)


@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize(
    "body",
    [lambda: Ensemble(3), lambda: Ensemble(4), *(lambda o=o: Transposed(o) for o in ((1, 0, 2), (2, 0, 1), (1, 2, 0)))],
)
def test_relus_whose_first_axis_is_not_that_of_the_images_are_refused(body, count):
    guard = ClusterGuard(nn.Sequential(body(), nn.Flatten()), 3, example=torch.rand(1, 1, 4, 4), center_scale=1.0)
    guard.thresholds = torch.full((3,), 100.0)
    images = torch.rand(count, 1, 4, 4)
    certify(guard, images, torch.zeros(count).long(), eps=0.3)
    for method in ("linear", "branching"):
        with pytest.raises(ConfigurationError, match=r"first axis.*method='intervals'"):
            certify(guard, images, torch.zeros(count).long(), eps=0.3, method=method)


@pytest.mark.parametrize("order", [(0, 2, 1), (0, 1, 2)])
def test_other_axes_may_be_exchanged(order):
    guard = ClusterGuard(nn.Sequential(Transposed(order), nn.Flatten()), 3, example=torch.rand(1, 1, 4, 4))
    guard.thresholds = torch.full((3,), 100.0)
    certify(guard, torch.rand(4, 1, 4, 4), torch.zeros(4).long(), eps=0.3, method="branching")


@pytest.mark.parametrize("method", ["linear", "branching"])
def test_linear_guards_and_inference_mode_and_broken_images_are_no_trouble(method):
    options = {"method": method, "branches": 20}
    linear = ClusterGuard(nn.Flatten(), 3, example=torch.rand(1, 1, 2, 2), center_scale=1.0)
    linear.thresholds = torch.full((3,), 100.0)
    images = torch.rand(6, 1, 2, 2)
    labels = linear.detect(images).labels
    one, other = (certify(linear, images, labels, eps=0.1, method=name).is_secure for name in ("intervals", method))
    assert one.equal(other)
    guard = make_guard("dense")
    images, labels = torch.rand(4, 1, 4, 4), torch.zeros(4).long()
    expected = certify(guard, images, labels, eps=0.03, **options).is_secure
    with torch.inference_mode():
        assert certify(guard, images.clone(), labels.clone(), eps=0.03, **options).is_secure.equal(expected)
    images[1, 0, 2, 3] = torch.nan
    proved = certify(guard, images, labels, eps=0.03, **options).is_secure
    assert proved[[0, 2, 3]].equal(expected[[0, 2, 3]])
    assert not certified_radius(guard, images, labels, tolerance=0.5, **options)[1]


@pytest.mark.parametrize("branches", [1, 0, -3, True, "many", 2.5])
def test_wrong_numbers_of_branches_are_refused(branches):
    with pytest.raises(ConfigurationError, match="branches"):
        certify(guard_of(), torch.rand(1, 1, 2, 2).double(), torch.tensor([0]), eps=0.05, branches=branches)


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
    with pytest.raises(ConfigurationError, match=r"'intervals', 'linear' or 'branching', got 'crown'"):
        certify(guard_of(), torch.rand(1, 1, 2, 2).double(), torch.tensor([0]), eps=0.05, method="crown")
