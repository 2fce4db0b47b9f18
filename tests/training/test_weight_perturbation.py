import copy

import pytest
import torch
from accelerate import Accelerator
from clusterguard import AdversarialClusterTrainer, DetectorTrainer, TrainingOptions
from clusterguard.errors import ConfigurationError, TrainingDivergedError
from clusterguard.training import TrainingStep
from torch import nn
from torch.utils.data import DataLoader
from trainings import ATTACK, fit, new_guard, weights


class Plain(DetectorTrainer):
    """Cross-entropy, remembering the loss of every pass."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = []

    def training_step(self, images, labels, generator):
        logits = self.detector(images)
        loss = nn.functional.cross_entropy(logits, labels)
        self.losses.append(loss.detach())
        return TrainingStep(loss, (logits.argmax(1) == labels).sum())


def moved_up(guard, loss_of, share):
    """A copy whose matrices lie a share of their norms up the loss, by hand."""
    above = copy.deepcopy(guard)
    loss_of(above).backward()
    with torch.no_grad():
        for weight in above.parameters():
            if weight.ndim > 1:
                weight += share * weight.norm() * weight.grad / weight.grad.norm()
    above.zero_grad()
    return above


def test_perturbed_weights_give_the_gradient_and_the_old_ones_take_the_step(blobs):
    guard, (images, labels) = new_guard(nn.BatchNorm1d(16)), next(iter(blobs))
    expected, plain = copy.deepcopy(guard).train(), copy.deepcopy(guard)

    def loss_of(model):
        return nn.functional.cross_entropy(model(images), labels)

    above = moved_up(expected, loss_of, 0.05)
    loss_of(above).backward()
    with torch.no_grad():
        for weight, other in zip(expected.parameters(), above.parameters(), strict=True):
            weight -= 0.1 * other.grad
    for model, options in ((guard, TrainingOptions(weight_perturbation=0.05)), (plain, TrainingOptions())):
        trainer = Plain(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), options=options)
        trainer.fit([(images, labels)], blobs, epochs=1, calibrate=False, progress=False)
        assert trainer.history[0].loss == pytest.approx(trainer.losses[0].item())
        assert len(trainer.losses) == (1 if model is plain else 2)
    torch.testing.assert_close(weights(guard), weights(expected), rtol=1e-4, atol=1e-6)
    assert (weights(guard) - weights(plain)).norm() > 1e-5
    statistics = [dict(model.named_buffers()) for model in (guard, plain)]
    assert all(torch.equal(value, statistics[1][name]) for name, value in statistics[0].items() if "running" in name)
    assert statistics[0]["encoder.0.3.num_batches_tracked"] == 1


def test_without_a_gradient_nothing_moves(blobs):
    class Flat(Plain):
        def training_step(self, images, labels, generator):
            step = super().training_step(images, labels, generator)
            return step._replace(loss=0 * step.loss)

    guard = new_guard()
    optimizer = torch.optim.SGD(guard.parameters(), lr=0.1)
    trainer = Flat(guard, optimizer=optimizer, options=TrainingOptions(weight_perturbation=100.0))
    with (
        pytest.warns(UserWarning, match="no weight has changed in the first epoch"),
        pytest.raises(ConfigurationError, match="none changed in 1 step"),
    ):
        trainer.fit([next(iter(blobs))], blobs, epochs=1, calibrate=False, progress=False)
    assert trainer.losses[0] == trainer.losses[1]
    assert torch.equal(weights(guard), weights(new_guard()))


def test_where_only_biases_are_trained_nothing_moves(blobs):
    guards = [new_guard(), new_guard()]
    for guard, options in zip(guards, (TrainingOptions(weight_perturbation=0.1), None), strict=True):
        for weight in guard.parameters():
            weight.requires_grad_(weight.ndim == 1)
        fit(guard, blobs, epochs=1, options=options)
    assert torch.equal(weights(guards[0]), weights(guards[1]))
    assert not torch.equal(weights(guards[0]), weights(new_guard()))


def test_weight_perturbation_attacks_each_batch_once_and_off_it_costs_nothing(blobs):
    passes, attacks = [], []

    def attack(detector, images, labels, **_):
        attacks.append(detector.detector)
        return images

    for options in (TrainingOptions(), TrainingOptions(weight_perturbation=0.01)):
        guard = new_guard()
        guard.encoder.register_forward_hook(lambda module, *_: passes.append(module.training))
        fit(guard, [next(iter(blobs))] * 2, epochs=1, attack=attack, options=options)
        assert len(attacks) == 2
        assert passes.count(True) == 2 * (1 if options.weight_perturbation is None else 2)
        passes.clear()
        attacks.clear()


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_weights_are_put_back_exactly_when_the_second_pass_fails(blobs, failure):
    guard = new_guard(nn.BatchNorm1d(16))

    class Failing(Plain):
        def training_step(self, images, labels, generator):
            step = super().training_step(images, labels, generator)
            if len(self.losses) == 2:
                assert not torch.equal(weights(guard), before)
                raise failure
            statistics.append(guard.encoder[0][3].running_mean.clone())
            return step

    before, statistics = weights(guard), []
    trainer = Failing(guard, options=TrainingOptions(weight_perturbation=0.1))
    with pytest.raises(failure):
        trainer.fit(blobs, blobs, epochs=1, calibrate=False, progress=False)
    assert torch.equal(weights(guard), before)
    assert torch.equal(guard.encoder[0][3].running_mean, statistics[0])


def test_a_loss_that_explodes_at_perturbed_weights_leaves_the_ones_before(blobs):
    guard = new_guard()

    class Exploding(Plain):
        def training_step(self, images, labels, generator):
            step = super().training_step(images, labels, generator)
            return step if len(self.losses) % 2 else step._replace(loss=step.loss * torch.inf)

    before = weights(guard)
    optimizer = torch.optim.SGD(guard.parameters(), lr=0.1)
    trainer = Exploding(guard, optimizer=optimizer, options=TrainingOptions(weight_perturbation=0.1))
    with pytest.raises(TrainingDivergedError, match="inf at step 0"):
        trainer.fit(blobs, blobs, epochs=1, calibrate=False, progress=False)
    assert torch.equal(weights(guard), before)
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in guard.parameters())


def test_weight_perturbation_goes_on_from_within_an_epoch_to_the_same_weights(blobs, tmp_path):
    def make():
        guard = new_guard(nn.BatchNorm1d(16), nn.Dropout(0.2))
        options = TrainingOptions(weight_perturbation=0.02, average_decay=0.9, clip_norm=5.0)
        return AdversarialClusterTrainer(guard, ATTACK, refresh_every=3, options=options)

    loader = DataLoader(blobs.dataset, batch_size=100, shuffle=True)
    straight, stopped, resumed = make(), make(), make()
    torch.manual_seed(3)
    straight.fit(loader, blobs, epochs=2, calibrate=False, progress=False)

    def stop(batches, after=stopped.after_step):
        after(batches)
        if stopped.engine.steps == 9:
            raise KeyboardInterrupt

    stopped.after_step = stop
    options = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 2, "calibrate": False, "progress": False}
    torch.manual_seed(3)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(loader, blobs, epochs=2, **options)
    resumed.fit(loader, blobs, epochs=2, **options)
    ends = [
        {**dict(trainer.guard.named_buffers()), "weights": weights(trainer.guard)} for trainer in (straight, resumed)
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0] if name != "thresholds")


def test_accumulated_batches_are_each_perturbed_on_their_own(blobs, fresh_accelerate):
    guard, (images, labels) = new_guard(), next(iter(blobs))
    halves = [(images[:30], labels[:30]), (images[30:], labels[30:])]
    expected = copy.deepcopy(guard)
    gradients = []
    for half_images, half_labels in halves:

        def loss_of(model, half_images=half_images, half_labels=half_labels):
            return nn.functional.cross_entropy(model(half_images), half_labels)

        above = moved_up(expected, loss_of, 0.05)
        loss_of(above).backward()
        gradients.append([weight.grad for weight in above.parameters()])
    with torch.no_grad():
        for weight, first, second in zip(expected.parameters(), *gradients, strict=True):
            weight -= 0.1 * (first + second) / 2
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    options = TrainingOptions(weight_perturbation=0.05, accelerator=accelerator)
    trainer = Plain(guard, optimizer=torch.optim.SGD(guard.parameters(), lr=0.1), options=options)
    trainer.fit(halves, blobs, epochs=1, calibrate=False, progress=False)
    assert trainer.engine.steps == 1
    torch.testing.assert_close(weights(guard), weights(expected), rtol=1e-4, atol=1e-6)
