"""Which network learns the most robustness on CIFAR10 in a given time of this machine's CPU.

`python -m benchmarks.studies.networks --minutes 30` trains each network for so many minutes of CPU time on one thread,
with attacks of a single step, in bfloat16 where that is faster, and measures accuracy without and with PGD. Results go
to benchmarks/results/networks.json after each network. A killed training goes on with `--resume`.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import typer
from clusterguard import PGD, ClusterGuard, DetectorModule, DetectorTrainer, recipes
from clusterguard.attacks import NoisyFGSM
from clusterguard.detection import Loader, Rate, Verdicts, accuracy, judge
from clusterguard.detectors import WithThresholds
from clusterguard.training import EpochRecord, OverfittingCheck, crop_and_flip
from torch import Generator, Tensor

from benchmarks._support import markdown_table, write_atomically, write_json
from benchmarks.data import DataSet, FloatBatches, Images, load_data_set
from benchmarks.detectors import RECIPES, OneCycle, Schedule, build_network
from benchmarks.running import RESULTS, provenance

NETWORKS = ("resnet18", "resnet18-half", "resnet9", "wrn-16-4")
NETWORKS_FILE = RESULTS / "networks.json"
TrainerName = Literal["madry", "ours"]
_EPS, _PGD_STEP = 8 / 255, 2 / 255
_BATCH = 128
_RATE = 0.2  # as in the publications on training with a single step
_TRIAL = 5  # number of steps that are timed
_HELD_OUT = 256  # images that catastrophic overfitting is looked for on
_CLEAN, _ATTACKED = 1000, 300  # test images
_STEPS_AT_RISK = 50


class Passes:
    """Batches of a number of steps, from as many passes over the images as that takes, each in a new order.

    Args:
        images: images to make batches of.
        steps: number of batches.
        seed: seed of the orders.
    """

    def __init__(self, images: Images, steps: int, seed: int) -> None:
        self.images, self.steps = images, steps
        self.generator = Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count, wanted = len(self.images.labels), self.steps * _BATCH
        orders = [torch.randperm(count, generator=self.generator) for _ in range(-(-wanted // count))]
        for rows in torch.cat(orders)[:wanted].split(_BATCH):
            yield Images(self.images.pixels[rows], self.images.labels[rows]).floats()


@dataclass(frozen=True)
class Plan:
    """How long a training takes, and how that was found.

    Attributes:
        epochs: number of epochs, each of about one pass over the training images.
        steps: number of steps of an epoch.
        cpu_seconds: CPU seconds of a step.
    """

    epochs: int
    steps: int
    cpu_seconds: float

    @classmethod
    def fitting(cls, minutes: float, cpu_seconds: float, images: int) -> "Plan":
        """The plan that takes these minutes, if a step takes these CPU seconds, for a number of training images."""
        steps = max(1, round(60 * minutes / cpu_seconds))
        epochs = max(1, round(steps * _BATCH / images))
        return cls(epochs, max(1, steps // epochs), cpu_seconds)


@dataclass
class Stopwatch:
    """A loader that notes the CPU time whenever a batch is asked for.

    Attributes:
        loader: loader with the batches.
        readings: CPU seconds of the process at each batch of the last pass.
    """

    loader: Passes
    readings: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.readings = []
        for batch in self.loader:
            self.readings.append(time.process_time())
            yield batch


def build_classifier_trainer(name: str, loader: Loader, plan: Plan) -> DetectorTrainer:
    """The trainer of a classifier on attacked images alone, with SGD, one cycle and averaged weights."""
    recipe, cycle = RECIPES["madry"], OneCycle(_RATE, plan.epochs * plan.steps)
    schedule = Schedule(
        attack=NoisyFGSM(eps=_EPS).as_pgd(),
        optimizer=lambda module: cycle.optimizer(module.parameters()),
        scheduler=cycle.scheduler,
        options=cycle.options(),
    )
    return recipe.trainer(recipe.build(build_network(name, (3, 32, 32))), schedule)


def build_guard_trainer(name: str, loader: Loader, plan: Plan) -> DetectorTrainer:
    """The trainer of a guard by the library's recipe."""
    guard = cast(ClusterGuard, RECIPES["ours"].build(build_network(name, (3, 32, 32))))
    trainer = recipes.single_step(guard, loader, epochs=plan.epochs, eps=_EPS, augment=crop_and_flip)
    trainer.options = replace(trainer.options, precision="auto", memory_format="channels_last")
    return trainer


_BUILD: dict[str, Callable[[str, Loader, Plan], DetectorTrainer]] = {
    "madry": build_classifier_trainer,
    "ours": build_guard_trainer,
}


def time_steps(name: str, method: TrainerName, data: DataSet) -> float:
    """The CPU seconds of a training step, without the first one."""
    plan = Plan(1, _TRIAL + 1, 0.0)
    loader = Stopwatch(Passes(data.train, plan.steps, seed=0))
    trainer = _BUILD[method](name, loader, plan)
    trainer.fit(loader, FloatBatches(data.calibration, _BATCH), epochs=1, calibrate=False, progress=False)
    return (loader.readings[-1] - loader.readings[1]) / (_TRIAL - 1)


def pgd(method: TrainerName, steps: int) -> PGD:
    """The attack that a training is judged by. It searches in bfloat16 where that is faster, and judges in float32."""
    objective = "cross_entropy" if method == "madry" else "margin"
    return PGD(eps=_EPS, step_size=_PGD_STEP, steps=steps, start="random", objective=objective, precision="auto")


def train_network(
    name: str, method: TrainerName, data: DataSet, work: Path, *, minutes: float, seed: int
) -> tuple[DetectorTrainer, Plan]:
    """Train a network, or go on from the checkpoint in a folder.

    Args:
        name: key of `benchmarks.detectors.MODELS`.
        method: key of the trainer.
        data: data set.
        work: folder of the plan and the checkpoint.
        minutes: CPU minutes of the training.
        seed: seed of weights, batches, crops and attacks.
    """
    file = work / "plan.json"
    if file.exists():
        plan = Plan(**json.loads(file.read_text()))
    else:
        plan = Plan.fitting(minutes, time_steps(name, method, data), len(data.train.labels))
        work.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda new: new.write_text(json.dumps(asdict(plan))))
    print(f"{name}: {plan.epochs} epochs of {plan.steps} steps, {_BATCH / plan.cpu_seconds:.0f} images a CPU second")
    torch.manual_seed(seed)
    loader = Passes(data.train, plan.steps, seed)
    trainer = _BUILD[method](name, loader, plan)
    held_out = Images(*(part[-_HELD_OUT:] for part in data.calibration))
    rest = Images(*(part[:-_HELD_OUT] for part in data.calibration))
    trainer.fit(
        loader,
        FloatBatches(rest, _BATCH),
        epochs=plan.epochs,
        checkpoint=work / "training.pt",
        checkpoint_every=_STEPS_AT_RISK,
        generator=Generator().manual_seed(seed),
        calibrate=False,
        overfitting=OverfittingCheck(FloatBatches(held_out, _HELD_OUT), pgd(method, 10)),
    )
    return trainer, plan


def judge_network(detector: DetectorModule, method: TrainerName, data: DataSet) -> dict[str, Any]:
    """The accuracy of a detector that refuses nothing, on test images and on attacked ones."""
    accepting = WithThresholds(detector, torch.full_like(detector.thresholds, torch.inf))
    test = data.open_test()
    clean = judge(accepting, FloatBatches(test.head(_CLEAN), 250))
    batches = FloatBatches(test.head(_ATTACKED), 100)
    generator, attack = Generator().manual_seed(0), pgd(method, 20)
    robust = judge(
        accepting, [(attack(accepting, images, labels, generator=generator), labels) for images, labels in batches]
    )
    return {"clean": _plain(clean), "robust": _plain(robust)}


def _plain(verdicts: Verdicts) -> dict[str, Any]:
    rate = accuracy(verdicts)
    return {"count": rate.count, "total": rate.total, "interval": [round(end, 4) for end in rate.interval]}


def describe_epochs(history: list[EpochRecord]) -> list[dict[str, Any]]:
    """What a reader wants to know of each epoch."""
    names = ("loss", "accuracy", "attack_success_rate", "check_success_rate", "returned_to", "seconds", "precision")
    rows = [{name: getattr(record, name) for name in names} for record in history]
    return [{name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()} for row in rows]


def summarise_networks(rows: list[dict[str, Any]]) -> str:
    """The table for the page on findings."""
    head = "network", "trained", "CPU minutes", "images a second", "epochs", "accuracy", "accuracy under PGD-20"
    cells = []
    for row in rows:
        shown = [
            f"{rate.value:.2f} [{rate.interval[0]:.2f}, {rate.interval[1]:.2f}]"
            for rate in (Rate(row[kind]["count"], row[kind]["total"]) for kind in ("clean", "robust"))
        ]
        passes = row["epochs"] * row["steps"] * row["batch_size"] / row["training_images"]
        facts = [
            f"`{row['network']}`",
            "classifier" if row["method"] == "madry" else "guard",
            f"{row['minutes']:g}",
            f"{row['images_per_cpu_second']:.0f}",
            f"{passes:.1f}",
        ]
        cells.append([*facts, *shown])
    return "\n".join(markdown_table(head, cells))


def main(
    minutes: Annotated[float, typer.Option(help="CPU minutes of each training.")] = 30.0,
    only: Annotated[list[str] | None, typer.Option(help="Networks to train; all by default.")] = None,
    method: Annotated[TrainerName, typer.Option(help="madry: a classifier; ours: a guard.")] = "madry",
    seed: Annotated[int, typer.Option(help="Seed of weights, batches, crops and attacks.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what was begun; keep what is done.")] = False,
    output: Annotated[Path, typer.Option(help="The JSON file.")] = NETWORKS_FILE,
) -> None:
    """Train networks for a fixed time each, and measure what they have learned."""
    torch.set_num_threads(1)
    data = load_data_set("cifar10")
    rows: list[dict[str, Any]] = json.loads(output.read_text())["rows"] if output.exists() else []
    for name in only or NETWORKS:
        key = {"network": name, "method": method, "minutes": minutes, "seed": seed}
        if resume and any(key.items() <= row.items() for row in rows):
            continue
        work = RESULTS / "work" / "networks" / f"{method}-{name}-{minutes:g}-{seed}"
        if not resume:
            shutil.rmtree(work, ignore_errors=True)
        trainer, plan = train_network(name, method, data, work, minutes=minutes, seed=seed)
        seconds = sum(record.seconds for record in trainer.history)
        row = key | {
            "parameters": sum(weight.numel() for weight in trainer.detector.parameters()),
            "epochs": plan.epochs,
            "steps": plan.steps,
            "batch_size": _BATCH,
            "training_images": len(data.train.labels),
            "seconds": round(seconds, 1),
            "images_per_second": round(plan.epochs * plan.steps * _BATCH / seconds, 1),
            "images_per_cpu_second": round(_BATCH / plan.cpu_seconds, 1),
            **judge_network(trainer.detector, method, data),
            "history": describe_epochs(trainer.history),
            "provenance": provenance(torch.device("cpu")),
        }
        rows = [other for other in rows if not key.items() <= other.items()] + [row]
        content = {
            "protocol": {
                "eps": _EPS,
                "training_attack": repr(NoisyFGSM(eps=_EPS)),
                "attack": "PGD, 20 steps of 2/255 from a random start, precision auto, judged in float32",
            },
            "rows": rows,
        }
        write_json(output, content)
        shutil.rmtree(work, ignore_errors=True)
        print(summarise_networks([row]))


if __name__ == "__main__":
    typer.run(main)
