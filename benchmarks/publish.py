"""A trained guard of the benchmarks as a folder that users load: calibrated, evaluated, with its model card."""

from pathlib import Path

from clusterguard import Calibrator, ClusterGuard, WorstCaseSuite, certified_success_rate, evaluate
from clusterguard.errors import ConfigurationError
from torch import Generator

from benchmarks.cells import Cell
from benchmarks.datasets import Batches
from benchmarks.runner import REFERENCES, Runner
from benchmarks.training import JUDGED_AT_ONCE


def publish(cell: Cell, runner: Runner, folder: Path, *, images: int = 1000, attacked: int = 300) -> None:
    """Save a cell's detector, trained already or now.

    Args:
        cell: any cell of the detector; its attack does not matter.
        runner: trains and keeps weights.
        folder: where to save, see `ClusterGuard.save_pretrained`.
        images: test images for accuracy and certificates, the first ones.
        attacked: test images for the suite.

    Raises:
        ConfigurationError: the detector is no `ClusterGuard`.
    """
    guard, record = runner.detector(cell)
    if not isinstance(guard, ClusterGuard):
        raise ConfigurationError(f"expected a guard to publish, got a {type(guard).__name__}")
    data, eps = runner.dataset(cell.training.dataset), cell.training.attack["eps"]
    Calibrator().fit(guard, Batches(data.calibration, JUDGED_AT_ONCE), progress=runner.progress)
    references = data.calibration.head(REFERENCES).floats()
    test = data.open_test()
    report = evaluate(
        guard,
        {f"suite linf {eps:g}": WorstCaseSuite("linf", eps=eps, references=references)},
        Batches(test.head(attacked).to(runner.device), attacked),
        generator=Generator(runner.device).manual_seed(cell.seed),
        sanity_images=0,
        progress=runner.progress,
    )
    judged = Batches(test.head(images).to(runner.device), JUDGED_AT_ONCE)
    proved = {f"linf {radius:g}": str(certified_success_rate(guard, judged, eps=radius)) for radius in (eps / 2, eps)}
    training = {
        **record,
        "certified attack success rate at most": proved,
        "attacks on them": f"first {attacked} images",
    }
    guard.save_pretrained(folder, training=training, evaluation=report)
