"""The study of certificates against changed pixels: that it runs, and that its table shows its counts."""

import json

import pytest
import torch
from clusterguard.samples import load_digits
from torch.utils.data import TensorDataset

from benchmarks.studies import changed_pixels


class _Digits:
    """The digits that ship, in the place of MNIST."""

    class train:  # noqa: N801  # as the benchmarks' data sets have it
        @staticmethod
        def floats():
            return load_digits("train").tensors

    @staticmethod
    def open_test():
        return _Digits.train


@pytest.mark.slow
def test_the_study_runs_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(changed_pixels, "load_data_set", lambda name: _Digits)
    small = {"_TEMPLATES": 2, "_EPOCHS": 2, "_CALIBRATION": 400, "_RATE": 0.2, "PIXELS": (1,), "PATCHES": (1,)}
    for name, value in small.items():
        monkeypatch.setattr(changed_pixels, name, value)
    assert isinstance(load_digits("train"), TensorDataset)
    changed_pixels.main(seeds=1, proved=20, attacked=4, output=tmp_path)
    first = (tmp_path / "counts.json").read_bytes()
    changed_pixels.main(seeds=1, proved=20, attacked=4, output=tmp_path)
    assert (tmp_path / "counts.json").read_bytes() == first
    assert (tmp_path / "table.md").read_text().strip() in capsys.readouterr().out
    assert torch.get_num_threads() == 1


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
