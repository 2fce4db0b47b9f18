import re
import shlex
from pathlib import Path

import pytest
import torch
from small_experiment import SMALL
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.experiments import _cells as cells
from benchmarks.experiments import load_experiment
from benchmarks.running import OutOfTimeError, Store
from benchmarks.running import _plan as plan


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    (tmp_path / "small.toml").write_text(SMALL)
    monkeypatch.setattr(cells, "FOLDER", tmp_path)
    return load_experiment("small")


def test_the_plan_adds_up(experiment, capsys):
    speed = plan.Throughput("made up", lambda model, dataset, batch, precision: (0.001, 0.01))
    plan.print_plan(experiment.cells[:1], speed)
    text = capsys.readouterr().out
    # 500 images: 2 epochs, each a step on them and their attacked versions, after 2 steps of attack
    assert "4,000 gradients" in text
    assert "72 gradients" in text  # 12 images, 3 steps, 2 step sizes
    assert "1 cells, 1 trainings, about 41 s in all" in text


def test_what_is_done_on_the_device_is_told_beside_its_plan(experiment, capsys):
    speed = plan.Throughput("made up", lambda model, dataset, batch, precision: (0.001, 0.01))
    here = {"seconds": 2.0, "training": {"seconds": 80.4}, "provenance": {"device": "x86_64 CPU"}}
    elsewhere = here | {"seconds": 500.0, "provenance": {"device": "NVIDIA H200"}}
    first, second, third, *_ = experiment.cells
    results = {first.key: here, second.key: elsewhere}
    plan.print_experience([first, second, third], results, speed, "cpu")
    assert capsys.readouterr().out.splitlines() == [
        "done: 1 trainings in 80 s, where the plan says 40 s",
        "done: 1 attacks in 2 s, where the plan says 1 s",
    ]


_ROW = re.compile(r"^\| `?(.+?)`?(?: besides)? \| (?:([\d,]+) \| )?([\d,]+) \|$", re.MULTILINE)
_OF_MNIST = ["table2", "table3", "table4", "figure1", "figure2", "figure6", "figure7", "strict"]


@pytest.mark.parametrize(
    ("title", "options"),
    [
        ("--device cuda`", ["--device", "h200"]),
        ("--profile short`", ["--profile", "short", "--device", "h200"]),
        ("--profile short --device cpu`", ["--profile", "short", "--device", "cpu"]),
    ],
)
def test_the_page_of_results_says_what_the_plan_says(title, options, tmp_path):
    page = Path("docs/results/index.md").read_text()
    rows = _ROW.findall(page.split(f"`python -m benchmarks run … {title} |")[1].split("\n\n")[0])
    assert rows
    for names, count, seconds in rows:
        given = [f"{name}-mnist" for name in _OF_MNIST] if names.startswith("Tables 2 to 4") else shlex.split(names)
        told = CliRunner().invoke(app, ["plan", *given, *options, "--out", str(tmp_path)]).output
        planned = re.search(r"(\d+) cells, .* about ([\d,]+) s", told)
        assert count in ("", planned[1]), names
        assert int(seconds.replace(",", "")) == pytest.approx(int(planned[2].replace(",", "")), rel=0.02), names


def test_without_a_name_everything_is_planned(tmp_path):
    told = CliRunner().invoke(app, ["plan", "--profile", "cpu", "--device", "cpu", "--out", str(tmp_path)])
    assert told.exit_code == 0
    assert "attack ours, PGD linf 0.3 T, seed 0" in told.output


def test_long_times_are_told_in_hours_and_days():
    told = [plan._duration(seconds) for seconds in (41, 8377, 875_289)]
    assert told == ["41 s", "8,377 s, 2.3 hours", "875,289 s, 10.1 days"]


def test_the_status_tells_which_profile_has_results(tmp_path):
    Store(tmp_path).write_cell(load_experiment("table2-mnist", "cpu").cells[0], {"title": "one"})
    told = CliRunner().invoke(app, ["status", "--out", str(tmp_path)]).output
    assert " 1 of" not in told.split("profile cpu")[0]
    assert re.search(r"^profile cpu: 1 of \d+ cells done; --profile cpu shows them$", told, re.MULTILINE)


@pytest.mark.parametrize("device", ["h200", "cpu", "cuda:0"])
def test_devices_that_were_never_measured_get_stated_assumptions(device, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "THROUGHPUT_FILE", tmp_path / "none.json")
    speed = plan.find_throughput(device)
    assert "assumed" in speed.source
    forward, both = speed.seconds("small-cnn", "mnist", 1000, "float32")
    assert 0 < forward < both < 0.1


def test_measured_throughput_is_found_again(experiment, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "THROUGHPUT_FILE", tmp_path / "throughput.json")
    monkeypatch.setattr(plan, "PATIENCE", 0.05)
    plan.measure_throughput(experiment.cells[:1], torch.device("cpu"))
    speed = plan.find_throughput("cpu")
    assert "measured" in speed.source
    assert speed.seconds("tiny-cnn", "digits", 10_000, "float32")[1] > 0
    assert speed.seconds("small-cnn", "mnist", 1000, "float32")[1] > 0  # assumed: it was not measured


def test_each_precision_has_its_own_throughput(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "THROUGHPUT_FILE", tmp_path / "throughput.json")
    monkeypatch.setattr(plan, "_measure", lambda *given: (1.0, 3.0) if given[-1] == "bf16" else (2.0, 6.0))
    (cell,) = [cell for cell in load_experiment("table2-mnist", "short").cells if cell.detector == "ours"][:1]
    assert (cell.training.mixed_precision, cell.options["precision"]) == (True, "bf16")
    plan.measure_throughput([cell], torch.device("cpu"))
    seconds = plan.find_throughput("cpu").seconds
    assert seconds("small-cnn", "mnist", cell.training.batch_size, "bf16") == (1.0, 3.0)
    assert seconds("small-cnn", "mnist", cell.training.batch_size, "float32")[0] < 1  # assumed: it was not measured


def test_near_the_end_of_the_budget_cells_that_fit_come_first(experiment, tmp_path, monkeypatch):
    """A made-up machine: a pass takes a millisecond, and training nothing."""
    now, order = [0.0], []

    def run(cell, trainings):
        now[0] += 0.001 * plan.attack_cost(cell)
        if now[0] > 4.0:
            raise OutOfTimeError
        order.append(cell.attack)

    monkeypatch.setattr("benchmarks.running._schedule.run_cell", run)
    monkeypatch.setattr("benchmarks.running._clock.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(Store, "has_weights", lambda self, key: True)
    command = ["run", "small", "--device", "cpu", "--out", str(tmp_path), "--time-budget", "4", "--only", "ours*"]
    assert CliRunner().invoke(app, command).exit_code == 3
    costs = {cell.attack: 0.001 * plan.attack_cost(cell) for cell in experiment.cells if cell.detector == "ours"}
    assert costs["suite"] > 4  # it does not fit, so all others are whole before it is begun
    assert order == [name for name in costs if name != "suite"][: len(order)]
    assert sum(costs[name] for name in order) <= 4
    assert len(order) == len([name for name in costs if name != "suite"])


def test_estimates_know_which_trainings_attack():
    cells_of = {cell.detector: cell for cell in load_experiment("strict-mnist").cells}
    attacked = {name for name, cell in cells_of.items() if plan.training_passes(cell) > 55_000 * cell.training.epochs}
    assert attacked == {"ours", "l-ben", "madry", "trades", "ccat", "rectified-rejection"}
    certified = load_experiment("certified-mnist").cells[0]
    assert plan.training_passes(certified) == 3 * 55_000 * certified.training.epochs
