"""The paper's method, and its ablation L-Ben, which gives every attacked image its original class."""

from dataclasses import replace
from functools import partial
from typing import cast

import torch
from clusterguard import AdversarialClusterTrainer, ClusterGuard, DetectorModule, DetectorTrainer
from clusterguard.training import Relabel
from torch import nn

from benchmarks.recipe import Recipe, Schedule


def ours(
    *,
    relabel: Relabel = "separate",
    center_scale: float = 10.0,
    block: int = 1,
    adversarial_weight: float = 1.0,
    refresh_every: int = 10,
    start: str = "image",
) -> Recipe:
    """The library's guard, trained by the library's trainer.

    Args:
        relabel: "separate" is the paper's method, "original" L-Ben.
        center_scale: M.
        block: l, dimensions of the representation a class.
        adversarial_weight: of the loss of attacks that got through.
        refresh_every: steps between refreshes of the thresholds that say what got through.
        start: of the training attack; the paper's starts at the image.
    """

    def build(network: nn.Module) -> ClusterGuard:
        example = torch.zeros(1, *cast(tuple[int, ...], network.image_shape))
        return ClusterGuard(
            network, num_classes=10, representation_dim=10 * block, center_scale=center_scale, example=example
        )

    def make_trainer(detector: DetectorModule, schedule: Schedule) -> DetectorTrainer:
        assert isinstance(detector, ClusterGuard)  # tells the type checker
        optimizer = schedule.optimizer(detector)
        return AdversarialClusterTrainer(
            detector,
            replace(schedule.attack, objective="suspicion", start=start, keep="last"),
            optimizer=optimizer,
            scheduler=None if schedule.scheduler is None else schedule.scheduler(optimizer),
            warmup_epochs=schedule.warmup_epochs,
            adversarial_weight=adversarial_weight,
            relabel=relabel,
            refresh_every=refresh_every,
        )

    return Recipe(
        title="Ours" if relabel == "separate" else "L-Ben",
        reference="arXiv 2012.03483",
        training="ours" if relabel == "separate" else "l-ben",
        build=build,
        trainer=make_trainer,
        objective="suspicion",
        variant=partial(ours, relabel=relabel),
    )


OURS, L_BEN = ours(), ours(relabel="original")
