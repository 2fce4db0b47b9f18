"""What a person sees of a training: lines in logs, bars on terminals only, and how long it will take."""

import logging
import re

import pytest
import torch
from accelerate import Accelerator
from clusterguard import PGD, AdversarialClusterTrainer, TrainingOptions
from clusterguard.training import Validation, _reporting
from torch.utils.data import DataLoader, Subset
from trainings import ATTACK, held_out, new_guard, weights


def run(blobs, *, epochs=2, progress=True, validate=True, attack=ATTACK, **options):
    trainer = AdversarialClusterTrainer(new_guard(), attack, **options)
    trainer.fit(
        DataLoader(Subset(blobs.dataset, range(180)), 60),
        held_out(blobs),
        epochs=epochs,
        calibrate=False,
        validation=Validation(DataLoader(Subset(held_out(blobs).dataset, range(60)), 60)) if validate else None,
        progress=progress,
    )
    return trainer


def test_each_epoch_has_a_line_and_a_log_no_bar(blobs, capfd):
    run(blobs)
    out, err = capfd.readouterr()
    assert out == ""
    first, second = err.splitlines()
    number = r"\d+\.\d{3}"
    assert re.fullmatch(
        rf"epoch 1/2: loss {number}, accuracy {number}, attack success {number}, validation accuracy {number}, "
        rf"accepted_accuracy {number}, robust_accuracy {number} \(best so far\), \d+ s",
        first,
    )
    assert second.startswith("epoch 2/2: ")
    run(blobs, progress=False)
    assert capfd.readouterr().err == ""


def test_a_terminal_shows_a_bar(blobs, capfd, monkeypatch):
    monkeypatch.setattr("clusterguard._support._bars.is_watched", lambda: True)
    run(blobs)
    assert "epoch 1/2:   0%" in capfd.readouterr().err


def test_whoever_listens_to_the_logger_gets_the_lines_instead(blobs, capfd, caplog):
    with caplog.at_level(logging.INFO, logger="clusterguard"):
        run(blobs, progress=False, validate=False)
    assert [record.getMessage()[:10] for record in caplog.records] == ["epoch 1/2:", "epoch 2/2:"]
    assert capfd.readouterr().err == ""


def test_the_time_is_told_after_the_second_step(blobs, capfd, monkeypatch):
    monkeypatch.setattr(_reporting, "_WORTH_TELLING", 0.0)
    run(blobs, validate=False)
    estimate, first, second = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"2 epochs of 3 steps: about \d+ s left", estimate)
    assert re.search(r"about \d+ s left$", first)
    assert "about 0 s left" in second


def test_a_warm_up_counts_less_than_what_follows(blobs):
    attacked = []

    def slow(detector, images, labels, generator=None):
        attacked.append(len(labels))
        torch.rand(3)  # from the global generator
        return images

    trainer = AdversarialClusterTrainer(new_guard(), slow, warmup_epochs=2)
    images, labels = next(iter(blobs))
    state = torch.get_rng_state()
    assert trainer.seconds_ahead(2, images, labels, 1.0) == 2
    assert not attacked
    assert 3 * 2 + 2 <= trainer.seconds_ahead(5, images, labels, 1.0) < 9
    assert attacked == [60]
    assert torch.equal(torch.get_rng_state(), state)


def test_telling_changes_no_weight(blobs, capfd, monkeypatch):
    attack = PGD(eps=0.1, step_size=0.05, steps=3, start="random", keep="last")
    ends = []
    monkeypatch.setattr(_reporting, "_WORTH_TELLING", 0.0)
    for progress in (False, True):
        torch.manual_seed(1)
        ends.append(weights(run(blobs, progress=progress, validate=False, warmup_epochs=1, attack=attack).guard))
    assert torch.equal(*ends)
    assert "about" in capfd.readouterr().err


def test_trackers_get_the_epochs(blobs, monkeypatch):
    accelerator, told = Accelerator(cpu=True), []
    accelerator.trackers = [None]
    monkeypatch.setattr(accelerator, "log", lambda values, step: told.append((step, values)))
    run(blobs, progress=False, options=TrainingOptions(accelerator=accelerator))
    epochs = [(step, values) for step, values in told if "epoch" in values]
    assert [(step, values["epoch"]) for step, values in epochs] == [(3, 1), (6, 2)]
    assert epochs[0][1]["validation/robust_accuracy"] >= 0
    assert epochs[0][1]["epoch/loss"] > 0


@pytest.mark.parametrize(("seconds", "text"), [(3.2, "3 s"), (99, "99 s"), (200, "3 min"), (9000, "2.5 h")])
def test_durations_are_in_the_unit_that_suits_them(seconds, text):
    assert _reporting.duration(seconds) == text
