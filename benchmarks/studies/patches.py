"""What a guard that sums costs of windows can prove about patches on CIFAR10, with refusal and without.

`python -m benchmarks.studies.patches` trains one guard for each seed, and writes counts and tables of them to
benchmarks/results/patches. Everything is counted for the guard in float64, unless `--float32` is given. The study goes
on where it stopped, in a training from its last checkpoint. On two cores of a CPU without bfloat16 an epoch takes about
eight minutes.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from clusterguard import Calibrator, ClusterGuard
from clusterguard.detectors import make_local_guard
from clusterguard.training import TemplateTrainer
from torch import Generator, Tensor, nn
from tqdm import tqdm

from benchmarks._support import keep_freed_memory, markdown_table, without_refusal
from benchmarks.data import FloatBatches, load_data_set
from benchmarks.detectors import OneCycle
from benchmarks.running import (
    RESULTS,
    Counts,
    SuiteBudget,
    count_accepted,
    count_broken,
    count_without_proof,
    read_study,
    threat_in_words,
    write_study,
)

PATCH_RESULTS = RESULTS / "patches"
PROVED = (("l0", 1), ("patch", 2), ("patch", 3), ("patch", 5))
ATTACKED = (("patch", 2), ("patch", 3), ("patch", 5))
REFUSING, ACCEPTING = "with refusal", "without refusal"
_BATCH, _RATE = 128, 0.1
_FALSE_POSITIVES = 0.05
_STEPS_AT_RISK = 100


def build_local_network(width: int = 64) -> nn.Sequential:
    """A network whose outputs look at windows of 9 × 9 pixels, every second one along rows and columns."""

    def block(channels: int, out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)
        return [layer, nn.BatchNorm2d(out), nn.ReLU()]

    return nn.Sequential(
        *block(3, width, 3),
        *block(width, 2 * width, 3, stride=2),
        *block(2 * width, 2 * width, 3),
        *block(2 * width, 4 * width, 1),
        *block(4 * width, 4 * width, 1),
        nn.Conv2d(4 * width, 10, 1),
    )


def train_local_guard(
    seed: int, *, epochs: int, room: float, temperature: float, work: Path
) -> tuple[ClusterGuard, list[str]]:
    """A guard for CIFAR10, trained from the last checkpoint in a folder, if there is one, and the epochs' precisions.

    Args:
        seed: seed of weights, batches and crops.
        epochs: number of epochs.
        room: number of windows to make room for.
        temperature: divisor of the distances in the loss.
        work: folder of the checkpoint.
    """
    torch.manual_seed(seed)
    data = load_data_set("cifar10")
    guard = make_local_guard(build_local_network(), 10, example=torch.zeros(1, 3, 32, 32))
    loader = FloatBatches(data.train, _BATCH, shuffle=True, generator=Generator().manual_seed(seed))
    cycle = OneCycle(_RATE, epochs * len(loader))
    trainer = TemplateTrainer(
        guard,
        pixels=room,
        temperature=temperature,
        optimizer=cycle.optimizer,
        scheduler=cycle.scheduler,
        calibrator=Calibrator(_FALSE_POSITIVES),
        options=cycle.options(),
    )
    work.mkdir(parents=True, exist_ok=True)
    history = trainer.fit(
        loader,
        FloatBatches(data.calibration, 250),
        epochs=epochs,
        checkpoint=work / f"training-{seed}.pt",
        checkpoint_every=_STEPS_AT_RISK,
        generator=Generator().manual_seed(seed),
    )
    return guard, [record.precision for record in history]


def planned_patch_counts(
    guard: ClusterGuard, images: Tensor, labels: Tensor, settings: Mapping[str, Any]
) -> dict[str, Callable[[], Counts]]:
    """What to count for a guard, by name, with refusal and without.

    Args:
        guard: guard to count for.
        images: (n, 3, 32, 32) test images.
        labels: (n,) their labels.
        settings: how many images to prove something about and to attack, and the budget of the attacks.
    """
    judges = {REFUSING: guard, ACCEPTING: without_refusal(guard)}
    plan: dict[str, Callable[[], Counts]] = {
        f"{name}/benign": partial(count_accepted, judge, images, labels) for name, judge in judges.items()
    }
    few = images[: settings["proved"]], labels[: settings["proved"]]
    for norm, eps in PROVED:
        for name, judge in judges.items():
            plan[f"{name}/proof/{norm}/{eps:g}"] = partial(count_without_proof, judge, *few, norm, eps)
    few = images[: settings["attacked"]], labels[: settings["attacked"]]
    for norm, eps in ATTACKED:
        plan[f"{REFUSING}/suite/{norm}/{eps:g}"] = partial(count_broken, guard, *few, norm, eps, settings["budget"])
    return plan


def patch_lines(content: Mapping[str, Any]) -> list[str]:
    """The counts as two tables in Markdown: of each seed, and of each kind of change with the seeds side by side."""
    runs: list[Mapping[str, Counts]] = [*content["counts"].values()]
    proved = content["settings"]["proved"]

    def shares(key: str, part: str) -> list[str]:
        return [f"{run[key][part] / run[key]['images']:.3f}" for run in runs]

    def each(key: str, show: Callable[[Counts], str]) -> str:
        return ", ".join(show(run[key]) if key in run else "not run" for run in runs)

    def share_proved(found: Counts) -> str:
        return f"{(found['of'] - found['count']) / proved:.3f}"

    refusing = [run[f"{REFUSING}/benign"] for run in runs]
    seeds = [
        ["accuracy", *shares(f"{ACCEPTING}/benign", "right")],
        ["accepted and right", *shares(f"{REFUSING}/benign", "eligible")],
        ["refused test images", *(f"{1 - x['accepted'] / x['images']:.3f}" for x in refusing)],
    ]
    changes = [
        [
            threat_in_words(norm, eps),
            *(each(f"{kind}/proof/{norm}/{eps:g}", share_proved) for kind in (ACCEPTING, REFUSING)),
            each(f"{REFUSING}/suite/{norm}/{eps:g}", lambda found: f"{found['count']} of {found['of']}")
            if (norm, eps) in ATTACKED
            else "not run",
        ]
        for norm, eps in PROVED
    ]
    head = "change", "right and proved, without refusal", "right, accepted and proved", "the suite breaks"
    return [
        *markdown_table(["", *(f"seed {seed}" for seed in content["counts"])], seeds),
        "",
        *markdown_table(head, changes),
    ]


def load_or_train(seed: int, settings: Mapping[str, Any], work: Path) -> tuple[ClusterGuard, list[str]]:
    """The guard of a seed, and the precisions of its epochs. A finished training is not repeated.

    Raises:
        typer.BadParameter: the folder holds a guard that was trained with other settings.
    """
    folder, options = work / f"guard-{seed}", {name: settings[name] for name in ("epochs", "room", "temperature")}
    if folder.exists():
        record = json.loads((folder / "config.json").read_text())["training"]
        if {name: record[name] for name in options} != options:
            raise typer.BadParameter(f"{folder} holds a guard of another training, {record}; move it away")
        return ClusterGuard.from_pretrained(folder), record["precisions"]
    guard, precisions = train_local_guard(seed, work=work, **options)
    guard.save_pretrained(folder, training={**settings, "seed": seed, "precisions": precisions})
    return guard, precisions


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0.")] = 1,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of training.")] = 30,
    room: Annotated[float, typer.Option(help="Windows to make room for.")] = 20.0,
    temperature: Annotated[float, typer.Option(help="Divisor of distances in the loss.")] = 10.0,
    proved: Annotated[int, typer.Option(min=1, help="Test images to prove something about, the first ones.")] = 10_000,
    attacked: Annotated[int, typer.Option(min=1, help="Test images to attack, the first ones.")] = 100,
    budget: Annotated[SuiteBudget, typer.Option(help="Budget of the attacks.")] = "quick",
    threads: Annotated[int, typer.Option(min=1, help="Threads of the CPU.")] = 1,
    single: Annotated[bool, typer.Option("--float32", help="Count for the guard as it was trained.")] = False,
    output: Annotated[Path, typer.Option(help="The folder for results.")] = PATCH_RESULTS,
) -> None:
    """Train, prove and attack, and write counts and tables after each count."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    settings: dict[str, Any] = {"epochs": epochs, "room": room, "temperature": temperature}
    settings |= {"proved": proved, "attacked": attacked, "budget": budget, "float32": single}
    content = read_study(output, {"settings": settings, "precisions": {}, "counts": {}})
    if content["settings"] != settings:
        raise typer.BadParameter(f"{output} holds results with {content['settings']}; choose another --output")
    images, labels = load_data_set("cifar10").open_test().floats()
    for seed in map(str, range(seeds)):
        guard, content["precisions"][seed] = load_or_train(int(seed), settings, RESULTS / "work" / "patches")
        counts = content["counts"].setdefault(seed, {})
        dtype = torch.float32 if single else torch.float64  # bounds on the rounding of float32 use up the guard's room
        plan = planned_patch_counts(guard.to(dtype), images.to(dtype), labels, settings)
        for name, count in tqdm(plan.items(), desc=f"seed {seed}"):
            if name not in counts:
                counts[name] = count()
                if f"{ACCEPTING}/benign" in counts:
                    write_study(output, content, patch_lines(content))
    print("\n".join(patch_lines(content)))


if __name__ == "__main__":
    typer.run(main)
