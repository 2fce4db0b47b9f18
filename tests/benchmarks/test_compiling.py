import time
from dataclasses import replace

import pytest
import torch
from clusterguard.errors import ConfigurationError
from small_experiment import SMALL
from torch import nn

from benchmarks.detectors import RECIPES, quickest_mode
from benchmarks.detectors import _networks as networks
from benchmarks.experiments import _cells as cells
from benchmarks.experiments import load_experiment
from benchmarks.running import Store, Trainings, run_cell
from benchmarks.running import _training as training
from benchmarks.running._training import networks_in


class Compilable(nn.Module):
    """Takes so many seconds a pass, and others, or an error, once compiled."""

    def __init__(self, seconds, compiled):
        super().__init__()
        self.seconds, self.compiled = seconds, compiled

    def compile(self, *, mode):
        self.seconds = self.compiled

    def forward(self, images):
        if isinstance(self.seconds, Exception):
            raise self.seconds
        time.sleep(self.seconds)
        return 2 * images


@pytest.mark.parametrize(
    ("compiled", "expected"),
    [
        (0.001, "default"),
        (0.02, None),
        (0.04, None),
        (ConfigurationError("wrong gradients"), None),
        (RuntimeError("no compiler"), None),
    ],
)
def test_the_compiler_is_taken_where_it_pays_and_gives_the_same_gradients(compiled, expected):
    assert quickest_mode(Compilable(0.02, compiled), torch.rand(2, 1, 4, 4)) == expected


def test_a_network_that_fails_by_itself_is_not_called_slow():
    with pytest.raises(RuntimeError, match="out of memory"):
        quickest_mode(Compilable(RuntimeError("out of memory"), 0.001), torch.rand(2, 1, 4, 4))


def test_whether_compiling_pays_is_measured_once_a_network_and_recorded(tmp_path, monkeypatch):
    (tmp_path / "small.toml").write_text(SMALL)
    monkeypatch.setattr(cells, "FOLDER", tmp_path)
    seen, compiled = [], []
    monkeypatch.setattr(training, "quickest_mode", lambda network, images: seen.append(images.shape) or "default")
    monkeypatch.setattr(networks.Features, "compile", lambda network, mode: compiled.append((network, mode)))
    trainings = Trainings(Store(tmp_path), device=torch.device("cpu"), compiled="auto")
    chosen = [cell for cell in load_experiment("small").cells if cell.attack == "FGSM"]
    chosen = [replace(cell, training=replace(cell.training, epochs=1)) for cell in chosen]
    results = [run_cell(cell, trainings) for cell in chosen]
    assert [result["provenance"]["compiled"] for result in results] == ["default", "default"]
    inner = [network for cell in chosen for network in networks_in(trainings.detector(cell)[0])]
    assert compiled == [(network, "default") for network in inner]
    assert seen == [(50, 1, 28, 28)]


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_training_compiles_is_what_the_detector_runs(name):
    """A guard runs a copy of the network it was built from: to compile that one would change nothing."""
    detector = RECIPES[name].build(networks.build_network("tiny-cnn", (1, 28, 28))).eval()
    (network,) = networks_in(detector)
    runs = []
    network._call = lambda body, images: runs.append(images.shape) or body(images)
    detector.evidence(torch.rand(3, 1, 28, 28))
    assert runs
