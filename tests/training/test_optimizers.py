"""Optimizers and schedulers that people bring."""

import numpy as np
import pytest
import torch
from clusterguard import AdversarialClusterTrainer, Calibrator, ClusterGuard, TrainingOptions
from clusterguard.errors import ConfigurationError
from timm.scheduler import CosineLRScheduler, PlateauLRScheduler
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from trainings import ATTACK, held_out, new_guard, weights


def fit(guard, blobs, *, epochs=1, checkpoint=None, **options):
    trainer = AdversarialClusterTrainer(guard, ATTACK, **options)
    trainer.fit(blobs, held_out(blobs), epochs=epochs, checkpoint=checkpoint, calibrate=False, progress=False)
    return trainer


def test_an_optimizer_of_the_network_that_was_handed_in_is_refused_before_anything_happens(blobs):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
    guard = ClusterGuard(network, num_classes=3, example=torch.rand(2, 1, 8, 8))
    guard.thresholds = torch.ones(3)
    with pytest.raises(ConfigurationError, match=r"copies its backbone.*optimizer=lambda parameters"):
        fit(guard, blobs, optimizer=Adam(network.parameters()))
    assert guard.is_calibrated


def test_an_optimizer_of_some_parameters_is_told_which_it_lacks(blobs):
    guard = new_guard()
    bias = guard.encoder[0][1].bias
    before = bias.detach().clone()
    rest = [weight for weight in guard.parameters() if weight is not bias]
    with pytest.warns(UserWarning, match=r"lacks 1 of .* trainable parameters.*: encoder\.0\.1\.bias; pass"):
        fit(guard, blobs, optimizer=SGD(rest, lr=1e-3))
    assert torch.equal(bias, before)
    bias.requires_grad_(False)
    fit(guard, blobs, optimizer=SGD(rest, lr=1e-3))  # no warning: it is frozen on purpose


def test_an_optimizer_may_hold_more_than_the_detector(blobs):
    temperature = nn.Parameter(torch.ones(()))
    fit(guard := new_guard(), blobs, optimizer=SGD([*guard.parameters(), temperature], lr=1e-3))


def test_a_factory_makes_the_optimizer_of_the_right_parameters_and_the_scheduler_of_it(blobs):
    guard = new_guard()
    before = weights(guard)
    trainer = fit(
        guard,
        blobs,
        epochs=2,
        optimizer=lambda parameters: SGD(parameters, lr=0.01),
        scheduler=lambda optimizer: StepLR(optimizer, 1, gamma=0.1),
    )
    assert not torch.equal(weights(guard), before)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_nothing_to_train_is_refused(blobs):
    with pytest.raises(ConfigurationError, match="all of them frozen"):
        fit(new_guard().requires_grad_(False), blobs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": torch.optim.LBFGS}, "needs no closure"),
        ({"optimizer": torch.optim.SparseAdam}, "dense gradients, got SparseAdam; take Adam"),
        ({"optimizer": lambda parameters: SGD(parameters, lr=0.0)}, "learning rate above 0"),
        ({"optimizer": lambda parameters: Adam(parameters, lr=torch.tensor(0.0))}, "learning rate above 0"),
        ({"scheduler": CosineAnnealingLR(SGD([nn.Parameter(torch.ones(1))], lr=1.0), 3)}, "of another one"),
        ({"scheduler": lambda optimizer: ReduceLROnPlateau(optimizer, mode="max")}, "mode='min'"),
        ({"scheduler": ReduceLROnPlateau, "options": TrainingOptions(schedule_every="step")}, "schedule_every='epoch'"),
        (
            {
                "scheduler": lambda optimizer: OneCycleLR(optimizer, 1.0, total_steps=5),
                "options": TrainingOptions(schedule_every="step"),
            },
            "total_steps of at least the 10 steps",
        ),
    ],
)
def test_what_cannot_take_the_steps_is_refused_before_the_first(blobs, options, message):
    trainer = AdversarialClusterTrainer(new_guard(), ATTACK, **options)
    with pytest.raises(ConfigurationError, match=message):
        trainer.fit(blobs, blobs, epochs=1, calibrate=False, progress=False)
    assert not trainer.engine.steps


@pytest.mark.parametrize(
    "options",
    [
        {
            "optimizer": lambda parameters: SGD(parameters, lr=0.1),
            "scheduler": lambda optimizer: ConstantLR(optimizer, 0.0, total_iters=99),
        },
        {"optimizer": lambda parameters: SGD(parameters, lr=1e-30)},
    ],
)
def test_a_training_that_changes_no_weight_is_said_after_an_epoch_and_leaves_the_guard_uncalibrated(blobs, options):
    trainer = AdversarialClusterTrainer(new_guard(), ATTACK, calibrator=Calibrator(0.2, scarce="pool"), **options)
    with (
        pytest.warns(UserWarning, match="no weight has changed in the first epoch; raise the learning rate"),
        pytest.raises(ConfigurationError, match="none changed in 20 step"),
    ):
        trainer.fit(blobs, held_out(blobs), epochs=2, progress=False)
    assert not trainer.detector.is_calibrated


def test_a_learning_rate_may_begin_and_end_at_0(blobs):
    def rising(optimizer):
        return LambdaLR(optimizer, lambda epoch: [0.0, 1.0, 0.0, 0.0][epoch])

    options = {"optimizer": lambda parameters: SGD(parameters, lr=0.01), "scheduler": rising}
    with pytest.warns(UserWarning, match="no weight has changed in the first epoch"):
        trainer = fit(new_guard(), blobs, epochs=2, **options)
    trainer.fit(blobs, held_out(blobs), epochs=3, calibrate=False, progress=False)  # at 0
    guard = new_guard()
    groups = [{"params": [weight], "lr": 0.01 * place} for place, weight in enumerate(guard.parameters())]
    fit(guard, blobs, optimizer=SGD(groups))


class SparseGradients(nn.Module):
    """Adds a row of a table, whose gradient has no other rows."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 16, sparse=True)

    def forward(self, features):
        return features + self.table(torch.zeros(len(features), dtype=torch.long))


def test_an_optimizer_that_cannot_use_the_gradients_is_named(blobs):
    with pytest.raises(ConfigurationError, match=r"use this detector's gradients, got .*Adam.*sparse"):
        fit(new_guard(SparseGradients()), blobs)


def in_turn(optimizer, *, total):
    """A schedule of one step, then a cycle."""
    first, second = StepLR(optimizer, 1), OneCycleLR(optimizer, 1.0, total_steps=total)
    return SequentialLR(optimizer, [first, second], milestones=[1])


@pytest.mark.parametrize("chain", [lambda scheduler: scheduler, lambda scheduler: ChainedScheduler([scheduler])])
def test_a_cycle_within_a_schedule_must_last_to_the_end(chain, blobs):
    options = TrainingOptions(schedule_every="step")
    with pytest.raises(ConfigurationError, match="total_steps of at least the 9 steps"):
        fit(new_guard(), blobs, scheduler=lambda optimizer: chain(in_turn(optimizer, total=8)), options=options)
    fit(new_guard(), blobs, scheduler=lambda optimizer: chain(in_turn(optimizer, total=9)), options=options)


def test_a_cycle_that_another_schedule_follows_may_end_before_the_training(blobs):
    def first_a_cycle(optimizer, total=3):
        cycle, rest = OneCycleLR(optimizer, 1e-3, total_steps=total), StepLR(optimizer, 1)
        return SequentialLR(optimizer, [cycle, rest], milestones=[4])

    options = TrainingOptions(schedule_every="step")
    fit(new_guard(), blobs, scheduler=first_a_cycle, options=options)
    with pytest.raises(ConfigurationError, match="total_steps of at least the 3 steps"):
        fit(new_guard(), blobs, scheduler=lambda optimizer: first_a_cycle(optimizer, total=2), options=options)


@pytest.mark.parametrize("options", [{"optimizer": lambda parameters: None}, {"scheduler": lambda parameters: None}])
def test_a_factory_that_makes_nothing_is_named(options):
    with pytest.raises(ConfigurationError, match="a function"):
        AdversarialClusterTrainer(new_guard(), ATTACK, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam"}, "got 'adam'; pass optimizer=lambda parameters"),
        ({"optimizer": [nn.Parameter(torch.ones(1))]}, "pass optimizer=lambda parameters"),
        ({"optimizer": lambda: None}, "function of the parameters alone, got <lambda>"),
        ({"scheduler": "cosine"}, "such as scheduler=lambda optimizer"),
        ({"scheduler": CosineAnnealingLR}, "got CosineAnnealingLR .*T_max.*; pass scheduler=lambda optimizer"),
        ({"scheduler": OneCycleLR}, "got OneCycleLR .*max_lr"),
    ],
)
def test_what_is_no_optimizer_or_scheduler_and_makes_none_is_told_what_to_pass(options, message):
    with pytest.raises(ConfigurationError, match=message):
        AdversarialClusterTrainer(new_guard(), ATTACK, **options)


def test_a_plateau_is_one_of_the_epochs_loss(blobs):
    losses = []

    class Spy(ReduceLROnPlateau):
        def step(self, metrics):
            losses.append(metrics)
            super().step(metrics)

    trainer = fit(new_guard(), blobs, epochs=3, scheduler=Spy)
    assert losses == [record.loss for record in trainer.history]


def test_timms_schedulers_are_told_of_epochs_and_steps(blobs, tmp_path):
    def rates(in_epochs, *parts, checkpoint=None):
        seen = []
        for epochs in parts:
            trainer = AdversarialClusterTrainer(
                new_guard(),
                ATTACK,
                optimizer=lambda parameters: SGD(parameters, lr=1e-3),
                scheduler=lambda optimizer: CosineLRScheduler(
                    optimizer, t_initial=4 if in_epochs else 40, t_in_epochs=in_epochs
                ),
            )
            trainer.fit(
                blobs,
                blobs,
                epochs=epochs,
                on_epoch_end=lambda _, fitted=trainer: seen.append(fitted.optimizer.param_groups[0]["lr"]),
                checkpoint=checkpoint,
                calibrate=False,
                progress=False,
            )
        return seen

    expected = [1e-3 * 0.5 * (1 + torch.tensor(torch.pi * done / 4).cos().item()) for done in (1, 2, 3)]
    assert rates(True, 3) == pytest.approx(expected)
    assert rates(False, 3) == pytest.approx(expected)
    assert rates(True, 1, 3, checkpoint=tmp_path / "run.pt") == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_scheduler_that_does_not_keep_its_state_is_refused(blobs):
    with pytest.raises(ConfigurationError, match="ReduceLROnPlateau, got a PlateauLRScheduler"):
        fit(new_guard(), blobs, scheduler=lambda optimizer: PlateauLRScheduler(optimizer, mode="min"))


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": lambda parameters: SGD(parameters, lr=np.float64(1e-3))},
        {"scheduler": lambda optimizer: StepLR(optimizer, 1, gamma=np.float64(0.5))},
    ],
)
def test_what_a_checkpoint_cannot_keep_is_refused_before_training(blobs, tmp_path, options):
    with pytest.raises(ConfigurationError, match=r"pass float\(\.\.\.\)"):
        fit(new_guard(), blobs, checkpoint=tmp_path / "run.pt", **options)
    fit(new_guard(), blobs, **options)
