import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from clusterguard.attacks import EFFORTS, Metered
from clusterguard.detectors import WithThresholds
from clusterguard.errors import ConfigurationError
from effort import FEW_STEPS
from hypothesis import given
from hypothesis import strategies as st
from small_experiment import SMALL, comparable, run_all
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.detectors import RECIPES
from benchmarks.experiments import KINDS, Scene, load_experiment
from benchmarks.experiments import _cells as cells
from benchmarks.running import Clock, OutOfTimeError, Store, Trainings, from_hex, run_cell
from benchmarks.running import _plan as plan
from benchmarks.running import _training as training
from benchmarks.running._attacking import pair_goals
from benchmarks.running._judging import to_hex


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiments")
    (folder / "small.toml").write_text(SMALL)
    return folder


@pytest.fixture
def experiment(folder, monkeypatch, light_suites):
    monkeypatch.setattr(cells, "FOLDER", folder)
    return load_experiment("small")


@pytest.fixture(scope="session")
def finished(folder, tmp_path_factory):
    """The store of a run that nobody interrupted, and its results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "FOLDER", folder)
        patch.setitem(EFFORTS, "quick", FEW_STEPS)
        root = tmp_path_factory.mktemp("finished")
        return root, [comparable(result) for result in run_all(load_experiment("small").cells, root)]


def test_every_kind_of_attack_runs_on_any_detector_through_one_code_path(finished, experiment):
    root, results = finished
    assert {cell.kind for cell in experiment.cells} == set(KINDS) - {"certificate"}  # which is no attack
    for cell, result in zip(experiment.cells, results, strict=True):
        assert result["definition"] == json.loads(json.dumps(cell.definition))
        variants = result["results"]
        assert len(variants) == len(cell.options.get("step_sizes", [0]))
        for verdict in variants.values():
            assert verdict["eroc"] is None or 0 <= verdict["eroc"] <= 1
            assert list(verdict["rates"]) == ["0.05", "0.2"]
            for rate in verdict["rates"].values():
                count, total = rate["success"]
                eligible, broken = (from_hex(rate[name], cell.images) for name in ("eligible", "broken"))
                assert (int(broken.sum()), int(eligible.sum())) == (count, total)
                assert not (broken & ~eligible).any()
                assert rate["invalid"] == 0
        strict, lax = (next(iter(variants.values()))["rates"][rate]["success"][1] for rate in ("0.2", "0.05"))
        assert strict <= lax
        assert len(result["points"]["benign"]) == len(result["points"]["attacked"]) == 8
        assert bool(result["stages"]) == (cell.kind == "suite")
    assert not list((root / "work").glob("*"))


def test_detectors_of_one_training_are_trained_once(finished):
    root, _ = finished
    assert len(list((root / "models").glob("*.json"))) == 3  # ours, vanilla for FS, and the surrogate


def test_a_second_look_needs_no_second_training(experiment, tmp_path):
    cell = next(cell for cell in experiment.cells if cell.detector == "ours" and cell.attack == "PGD")
    again = replace(cell, consistency={"radius": 0.05, "steps": 1})
    store = Store(tmp_path)
    plain, looked = (run_cell(chosen, Trainings(store, device=torch.device("cpu"))) for chosen in (cell, again))
    assert plain["training"] == looked["training"]
    assert len(list((tmp_path / "models").glob("*.json"))) == 1
    assert looked["definition"]["consistency"] == {"radius": 0.05, "steps": 1}
    assert plain["results"] != looked["results"]
    forward, backward = plan.attack_passes(cell)
    assert plan.attack_passes(again) == (3 * forward, 2 * backward + forward)


class Impatient(Clock):
    """Lets so many looks at it pass, then stops the run."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    def check(self, needed=0.0):
        self.looks -= 1
        if self.looks < 0:
            raise OutOfTimeError

    @property
    def is_ending(self):
        """Asked after every step of a training."""
        self.looks -= 0.05
        return self.looks < 0


def out_of_memory(scene, **options):
    scene.generator.manual_seed(99)  # it had begun
    raise torch.OutOfMemoryError


@pytest.mark.parametrize("case", ["both fit", "only one fits"])
def test_goals_of_one_attack_share_batches_and_find_the_same(finished, experiment, tmp_path, monkeypatch, case):
    targeted = replace(experiment.cells[0], points=0)
    options = {key: value for key, value in targeted.options.items() if key != "targeted"}
    untargeted = replace(targeted, options=options, attack="PGD U")

    def fresh(name):
        shutil.copytree(finished[0] / "models", tmp_path / name / "models", dirs_exist_ok=True)
        return Trainings(Store(tmp_path / name), device=torch.device("cpu"))

    alone = [run_cell(cell, fresh(cell.attack))["results"] for cell in (targeted, untargeted)]
    changed = {"run": None} if case == "both fit" else {"run_both": out_of_memory}  # neither would be called in vain
    monkeypatch.setitem(KINDS, "pgd", replace(KINDS["pgd"], **changed))
    trainings, stops = fresh("together"), 0
    while not (tmp_path / "together" / "cells").exists():  # stopped after every chunk
        trainings.clock = Impatient(looks=1)
        try:
            run_cell(targeted, trainings, untargeted)
        except OutOfTimeError:
            stops += 1
    assert stops == 2  # 12 images, 5 at a time
    trainings.clock = Clock()
    assert [run_cell(targeted, trainings, untargeted)["results"], run_cell(untargeted, trainings)["results"]] == alone
    assert alone[0] != alone[1]
    assert not list((tmp_path / "together" / "work").glob("*"))


def test_goals_are_paired_where_attack_and_detector_are_the_same():
    cells = load_experiment("table2-mnist").cells
    pairs = pair_goals([*cells, cells[0]])
    assert [cell for pair in pairs for cell in pair] == list(cells)
    assert len(pairs) == len(cells) / 2
    for targeted, untargeted in pairs:
        assert targeted.options == untargeted.options | {"targeted": True}
        assert (targeted.detector, targeted.training) == (untargeted.detector, untargeted.training)


def test_a_run_stopped_again_and_again_ends_with_the_same_results(finished, experiment, tmp_path):
    wanted = {"PGD", "CW", "Transfer", "suite"}
    chosen = [cell for cell in experiment.cells if cell.attack in wanted]
    stops = 0
    while True:
        try:
            results = run_all(chosen, tmp_path, Impatient(looks=3))
            break
        except OutOfTimeError:
            stops += 1
    assert stops > 8
    expected = {result["title"]: result for result in finished[1]}
    assert [comparable(result) for result in results] == [expected[cell.title] for cell in chosen]


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_results(finished, folder, tmp_path):
    code = (
        "import sys; from pathlib import Path; from benchmarks.experiments import _cells as cells;"
        "cells.FOLDER = Path(sys.argv[1]);"
        "import torch; torch.set_num_threads(1);"  # as here: sums round by the number of threads
        "from clusterguard.attacks import EFFORTS; Effort = type(EFFORTS['quick']);"
        f"EFFORTS['quick'] = {FEW_STEPS};"
        "from benchmarks.__main__ import app; app(['run', 'small', '--device', 'cpu', '--out', sys.argv[2]])"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path)]
    for patience in (6, 9, 14):
        process = subprocess.Popen(command)
        time.sleep(patience)
        process.kill()
        process.wait()
    subprocess.run(command, check=True)
    for key in Store(tmp_path).cell_keys():
        assert comparable(Store(tmp_path).read_cell(key)) == comparable(Store(finished[0]).read_cell(key))
    assert Store(tmp_path).cell_keys() == Store(finished[0]).cell_keys()


def test_what_is_done_is_not_done_again(finished, experiment, monkeypatch):
    monkeypatch.setattr(training, "train_detector", None)
    results = run_all(experiment.cells, finished[0])
    assert [comparable(result) for result in results] == finished[1]


def test_training_and_calibration_never_touch_the_test_set(experiment, tmp_path, monkeypatch):
    trainings = Trainings(Store(tmp_path), device=torch.device("cpu"))
    opened = []
    data = trainings.dataset("digits")
    trainings._sets["digits"] = replace(data, open_test=lambda: opened.append(1) or data.open_test())
    cell = experiment.cells[0]
    trainings.detector(cell)
    assert not opened
    run_cell(cell, trainings)
    assert len(opened) == 1


def test_recipes_are_chosen_without_the_test_set_and_judged_on_images_that_nothing_was_fitted_to(experiment, tmp_path):
    trainings = Trainings(Store(tmp_path), device=torch.device("cpu"))
    data = trainings.dataset("digits")
    trainings._sets["digits"] = replace(data, open_test=lambda: pytest.fail("opened the test set"))
    cell = replace(experiment.cells[0], split="validation")
    assert run_cell(cell, trainings)["images"] == cell.images
    assert cell.key != experiment.cells[0].key
    calibration, validation = data.held_out()
    assert len(calibration.labels) + len(validation.labels) == len(data.calibration.labels)
    assert torch.equal(torch.cat([calibration.pixels, validation.pixels]), data.calibration.pixels)


def test_half_precision_weights_are_the_ones_that_get_evaluated(experiment, tmp_path):
    cell = experiment.cells[0]
    cell = replace(cell, training=replace(cell.training, half=True, epochs=1))
    fresh, _ = Trainings(Store(tmp_path), device=torch.device("cpu")).detector(cell)
    loaded, _ = Trainings(Store(tmp_path), device=torch.device("cpu")).detector(cell)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value.nan_to_num(), loaded.state_dict()[name].nan_to_num()), name
    stored, _ = Store(tmp_path).load_weights(cell.training.key)
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {torch.float16}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what torch deprecates
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # and looks at gradients that are none
def test_compiled_networks_give_the_same_results(finished, experiment, tmp_path):
    pytest.importorskip("torch._inductor")
    chosen = [cell for cell in experiment.cells if cell.attack in ("PGD", "FGSM")]
    trainings = Trainings(Store(tmp_path), device=torch.device("cpu"), compiled="default")
    torch._dynamo.utils.counters.clear()
    for cell in chosen:
        result, expected = run_cell(cell, trainings), Store(finished[0]).read_cell(cell.key)
        assert result["provenance"]["compiled"] == "default"
        assert set(Store(tmp_path).load_weights(cell.training.key)[0]) == set(
            Store(finished[0]).load_weights(cell.training.key)[0]
        )
        for variant, rates in expected["results"].items():
            for rate, counts in rates["rates"].items():
                success = result["results"][variant]["rates"][rate]["success"]
                assert abs(success[0] - counts["success"][0]) <= 2  # rounding moves an image or two
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # with and without gradients


@pytest.mark.parametrize("attack", [line.split('"')[1] for line in SMALL.splitlines() if "kind" in line])
def test_no_attack_costs_more_than_planned(experiment, tmp_path_factory, finished, attack, tmp_path):
    trainings = Trainings(Store(finished[0]), device=torch.device("cpu"))
    cell = next(cell for cell in experiment.cells if cell.attack == attack)
    detector, _ = trainings.detector(cell)
    metered = Metered(WithThresholds(detector, torch.full((10,), 12.0)))
    images, labels = trainings.dataset("digits").calibration.head(6).floats()
    scene = Scene(
        detector=metered,
        images=images,
        labels=labels,
        objective="suspicion",
        references=(images, labels),
        surrogate=(metered, "logit"),
        generator=torch.Generator().manual_seed(0),
        checkpoint=tmp_path / "state",
        on_stage=lambda stage: None,
    )
    kind = KINDS[cell.kind]
    kind.run(scene, **cell.options)
    planned = kind.cost(10, **cell.options)
    assert metered.cost.backward <= 6 * planned.backward
    if cell.kind != "suite":  # which stops where everything is broken
        assert metered.cost.backward >= 0.99 * 6 * planned.backward


@given(st.lists(st.booleans(), max_size=30))
def test_bits_survive(bits):
    assert from_hex(to_hex(torch.tensor(bits, dtype=torch.bool)), len(bits)).tolist() == bits


def test_the_command_line_runs_plans_and_tells(experiment, finished, monkeypatch):
    def call(*arguments):
        return CliRunner().invoke(app, list(arguments))

    out = ["--out", str(finished[0])]
    assert "nothing is left" in call("run", "small", "--device", "cpu", *out).output
    assert "16 of   16 cells done" in call("status", *out).output
    assert "0 cells" in call("plan", "small", *out).output
    stopped = call("run", "small", "--device", "cpu", "--time-budget", "0", "--out", str(finished[0] / "new"))
    assert stopped.exit_code == 3
    assert "16 of 16 cells are left" in stopped.output
    assert "stale" not in call("status", *out).output
    assert (
        "--profile short and --profile cpu plan what a CPU can do"
        in call("plan", "small", "--out", str(finished[0] / "new")).output
    )
    cell = load_experiment("small").cells[0]
    old = replace(cell, seed=99, training=replace(cell.training, seed=99))
    Store(finished[0]).write_cell(old, {"title": "an old one"})
    assert f"stale: {old.key} an old one" in call("status", *out).output
    next(finished[0].rglob("*-seed99-*.jsonl")).unlink()


def test_finished_cells_are_run_again_and_a_changed_verdict_is_counted(finished, experiment, tmp_path):
    root = shutil.copytree(finished[0], tmp_path / "store")
    options = ["repeat", "small", "--count", "2", "--device", "cpu", "--out", str(root)]
    before = {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}
    outcome = CliRunner().invoke(app, [*options, "--only", "*PGD*"])
    assert (outcome.exit_code, outcome.exception) == (0, None), outcome.output
    assert outcome.output.count("the same verdicts on all of 12 images") == 8  # two detectors, settings and rates
    assert {file: file.read_bytes() for file in root.rglob("*") if file.is_file()} == before
    store, cell = Store(root), next(cell for cell in experiment.cells if "FGSM" in cell.title)
    result = store.read_cell(cell.key)
    verdict = result["results"][""]["rates"]["0.05"]
    verdict["broken"] = f"{int(verdict['broken'], 16) ^ 0b1100:0{len(verdict['broken'])}x}"
    shutil.rmtree(root / "cells")
    store.write_cell(cell, result)
    outcome = CliRunner().invoke(app, [*options[:3], "1", *options[4:]])
    assert outcome.exit_code == 1
    assert "rate 0.05: verdicts differ on 2 of 12 images" in outcome.output
    with pytest.raises(ConfigurationError, match="expected 2 matching cells with results and weights, found 1"):
        CliRunner().invoke(app, options, catch_exceptions=False)


def test_every_detector_is_there():
    assert len(RECIPES) == 12
