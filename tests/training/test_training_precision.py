import pytest
import torch
from accelerate import Accelerator
from clusterguard import PGD, AdversarialClusterTrainer, ClusterGuard, TrainingOptions
from clusterguard.attacks import _search_precision as attack_precision
from clusterguard.errors import ConfigurationError, PersistenceError, TrainingDivergedError
from clusterguard.training import _resuming
from clusterguard.training import _step_precision as training_precision
from clusterguard.training._faulty_convolutions import find_faulty_convolution
from torch import nn
from trainings import ATTACK, fit, weights


def new_guard(seed=0):
    """A guard whose network convolves."""
    torch.manual_seed(seed)
    convolutions = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU())
    backbone = nn.Sequential(convolutions, nn.Flatten(), nn.LazyLinear(16), nn.ReLU())
    return ClusterGuard(backbone, num_classes=3, example=torch.rand(2, 1, 8, 8))


def second_convolution(guard):
    return [module for module in guard.modules() if isinstance(module, nn.Conv2d)][1]


@pytest.fixture
def fast(monkeypatch):
    """What "auto" takes, in this order."""
    choices = ["bf16"]
    monkeypatch.setattr(_resuming, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(training_precision, "choose_precision", lambda detector, images, labels: choices.pop(0))
    return choices


def test_a_training_in_bfloat16_attacks_and_learns_in_it_and_judges_in_float32(blobs):
    guard, seen = new_guard(), set()
    second_convolution(guard).register_forward_hook(
        lambda module, inputs, output: seen.add((output.dtype, output.requires_grad))
    )
    trainer = fit(guard, blobs, epochs=4, options=TrainingOptions(precision="bf16"))
    assert (torch.bfloat16, True) in seen  # training and attack
    assert (torch.float32, True) not in seen
    assert (torch.float32, False) in seen  # thresholds
    assert trainer.history[-1].loss < trainer.history[0].loss
    assert {record.precision for record in trainer.history} == {"bf16"}
    assert {weight.dtype for weight in guard.parameters()} == {torch.float32}
    assert guard.distances(next(iter(blobs))[0]).dtype == torch.float32


def test_a_step_in_bfloat16_is_nearly_that_in_float32(blobs):
    """Also after an attack, whose weights need no gradients: none that it cast may serve the loss."""
    steps = []
    for precision in ("float32", "bf16"):
        guard = new_guard()
        before = [weight.detach().clone() for weight in guard.parameters()]
        fit(guard, [next(iter(blobs))], epochs=1, options=TrainingOptions(precision=precision))
        steps.append([weight.detach() - old for weight, old in zip(guard.parameters(), before, strict=True)])
    for exact, rough in zip(*steps, strict=True):
        assert torch.cosine_similarity(exact.flatten(), rough.flatten(), dim=0) > 0.98
        assert (rough.norm() / exact.norm()).item() == pytest.approx(1, abs=0.1)


def test_bfloat16_is_not_taken_where_torch_computes_gradients_wrongly(blobs, fast, fresh_accelerate):
    """A strided convolution on one pixel: torch leaves the gradients of weights that meet only padding unwritten."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.Flatten())
    network.append(nn.Linear(8, 8))
    guard = ClusterGuard(network, num_classes=3, example=torch.rand(2, 1, 8, 8))
    theirs = Accelerator(cpu=True, mixed_precision="bf16")
    for options in (TrainingOptions(precision="bf16"), TrainingOptions(accelerator=theirs)):
        with pytest.raises(ConfigurationError, match=r"or larger images, because .* the weights of Conv2d"):
            fit(guard, blobs, epochs=1, options=options)
    (layer,) = (module for module in guard.modules() if isinstance(module, nn.Conv2d))
    before = layer.weight.detach().clone()
    assert fit(guard, blobs, epochs=1, options=TrainingOptions(precision="auto")).history[0].precision == "float32"
    after = layer.weight.detach()
    assert after[:, :, 0, 0].equal(before[:, :, 0, 0])
    assert not after[:, :, 1, 1].equal(before[:, :, 1, 1])


@pytest.mark.parametrize(("stride", "size"), [(2, 1), (2, 2), (1, 1), (3, 2), (3, 3)])
def test_gradients_of_weights_in_bfloat16_are_right_unless_we_say_so(stride, size):
    layer = nn.Conv2d(16, 32, 3, stride=stride, padding=1, bias=False)
    detector = nn.Sequential(layer)
    detector.evidence = detector.forward
    images = torch.rand(4, 16, size, size)
    if find_faulty_convolution(detector, images) is not None:
        assert size < stride
        return
    (exact,) = torch.autograd.grad(layer(images).square().sum(), layer.weight)
    for _ in range(3):
        torch.full((2 * layer.weight.numel(),), torch.nan)  # what memory may hold that is not written
        with torch.autocast("cpu", torch.bfloat16):
            outputs = layer(images).float()
        (rough,) = torch.autograd.grad(outputs.square().sum(), layer.weight)
        assert (rough - exact).abs().max() < 0.03 * exact.abs().max()


@pytest.mark.parametrize(
    ("options", "is_last"),
    [
        ({}, False),
        ({"precision": "bf16"}, True),
        ({"precision": "bf16", "memory_format": "contiguous"}, False),
        ({"memory_format": "channels_last"}, True),
    ],
)
def test_channels_come_last_where_it_pays_or_is_asked_for_and_weights_end_as_they_were(blobs, options, is_last):
    guard, seen = new_guard(), set()
    second_convolution(guard).register_forward_hook(
        lambda module, inputs, output: seen.add(output.is_contiguous(memory_format=torch.channels_last))
    )
    fit(guard, blobs, epochs=1, options=TrainingOptions(**options))
    assert seen == {is_last}
    assert all(weight.is_contiguous() for weight in guard.parameters())


def test_weights_end_as_they_were_also_if_training_fails(blobs):
    guard = new_guard()
    optimizer = torch.optim.SGD(guard.parameters(), lr=1e30)
    with pytest.raises(TrainingDivergedError):
        fit(guard, blobs, epochs=3, optimizer=optimizer, options=TrainingOptions(precision="bf16"))
    assert all(weight.is_contiguous() for weight in guard.parameters())


def test_auto_takes_one_precision_for_all_steps_and_a_resumed_training_keeps_it(blobs, tmp_path, fast):
    options = TrainingOptions(precision="auto")
    trainer, _ = train_for(1, blobs, tmp_path, options)
    assert trainer.history[0].precision == "bf16"
    fast[:] = ["float32"]
    trainer, guard = train_for(2, blobs, tmp_path, options)
    assert [record.precision for record in trainer.history] == ["bf16", "bf16"]
    fast[:] = ["bf16"]
    _, straight = train_for(2, blobs, tmp_path / "other", options)
    assert torch.equal(weights(guard), weights(straight))


def test_a_choice_of_bfloat16_is_not_kept_on_a_machine_without_it(blobs, tmp_path, fast, monkeypatch):
    options = TrainingOptions(precision="auto")
    train_for(1, blobs, tmp_path, options)
    monkeypatch.setattr(_resuming, "has_bfloat16", lambda device: False)
    with pytest.warns(UserWarning, match="goes on in float32"):
        trainer, _ = train_for(2, blobs, tmp_path, options)
    assert [record.precision for record in trainer.history] == ["bf16", "float32"]


def test_bfloat16_that_was_asked_for_is_kept_on_a_machine_without_it(blobs, tmp_path, monkeypatch):
    monkeypatch.setattr(_resuming, "has_bfloat16", lambda device: False)
    options = TrainingOptions(precision="bf16")
    train_for(1, blobs, tmp_path, options)
    trainer, _ = train_for(2, blobs, tmp_path, options)
    assert [record.precision for record in trainer.history] == ["bf16", "bf16"]


def train_for(epochs, blobs, folder, options):
    folder.mkdir(exist_ok=True)
    guard = new_guard()
    torch.manual_seed(0)
    trainer = AdversarialClusterTrainer(guard, ATTACK, options=options)
    checkpoint = folder / "run.pt"
    trainer.fit(blobs, blobs, epochs=epochs, calibrate=False, progress=False, checkpoint=checkpoint)
    return trainer, guard


def test_auto_is_float32_for_a_network_that_fails_in_bfloat16(blobs, monkeypatch):
    monkeypatch.setattr(attack_precision, "has_bfloat16", lambda device: True)

    class Picky(nn.Module):
        def forward(self, images):
            features = images.flatten(1) @ torch.eye(64)
            if features.dtype != torch.float32:
                raise RuntimeError("not implemented for BFloat16")
            return features

    torch.manual_seed(0)
    guard = ClusterGuard(nn.Sequential(Picky(), nn.Linear(64, 16)), num_classes=3, example=torch.rand(2, 1, 8, 8))
    trainer = fit(guard, blobs, epochs=1, options=TrainingOptions(precision="auto"))
    assert trainer.history[0].precision == "float32"


def test_a_checkpoint_of_another_precision_is_refused(blobs, tmp_path):
    train_for(1, blobs, tmp_path, TrainingOptions(precision="bf16"))
    with pytest.raises(PersistenceError, match="precision"):
        train_for(2, blobs, tmp_path, TrainingOptions())


def test_an_attack_with_a_precision_of_its_own_works_within(blobs):
    attack = PGD(eps=0.1, step_size=0.05, steps=2, precision="bf16")
    trainer = fit(new_guard(), blobs, epochs=1, attack=attack, options=TrainingOptions(precision="bf16"))
    assert trainer.history[0].loss < float("inf")


def test_options_that_cannot_work_are_refused(blobs, fresh_accelerate):
    with pytest.raises(ConfigurationError, match="'float32', 'bf16' or 'auto', got 'fp16'"):
        TrainingOptions(precision="fp16")
    with pytest.raises(ConfigurationError, match="'contiguous' or 'channels_last', got 'nhwc'"):
        TrainingOptions(memory_format="nhwc")
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    with pytest.raises(ConfigurationError, match="beside an accelerator that sets the precision"):
        fit(new_guard(), blobs, options=TrainingOptions(accelerator=accelerator, precision="bf16"))


class Viewing(nn.Module):
    """Flattens feature maps with `view`, which contiguous maps alone allow."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3))

    def forward(self, images):
        maps = self.convolutions(images)
        return maps.view(maps.size(0), -1)


def viewing_guard():
    torch.manual_seed(0)
    return ClusterGuard(Viewing(), num_classes=3, example=torch.rand(2, 1, 8, 8))


def test_a_network_that_needs_contiguous_maps_trains_in_bfloat16_and_is_attacked_in_it(blobs):
    guard = viewing_guard()
    trainer = fit(guard, blobs, options=TrainingOptions(precision="bf16"))
    assert trainer.history[-1].loss < trainer.history[0].loss
    guard.thresholds = torch.full((3,), 9.0)
    images, labels = next(iter(blobs))
    attacked = PGD(eps=0.1, step_size=0.02, steps=3, precision="bf16")(guard, images, labels)
    assert not torch.equal(attacked, images)
    with pytest.raises(ConfigurationError, match="memory_format='contiguous', because the network fails"):
        fit(viewing_guard(), blobs, options=TrainingOptions(memory_format="channels_last"))


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_with_moments_goes_on_from_them_in_another_layout(blobs, fused):
    """Fused kernels read weights and moments as flat memory, so both must have the same layout."""
    ends = []
    for layout in ("contiguous", "channels_last"):
        guard = new_guard()
        optimizer = torch.optim.SGD(guard.parameters(), lr=1e-3, momentum=0.9, fused=fused)
        for memory_format in ("contiguous", layout, "contiguous"):
            fit(guard, blobs, epochs=1, optimizer=optimizer, options=TrainingOptions(memory_format=memory_format))
        ends.append(weights(guard))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-6)
