"""A norm in its own file, known by nothing but its entry in NORMS, is one that everything else can use."""

import ast
import math
from pathlib import Path

import pytest
import torch
from clusterguard import APGD, PGD, ClusterGuard, WorstCaseSuite, evaluate
from clusterguard.attacks import NORMS, Boundary, FastMinimumNorm, Norm, Square, Towards, get_norm
from clusterguard.errors import ConfigurationError
from norm_problems import assert_inside

EPS = 0.2
ROOT = Path(__file__).parents[2]


class HalvedOnTheLeft(Norm):
    """The largest absolute change, where a change of the left half of an image counts half."""

    name, symbol, order, limit = "left", "ℓ∞ left", math.inf, 1.0

    def weights(self, images):
        width = images.shape[-1]
        return torch.where(torch.arange(width) < width // 2, 0.5, 1.0).to(images).expand_as(images)

    def size(self, perturbations):
        return (perturbations.abs() * self.weights(perturbations)).flatten(1).amax(dim=1)

    def largest(self, shape):
        return 1.0

    def direction(self, gradient, *, sparsity=None):
        return gradient.sign() / self.weights(gradient)

    def random_start(self, images, eps, generator=None):
        noise = torch.empty_like(images).uniform_(-1, 1, generator=generator)
        radii = torch.as_tensor(eps).to(images).reshape(-1, 1, 1, 1)
        return self.project(images, images + radii * noise / self.weights(images), eps)

    def _shorten(self, reach, beyond, radii):
        return torch.minimum(reach, radii / self.weights(reach))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(NORMS, HalvedOnTheLeft.name, HalvedOnTheLeft())


@pytest.fixture(scope="module")
def scene():
    """A guard that decides by distances in pixels, and images that it accepts under their labels."""
    torch.manual_seed(0)
    guard = ClusterGuard(torch.nn.Flatten(), num_classes=4, example=torch.rand(1, 1, 4, 4)).requires_grad_(False)
    images = torch.rand(16, 1, 4, 4)
    distances = guard.distances(images)
    guard.thresholds = distances.amin(dim=1).max().repeat(4)
    return guard, images, distances.argmin(dim=1)


def attacks(images, labels):
    return {
        "PGD": PGD(norm="left", eps=EPS, step_size=0.05, steps=20, objective="margin"),
        "APGD": APGD(norm="left", eps=EPS, steps=20, start="random"),
        "fast minimum norm": FastMinimumNorm(norm="left", eps=EPS, steps=50),
        "Square": Square(norm="left", eps=EPS, queries=200),
        "Boundary": Boundary(norm="left", eps=EPS, queries=300, references=Towards(images, labels)),
        "suite": WorstCaseSuite("left", eps=EPS, budget="quick"),
    }


@pytest.mark.parametrize("name", ["PGD", "APGD", "fast minimum norm", "Square", "Boundary", "suite"])
def test_every_attack_stays_inside_its_ball(name, scene):
    guard, images, labels = scene
    attack = attacks(images, labels)[name]
    attacked = attack(guard, images, labels, generator=torch.Generator().manual_seed(0))
    assert_inside(get_norm("left"), images, attacked, EPS)


@pytest.mark.parametrize("name", ["PGD", "suite"])
def test_the_weaker_half_may_change_twice_as_far(name, scene):
    guard, images, labels = scene
    attacked = attacks(images, labels)[name](guard, images, labels, generator=torch.Generator().manual_seed(0))
    change = (attacked - images).abs()
    assert EPS < change[..., :2].max() <= 2 * EPS + 1e-6
    assert change[..., 2:].max() <= EPS + 1e-6


def test_a_larger_ball_breaks_more(scene):
    guard, images, labels = scene
    report = evaluate(
        guard,
        {name: WorstCaseSuite(name, eps=EPS, budget="quick") for name in ("linf", "left")},
        [(images, labels)],
        generator=torch.Generator().manual_seed(0),
        sanity_images=16,
    )
    narrow, wide = report.results
    assert wide.norm == "left"
    assert 0 < narrow.success.count <= wide.success.count
    assert report.worst_by_norm["left"] == wide.success
    assert narrow.invalid == wide.invalid == 0


def test_the_thorough_suite_walks_along_boundaries_unless_the_norm_is_sparse(scene):
    guard, images, labels = scene
    stages = WorstCaseSuite("left", eps=EPS, budget="thorough").stages(guard, Towards(images, labels))
    assert {"Square", "boundary"} <= set(stages)
    assert "Carlini-Wagner" not in stages


def test_radii_beyond_its_limit_are_refused():
    with pytest.raises(ConfigurationError, match=r"expected eps in \[0, 1\] in left"):
        PGD(norm="left", eps=1.5, step_size=0.1)


@pytest.mark.parametrize("folder", ["clusterguard", "benchmarks"])
def test_nothing_branches_on_the_name_of_a_norm(folder):
    names = set(NORMS) - {HalvedOnTheLeft.name}
    branches = [
        f"{path}:{node.lineno}"
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare)
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and part.value in names
    ]
    assert not branches
