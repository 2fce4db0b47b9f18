import json
import re
from pathlib import Path

import pytest
from clusterguard import FGSM, ClusterGuard, WorstCaseSuite, certify, load_onnx
from clusterguard.attacks import EFFORTS
from clusterguard.cli import app
from clusterguard.samples import load_digits
from effort import FEW_STEPS
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    arguments = ["demo", "--output", str(folder), "--epochs", "3", "--limit", "100"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EFFORTS, "quick", FEW_STEPS)
        with pytest.warns(UserWarning, match="pooled threshold"):  # hardly anything is learned from 100 digits
            result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    return folder, result


def test_the_demo_writes_what_it_promises(dry_run):
    folder, result = dry_run
    assert result.exit_code == 0
    names = {path.name for path in folder.iterdir()}
    assert names == {"guard", "report.json", "representations.png", "distances.png"}
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in names if name.endswith("png"))


def test_its_guard_loads_without_code_and_goes_every_way_from_there(dry_run, tmp_path):
    folder, _ = dry_run
    guard = ClusterGuard.from_pretrained(folder / "guard")
    images, labels = (part[:8] for part in load_digits("test").tensors)
    assert guard.is_calibrated
    assert re.search(r"\| suite +linf 0\.3 \|", (folder / "guard" / "README.md").read_text())
    assert WorstCaseSuite("linf", eps=0.01, budget="quick").run(guard, images, guard.detect(images).labels).stages
    assert certify(guard, images, labels, eps=0.001).is_secure.shape == (8,)
    for command in (["inspect"], ["export", "--output", str(tmp_path / "guard.onnx")]):
        result = CliRunner().invoke(app, [command[0], str(folder / "guard"), *command[1:]], catch_exceptions=False)
        assert result.exit_code == 0
    assert load_onnx(tmp_path / "guard.onnx").detect(images).labels.equal(guard.detect(images).labels)


def test_the_lines_of_the_quickstart_load_its_guard(dry_run, capsys):
    folder, _ = dry_run
    quickstart = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", quickstart, re.DOTALL)
    (block,) = (block for block in blocks if "runs/demo/guard" in block)
    exec(block.replace("runs/demo/guard", str(folder / "guard")), {})
    assert "Detection(" in capsys.readouterr().out


def test_its_table_says_what_it_measured_and_its_text_how_little_that_is(dry_run):
    folder, result = dry_run
    report = json.loads((folder / "report.json").read_text())
    for text in ("undefended", "guarded", "accuracy", "false positives", "ASR-1", "EROC", "0.2", "0.3"):
        assert text in report["table"]
    assert report["table"] in result.output
    assert "not as robustness" in result.output
    assert len(report["undefended"]["results"]) == len(report["guarded"]["results"]) == 2
    assert len(report["training"]["history"]) == 3
    precision = report["precision"]
    assert precision["training"] in ("float32", "bf16")
    assert set(precision["attacks"]) <= {"float32", "bf16"}
    assert f"Trained in {precision['training']}, attacked in" in result.output


def test_without_matplotlib_the_demo_says_so_and_does_the_rest(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for name in ("evaluation_attack", "WorstCaseSuite"):  # how strong they are is another matter
        monkeypatch.setattr(f"clusterguard.cli._demo.{name}", lambda *_, eps=0.3, **__: FGSM(eps=eps))
    with pytest.warns(UserWarning, match="pooled threshold"):
        result = CliRunner().invoke(
            app,
            ["demo", "--output", str(tmp_path), "--epochs", "3", "--limit", "100", "--json"],
            catch_exceptions=False,
        )
    assert "pip install matplotlib" in result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert json.loads(result.stdout)["guarded"] == report["guarded"]


def test_its_report_is_strict_json(dry_run):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")  # there is no attack to succeed while warming up

    json.loads((dry_run[0] / "report.json").read_text(), parse_constant=refuse)


def test_help_shows_an_example():
    result = CliRunner().invoke(app, ["demo", "--help"])
    assert "Example: clusterguard demo" in result.output
