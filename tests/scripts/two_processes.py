"""Train, calibrate and evaluate; started in one process or in two, it leaves the same results in FOLDER."""

import contextlib
import copy
import re
import sys
from pathlib import Path

import clusterguard as cg
import torch
from accelerate import Accelerator
from clusterguard.attacks import EFFORTS
from clusterguard.attacks._suite import Effort
from clusterguard.errors import TrainingStoppedError
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def blobs(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = 0.4 * torch.rand(count, 1, 6, 6, generator=generator)
    for index in range(3):
        images[labels == index, :, 2 * index : 2 * index + 2] += 0.4
    return TensorDataset(images.clamp(0, 1), labels)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    share = 2 // accelerator.num_processes
    torch.manual_seed(accelerator.process_index)  # processes start with weights of their own
    guard = cg.ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU()), 3)
    guard.load_state_dict(torch.load(folder / "start.pt") if accelerator.process_index == 0 else guard.state_dict())
    trainer = cg.AdversarialClusterTrainer(
        guard,
        cg.PGD(eps=0.15, step_size=0.08, steps=3, keep="last"),
        optimizer=torch.optim.Adam(guard.parameters(), lr=5e-3),
        refresh_every=2,
        refresh_batches=2 * share,
        calibrator=cg.Calibrator(0.1),
        options=cg.TrainingOptions(accelerator=accelerator, clip_norm=50.0),
    )
    train = DataLoader(blobs(180, 0), batch_size=15 * share)
    calibration = DataLoader(blobs(165, 1), batch_size=15)  # an odd number of batches
    validation = cg.training.Validation(DataLoader(blobs(45, 3), batch_size=15))
    options = {"epochs": 2, "checkpoint": folder / "run.pt", "progress": False, "validation": validation}
    if accelerator.num_processes == 2:  # the second process alone asks to stop, within the second epoch
        with contextlib.suppress(TrainingStoppedError):
            trainer.fit(
                train, calibration, stop_when=lambda: accelerator.process_index and trainer.engine.steps == 8, **options
            )
        assert trainer.engine.steps == 8, "nobody stopped"
    history = trainer.fit(train, calibration, **options)
    moving, accumulated, proved = train_otherwise(guard, accelerator, train, calibration)
    fitted = cg.Calibrator(0.05).fit(guard, calibration, accelerator=accelerator)
    test = DataLoader(blobs(30, 2), batch_size=6)
    attacks = {
        "PGD": cg.PGD(eps=0.3, step_size=0.1, steps=5, start="random"),
        "suite": cg.WorstCaseSuite("linf", eps=0.2, budget="quick"),
    }
    EFFORTS["quick"] = Effort(steps=5, restarts=1, targets=2, queries=20)
    generator = torch.Generator().manual_seed(0)
    report = cg.evaluate(guard, attacks, test, generator=generator, accelerator=accelerator, sanity_images=10)
    result = {
        "weights": guard.state_dict(),
        "moved": {name: weight.detach() for name, weight in moving.named_parameters()},
        "accumulated": {name: weight.detach() for name, weight in accumulated.named_parameters()},
        "proved": {name: weight.detach() for name, weight in proved.named_parameters()},
        "thresholds": trainer.thresholds,
        "history": [
            [record.loss, record.accuracy, record.attack_success_rate, *record.validation.values()]
            for record in history
        ],
        "calibration": [*fitted.thresholds, *fitted.counts],
        "broken": [result.verdict.labels for result in report.results],
        "cost": [tuple(result.cost) for result in report.results],
        "report": re.sub(r"\d+\.\d+ s", "", str(report)),
    }
    torch.save(result, folder / f"{accelerator.num_processes}-{accelerator.process_index}.pt")


def train_otherwise(guard, accelerator, train, calibration):
    """Copies of a guard, trained further: with perturbed weights, with groups of batches, and certified."""
    # With weights that move up the loss before they go down, on weights that have learned something.
    moving = copy.deepcopy(guard)
    options = cg.TrainingOptions(accelerator=accelerator, weight_perturbation=0.05)
    cg.AdversarialClusterTrainer(
        moving,
        cg.PGD(eps=0.15, step_size=0.08, steps=3, keep="last"),
        optimizer=torch.optim.SGD(moving.parameters(), lr=1e-3),
        options=options,
    ).fit(train, calibration, epochs=1, calibrate=False, progress=False)
    # With groups of batches, the last of which is smaller.
    accumulated = copy.deepcopy(guard)
    cg.AdversarialClusterTrainer(
        accumulated,
        cg.PGD(eps=0.15, step_size=0.08, steps=3, keep="last"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        relabel=cg.training.Original(),
        options=cg.TrainingOptions(accelerator=accelerator, accumulate=4),
    ).fit(train, calibration, epochs=2, calibrate=False, progress=False)
    proved = copy.deepcopy(guard)
    cg.CertifiedTrainer(
        proved,
        eps=0.05,
        optimizer=torch.optim.SGD(proved.parameters(), lr=1e-3),
        ramp_epochs=1,
        options=cg.TrainingOptions(accelerator=accelerator),
    ).fit(train, calibration, epochs=3, calibrate=False, progress=False)
    return moving, accumulated, proved


if __name__ == "__main__":
    main(Path(sys.argv[1]))
