"""The copy that attacks in bfloat16 search on: fast, nearly equal, and without effect on the detector."""

import copy

import pytest
import torch
from clusterguard import PGD, ClusterGuard, Evidence
from clusterguard.attacks import Metered
from clusterguard.attacks._search_precision import InBfloat16
from clusterguard.attacks._working_copy import fold_batch_norms, working_copy
from clusterguard.detectors import WithThresholds
from torch import nn
from torch.nn import functional

IMAGES = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block; `early` adds the convolution's output before it is normalised."""

    def __init__(self, *, early: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.early = early

    def forward(self, maps):
        made = self.first(maps)
        return functional.relu(self.norm(made)) + (made if self.early else maps)


def new_guard(*blocks, seed=0):
    """A guard whose batch normalisation has seen images."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), *blocks, nn.Flatten(), nn.LazyLinear(8)]
    guard = ClusterGuard(nn.Sequential(*layers), num_classes=4, example=torch.rand(2, 3, 16, 16))
    guard.train()
    for _ in range(5):
        guard.represent(torch.rand(16, 3, 16, 16))
    guard.thresholds = torch.full((4,), 9.0)
    return guard.eval()


def norms(module):
    return sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())


def test_batch_normalisation_is_folded_and_evidence_stays():
    guard = new_guard(Block(early=False), Block(early=False))
    copied = working_copy(guard)
    fold_batch_norms(copied, IMAGES)
    assert (norms(guard), norms(copied)) == (3, 0)
    for before, after in zip(guard.evidence(IMAGES), copied.evidence(IMAGES), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "layers",
    [
        [Block(early=True)],
        [(shared := Block(early=False)), shared],
        [nn.BatchNorm2d(8, track_running_stats=False)],
        [nn.Conv2d(8, 8, 1), nn.Identity(), nn.ReLU(), nn.BatchNorm2d(8)],
    ],
    ids=["used twice", "called twice", "batch statistics", "not after a convolution"],
)
def test_what_cannot_be_folded_exactly_is_left(layers):
    guard = new_guard(*copy.deepcopy(nn.ModuleList(layers)))
    copied = working_copy(guard)
    fold_batch_norms(copied, IMAGES)
    for before, after in zip(guard.evidence(IMAGES), copied.evidence(IMAGES), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert norms(copied) >= 1


def test_a_layer_with_hooks_keeps_them_and_its_weights():
    guard = new_guard()
    seen = []
    convolution = next(part for part in guard.modules() if isinstance(part, nn.Conv2d))
    convolution.register_forward_hook(lambda module, inputs, output: seen.append(module.weight.dtype))
    InBfloat16(guard).evidence(IMAGES)
    assert set(seen) == {torch.float32}


class Listening(nn.Module):
    """Takes its evidence from what a hook writes down; the hook of a copy writes into the original."""

    def __init__(self, guard):
        super().__init__()
        self.guard, self.heard, self.thresholds = guard, {}, guard.thresholds
        heard = self.heard
        guard.encoder.register_forward_hook(lambda module, inputs, output: heard.update(found=output))

    def evidence(self, images):
        self.guard.evidence(images)
        distances = self.guard.head.distances(self.heard["found"].float())
        return Evidence(-distances, distances)


@pytest.mark.parametrize("seen_before", [0, 2, 12])
def test_a_detector_whose_copy_would_use_the_original_is_used_itself(seen_before):
    listening = Listening(new_guard()).eval()
    if seen_before:
        listening.evidence(IMAGES[:seen_before])
    rough = InBfloat16(listening)
    for images in (IMAGES[:2], 1 - IMAGES):
        assert torch.equal(rough.evidence(images).suspicion, listening.evidence(images).suspicion)
    assert not rough.is_rough
    attack = PGD(eps=0.1, step_size=0.02, steps=3, precision="bf16")
    assert not torch.equal(attack(listening, IMAGES, torch.arange(12) % 4), IMAGES)


@pytest.mark.parametrize("wrap", [lambda guard: guard, Metered, lambda guard: WithThresholds(guard, torch.ones(4))])
def test_an_attack_leaves_the_detector_as_it_was(wrap):
    guard = new_guard(Block(early=False))
    before = {name: value.clone() for name, value in guard.state_dict().items()}
    strides = [weight.stride() for weight in guard.parameters()]
    PGD(eps=0.1, step_size=0.02, steps=3, precision="bf16")(wrap(guard), IMAGES, torch.arange(12) % 4)
    assert all(torch.equal(value, before[name]) for name, value in guard.state_dict().items())
    assert [weight.stride() for weight in guard.parameters()] == strides
    assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in guard.parameters())
    assert norms(guard) == 2


def test_images_of_the_copy_are_counted_at_the_detector_and_trials_are_not():
    metered = Metered(new_guard())
    rough = InBfloat16(metered)
    rough.evidence(IMAGES.clone().requires_grad_()).suspicion.sum().backward()
    assert metered.cost == (12, 12)


class Remote:
    """A detector that is no module, such as a client of a service."""

    thresholds = torch.ones(2)

    def __init__(self):
        self.calls = 0

    def evidence(self, images):
        self.calls += 1
        return Evidence(images.flatten(1)[:, :2], images.flatten(1)[:, :2])


def test_what_is_no_module_or_cannot_be_copied_is_shared():
    remote = Remote()
    assert working_copy(remote) is remote
    InBfloat16(remote).evidence(IMAGES)
    assert remote.calls == 1
    around = Metered(remote)
    assert working_copy(around) is around
    guard = new_guard()
    guard.lock = __import__("threading").Lock()  # deepcopy fails on it
    assert working_copy(guard) is guard
    assert InBfloat16(guard).evidence(IMAGES).suspicion.shape == (12, 4)


def test_a_layer_that_runs_outside_autocast_still_gets_weights_that_it_can_use():
    class Exact(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, features):
            with torch.autocast("cpu", enabled=False):
                return self.layer(features.float())

    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Exact()]
    guard = ClusterGuard(nn.Sequential(*layers), num_classes=4, example=torch.rand(2, 3, 16, 16)).eval()
    rough, exact = InBfloat16(guard).evidence(IMAGES), guard.evidence(IMAGES)
    torch.testing.assert_close(rough.suspicion, exact.suspicion, rtol=0.02, atol=0.02)


def test_maps_of_one_channel_also_lead_to_channels_last():
    """A backward pass of mixed layouts takes many times as long as one of either."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()]
    guard = ClusterGuard(nn.Sequential(*layers), num_classes=4, example=torch.rand(2, 1, 16, 16)).eval()
    seen = []
    next(part for part in guard.modules() if isinstance(part, nn.Conv2d)).register_forward_hook(
        lambda module, inputs, output: seen.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    rough = InBfloat16(guard)
    rough.evidence(torch.rand(12, 1, 16, 16))
    seen.clear()  # the guard itself has judged the first images, too
    rough.evidence(torch.rand(12, 1, 16, 16))
    assert seen == [True]
