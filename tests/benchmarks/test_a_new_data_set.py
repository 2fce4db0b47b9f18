"""A data set that the benchmarks do not know: one entry and one TOML file, and everything takes it."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.data import DATA_SETS, DataSetDefinition, Images, hold_out_calibration
from benchmarks.experiments import _cells, load_experiment
from benchmarks.running import Store

EXPERIMENT = """
title = "Bands"
section = "suite"
form = "attacks"
dataset = "bands"
model = "tiny-cnn"
images = 20
chunk = 10
rates = [0.01, 0.1]
seeds = [0]
detectors = ["ours"]
attacks = [{ name = "PGD linf 0.1 U", kind = "pgd", norm = "linf", eps = 0.1, steps = 9, step_sizes = [0.02] }]

[training]
epochs = 9
attack = { norm = "linf", eps = 0.1, step_size = 0.05, steps = 9 }

[quick.training]
epochs = 3
batch_size = 50
attack = { norm = "linf", eps = 0.1, step_size = 0.05, steps = 2 }

[quick.attack]
steps = 2
"""


def read_bands(folder: Path, train: bool) -> Images:
    """Ten classes of noisy images of 2 × 20 × 20 pixels, each with a bright band at another height."""
    generator = torch.Generator().manual_seed(int(train))
    labels = torch.arange(700 if train else 100) % 10
    pixels = torch.randint(80, (len(labels), 2, 20, 20), generator=generator, dtype=torch.uint8)
    for index, label in enumerate(labels.tolist()):
        pixels[index, :, 2 * label : 2 * label + 2] += 150
    return Images(pixels, labels)


@pytest.fixture
def bands(tmp_path, monkeypatch):
    definition = DataSetDefinition(
        title="Bands",
        image_shape=(2, 20, 20),
        training_images=500,
        calibration_images=200,
        read=hold_out_calibration(read_bands, 200),
    )
    monkeypatch.setitem(DATA_SETS, "bands", definition)
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "suite-bands.toml").write_text(EXPERIMENT)
    monkeypatch.setattr(_cells, "FOLDER", folder)
    return load_experiment("suite-bands", "quick")


def call(*arguments):
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.output


def test_a_cell_of_a_new_data_set_is_planned_run_and_reported(bands, tmp_path):
    out, pages = ["--profile", "quick", "--out", str(tmp_path / "out")], tmp_path / "pages"
    (cell,) = bands.cells
    assert "1 cells, 1 trainings" in call("plan", "bands", "--device", "cpu", *out)
    assert "nothing is left" in call("run", "bands", "--device", "cpu", "--no-progress", *out)
    result = Store(tmp_path / "out").read_cell(cell.key)
    assert result["accuracy"][1] == 20
    assert result["checksums"] == {}

    assert call("report", "--pages", str(pages), *out).split() == [str(pages / "bands.md")]
    page = (pages / "bands.md").read_text()
    assert "# Bands, quick" in page
    assert "Data: Bands;" in page
    assert "from 200 images held out of training" in page
    assert "network `tiny-cnn`." in page  # and nothing about the network of the paper, which has no bands
    assert "The paper trains" not in page
