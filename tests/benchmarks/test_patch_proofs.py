"""The study of certificates against patches: its network, and that its table shows its counts."""

import json
from functools import partial

import pytest
import torch
import typer
from clusterguard import Calibrator
from clusterguard.detectors import LocalCosts, Windows
from clusterguard.samples import load_digits

from benchmarks.data import Images
from benchmarks.running import read_study
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
    monkeypatch.setattr(patches, "PROVED", (("patch", 1), ("l0", 1)))
    monkeypatch.setattr(patches, "ATTACKED", (("patch", 1),))
    options = {"seeds": 1, "epochs": 2, "room": 5.0, "temperature": 10.0, "proved": 20, "attacked": 4}
    patches.main(**options, output=tmp_path / "counts")
    first = (tmp_path / "counts" / "counts.json").read_text()
    patches.main(**options, output=tmp_path / "counts")
    assert (tmp_path / "counts" / "counts.json").read_text() == first
    assert (tmp_path / "counts" / "table.md").read_text().strip() in capsys.readouterr().out
    assert_bounded(json.loads(first))
    patches.main(**options, output=tmp_path / "again")  # of the saved guard
    again = json.loads((tmp_path / "again" / "counts.json").read_text())
    assert again["counts"] == json.loads(first)["counts"]
    assert again["precisions"] == {"0": ["float32", "float32"]}
    with pytest.raises(typer.BadParameter, match="choose another --output"):
        patches.main(**options | {"epochs": 3}, output=tmp_path / "counts")
    with pytest.raises(typer.BadParameter, match="another training"):
        patches.main(**options | {"epochs": 3}, output=tmp_path / "third")


def assert_bounded(content):
    """Check that no attack breaks more than is unproved."""
    for counts in content["counts"].values():
        for name, found in counts.items():
            kind, what, *threat = name.split("/")
            if what == "suite":
                assert found["count"] <= counts["/".join((kind, "proof", *threat))]["count"]


def test_the_committed_table_is_that_of_the_committed_counts():
    if not (patches.PATCH_RESULTS / "counts.json").exists():
        pytest.skip("not run yet")
    content = read_study(patches.PATCH_RESULTS, {})
    assert_bounded(content)
    table = (patches.PATCH_RESULTS / "table.md").read_text()
    assert table == "\n".join(patches.patch_lines(content)) + "\n"
