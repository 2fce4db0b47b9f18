"""Detectors whose weights are among the results, ready to be attacked."""

import torch
from clusterguard import Calibrator, DetectorModule

from benchmarks.data import FloatBatches
from benchmarks.experiments import load_experiment
from benchmarks.running._store import RESULTS, Store
from benchmarks.running._training import JUDGED_AT_ONCE, Trainings


def load_trained(title: str) -> DetectorModule:
    """A detector of Table 2 on MNIST, profile short and seed 0, with thresholds for 1 % false positives.

    Args:
        title: beginning of its name, such as "l-ben".
    """
    cells = load_experiment("table2-mnist", "short").cells
    cell = next(cell for cell in cells if cell.title.startswith(title) and cell.training.seed == 0)
    trainings = Trainings(Store(RESULTS, "short"), device=torch.device("cpu"))
    detector, _ = trainings.detector(cell)
    Calibrator().fit(detector, FloatBatches(trainings.dataset("mnist").calibration, JUDGED_AT_ONCE), progress=False)
    return detector
