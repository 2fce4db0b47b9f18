"""Certificates of costs of windows, against every patch of a grid and against random changes."""

import itertools

import pytest
import torch
from clusterguard import Calibrator, ClusterGuard
from clusterguard.attacks import Patch
from clusterguard.certification import certified_radius, certify
from clusterguard.detectors import LocalCosts, Windows, make_local_guard
from clusterguard.errors import ConfigurationError
from clusterguard.training import TemplateTrainer
from torch import nn

NETWORKS = {
    "plain": lambda: [nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 1)],
    "strided": lambda: [nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 1)],
    "dilated": lambda: [nn.Conv2d(1, 6, 2, dilation=2), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 3, 2, stride=2)],
    "pooled": lambda: [nn.Conv2d(1, 6, 2), nn.ReLU(), nn.Sequential(nn.AvgPool2d(2, padding=1), nn.Conv2d(6, 3, 1))],
}
SIDE = 8


def make_guard(name, seed=0, thresholds=4.0):
    torch.manual_seed(seed)
    network = nn.Sequential(*NETWORKS[name]())
    last = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)][-1]
    last.weight.data.mul_(3)
    last.bias.data.copy_(torch.tensor([-1.5, 1.0, 1.5]))
    guard = make_local_guard(network, 3, example=torch.rand(1, 1, SIDE, SIDE))
    guard.thresholds = torch.full((3,), thresholds)
    return guard.requires_grad_(False)


def patched(image, side):
    """An image with patches of all kinds at each place."""
    for row, column in itertools.product(range(SIDE - side + 1), repeat=2):
        for fill in (0.0, 1.0, None, None, None):
            changed = image.clone()
            window = changed[:, row : row + side, column : column + side]
            window.copy_(torch.rand_like(window).round() if fill is None else torch.full_like(window, fill))
            yield changed


@pytest.mark.parametrize("name", NETWORKS)
def test_the_windows_are_those_that_outputs_depend_on(name):
    network = nn.Sequential(*NETWORKS[name]()).eval()
    size, stride, padding = LocalCosts(network).windows()
    image = torch.rand(1, 1, SIDE, SIDE, requires_grad=True)
    outputs = network(image)
    for place in range(outputs.shape[2]):
        (gradient,) = torch.autograd.grad(outputs[0, :, place, place].sum(), image, retain_graph=True)
        seen = gradient[0, 0].abs().sum(dim=1).nonzero().flatten()
        first = place * stride - padding
        assert seen.min() >= max(0, first)
        assert seen.max() <= first + size - 1


@pytest.mark.parametrize("name", NETWORKS)
def test_no_patch_leaves_the_bounds_of_a_proof(name):
    proved = 0
    for seed, side in itertools.product(range(3), (1, 2, 5)):
        guard = make_guard(name, seed)
        images = torch.rand(4, 1, SIDE, SIDE)
        labels = guard.distances(images).argmin(dim=1)
        guard.thresholds = guard.distances(images).amin(dim=1).amax().expand(3) + 0.1
        certificate = certify(guard, images, labels, eps=side, norm="patch")
        for row, image in enumerate(images):
            detection = guard.detect(torch.stack([*patched(image, side)]))
            wrong = ~detection.is_adversarial & (detection.labels != labels[row])
            assert not (wrong.any() and certificate.is_secure[row])
            kept = ~detection.is_adversarial & (detection.labels == labels[row])
            assert kept.all() or not certificate.is_kept[row]
        proved += int(certificate.is_secure.sum())
    assert 0 < proved < 36


class Windowed(nn.Module):
    """Tells the brightness of each window of 2 × 2 pixels from that of the others."""

    def __new__(cls):
        layer = nn.Conv2d(1, 2, 2, stride=2)
        layer.weight.data.copy_(torch.tensor([-100.0, 100.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2))
        layer.bias.data.zero_()
        return nn.Sequential(layer)


def test_the_radius_is_that_of_counting():
    """All 16 windows speak for class 0, so it needs 8 changed windows for a tie, which has no proof."""
    guard = make_local_guard(Windowed(), 2, example=torch.rand(1, 1, SIDE, SIDE))
    guard.thresholds = torch.full((2,), 16.0)
    image = torch.ones(1, 1, SIDE, SIDE)
    label = torch.zeros(1, dtype=torch.long)
    assert guard.distances(image).round().tolist() == [[0, 16]]
    assert certified_radius(guard, image, label, norm="l0").item() == 7
    # A square of side 3 meets 4 windows, one of side 4 meets 9.
    assert certified_radius(guard, image, label, norm="patch").item() == 3
    guard.thresholds = torch.full((2,), 5.0)  # class 1 must come from 16 to 5 to be accepted
    assert certified_radius(guard, image, label, norm="l0").item() == 10
    assert certified_radius(guard, image, label, norm="patch").item() == 5  # as many as one of side 4


def test_other_norms_and_networks_have_no_bounds():
    guard, images = make_guard("plain"), torch.rand(2, 1, SIDE, SIDE)
    labels = guard.detect(images).labels
    with pytest.raises(ConfigurationError, match="no bounds are known in l1"):
        certify(guard, images, labels, eps=1.0, norm="l1")
    guard.encoder[0].network[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigurationError, match="without hooks, got Conv2d"):
        certify(guard, images, labels, eps=1, norm=Patch.name)
    with pytest.raises(ConfigurationError, match="returns 4 maps, got 3"):
        make_local_guard(nn.Sequential(nn.Conv2d(1, 3, 2)), 4, example=images)
    for layer in (nn.Linear(2, 2), nn.Conv2d(1, 2, (1, 3)), nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")):
        with pytest.raises(ConfigurationError, match="expected"):
            LocalCosts(nn.Sequential(layer))
    assert LocalCosts(nn.Sequential(nn.MaxPool2d(3, stride=2), nn.Conv2d(1, 2, 3, stride=2))).windows() == Windows(
        7, 4, 0
    )


def test_a_trained_guard_of_windows_proves_patches_and_comes_back_from_a_folder(tmp_path):
    torch.manual_seed(0)
    labels = torch.arange(300) % 2
    images = (0.5 * torch.rand(300, 1, SIDE, SIDE) + 0.5 * labels.view(-1, 1, 1, 1)).clamp(0, 1)
    network = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    guard = make_local_guard(network, 2, example=images[:1])
    trainer = TemplateTrainer(guard, pixels=4, temperature=2.0, calibrator=Calibrator(0.1))
    history = trainer.fit([(images[:200], labels[:200])], [(images[200:], labels[200:])], epochs=15, progress=False)
    assert history[-1].accuracy > 0.95
    assert guard.is_calibrated
    shares = [
        certify(guard, images[200:], labels[200:], eps=side, norm="patch").is_secure.double().mean()
        for side in (1, 3, 8)
    ]
    assert shares[0] > 0.9
    assert shares[0] >= shares[1] > shares[2]
    guard.save_pretrained(tmp_path)
    again = ClusterGuard.from_pretrained(tmp_path)
    TemplateTrainer(again)
    assert not any(weight.requires_grad for weight in again.encoder[1].parameters())
    assert torch.equal(again.distances(images[:5]), guard.distances(images[:5]))
    assert certify(again, images[200:], labels[200:], eps=1, norm="patch").is_secure.double().mean() == shares[0]


def test_weights_of_another_size_than_the_layer_says_are_refused():
    guard = make_local_guard(nn.Sequential(nn.Conv2d(1, 2, 3)), 2, example=torch.rand(1, 1, SIDE, SIDE))
    guard.thresholds = torch.full((2,), 100.0)
    guard.encoder[0].network[0].weight = nn.Parameter(torch.rand(2, 1, 7, 7))
    with pytest.raises(ConfigurationError, match=r"expected weights of size \(3, 3\)"):
        certify(guard, torch.rand(1, 1, SIDE, SIDE), torch.zeros(1, dtype=torch.long), eps=1, norm="patch")
    with pytest.raises(ConfigurationError, match="dilated"):
        LocalCosts(nn.Sequential(nn.MaxPool2d(2, stride=1, padding=1, dilation=2)))


def test_a_window_that_can_overflow_is_not_proved_to_be_kept():
    example = torch.zeros(1, 1, 20, 20)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 1))
    guard = make_local_guard(network, 2, example=example, mean=0.0, std=1.0).requires_grad_(False)
    guard.thresholds = torch.full((2,), 1e6)
    signs = torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]])
    first, second = guard.encoder[0].network
    first.weight[:], first.bias[:] = 0.9e38 * signs, torch.tensor([4e36, 0.0])
    second.weight[:], second.bias[:] = torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).view(2, 2, 1, 1), 0.0
    changed = example.clone()
    changed[0, 0, 5:8, 5:8] = (signs > 0).float()
    assert guard.detect(changed).is_adversarial
    assert not certify(guard, example, torch.tensor([0]), eps=3, norm="patch").is_kept
