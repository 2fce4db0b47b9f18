"""The study of certificates against patches: its network, and that its table shows its counts."""

import json
from functools import partial

import pytest
import torch
from clusterguard import Calibrator
from clusterguard.detectors import LocalCosts, Windows
from clusterguard.samples import load_digits

from benchmarks.data import Images
from benchmarks.studies import patches


def test_the_windows_are_small():
    assert LocalCosts(patches.build_local_network(8)).windows() == Windows(9, 2, 4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:classes:UserWarning")
def test_the_study_runs_and_resumes(tmp_path, monkeypatch, capsys):
    class Digits:
        """Digits in the place of CIFAR10, in three channels and 32 × 32 pixels."""

        pixels, labels = load_digits("train").tensors
        pixels = torch.nn.functional.pad((pixels * 255).byte().expand(-1, 3, -1, -1), (2, 2, 2, 2))
        train, calibration = Images(pixels[:1000], labels[:1000]), Images(pixels[1000:2000], labels[1000:2000])

        @staticmethod
        def open_test():
            return Digits.calibration

    monkeypatch.setattr(patches, "load_data_set", lambda name: Digits)
    monkeypatch.setattr(patches, "RESULTS", tmp_path)
    monkeypatch.setattr(patches, "Calibrator", partial(Calibrator, scarce="pool"))  # after so short a training
    monkeypatch.setattr(patches, "PATCH_SIDES", (1,))
    options = {"seeds": 1, "epochs": 2, "room": 5.0, "temperature": 10.0, "proved": 20, "attacked": 4}
    patches.main(**options, output=tmp_path)
    first = (tmp_path / "counts.json").read_bytes()
    patches.main(**options, output=tmp_path)
    assert (tmp_path / "counts.json").read_bytes() == first
    assert (tmp_path / "table.md").read_text().strip() in capsys.readouterr().out


def test_no_attack_breaks_more_than_is_unproved_and_the_table_is_of_these_counts():
    file = patches.PATCH_RESULTS / "counts.json"
    if not file.exists():
        pytest.skip("not run yet")
    runs = json.loads(file.read_text())["runs"]
    for run in runs:
        proofs = run["with_refusal"]
        assert proofs["eligible"] <= proofs["right"]
        for attack in run["attacks"]:
            assert attack["broken"] <= proofs["eligible"] - proofs["secure"][str(attack["side"])]
    table = (patches.PATCH_RESULTS / "table.md").read_text()
    assert table == "\n".join(patches.patch_lines(runs)) + "\n"
