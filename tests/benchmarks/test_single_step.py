"""Trainings of the comparison with one attack step: what reaches the trainers, and what looks for overfitting."""

import json

import pytest
import torch
from clusterguard.attacks import NoisyFGSM
from clusterguard.errors import ConfigurationError
from trained_detectors import network

from benchmarks.data import load_data_set
from benchmarks.detectors import make_recipe
from benchmarks.experiments import Training, list_experiments, load_experiment
from benchmarks.reporting import _report as report
from benchmarks.running import Clock, Store, _training

STEP = {"norm": "linf", "eps": 0.1, "step_size": 0.1, "steps": 1}


def training(recipe="madry", **options):
    options = {
        "epochs": 2,
        "images": 300,
        "batch_size": 50,
        "attack": STEP,
        "noise": 2.0,
        "average_share": 0.1,
    } | options
    return Training(dataset="digits", model="tiny-cnn", recipe=recipe, **options)


@pytest.mark.parametrize("detector", ["ours", "madry"])
def test_overfitting_is_looked_for_on_images_that_are_not_trained_on(detector, tmp_path, monkeypatch):
    shown = []
    look = _training.look_for_overfitting
    monkeypatch.setattr(_training, "HELD_OUT", 100)
    monkeypatch.setattr(_training, "look_for_overfitting", lambda *given: shown.append(given[1]) or look(*given))
    data, recipe, store = load_data_set("digits"), make_recipe(detector, {}), Store(tmp_path)
    device = torch.device("cpu")
    _, record = _training.train_detector(training(detector), recipe, data, store, device=device, clock=Clock())
    assert torch.equal(shown[0].pixels, data.train.pixels[200:300])
    assert 0 <= record["last"]["check_success_rate"] <= 1
    assert json.dumps(record)


def test_the_attack_and_the_average_reach_the_trainers():
    schedule = _training.make_schedule(training(), 100)
    assert schedule.attack == NoisyFGSM(eps=0.1, step_size=0.1).as_pgd()
    assert schedule.options.average_decay == pytest.approx(0.95)
    guard = make_recipe("ours", {}).build(network())
    trainer = make_recipe("ours", {}).trainer(guard, schedule)
    assert trainer.attack == schedule.attack
    assert trainer.options.average_decay == pytest.approx(0.95)
    assert _training.make_schedule(training(average_share=0.0), 100).options.average_decay is None
    for options in ({"start": "random"}, {"method": "apgd"}):
        with pytest.raises(ConfigurationError, match="N-FGSM as it is"):
            make_recipe("ours", options).trainer(guard, schedule)


def test_noise_before_several_steps_is_refused():
    with pytest.raises(ConfigurationError, match="one step with noise"):
        _training.make_schedule(training(attack=STEP | {"steps": 2}), 1)


def test_the_short_profile_of_cifar10_trains_so_and_says_it():
    trainings = {cell.detector: cell.training for cell in load_experiment("table2-cifar10", "short").cells}
    for name in ("ours", "l-ben", "madry", "trades"):
        assert _training.make_attack(trainings[name]).start.share == pytest.approx(2 / 3)
        assert report._describe_attack(trainings[name]) == "N-FGSM ℓ∞ 0.0314, noise of 2 times the radius"
        assert "weights averaged over the last 5% of the steps" in report._describe_schedule(trainings[name])
    assert (trainings["madry"].optimizer, trainings["madry"].learning_rate) == ("sgd", 0.2)


def test_every_training_of_every_profile_has_an_attack():
    for profile in ("quick", "cpu", "short", "full"):
        for name in list_experiments():
            for training in {
                cell.training.key: cell.training for cell in load_experiment(name, profile).cells
            }.values():
                assert _training.make_attack(training).steps == training.attack["steps"]
