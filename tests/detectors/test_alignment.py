"""`align` brings the images of a class near to its centre by the last layer alone, and keeps the labels."""

import copy

import pytest
import timm
import torch
from clusterguard import Calibrator, ClusterGuard, align
from clusterguard.detectors import GaussianClusters
from clusterguard.errors import ConfigurationError, InputError
from hypothesis import given, settings
from hypothesis import strategies as st
from quadrants import Xor, quadrants
from torch import nn
from torchvision import models

K, D = 4, 12


def problem(number=400, seed=0):
    """Images of K classes, each around a random pattern, and a linear classifier that is nearly right on them."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(K, 1, 3, D // 3, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(number) % K
    noise = 0.2 * torch.randn(number, 1, 3, D // 3, generator=generator)
    return (patterns[labels] + noise).clamp(0, 1), labels


def classifier():
    """The nearest pattern, as a linear layer on top of features."""
    patterns = torch.rand(K, 1, 3, D // 3, generator=torch.Generator().manual_seed(9)).flatten(1)
    layer = nn.Linear(D, K)
    with torch.no_grad():
        layer.weight.copy_(2 * patterns)
        layer.bias.copy_(-patterns.square().sum(dim=1))
    return nn.Sequential(nn.Flatten(), layer)


def batches(images, labels, size):
    return list(zip(images.split(size), labels.split(size), strict=True))


def distance_to_own(guard, images, labels):
    return float(guard.distances(images).detach().gather(1, labels[:, None]).mean())


def accuracy(guard, images, labels):
    return float((guard(images).argmax(dim=1) == labels).double().mean())


@settings(max_examples=15, deadline=None)
@given(copies=st.integers(1, 3), scale=st.sampled_from([1.0, 10.0, 50.0]), seed=st.integers(0, 99))
def test_images_come_nearer_to_their_centres_and_keep_their_labels(copies, scale, seed):
    guard = ClusterGuard(classifier(), K, representation_dim=copies * K, center_scale=scale)
    (images, labels), (fresh, fresh_labels) = problem(seed=seed), problem(seed=seed + 100)
    before, right = distance_to_own(guard, fresh, fresh_labels), accuracy(guard, fresh, fresh_labels)
    done = align(guard, batches(images, labels, 64))
    assert done.is_changed
    assert done.images == 400
    assert abs(done.held_out - 80) <= 1
    assert done.accuracy_after >= done.accuracy_before - 0.005
    assert done.distance_after < done.distance_before
    assert distance_to_own(guard, fresh, fresh_labels) < before
    assert accuracy(guard, fresh, fresh_labels) >= right - 0.03
    # What is reported of held-out images holds of new ones.
    assert distance_to_own(guard, fresh, fresh_labels) == pytest.approx(done.distance_after, rel=0.15)


@pytest.mark.filterwarnings("ignore:before the alignment only")
def test_a_layer_that_knows_nothing_becomes_the_regression():
    torch.manual_seed(0)
    guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(D, D)), K)
    with torch.no_grad():
        guard.encoder[0][1].weight.copy_(torch.eye(D))
        guard.encoder[0][1].bias.zero_()
    images, labels = problem()
    assert align(guard, batches(images, labels, 50)).share == 1
    # Independent solutions, one of each penalty: least squares on rows that are added for the penalty.
    inputs = images.flatten(1).double()
    centred, targets = inputs - inputs.mean(dim=0), guard.head.centers[labels].double()
    differences = []
    for power in range(-8, 3):
        penalty = (400 * 10.0**power * centred.var(dim=0, correction=0).mean()) ** 0.5
        rows = torch.cat([centred, penalty * torch.eye(D).double()])
        answers = torch.cat([targets - targets.mean(dim=0), torch.zeros(D, K).double()])
        expected = centred @ torch.linalg.lstsq(rows, answers).solution + targets.mean(dim=0)
        differences.append(float((guard.represent(images).detach() - expected).abs().max()))
    assert min(differences) < 1e-3


@pytest.mark.parametrize("size", [1, 7, 400])
def test_the_batches_do_not_matter(size):
    images, labels = problem()
    guards = [ClusterGuard(classifier(), K) for _ in range(2)]
    first, second = align(guards[0], [(images, labels)]), align(guards[1], batches(images, labels, size))
    assert first.share == second.share
    assert first.distance_after == pytest.approx(second.distance_after)
    assert torch.allclose(guards[0].represent(images), guards[1].represent(images), atol=1e-4)


@pytest.mark.parametrize(
    "build",
    [
        lambda: models.resnet18(num_classes=K),
        lambda: timm.create_model("test_resnet", num_classes=K),
        lambda: timm.create_model("dpn48b", num_classes=K),  # a convolution as the last layer
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, K)),
    ],
    ids=["torchvision", "timm", "convolution", "plain"],
)
def test_only_the_last_layer_changes(build):
    torch.manual_seed(0)
    guard = ClusterGuard(build(), K, representation_dim=2 * K).train()
    labels = torch.arange(40) % K
    images = (labels[:, None, None, None] / K + 0.3 * torch.rand(40, 3, 32, 32)).clamp(0, 1)
    guard.thresholds = torch.ones(K)
    before = {name: tensor.clone() for name, tensor in guard.state_dict().items()}
    done = align(guard, batches(images, labels, 8))
    changed = [name for name, tensor in guard.state_dict().items() if not torch.equal(tensor, before[name])]
    assert done.is_changed
    assert guard.thresholds.isnan().all()
    assert guard.training
    assert (
        len(changed) <= 5
    )  # thresholds, and the weight and the bias of one layer, and of one that repeats its outputs
    assert all(parameter.requires_grad for parameter in guard.parameters())


def test_classes_in_another_order_are_said():
    images, labels = problem()
    with pytest.warns(UserWarning, match=r"before the alignment only \d+ of \d+ images are labelled correctly"):
        align(ClusterGuard(classifier(), K), [(images, (labels + 1) % K)])


@pytest.mark.filterwarnings("ignore:before the alignment only")
@pytest.mark.parametrize("classes", [2, 4])
def test_no_order_of_the_classes_keeps_one_out(classes):
    images = torch.rand(100, 1, 3, 4)
    for labels in (torch.arange(100) % classes, torch.arange(100) * classes // 100):
        done = align(ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(D, classes)), classes), [(images, labels)])
        assert 18 <= done.held_out <= 22


@pytest.mark.parametrize(
    "spoil",
    [
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.spectral_norm,
        lambda layer: layer.register_forward_hook(lambda *_: None) and layer,
    ],
    ids=["parametrisation", "old-norm", "hook"],
)
def test_a_layer_that_is_not_what_its_weight_says_is_not_fitted(spoil):
    model = classifier()
    model[1] = spoil(model[1])
    guard, (images, labels) = ClusterGuard(model, K), problem()
    done = align(guard, [(images, labels)])  # fits the layer on top
    assert distance_to_own(guard, images, labels) == pytest.approx(done.distance_after, rel=0.15)
    assert accuracy(guard, images, labels) >= done.accuracy_after - 0.02


@pytest.mark.filterwarnings("ignore:before the alignment only")
def test_a_layer_without_a_bias_gets_one():
    torch.manual_seed(0)
    model = models.resnet18(num_classes=K)
    model.fc = nn.Linear(512, K, bias=False)
    guard = ClusterGuard(model)
    labels = torch.arange(40) % K
    images = (labels[:, None, None, None] / K + 0.3 * torch.rand(40, 3, 32, 32)).clamp(0, 1)
    align(guard, [(images, labels)])
    assert guard.encoder.fc.bias is not None
    assert guard.encoder.fc.bias.requires_grad


def test_an_aligned_guard_is_saved_and_calibrated_like_others(tmp_path):
    guard = ClusterGuard(classifier(), K)
    images, labels = problem()
    align(guard, [(images, labels)])
    Calibrator(0.2, scarce="pool").fit(guard, [problem(seed=5)])
    guard.save_pretrained(tmp_path)
    assert torch.equal(ClusterGuard.from_pretrained(tmp_path).distances(images), guard.distances(images))


class Averaged(nn.Module):
    """Two layers, none of which makes the output."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(D, K), nn.Linear(D, K)

    def forward(self, images):
        return (self.left(images.flatten(1)) + self.right(images.flatten(1))) / 2


class Reused(nn.Module):
    """A layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, images):
        return self.layer(self.layer(images.flatten(1)))


def test_representations_that_are_made_otherwise_are_refused():
    guard = ClusterGuard(timm.create_model("deit_tiny_distilled_patch16_224", num_classes=K, img_size=32))
    with pytest.raises(ConfigurationError, match="expected a representation that one linear layer makes"):
        align(guard, [(torch.rand(8, 3, 32, 32), torch.arange(8) % K)])


@pytest.mark.filterwarnings("ignore:before the alignment only")
def test_a_plain_network_of_any_end_is_aligned_on_its_outputs():
    images, labels = problem()
    for build in (Averaged, Reused):  # they get a layer on top, which is fitted
        torch.manual_seed(0)
        guard = ClusterGuard(build(), K)
        assert align(guard, [(images, labels)]).distance_after < 10


def test_what_cannot_be_aligned_is_refused():
    class Other(GaussianClusters):
        pass

    images, labels = problem()
    guard = ClusterGuard(classifier(), K)
    with pytest.raises(InputError, match="expected images of every class, got none of class 3"):
        align(guard, [(images[labels < 3], labels[labels < 3])])
    with pytest.raises(InputError, match="expected at least 5 images, got 4"):
        align(guard, [(images[:4], labels[:4])])
    with pytest.raises(InputError, match="got values from 0 to 255"):
        align(guard, [(images * 255, labels)])
    with pytest.raises(InputError, match="NaN or infinity"):
        align(guard, [(images.index_fill(0, torch.tensor([7]), torch.nan), labels)])
    untouched = copy.deepcopy(guard.state_dict())
    assert all(
        torch.equal(tensor.nan_to_num(), untouched[name].nan_to_num()) for name, tensor in guard.state_dict().items()
    )


def test_a_guard_that_would_lose_accuracy_stays_as_it_is():
    """Classes that no linear function of the features tells apart, though two layers do."""
    images, labels = quadrants(600)
    guard = ClusterGuard(Xor(), 2)
    assert accuracy(guard, images, labels) == 1
    assert align(guard, [(images, labels)]).accuracy_after >= 0.995
    assert accuracy(guard, images, labels) >= 0.99
