"""The study of certificates against changed pixels: that it runs, and that its table shows its counts."""

import json

import pytest
import torch
from clusterguard import ClusterGuard
from clusterguard.certification import certify
from clusterguard.samples import load_digits

from benchmarks.data import Images
from benchmarks.studies import changed_pixels


class _Digits:
    """The digits that ship, in the place of MNIST."""

    images, labels = load_digits("train").tensors
    train = Images((255 * images).round().byte(), labels)

    @classmethod
    def open_test(cls):
        return cls.train


@pytest.fixture
def small(monkeypatch):
    """A small study."""
    monkeypatch.setattr(changed_pixels, "load_data_set", lambda name: _Digits)
    small = {"_TEMPLATES": 2, "_EPOCHS": 2, "_CALIBRATION": 400, "_RATE": 0.2, "PIXELS": (1,), "PATCHES": (1,)}
    for name, value in small.items():
        monkeypatch.setattr(changed_pixels, name, value)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_study_runs_and_resumes(tmp_path, capsys):
    changed_pixels.main(seeds=1, proved=20, attacked=4, output=tmp_path)
    first = (tmp_path / "counts.json").read_bytes()
    changed_pixels.main(seeds=1, proved=20, attacked=4, output=tmp_path)
    assert (tmp_path / "counts.json").read_bytes() == first
    assert (tmp_path / "table.md").read_text().strip() in capsys.readouterr().out
    assert torch.get_num_threads() == 1


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_study_saves_a_guard_with_its_figures(tmp_path):
    changed_pixels.main(proved=20, attacked=4, output=tmp_path / "counts", save=tmp_path / "guard")
    assert not (tmp_path / "counts").exists()
    guard = ClusterGuard.from_pretrained(tmp_path / "guard")
    images, labels = load_digits("test")[:4]
    assert certify(guard, images, labels, eps=1, norm="l0").is_secure.shape == (4,)
    card = (tmp_path / "guard" / "README.md").read_text()
    assert "proved upper bound, l0 10" in card


def test_no_attack_breaks_more_than_is_unproved_and_the_table_is_of_these_counts():
    runs = json.loads((changed_pixels.CHANGED_PIXELS / "counts.json").read_text())["runs"]
    assert [run["seed"] for run in runs] == [*range(len(runs))] != []
    for run in runs:
        proofs = run["with_refusal"]
        for attack in run["attacks"]:
            of = "unproved_pixels" if attack["norm"] == "l0" else "unproved_patches"
            assert attack["broken"] <= proofs[of][f"{attack['eps']:g}"]
    table = (changed_pixels.CHANGED_PIXELS / "table.md").read_text()
    assert table == "\n".join(changed_pixels.proof_lines(runs)) + "\n"
