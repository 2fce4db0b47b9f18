"""What other libraries learned the hard way (see the issues named), held for every attack of ours at once."""

import copy
from dataclasses import replace

import pytest
import torch
from clusterguard import APGD, FGSM, PGD, ClusterGuard, Evidence, WorstCaseSuite, evaluate, success_margin
from clusterguard.attacks import (
    BIM,
    MIM,
    NES,
    PDPGD,
    Boundary,
    CarliniWagner,
    FastMinimumNorm,
    MultiTarget,
    OrthogonalPGD,
    PatchAttack,
    Polish,
    Problem,
    RepelThenMinimise,
    RepresentationMatching,
    SigmaZero,
    SparsePGD,
    SparseRS,
    Square,
    Towards,
    get_norm,
)
from clusterguard.attacks._internal import backpropagate
from clusterguard.attacks._objectives import OBJECTIVES
from clusterguard.detectors import ConfidenceDetector, WithThresholds
from clusterguard.errors import ConfigurationError
from torch import nn

REFERENCES = Towards(torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(9)), torch.arange(30) % 3)
EPS, STEPPED = 0.5, {"eps": 0.5, "step_size": 0.1, "steps": 10}
DETERMINISTIC = {
    "FGSM": FGSM(eps=EPS),
    "BIM": BIM(eps=EPS),
    "PGD": PGD(**STEPPED),
    "MIM": MIM(**STEPPED),
    "APGD": APGD(eps=EPS, steps=10),
    "fast minimum norm": FastMinimumNorm(eps=EPS, steps=20),
    "σ-zero": SigmaZero(eps=30, steps=20),
    "PDPGD": PDPGD(norm="l2", eps=3.0, steps=20),
    "multi-target": MultiTarget(attack=PGD(**STEPPED)),
    "Carlini-Wagner": CarliniWagner(eps=4.0, steps=20, searches=3),
    "orthogonal": OrthogonalPGD(**STEPPED),
    "selective": OrthogonalPGD(strategy="selective", **STEPPED),
    "match representations": RepresentationMatching(references=REFERENCES, **STEPPED),
    "repel, then minimise": RepelThenMinimise(start=REFERENCES, **STEPPED),
}
ATTACKS = DETERMINISTIC | {
    "NES": NES(samples=20, **STEPPED),
    "Square": Square(eps=EPS, queries=60),
    "Sparse-RS": SparseRS(eps=30, queries=60),
    "Sparse-PGD": SparsePGD(eps=30, steps=10),
    "patch": PatchAttack(eps=6, rounds=4),
    "Boundary": Boundary(norm="l2", eps=4.0, queries=80),
    "polish": Polish(eps=EPS, rounds=2, halvings=1),
    "suite": WorstCaseSuite("linf", eps=EPS, budget="quick"),
}


pytestmark = pytest.mark.usefixtures("light_suites")


def each(attacks):
    return pytest.mark.parametrize("attack", attacks.values(), ids=attacks)


@pytest.fixture
def guard():
    """In train mode, one BatchNorm frozen, one weight fixed, one gradient that its owner still needs."""
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.BatchNorm1d(16)
    guard = ClusterGuard(nn.Sequential(*layers), 3, representation_dim=6).train()
    guard.encoder[0][4].eval()
    guard.encoder[0][1].weight.requires_grad_(False)
    guard.encoder[1].weight.grad = torch.ones_like(guard.encoder[1].weight)
    guard.thresholds = torch.full((3,), 16.0)
    return guard


@pytest.fixture
def cases(guard):
    images = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return images, guard.detect(images).labels


def seeded():
    return torch.Generator().manual_seed(1)


@each(ATTACKS)
def test_modes_gradients_and_weights_stay_as_they_were(guard, cases, attack):
    """torchattacks #21, Foolbox #74, ART #484: train mode came back for frozen modules too; advertorch #113: gradients
    piled up in the parameters, and images came back attached to the graph."""
    before = copy.deepcopy(guard)
    gradients = [None if weight.grad is None else weight.grad.clone() for weight in guard.parameters()]
    attacked = attack(guard, *cases, generator=seeded())
    assert not attacked.requires_grad
    for old, new in zip(before.modules(), guard.modules(), strict=True):
        assert new.training == old.training
    for (name, old), new, gradient in zip(before.named_parameters(), guard.parameters(), gradients, strict=True):
        assert new.requires_grad == old.requires_grad, name
        assert new.grad is gradient is None or torch.equal(new.grad, gradient), name
    for name, value in before.state_dict().items():
        assert torch.equal(guard.state_dict()[name], value), name


@each(ATTACKS)
def test_rounding_beyond_the_box_is_no_error(guard, cases, attack):
    """torchattacks #136: images of −3e-8 were refused."""
    images, labels = cases
    images[0, 0, 0, 0], images[1, 0, 0, 0] = -3e-8, 1 + 1e-7
    attacked = attack(guard, images, labels, generator=seeded())
    assert (attacked[2:] != images[2:]).any()


@each(ATTACKS)
def test_targets_are_aimed_at(small_guard, attack):
    """torchattacks #32 and #121: the targeted mode of some attacks did nothing, or aimed away."""
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    small_guard.thresholds = torch.full((3,), 16.0)
    labels = small_guard.detect(images).labels
    if isinstance(attack, RepresentationMatching):
        attack = replace(attack, references=Towards(images, labels))
    for shift in (1, 2):
        targets = (labels + shift) % 3
        attacked = attack(small_guard, images, labels, targets=targets, generator=seeded())
        moved = (attacked != images).flatten(1).any(dim=1)
        assert moved.any()
        (margin, distance), (new_margin, new_distance) = (
            (
                success_margin(small_guard.evidence(x), small_guard.thresholds, labels, targets)[moved],
                small_guard.distances(x).gather(1, targets[:, None]).squeeze(1)[moved],
            )
            for x in (images, attacked)
        )
        assert ((new_margin < margin) | (new_distance < distance)).double().mean() > 0.9


@each(ATTACKS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_the_same(guard, cases, attack, context):
    """ART #498, MART #249: attacks failed, or did nothing, under no_grad."""
    expected = attack(guard, *cases, generator=seeded())
    with context():
        assert torch.equal(attack(guard, *cases, generator=seeded()), expected)


@each(ATTACKS)
def test_doubles_stay_doubles(guard, cases, attack):
    """ART #2454, torchattacks #162: everything was cast to float32, or went through NumPy."""
    images, labels = cases[0].double(), cases[1]
    if isinstance(attack, RepresentationMatching | RepelThenMinimise):
        pytest.skip("references are of the images' dtype, and these are not")
    attacked = attack(guard.double(), images, labels, generator=seeded())
    assert attacked.dtype == torch.float64


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_are_in_float32_and_of_one_image_each(guard, cases, objective):
    """AutoAttack #51, #87: under autocast, losses in half precision or averaged over the batch gave no gradient."""
    images, labels = cases
    guard.eval()

    def evaluate_on(rows):
        problem = Problem(guard, images[rows], labels[rows], None, get_norm("linf"), EPS, OBJECTIVES[objective])
        with torch.autocast("cpu", torch.bfloat16):
            return backpropagate(problem, images[rows])

    every, one = evaluate_on(slice(None)), evaluate_on(slice(3, 4))
    assert every.loss.dtype == every.margin.dtype == every.gradient.dtype == torch.float32
    assert every.loss.shape == labels.shape
    torch.testing.assert_close(every.gradient[3:4], one.gradient, rtol=0.05, atol=1e-3 * one.gradient.abs().max())


@each(ATTACKS)
def test_an_image_that_cannot_be_judged_does_not_fail_the_others(guard, cases, attack, monkeypatch):
    """Foolbox #541, #435: one image without a starting point, or with NaN in its evidence, stopped the whole batch."""
    images, labels = cases
    distances = ClusterGuard.distances

    def sick(self, batch):
        ill = batch.flatten(1).mean(dim=1) < images.flatten(1).mean(dim=1).min() + 1e-3
        usual = distances(self, batch)
        return usual / (~ill[:, None]).to(usual.dtype)

    monkeypatch.setattr(ClusterGuard, "distances", sick)
    attacked = attack(guard, images, labels, generator=seeded())
    assert attacked.isfinite().all()
    assert (attacked != images).flatten(1).any(dim=1).sum() >= 3


def test_failures_come_back_too_with_what_became_of_them(guard, cases):
    """Foolbox #230: images that an attack failed on were dropped, and nobody could tell which."""
    images, _labels = cases
    (result,) = evaluate(guard.eval(), FGSM(eps=0.02), [cases], sanity_images=0).results
    assert len(result.verdict.labels) == len(images)
    assert result.success.count < result.success.total


class NarrowDoor(nn.Module):
    """Accepts as class 1 only what no 8-bit image can be."""

    def __init__(self):
        super().__init__()
        self.thresholds = torch.tensor([1.0, 1.0])

    def evidence(self, images):
        level = images.flatten(1)[:, 0] * 255
        through = (level - level.round()).abs() > 0.4
        scores = torch.stack([~through, through], dim=1).float() + 0 * images.flatten(1).sum(1, keepdim=True)
        return Evidence(scores, torch.zeros_like(scores))


def test_attacked_images_are_judged_as_floats():
    """AutoAttack #44, TransferAttack #98: rounding to 8 bits, or saving as JPEG, undid attacks silently."""
    images, labels = torch.full((2, 1, 4, 4), 100 / 255), torch.tensor([0, 0])

    def attack(detector, images, labels, *, targets=None, generator=None):
        return images + 0.5 / 255

    (result,) = evaluate(NarrowDoor(), attack, [(images, labels)], sanity_images=0).results
    assert (result.success.count, result.success.total) == (2, 2)


def test_probabilities_instead_of_logits_raise_a_warning():
    """Foolbox #158, #618: a model that ends in softmax hands out gradients of nearly nothing."""
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    images = torch.rand(5, 1, 4, 4)
    with pytest.warns(UserWarning, match="logits"):
        ConfidenceDetector(nn.Sequential(classifier, nn.Softmax(dim=1)), 4).evidence(images)
    ConfidenceDetector(classifier, 4).evidence(images)  # warnings are errors here


@each(DETERMINISTIC)
def test_results_do_not_depend_on_the_batch(guard, cases, attack):
    """advertorch #87, DeepRobust #163: a batch's images influenced each other."""
    images, labels = cases
    guard.eval()
    whole = attack(guard, images, labels, generator=seeded())
    for row in (0, 7):
        alone = attack(guard, images[row : row + 1], labels[row : row + 1], generator=seeded())
        torch.testing.assert_close(alone, whole[row : row + 1], rtol=0, atol=1e-4)


@each(ATTACKS)
def test_randomness_comes_from_the_generator_alone(guard, cases, attack):
    """Foolbox #243: results could not be repeated."""
    first, second = (attack(guard, *cases, generator=seeded()) for _ in range(2))
    assert torch.equal(first, second)


@each(ATTACKS)
def test_thresholds_of_another_detector_make_another_detector(guard, cases, attack):
    """energy_ood #6, knn-ood #15: how a threshold turns a score into a verdict was left to the reader."""
    permissive = WithThresholds(guard.eval(), torch.full((3,), torch.inf))
    images, labels = cases
    attacked = attack(permissive, images, labels, generator=seeded())
    assert (guard(attacked).argmax(1) != labels).any()


@each(ATTACKS)
def test_an_attack_holds_no_more_images_at_a_time_than_asked_to(attack, guard):
    seen = []

    class Watched(nn.Module):
        thresholds = guard.thresholds

        def evidence(self, images):
            seen.append(len(images))
            return self.inner.evidence(images)

        def represent(self, images):
            seen.append(len(images))
            return self.inner.represent(images)

    images, labels = torch.rand(7, 1, 8, 8), torch.arange(7) % 3
    bounded = replace(attack, batch_size=3)
    watched = Watched()
    watched.inner = guard
    bounded(watched, images, labels, generator=torch.Generator().manual_seed(0))
    assert max(seen) <= 3


def test_a_detector_made_in_inference_mode_is_refused_and_its_copy_is_attacked():
    with torch.inference_mode():
        torch.manual_seed(0)
        made = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(64, 16)), 3, representation_dim=6).eval()
        made.thresholds = torch.full((3,), 9.0)
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4) % 3
    with pytest.raises(ConfigurationError, match="made inside torch"):
        PGD(**STEPPED)(made, images, labels)
    assert PGD(**STEPPED)(copy.deepcopy(made), images, labels).shape == images.shape
