"""Attacks on many batches, in one process or distributed over several."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from clusterguard._support import bar, gather, share
from clusterguard.attacks import Attack, Cost, Metered, StageRecord, WorstCaseSuite
from clusterguard.attacks._internal import attack_checked_images
from clusterguard.detection import Detector
from torch import Generator, Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

Batches = list[tuple[Tensor, Tensor]]


class Attacked(NamedTuple):
    """The images that an attack returned for a list of batches, and its cost.

    Attributes:
        images: attacked images, one (B, C, H, W) for each batch.
        stages: records of a suite's stages; empty for other attacks.
        cost: cost of all batches together; for a suite, the sum of its stages in all runs.
        runs: number of those runs.
    """

    images: list[Tensor]
    stages: tuple[StageRecord, ...]
    cost: Cost
    runs: int = 1


def attack_batches(
    attack: Attack,
    detector: Detector,
    batches: Batches,
    *,
    generator: Generator | None = None,
    checkpoint: Path | None = None,
    accelerator: "Accelerator | None" = None,
    progress: str = "",
) -> Attacked:
    """Attack images batch by batch.

    Without an accelerator, a suite gets all images at once, because its attacks also start from other images of the
    set. With an accelerator, each batch has its own random generator and a suite runs batch by batch. So the result
    does not depend on the number of processes.

    Args:
        attack: attack or suite.
        detector: calibrated detector.
        batches: checked images and labels, on the detector's device, the same in all processes.
        generator: randomness, on the detector's device, equally seeded in all processes.
        checkpoint: file in which a suite keeps its progress; with an accelerator, each batch has its own file next to
            it.
        accelerator: accelerator whose processes take the batches in turn.
        progress: title of the progress bar; none is shown if it is empty.
    """
    metered = Metered(detector)
    if accelerator is None and isinstance(attack, WorstCaseSuite):
        images, labels = _join(batches)
        result = attack.run(
            detector,
            images,
            labels,
            generator=generator,
            checkpoint=checkpoint,
            progress=bool(progress),
            check=False,
        )
        parts = list(result.images.split([len(labels) for _, labels in batches]))
        return Attacked(parts, result.stages, result.cost, result.runs)
    shown = bar(batches, progress)
    if accelerator is None:
        attacked = [
            attack_checked_images(attack, metered, images, labels, generator=generator) for images, labels in shown
        ]
        return Attacked(attacked, (), metered.cost)

    if isinstance(attack, WorstCaseSuite) and attack.references is None:
        attack = replace(attack, references=_join(batches))
    seed = None if generator is None else _draw_seed(generator)
    by_position: dict[int, Attacked] = {}
    for position, batch in share(shown, accelerator):
        seeded = None if seed is None else Generator(batch[0].device).manual_seed(seed + position)
        file = None if checkpoint is None else checkpoint.with_stem(f"{checkpoint.stem}-{position}")
        done = attack_batches(attack, detector, [batch], generator=seeded, checkpoint=file)
        by_position[position] = done._replace(images=[done.images[0].cpu()])
    parts = gather(by_position, accelerator)
    return Attacked(
        [part.images[0].to(batches[0][0].device) for part in parts],
        _add_up([record for part in parts for record in part.stages]),
        sum((part.cost for part in parts), Cost()),
        max(part.runs for part in parts),
    )


def _draw_seed(generator: Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def _join(batches: Batches) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def _add_up(records: Sequence[StageRecord]) -> tuple[StageRecord, ...]:
    """One record for each stage, in the order in which the stages first occur."""
    sums: dict[str, StageRecord] = {}
    for record in records:
        before = sums.get(record.name, StageRecord(record.name, 0, 0, 0, 0))
        sums[record.name] = StageRecord(
            record.name,
            before.attacked + record.attacked,
            before.broken + record.broken,
            before.forward + record.forward,
            before.backward + record.backward,
        )
    return tuple(sums.values())
