"""Gradients of several batches for one step; and accelerate's state, which belongs to the whole process."""

import contextlib
import itertools

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from clusterguard import FGSM, AdversarialClusterTrainer, Calibrator, TrainingOptions, evaluate, recipes
from clusterguard.detection import judge
from clusterguard.errors import ConfigurationError, TrainingStoppedError
from clusterguard.training import Original
from torch import nn
from torch.utils.data import DataLoader, Subset
from trainings import ATTACK, held_out, new_guard, weights


def fit(guard, batches, *, epochs=1, **options):
    checkpoint = options.pop("checkpoint", None)
    trainer = AdversarialClusterTrainer(
        guard,
        ATTACK,
        relabel=Original(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        options=TrainingOptions(**options),
    )
    trainer.fit(batches, batches, epochs=epochs, checkpoint=checkpoint, calibrate=False, progress=False)
    return trainer


@pytest.mark.parametrize(("count", "group", "steps"), [(4, 2, 2), (5, 2, 3), (1, 8, 1), (3, 3, 1), (3, 4, 1)])
def test_every_batch_of_an_epoch_moves_the_weights_as_part_of_a_larger_batch(blobs, count, group, steps):
    data = Subset(blobs.dataset, range(60 * count))
    large, small = new_guard(), new_guard()
    fit(large, DataLoader(data, 60 * group))
    trainer = fit(small, DataLoader(data, 60), accumulate=group)
    assert trainer.engine.steps == steps
    torch.testing.assert_close(weights(small), weights(large), rtol=1e-4, atol=1e-6)
    assert all(weight.grad is None for weight in small.parameters())


def test_gradients_of_before_a_training_have_no_part_in_it(blobs):
    plain, used = new_guard(), new_guard()
    used(next(iter(blobs))[0]).sum().backward()
    for guard in (plain, used):
        fit(guard, blobs)
    assert torch.equal(weights(plain), weights(used))


@pytest.mark.parametrize("group", [2, 3, 4, 20])
def test_a_resumed_accumulation_ends_where_an_uninterrupted_one_does(blobs, tmp_path, group):
    straight, resumed = new_guard(), new_guard()
    whole = fit(straight, blobs, epochs=3, accumulate=group)
    for epochs in (1, 2, 3):
        last = fit(resumed, blobs, epochs=epochs, accumulate=group, checkpoint=tmp_path / "run.pt")
    assert torch.equal(weights(straight), weights(resumed))
    assert last.engine.steps == whole.engine.steps


@pytest.mark.parametrize("group", [1, 3, 4, 20])
def test_an_accumulation_stopped_after_every_step_ends_where_an_uninterrupted_one_does(blobs, tmp_path, group):
    def fit(**options):
        trainer = AdversarialClusterTrainer(
            new_guard(nn.BatchNorm1d(16)), ATTACK, refresh_every=2, options=TrainingOptions(accumulate=group)
        )
        trainer.fit(blobs, blobs, epochs=2, calibrate=False, progress=False, **options)
        return trainer

    straight, stops = fit(), 0
    while stops < 30:
        with contextlib.suppress(TrainingStoppedError):
            last = fit(checkpoint=tmp_path / "run.pt", checkpoint_every=1, stop_when=lambda: True)
            break
        stops += 1
    assert stops == straight.engine.steps == last.engine.steps
    torch.testing.assert_close(last.guard.state_dict(), straight.guard.state_dict(), rtol=0, atol=0, equal_nan=True)
    assert [record.loss for record in last.history] == [record.loss for record in straight.history]


def test_trainings_take_turns_without_changing_each_other(blobs, fresh_accelerate):
    def new_trainer(group):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=group)
        options = TrainingOptions(accelerator=accelerator)
        return AdversarialClusterTrainer(new_guard(), ATTACK, options=options)

    trainers = [new_trainer(4), new_trainer(1)]
    for epochs, trainer in itertools.product((1, 2), trainers):
        trainer.fit(blobs, blobs, epochs=epochs, calibrate=False, progress=False)
    assert [trainer.engine.steps for trainer in trainers] == [6, 20]


def test_a_training_without_an_accelerator_neither_sees_nor_leaves_accelerates_state(blobs, fresh_accelerate):
    alone = fit(new_guard(), blobs)
    assert (AcceleratorState._shared_state, GradientState._shared_state, PartialState._shared_state) == ({}, {}, {})
    theirs = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
    theirs.sync_gradients = False
    seen = set()
    guard = new_guard()
    guard.encoder[0][1].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    after = fit(guard, blobs)
    assert seen == {torch.float32}
    assert torch.equal(weights(alone.guard), weights(guard))
    assert after.engine.steps == len(blobs)
    assert (theirs.mixed_precision, theirs.gradient_accumulation_steps) == ("bf16", 3)
    assert not theirs.sync_gradients


def test_a_training_with_an_accelerator_steps_whatever_the_script_has_told_accelerate(blobs, fresh_accelerate):
    accelerator = Accelerator(cpu=True)
    options = TrainingOptions(accelerator=accelerator)
    accelerator.sync_gradients = False
    Accelerator(cpu=True, gradient_accumulation_steps=7)
    trainer = AdversarialClusterTrainer(new_guard(), ATTACK, options=options)
    trainer.fit(blobs, blobs, epochs=1, calibrate=False, progress=False)
    alone = AdversarialClusterTrainer(new_guard(), ATTACK)
    alone.fit(blobs, blobs, epochs=1, calibrate=False, progress=False)
    assert trainer.engine.steps == len(blobs)
    assert torch.equal(weights(trainer.guard), weights(alone.guard))
    assert not accelerator.sync_gradients


@pytest.mark.parametrize("reset", [lambda: AcceleratorState._reset_state(True), GradientState._reset_state])
def test_an_accelerator_whose_state_is_gone_is_refused_in_a_sentence(blobs, fresh_accelerate, reset):
    """As in a notebook, of which a cell runs again."""
    guard = new_guard()
    accelerator = Accelerator()
    options = TrainingOptions(accelerator=accelerator)
    trainer = AdversarialClusterTrainer(guard, ATTACK, options=options)
    trainer.fit(blobs, held_out(blobs), epochs=1, calibrate=False, progress=False)
    guard.thresholds = torch.full((3,), 9.0)
    reset()
    for use in (
        lambda: trainer.fit(blobs, held_out(blobs), epochs=2, calibrate=False, progress=False),
        lambda: AdversarialClusterTrainer(guard, ATTACK, options=options).engine,
        lambda: TrainingOptions(accelerator=accelerator),
        lambda: judge(guard, held_out(blobs), accelerator=accelerator),
        lambda: Calibrator(0.1).fit(guard, held_out(blobs), accelerator=accelerator),
        lambda: evaluate(guard, {"FGSM": FGSM(eps=0.1)}, list(held_out(blobs)), accelerator=accelerator),
    ):
        with pytest.raises(ConfigurationError, match=r"_reset_state has deleted; make a new Accelerator"):
            use()
    for kind in (AcceleratorState, GradientState):
        kind._reset_state()
    options = TrainingOptions(accelerator=Accelerator())
    trainer = AdversarialClusterTrainer(guard, ATTACK, options=options)
    trainer.fit(blobs, held_out(blobs), epochs=1, calibrate=False, progress=False)


def test_a_launchers_precision_is_followed_and_another_of_the_script_refused(blobs, fresh_accelerate, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert TrainingOptions().make_accelerator().mixed_precision == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(ConfigurationError, match=r"launcher's precision, no, got .* bf16"):
        fit(new_guard(), blobs)


def test_a_recipes_schedule_counts_the_last_small_group(blobs, fresh_accelerate):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    trainer = recipes.robust(new_guard(), blobs, epochs=3, eps=0.2, accelerator=accelerator)
    trainer.fit(blobs, blobs, epochs=3, calibrate=False, progress=False)
    assert trainer.engine.steps == trainer.scheduler.total_steps == 9


def test_a_group_has_at_least_one_batch():
    with pytest.raises(ConfigurationError, match="accumulate of at least 1"):
        TrainingOptions(accumulate=0)


def test_the_number_of_another_accelerator_is_warned_of(fresh_accelerate):
    first = Accelerator(cpu=True, gradient_accumulation_steps=4)
    second = Accelerator(cpu=True)
    with pytest.warns(UserWarning, match=r"several accelerators.*accumulate=1\)"):
        TrainingOptions(accelerator=first)
    assert TrainingOptions(accelerator=first, accumulate=4).batches_per_step == 4
    assert second.gradient_accumulation_steps == 1


def test_an_accelerator_read_before_another_was_made_is_warned_of_only_when_its_number_has_changed(fresh_accelerate):
    first = Accelerator(cpu=True, gradient_accumulation_steps=4)
    assert TrainingOptions(accelerator=first).accumulate == 4
    second = Accelerator(cpu=True)
    assert TrainingOptions(accelerator=second).accumulate == 1  # all others were read before, so it is the newest
    with pytest.warns(UserWarning, match="several accelerators"):
        TrainingOptions(accelerator=first)
