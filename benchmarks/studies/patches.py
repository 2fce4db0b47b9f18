"""What a guard that sums costs of windows can prove about patches on CIFAR10, with refusal and without.

`python -m benchmarks.studies.patches` trains one guard for each seed, and writes counts and a table of them to
benchmarks/results/patches after each. A killed training goes on where its last checkpoint is. On one core of a CPU an
epoch takes a few minutes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from clusterguard import Calibrator, ClusterGuard, WorstCaseSuite, evaluate
from clusterguard.certification import certify
from clusterguard.detectors import LocalCosts, make_local_guard
from clusterguard.training import TemplateTrainer
from torch import Generator, Tensor, nn

from benchmarks._support import keep_freed_memory, markdown_table, without_refusal
from benchmarks.data import FloatBatches, load_data_set
from benchmarks.detectors import OneCycle
from benchmarks.running import RESULTS, read_study, write_study

PATCH_RESULTS = RESULTS / "patches"
PATCH_SIDES = (2, 3, 5)
_BATCH, _RATE = 128, 0.1
_FALSE_POSITIVES = 0.05
_AT_ONCE = 50
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


def count_secure(guard: ClusterGuard, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """How many images are labelled correctly and accepted, and of how many of these that is proved for patches."""
    right, eligible = 0, 0
    secure = dict.fromkeys(map(str, PATCH_SIDES), 0)
    for pictures, truth in zip(images.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True):
        detection = guard.detect(pictures)
        right += int((detection.labels == truth).sum())
        rows = (detection.labels == truth) & ~detection.is_adversarial
        eligible += int(rows.sum())
        for side in PATCH_SIDES if rows.any() else ():
            proved = certify(guard, pictures[rows], truth[rows], eps=side, norm="patch").is_secure
            secure[str(side)] += int(proved.sum())
    return {"images": len(labels), "right": right, "eligible": eligible, "secure": secure}


def count_broken(guard: ClusterGuard, images: Tensor, labels: Tensor, seed: int) -> list[dict[str, Any]]:
    """How many images the suite breaks with patches, of those that are labelled correctly and accepted."""
    rows = []
    for side in PATCH_SIDES:
        suite = WorstCaseSuite("patch", eps=float(side), budget="quick")
        report = evaluate(
            guard, {"suite": suite}, [(images, labels)], generator=Generator().manual_seed(seed), sanity_images=0
        )
        (result,) = report.results
        rows.append({"side": side, "broken": result.success.count, "of": result.success.total})
    return rows


def patch_lines(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The counts as a table in Markdown, with a column for each seed."""

    def shares(counts: Sequence[int], totals: Sequence[int]) -> list[str]:
        return [f"{count / total:.3f}" for count, total in zip(counts, totals, strict=True)]

    rows: list[list[str]] = []
    for key, words in (("without_refusal", "without refusal"), ("with_refusal", "with refusal")):
        found = [run[key] for run in runs]
        totals = [one["images"] for one in found]
        rows.append([f"{words}: right", *shares([one["right"] for one in found], totals)])
        rows.append([f"{words}: right and accepted", *shares([one["eligible"] for one in found], totals)])
        for side in map(str, PATCH_SIDES):
            counts = [one["secure"][side] for one in found]
            rows.append([f"{words}: of all images, right and proved, {side}×{side}", *shares(counts, totals)])
    for index, attack in enumerate(runs[0]["attacks"]):
        broken = [f"{run['attacks'][index]['broken']} of {run['attacks'][index]['of']}" for run in runs]
        rows.append([f"with refusal: the suite breaks, {attack['side']}×{attack['side']}", *broken])
    return markdown_table(["", *(f"seed {run['seed']}" for run in runs)], rows)


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0.")] = 1,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of training.")] = 30,
    room: Annotated[float, typer.Option(help="Windows to make room for.")] = 20.0,
    temperature: Annotated[float, typer.Option(help="Divisor of distances in the loss.")] = 10.0,
    proved: Annotated[int, typer.Option(min=1, help="Test images to prove something about, the first ones.")] = 10_000,
    attacked: Annotated[int, typer.Option(min=1, help="Test images to attack, the first ones.")] = 100,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the CPU.")] = 1,
    output: Annotated[Path, typer.Option(help="The folder for results.")] = PATCH_RESULTS,
) -> None:
    """Train, prove and attack."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    runs = read_study(output, {"runs": []})["runs"]
    images, labels = load_data_set("cifar10").open_test().floats()
    for seed in range(seeds):
        if seed in [run["seed"] for run in runs]:
            continue
        work = RESULTS / "work" / "patches"
        guard, precisions = train_local_guard(seed, epochs=epochs, room=room, temperature=temperature, work=work)
        assert isinstance(guard.encoder, nn.Sequential)
        assert isinstance(guard.encoder[0], LocalCosts)
        few, their = images[:proved], labels[:proved]
        settings = {"seed": seed, "epochs": epochs, "room": room, "temperature": temperature, "precisions": precisions}
        results = {
            "without_refusal": count_secure(without_refusal(guard), few, their),
            "with_refusal": count_secure(guard, few, their),
            "attacks": count_broken(guard, images[:attacked], labels[:attacked], seed),
        }
        runs.append(settings | {"windows": guard.encoder[0].windows()._asdict()} | results)
        write_study(output, {"runs": runs}, patch_lines(runs))
        guard.save_pretrained(work / f"guard-{seed}")
    print("\n".join(patch_lines(runs)))


if __name__ == "__main__":
    typer.run(main)
