"""The study of networks: its plan, a training that goes on after an interruption, and the page that shows the table."""

import json
from pathlib import Path

import pytest
import torch
from clusterguard.errors import TrainingDivergedError

from benchmarks.data import DataSet, Images
from benchmarks.studies import networks

FINDINGS = Path(__file__).parents[2] / "docs" / "results" / "findings.md"


def some_images(count):
    return Images(torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8), torch.arange(count) % 10)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A study of few images and few steps, whose training attack is as always."""
    data = DataSet("cifar10", {}, some_images(64), some_images(40), lambda: some_images(20))
    monkeypatch.setattr(networks, "load_data_set", lambda name: data)
    monkeypatch.setattr(networks, "RESULTS", tmp_path)
    monkeypatch.setattr(networks, "provenance", lambda device: {"commit": "none"})
    monkeypatch.setattr(networks, "time_steps", lambda *_: 10.0)
    for name, value in {"_BATCH": 16, "_HELD_OUT": 8, "_CLEAN": 20, "_ATTACKED": 10, "_STEPS_AT_RISK": 1}.items():
        monkeypatch.setattr(networks, name, value)
    return tmp_path / "networks.json"


@pytest.mark.parametrize("method", ["madry", "ours"])
def test_a_row_tells_what_was_trained_and_measured(small, method, capsys):
    networks.main(minutes=1.0, only=["tiny-cnn"], method=method, seed=3, resume=False, output=small)
    (row,) = json.loads(small.read_text())["rows"]
    assert (row["network"], row["method"], row["epochs"], row["steps"], row["seed"]) == ("tiny-cnn", method, 2, 3, 3)
    assert (row["clean"]["total"], row["robust"]["total"], len(row["history"])) == (20, 10, 2)
    assert row["robust"]["count"] <= row["clean"]["count"]
    assert all(0 <= epoch["check_success_rate"] <= 1 for epoch in row["history"])
    assert networks.summarise_networks([row]) in capsys.readouterr().out


def test_a_study_goes_on_where_it_was_interrupted(small, monkeypatch):
    def fail(*_, **__):
        raise TrainingDivergedError("the power is off")

    options = {"minutes": 1.0, "only": ["tiny-cnn"], "method": "madry", "seed": 0, "output": small}
    networks.main(resume=False, **options)
    (through,) = json.loads(small.read_text())["rows"]
    judge = networks.judge_network
    monkeypatch.setattr(networks, "judge_network", fail)
    with pytest.raises(TrainingDivergedError):
        networks.main(resume=False, **options)
    monkeypatch.setattr(networks, "judge_network", judge)
    monkeypatch.setattr(networks, "time_steps", lambda *_: pytest.fail("the plan is kept"))
    small.unlink()
    networks.main(resume=True, **options)
    (resumed,) = json.loads(small.read_text())["rows"]
    assert [epoch["loss"] for epoch in resumed["history"]] == [epoch["loss"] for epoch in through["history"]]
    networks.main(resume=True, **options)  # all is done


def test_a_plan_fills_its_time_with_whole_passes():
    assert networks.Plan.fitting(30, 1.25, 45_000) == networks.Plan(4, 360, 1.25)  # 1440 steps of 128 images
    assert networks.Plan.fitting(0.01, 2.0, 45_000) == networks.Plan(1, 1, 2.0)


def test_an_epoch_shows_no_image_more_often_than_its_passes():
    passes = networks.Passes(some_images(300), steps=7, seed=0)
    labels = [torch.cat([labels for _, labels in passes]) for _ in range(2)]
    assert len(labels[0]) == 7 * 128
    assert not torch.equal(*labels)
    assert torch.bincount(labels[0]).max() <= 3 * 30


@pytest.mark.skipif(not networks.NETWORKS_FILE.exists(), reason="the study has not been run")
def test_the_findings_show_what_was_measured():
    assert networks.summarise_networks(json.loads(networks.NETWORKS_FILE.read_text())["rows"]) in FINDINGS.read_text()
