import copy
from contextlib import nullcontext

import pytest
import torch
from clusterguard import PGD, AdversarialClusterTrainer, ClusterGuard, TrainingOptions
from clusterguard._support import read_progress, save_progress
from clusterguard.errors import (
    ConfigurationError,
    InputError,
    PersistenceError,
    TooFewCalibrationExamplesError,
    TrainingDivergedError,
    TrainingStoppedError,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainings import ATTACK, held_out, new_guard, train, weights


def test_equal_seeds_give_equal_weights_and_others_do_not(blobs):
    runs = []
    for seed in (0, 0, 1):
        guard = new_guard(nn.Dropout(0.2))
        train(guard, blobs, seed=seed, calibrate=False)
        runs.append(weights(guard))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(blobs, tmp_path):
    straight = new_guard(nn.Dropout(0.2), nn.BatchNorm1d(16))
    whole = train(straight, blobs, epochs=3)

    def interrupt(record):
        if record.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            new_guard(nn.Dropout(0.2), nn.BatchNorm1d(16)),
            blobs,
            epochs=3,
            checkpoint=tmp_path / "run.pt",
            on_epoch_end=interrupt,
        )
    resumed = new_guard(nn.Dropout(0.2), nn.BatchNorm1d(16), seed=5)
    with pytest.warns(UserWarning, match="began from other weights than this detector has"):
        parts = train(resumed, blobs, epochs=3, seed=9, checkpoint=tmp_path / "run.pt")
    assert torch.equal(weights(straight), weights(resumed))
    assert torch.equal(straight.thresholds, resumed.thresholds)
    assert [record.loss for record in parts] == [record.loss for record in whole]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.pt", "run.pt.previous"]


def test_a_run_stopped_after_every_few_steps_ends_where_an_uninterrupted_one_does(blobs, tmp_path):
    def fit(**options):
        trainer = AdversarialClusterTrainer(new_guard(nn.BatchNorm1d(16)), ATTACK, refresh_every=2)
        if options:
            options["stop_when"] = lambda: trainer.engine.steps % 4 == 0
        trainer.fit(blobs, blobs, epochs=2, calibrate=False, progress=False, **options)
        return trainer

    straight = fit()
    for steps in range(4, straight.engine.steps + 1, 4):
        with pytest.raises(TrainingStoppedError, match=rf"after {steps} steps; fit with .*run.pt goes on"):
            fit(checkpoint=tmp_path / "run.pt")
    stopped = fit(checkpoint=tmp_path / "run.pt")
    ends = [{**trainer.detector.state_dict(), "tau": trainer.thresholds} for trainer in (stopped, straight)]
    torch.testing.assert_close(*ends, rtol=0, atol=0, equal_nan=True)
    assert [record.loss for record in stopped.history] == [record.loss for record in straight.history]


@pytest.mark.parametrize("options", [{"epochs": "3"}, {"epochs": 1.5}, {"epochs": 1, "checkpoint_every": "2"}])
def test_what_is_counted_is_a_whole_number(blobs, options):
    with pytest.raises(ConfigurationError, match="a whole number as"):
        AdversarialClusterTrainer(new_guard(), ATTACK).fit(blobs, blobs, **options)


@pytest.mark.parametrize("place", ["file/c.pt", "file/deeper/c.pt", "."])
def test_a_checkpoint_where_no_file_can_be_is_refused_before_training(blobs, tmp_path, place):
    (tmp_path / "file").write_text("taken")
    guard = new_guard()
    before = weights(guard)
    with pytest.raises(
        ConfigurationError, match=r"expected the path of a file that can be written, got '.*choose anoth"
    ):
        train(guard, blobs, checkpoint=tmp_path / place)
    assert torch.equal(weights(guard), before)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_second_training_on_the_file_of_one_that_is_going_on_is_told_so(blobs, tmp_path):
    def begin_another(record):
        train(new_guard(), blobs, epochs=1, calibrate=False, checkpoint=tmp_path / "other.pt")
        with pytest.raises(PersistenceError, match=r"run\.pt is being written by another run; wait until that has"):
            train(new_guard(), blobs, epochs=1, calibrate=False, checkpoint=tmp_path / "run.pt")

    fit = {"calibrate": False, "checkpoint": tmp_path / "run.pt"}
    train(new_guard(), blobs, epochs=1, on_epoch_end=begin_another, **fit)
    assert len(train(new_guard(), blobs, epochs=2, **fit)) == 2
    assert not list(tmp_path.glob("*.lock"))


def test_what_may_be_stopped_needs_a_checkpoint(blobs):
    trainer = AdversarialClusterTrainer(new_guard(), ATTACK)
    with pytest.raises(ConfigurationError, match="would be lost"):
        trainer.fit(blobs, blobs, epochs=1, stop_when=lambda: True)
    assert not trainer.engine.steps


class Interrupted:
    """Batches that end with Ctrl-C."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        yield from self.batches
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("theirs", "processes", "batches", "error", "reason"),
    [
        ({}, 2, 4, PersistenceError, "written by 2 processes; go on with as many, not with 1"),
        ({"width": 8}, 1, 4, PersistenceError, "out_features was 8, is 16"),
        ({"options": TrainingOptions(average_decay=0.9)}, 1, 4, PersistenceError, "another run"),
        ({}, 1, 1, InputError, "at least 2 batches"),
    ],
)
def test_a_refused_checkpoint_changes_nothing(blobs, tmp_path, theirs, processes, batches, error, reason):
    def new_trainer(width=16, options=None):
        guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 16)), num_classes=3)
        return AdversarialClusterTrainer(guard, ATTACK, refresh_every=1, options=options)

    file, some = tmp_path / "run.pt", list(blobs)[:4]
    with pytest.raises(KeyboardInterrupt):
        new_trainer(**theirs).fit(
            Interrupted(some[:2]), some, epochs=1, checkpoint=file, checkpoint_every=2, calibrate=False, progress=False
        )
    state = read_progress(file, "training", hint="").state
    state["values"]["processes"] *= processes
    save_progress(file, "training", state)

    trainer = new_trainer()
    trainer.fit(some, some, epochs=1, calibrate=False, progress=False)
    trainer.detector.eval().thresholds = torch.ones(3)

    def everything():
        guard, adam = trainer.detector, trainer.optimizer.state.values()
        rest = trainer.history, trainer.epochs_done, trainer.engine.steps, guard.calibration, guard.training
        return copy.deepcopy(
            [*guard.state_dict().values(), trainer.thresholds, *(t for s in adam for t in s.values())]
        ), rest

    tensors, rest = everything()
    with pytest.raises(error, match=reason):
        trainer.fit(some[:batches], some, epochs=3, checkpoint=file, calibrate=False, progress=False)
    assert everything()[1] == rest
    torch.testing.assert_close(everything()[0], tensors, rtol=0, atol=0)


def test_a_loss_that_is_not_finite_stops_and_keeps_good_weights(blobs):
    guard = new_guard()

    def attack(detector, images, labels, *, targets=None, generator=None):
        calls.append(1)
        return images * torch.nan if len(calls) > 13 else images

    calls: list[int] = []
    guard.thresholds = torch.ones(3)
    with pytest.raises(TrainingDivergedError, match=r"nan at step 13.*weights of step 10"):
        train(guard, blobs, attack=attack)
    assert weights(guard).isfinite().all()
    assert not guard.is_calibrated


def test_a_calibration_set_that_cannot_suffice_is_refused_before_training(blobs):
    few = DataLoader(TensorDataset(*(part[:30] for part in held_out(blobs).dataset.tensors)), batch_size=30)
    guard = new_guard()
    before = weights(guard)
    with pytest.raises(TooFewCalibrationExamplesError, match="class 0: 10, class 1: 10, class 2: 10; add"):
        AdversarialClusterTrainer(guard, ATTACK).fit(blobs, few, epochs=1, progress=False)
    assert torch.equal(weights(guard), before)


def test_an_empty_calibration_loader_is_named_instead_of_asked_for_ever(blobs):
    trainer = AdversarialClusterTrainer(new_guard(), PGD(eps=0.1, step_size=0.1, steps=1), refresh_every=1)
    with pytest.raises(InputError, match="empty"):
        trainer.fit(blobs, [], epochs=1, calibrate=False, progress=False)


def test_a_calibration_that_fails_after_training_keeps_the_training(blobs):
    guard = new_guard()
    images, labels = held_out(blobs).dataset.tensors
    mislabelled = DataLoader(TensorDataset(images, (labels + 1) % 3), batch_size=60)
    trainer = AdversarialClusterTrainer(guard, ATTACK, warmup_epochs=2)
    with pytest.warns(UserWarning, match="trained, but not calibrated"):
        history = trainer.fit(blobs, mislabelled, epochs=2, progress=False)
    assert len(history) == 2
    assert not guard.is_calibrated


def test_a_scheduler_steps_every_epoch_and_any_optimizer_will_do(blobs):
    guard = new_guard()
    optimizer = torch.optim.SGD(guard.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    train(guard, blobs, optimizer=optimizer, scheduler=scheduler, calibrate=False)
    assert optimizer.param_groups[0]["lr"] == 2.5e-4


def test_a_train_loader_with_a_frozen_batchnorm_keeps_it_frozen(blobs):
    guard = new_guard(nn.BatchNorm1d(16))
    guard.train()
    guard.encoder[0][3].eval()
    mean = guard.encoder[0][3].running_mean.clone()
    train(guard, blobs, calibrate=False)
    assert torch.equal(guard.encoder[0][3].running_mean, mean)
    train(guard, blobs, calibrate=False)  # which finds it in eval mode, as training left it
    assert torch.equal(guard.encoder[0][3].running_mean, mean)
    assert not any(module.training for module in guard.modules())


def test_a_guard_in_eval_mode_is_trained_in_train_mode_and_given_back_in_eval_mode(blobs):
    guard = new_guard(nn.BatchNorm1d(16)).eval()
    mean = guard.encoder[0][3].running_mean.clone()
    train(guard, blobs, calibrate=False)
    assert not torch.equal(guard.encoder[0][3].running_mean, mean)
    assert not any(module.training for module in guard.modules())


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, InputError])
def test_a_guard_is_in_eval_mode_when_it_is_new_and_after_training_even_one_that_failed(blobs, error):
    guard, modes = new_guard(nn.BatchNorm1d(16)), []
    new = [module.training for module in guard.modules()]

    def look(detector, images, labels, **_):
        modes.append([module.training for module in guard.modules()])
        if error is not None:
            raise error
        return images

    with pytest.raises(error) if error else nullcontext():
        train(guard, blobs, attack=look, calibrate=False)
    assert not any(new)
    assert all(modes[-1])
    assert not any(module.training for module in guard.modules())


def test_what_was_frozen_within_a_backbone_in_train_mode_stays_frozen_while_the_guard_is_trained(blobs):
    frozen, awake = nn.BatchNorm1d(64).eval(), nn.BatchNorm1d(64)
    guard = ClusterGuard(nn.Sequential(nn.Flatten(), frozen, awake), 3, example=torch.rand(2, 1, 8, 8))
    train(copy.deepcopy(guard), blobs, calibrate=False)
    train(guard, blobs, calibrate=False)
    assert torch.equal(guard.encoder[0][1].running_mean, frozen.running_mean)
    assert not torch.equal(guard.encoder[0][2].running_mean, awake.running_mean)
    assert guard.frozen == {"encoder.0.1"}


def test_a_frozen_module_that_is_not_there_is_named_before_the_first_step(blobs):
    guard = new_guard()
    guard.frozen = frozenset({"encoder.0.7"})
    with pytest.raises(ConfigurationError, match=r"encoder\.0\.7"):
        train(guard, blobs, calibrate=False)


def test_an_epoch_is_trained_in_train_mode_whatever_was_done_after_the_last_one(blobs):
    guard, modes = new_guard(nn.BatchNorm1d(16)), []

    def look(detector, images, labels, **_):
        modes.append(guard.training)
        return images

    train(guard, blobs, attack=look, calibrate=False, on_epoch_end=lambda record: guard.eval())
    assert all(modes)


@pytest.mark.parametrize("loader", [[], [(torch.zeros(0, 1, 8, 8), torch.zeros(0).long())]])
def test_an_empty_training_loader_is_named(blobs, loader):
    with pytest.raises(InputError, match="image"):
        AdversarialClusterTrainer(new_guard(), ATTACK).fit(loader, blobs, epochs=1, progress=False)


def test_a_loss_that_is_not_finite_at_the_first_step_leaves_the_weights_as_they_were(blobs):
    guard = new_guard()
    before = weights(guard)
    with pytest.raises(TrainingDivergedError, match="nan at step 0"):
        train(guard, blobs, attack=lambda detector, images, labels, **_: images * torch.nan)
    assert torch.equal(weights(guard), before)
