"""An attack on many batches, in one process or shared by several."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from clusterguard._support import collect, share
from clusterguard.attacks import Attack, Cost, Metered, StageRecord, WorstCaseSuite
from clusterguard.detection import Detector
from torch import Generator, Tensor
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from accelerate import Accelerator

Batches = list[tuple[Tensor, Tensor]]


class Attacked(NamedTuple):
    """What an attack did to batches.

    Attributes:
        images: (B, C, H, W) each, in the batches they came in.
        stages: of a suite.
        cost: of all batches together, in all runs that a suite went on from.
        runs: how many runs that were.
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

    A suite gets all images at once, for they are also what it starts towards. With an accelerator each batch has
    randomness of its own, and a suite runs batch by batch, so that what is found does not depend on how many
    processes there are.

    Args:
        attack: or suite.
        detector: calibrated.
        batches: checked images and labels, on the detector's device, the same in all processes.
        generator: randomness, on the detector's device, equally seeded in all processes.
        checkpoint: a file for suites; with an accelerator each batch has one of its own beside it.
        accelerator: whose processes take a batch each, in turn.
        progress: the progress bar's title; empty shows none.
    """
    metered = Metered(detector)
    if accelerator is None and isinstance(attack, WorstCaseSuite):
        images, labels = _join(batches)
        result = attack.run(
            detector, images, labels, generator=generator, checkpoint=checkpoint, progress=bool(progress)
        )
        parts = list(result.images.split([len(labels) for _, labels in batches]))
        return Attacked(parts, result.stages, result.cost, result.runs)
    bar = tqdm(batches, desc=progress, disable=not progress, leave=False)
    if accelerator is None:
        attacked = [attack(metered, images, labels, generator=generator) for images, labels in bar]
        return Attacked(attacked, (), metered.cost)

    if isinstance(attack, WorstCaseSuite) and attack.references is None:
        attack = replace(attack, references=_join(batches))
    seed = None if generator is None else _draw_seed(generator)
    own: dict[int, Attacked] = {}
    for position, batch in share(bar, accelerator):
        seeded = None if seed is None else Generator(batch[0].device).manual_seed(seed + position)
        file = None if checkpoint is None else checkpoint.with_stem(f"{checkpoint.stem}-{position}")
        done = attack_batches(attack, detector, [batch], generator=seeded, checkpoint=file)
        own[position] = done._replace(images=[done.images[0].cpu()])
    parts = collect(own, accelerator)
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
    """One record a stage, in the order in which stages first occur."""
    found: dict[str, StageRecord] = {}
    for record in records:
        before = found.get(record.name, StageRecord(record.name, 0, 0, 0, 0))
        found[record.name] = StageRecord(
            record.name,
            before.attacked + record.attacked,
            before.broken + record.broken,
            before.forward + record.forward,
            before.backward + record.backward,
        )
    return tuple(found.values())
