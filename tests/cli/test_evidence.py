import json
import shutil
from pathlib import Path

import clusterguard as cg
import pytest
from clusterguard.attacks import EFFORTS, Polish, WorstCaseSuite
from clusterguard.cli import app
from clusterguard.cli._evidence import _steps
from clusterguard.detectors import make_template_guard
from clusterguard.samples import load_digits
from effort import FEW_STEPS
from typer.testing import CliRunner

FILES = {"evidence.html", "evidence.json", "sbom.cdx.json", "SHA256SUMS"}
GUARD = Path(__file__).parents[2] / "guards" / "mnist-certified"
FEW = ("--images", 6, "--batch-size", 500)


def run(*arguments: object):
    return CliRunner().invoke(app, ["evidence", *map(str, arguments)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """Suite and probe have all their parts, each of a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EFFORTS, "quick", FEW_STEPS)
        patch.setitem(Polish.__init__.__kwdefaults__, "halvings", 0)
        patch.setattr("clusterguard.evaluation._sanity._STEPS", 10)
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What the command writes once, and its result."""
    folder = tmp_path_factory.mktemp("written") / "evidence"
    result = run(GUARD, *FEW, "--output", folder, "--certify", "--json")
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout)


def test_it_measures_at_the_radius_of_the_training_and_writes_four_files(written):
    folder, told = written
    assert {*contents(folder)} == FILES
    content = json.loads((folder / "evidence.json").read_text())
    assert told["figures"] == {name: figure["text"] for name, figure in content["figures"].items()}
    assert content["attacks"]["results"][0]["name"] == "suite quick linf 0.4"
    assert content["attacks"]["images"] == 6
    assert content["benign"]["images"] == 1000
    assert content["certificate"]["eps"] == 0.4
    assert content["provenance"]["weights_sha256"] == json.loads((GUARD / "config.json").read_text())["weights_sha256"]
    assert content["provenance"]["data"]["test part"]["images"] == 1000
    assert "10 of 10 checks hold" in content["figures"]["failing closed"]["text"]


def test_an_interrupted_run_elsewhere_goes_on_and_writes_the_same_bytes(written, tmp_path, monkeypatch):
    moved = shutil.copytree(GUARD, tmp_path / "moved")
    command = (moved, *FEW, "--output", tmp_path / "out", "--certify", "--checkpoint", tmp_path / "state")
    run_stage, stages = WorstCaseSuite._run_stage, []

    def interrupt(suite, name, *arguments):
        stages.append(name)
        if len(stages) == 3:
            raise KeyboardInterrupt
        return run_stage(suite, name, *arguments)

    monkeypatch.setattr(WorstCaseSuite, "_run_stage", interrupt)
    assert run(*command).exit_code == 130
    assert not any((tmp_path / "out").iterdir())
    (tmp_path / "out" / "evidence.html").write_text("of an earlier run, which may be replaced")
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert stages.count("APGD") == 1  # it was not run again
    assert contents(tmp_path / "out") == contents(written[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--checkpoint", "out/state"), "a checkpoint outside out"),
        (("--certified-at", "linf:0.1"), "expected --certify together with --certified-at"),
        (("--output", "full"), "expected an empty folder"),
        (("--data", "nowhere"), "'digits' or a folder of images, got 'nowhere'"),
    ],
)
def test_it_refuses_at_once_in_one_line(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    monkeypatch.setattr("clusterguard.evaluation.evaluate", None)
    result = run(GUARD, "--output", "out", *options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_proof_in_a_norm_without_bounds_for_the_network_is_refused_before_attacks(tmp_path, monkeypatch):
    monkeypatch.setattr("clusterguard.evaluation.evaluate", None)
    for options in (("--attack", "l2:0.5"), ("--attack", "linf:0.1", "--certified-at", "l0:5")):
        result = run(GUARD, "--output", tmp_path / "out", "--certify", *options)
        assert result.exit_code == 1
        assert "for this network in norms other than linf" in result.stderr
    assert not any((tmp_path / "out").glob("*"))


def test_a_guard_of_templates_is_proved_in_its_own_norm(tmp_path):
    folder, out = tmp_path / "guard", tmp_path / "out"
    guard = make_template_guard([load_digits("train").tensors], 10, templates=2)
    cg.Calibrator(0.05).fit(guard, [load_digits("calibration").tensors], progress=False)
    guard.save_pretrained(folder)
    result = run(folder, "--output", out, "--attack", "l0:2", "--images", 20, "--certify")
    assert result.exit_code == 0, result.output
    content = json.loads((out / "evidence.json").read_text())
    assert (content["certificate"]["norm"], content["certificate"]["eps"]) == ("l0", 2.0)
    assert content["certificate"]["method"] == "the worst pixels of its costs"
    assert "no attack at l0 2 breaks more than" in result.stdout
    other = run(folder, "--output", out, "--attack", "l0:2", "--images", 20, "--certify", "--certified-at", "patch:2")
    assert "no attack at patch 2 breaks more than" in other.stdout


def test_a_guard_without_thresholds_or_without_a_known_attack_is_refused(tmp_path):
    digits = cg.ClusterGuard.from_pretrained(GUARD)
    digits.save_pretrained(tmp_path / "guard")
    assert "expected --attack NORM:RADIUS" in run(tmp_path / "guard", "--output", tmp_path / "out").stderr
    digits.reset_calibration()
    digits.save_pretrained(tmp_path / "guard")
    assert "run: clusterguard calibrate" in run(tmp_path / "guard", "--output", tmp_path / "out").stderr


@pytest.mark.parametrize("attack", ["linf", "linf:", "linf:a", "l3:0.1", ":0.1", "linf:0.1:0.2"])
def test_an_attack_is_a_norm_and_a_radius(tmp_path, attack):
    result = run(GUARD, "--output", tmp_path / "out", "--attack", attack)
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_the_estimate_counts_the_steps_of_a_stage():
    from clusterguard.attacks import APGD, MultiTarget, Square

    attack = APGD(eps=0.1, steps=20)
    assert _steps(attack, 10) == 20
    assert _steps(MultiTarget(attack=attack, max_targets=3), 10) == 60
    assert _steps(MultiTarget(attack=attack, max_targets=None), 4) == 60
    assert _steps(Square(eps=0.1, queries=300), 10) == 100
