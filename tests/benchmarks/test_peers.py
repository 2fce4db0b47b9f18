import json

import pytest
import torch
from clusterguard.attacks import Towards, get_norm
from clusterguard.detection import success_margin

pytest.importorskip("foolbox")
pytest.importorskip("adv_lib")

from typer.testing import CliRunner

from benchmarks.studies.peers import _guards
from benchmarks.studies.peers.__main__ import PEERS_RESULTS, app
from benchmarks.studies.peers._attacks import HELD_BACK, PEERS, SUITE, THOROUGH, build_all
from benchmarks.studies.peers._guards import CASES, Case
from benchmarks.studies.peers._held_back import EveryPlace, RectanglesAndPGD
from benchmarks.studies.peers._tables import attack_lines, list_missed, summary_lines

MEASURED = {name: json.loads(file.read_text()) for name in CASES if (file := PEERS_RESULTS / f"{name}.json").exists()}


def result(*broken, attacked=(0, 1, 2, 3)):
    costs = {"invalid": 0, "gradients": 40, "judged": 80, "cpu_seconds": 1.0}
    return {"attack": "A()", "attacked": list(attacked), "broken": list(broken), **costs}


def seeded():
    return torch.Generator().manual_seed(0)


def test_the_tables_are_those_of_the_results(tmp_path):
    for file in PEERS_RESULTS.glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    assert CliRunner().invoke(app, ["table", "--output", str(tmp_path)]).exit_code == 0
    for name in ("summary.md", "attacks.md"):
        assert (tmp_path / name).read_text() == (PEERS_RESULTS / name).read_text()


@pytest.mark.parametrize("name", MEASURED)
def test_a_measured_case_is_complete_and_the_thorough_suite_has_tried_what_others_broke(name):
    for threat, results in MEASURED[name]["results"].items():
        norm, _ = threat.split("/")
        peers = {f"{peer.library} {peer.attack}" for peer in PEERS[norm](1.0)}
        assert {SUITE, HELD_BACK, *peers} <= set(results)
        for result in results.values():  # an attack that gives images back is judged once for each class
            assert result["gradients"] + result["judged"] > 20 * len(result["attacked"])
        missed = list_missed(results)
        assert not missed or set(missed) == set(results[THOROUGH]["attacked"])  # the table says what it has left


def test_what_only_others_broke_is_counted():
    results = {SUITE: result(1), "PGD": result(), "Foolbox X": result(1, 3), "Foolbox Y": result(3)}
    assert list_missed(results) == [3]
    case = {"radii": {"l2": 1.5}, "results": {"l2/0": results}}
    assert summary_lines({"a guard": case})[-1].startswith("| a guard | ℓ2 1.5 | 0 | – | 0.500")
    assert summary_lines({"a guard": case})[-1].endswith("| 1 | – |")
    results[THOROUGH] = result(3, attacked=[3])
    assert summary_lines({"a guard": case})[-1].endswith("| 1 | 0 |")
    assert "| Foolbox X | 0.500 [0.150, 0.850] (2/4) | 1 | 0 | 10 | 20 | 1 |" in attack_lines(results)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0", "patch"])
def test_held_back_attacks_lower_the_margin_inside_the_ball(trained_guard, images, labels, norm):
    images, labels, eps = images[:6], labels[:6], {"linf": 0.1, "l2": 1.5, "l1": 8.0, "l0": 8.0, "patch": 5.0}[norm]
    attack = EveryPlace(side=5, steps=1) if norm == "patch" else RectanglesAndPGD(norm=norm, eps=eps, rounds=4, every=3)
    attacked = attack(trained_guard, images, labels, generator=seeded())
    assert (get_norm(norm).size(attacked - images) <= eps * (1 + 1e-5)).all()
    before, after = (
        success_margin(trained_guard.evidence(pictures), trained_guard.thresholds, labels)
        for pictures in (images, attacked)
    )
    assert (after <= before).all()
    assert (after < before).any()
    aimed = attack(trained_guard, images, labels, targets=(labels + 1) % 10, generator=seeded())
    assert not torch.equal(aimed, attacked)


def test_a_run_resumes_where_it_was(trained_guard, images, labels, monkeypatch, tmp_path, capsys):
    case = Case("small", lambda: trained_guard, {"patch": 3.0})
    monkeypatch.setattr(Case, "images", lambda self, count: (images, labels))
    monkeypatch.setattr(_guards, "CASES", {"small": case})
    monkeypatch.setattr("benchmarks.studies.peers.__main__.CASES", {"small": case})
    calls = []
    monkeypatch.setattr(
        "benchmarks.studies.peers.__main__.build_all",
        lambda *arguments: {"invert": lambda *_, **__: calls.append(1) or 1 - images[:2]},
    )
    for _ in range(2):
        done = CliRunner().invoke(app, ["run", "--images", "2", "--output", str(tmp_path)])
        assert done.exit_code == 0, done.output
    assert len(calls) == 1
    written = json.loads((tmp_path / "small.json").read_text())["results"]["patch/0"]["invert"]
    assert len(written["attacked"]) == 2


def test_every_attack_of_the_comparison_can_be_made():
    references = Towards(torch.rand(4, 1, 28, 28), torch.arange(4))
    for norm in PEERS:
        assert {SUITE, HELD_BACK} < set(build_all(norm, 0.5 if norm == "linf" else 4.0, references))
