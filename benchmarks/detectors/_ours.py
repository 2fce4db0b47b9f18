"""The method of the paper, and its ablation L-Ben, which gives every attacked image its original class."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, cast

import torch
from clusterguard import (
    APGD,
    PGD,
    AdversarialClusterTrainer,
    ClusterGuard,
    DetectorModule,
    DetectorTrainer,
)
from clusterguard.attacks import Attack, MixedAttack, MultiTarget
from clusterguard.training import ClusterLoss, Graded, Opposite, Origin, Original, Outside, Relabel, Separate, Target
from torch import nn

from benchmarks.detectors._recipe import Recipe, Schedule


def _target(name: str, margin: float) -> Target:
    return {"origin": Origin(), "opposite": Opposite(), "outside": Outside(margin)}[name]


def _relabel(name: str, power: float) -> Relabel:
    return {"separate": Separate(), "original": Original(), "graded": Graded(power)}[name]


def make_ours(
    *,
    relabel: Literal["separate", "graded", "original"] = "separate",
    center_scale: float = 10.0,
    block: int = 1,
    adversarial_weight: float = 1.0,
    adversarial_floor: float = 0.0,
    adversarial_target: Literal["origin", "opposite", "outside"] = "origin",
    adversarial_margin: float = 0.1,
    cross_entropy_weight: float = 0.0,
    temperature: float = 1.0,
    refresh_every: int = 10,
    method: Literal["pgd", "apgd"] = "pgd",
    start: str | Sequence[str] = "image",
    objective: str = "suspicion",
    ramp_epochs: float = 0.0,
    clip_norm: float | None = None,
    average_decay: float | None = None,
    weight_perturbation: float | None = None,
    radii: Mapping[str, float] | None = None,
    targets: int | None = None,
    grading_power: float = 10.0,
) -> Recipe:
    """A recipe for the guard of the library with the adversarial trainer of the library.

    Args:
        relabel: labels of attacked images. "separate" is the method of the paper and "original" is L-Ben.
        center_scale: scale of the cluster centres, M in the paper.
        block: number of dimensions of the representation for each class, l in the paper.
        adversarial_weight: weight of the loss of attacks that got through.
        adversarial_floor: smallest share of the attacks that this loss is averaged over.
        adversarial_target: place that the loss moves such attacks to, "origin", "opposite" or "outside".
        adversarial_margin: margin of the target "outside".
        cross_entropy_weight: weight of the cross-entropy that is added to the likelihood.
        temperature: temperature of that cross-entropy.
        refresh_every: number of steps between updates of the thresholds that decide which attacks got through.
        method: training attack. "apgd" takes as many steps as the attack of the experiment, but adapts their size and
            keeps the best iterate.
        start: start of the training attack, or several of which each batch takes one. The paper starts at the image.
        objective: objective of the training attack.
        ramp_epochs: number of epochs over which the radius of the training attack grows.
        clip_norm: largest norm of the gradient. None does not clip.
        average_decay: decay factor of the average of weights. None does not average.
        weight_perturbation: size γ of adversarial weight perturbation. None does not perturb.
        radii: radii by norm, of which each batch takes one. None takes the norm and radius of the experiment's attack.
        targets: number of wrong classes, the most promising ones, that the attack aims at in turn. None does not aim.
        grading_power: power of the labels "graded".
    """

    def build(network: nn.Module) -> ClusterGuard:
        example = torch.zeros(1, *cast(tuple[int, ...], network.image_shape))
        return ClusterGuard(
            network, num_classes=10, representation_dim=10 * block, center_scale=center_scale, example=example
        )

    def make_attack(given: PGD) -> Attack:
        budgets = {given.norm: given.eps} if radii is None else radii
        share = given.step_size / given.eps  # a step is the same share of the radius in every norm

        def descent(norm: str, eps: float, beginning: str) -> Attack:
            if method == "apgd":
                return APGD(norm=norm, eps=eps, steps=given.steps, start=beginning, objective=objective)
            size = given.step_size if eps == given.eps else share * eps
            return replace(given, norm=norm, eps=eps, step_size=size, start=beginning, objective=objective, keep="last")

        starts = [start] if isinstance(start, str) else start
        plain = [descent(norm, eps, beginning) for norm, eps in budgets.items() for beginning in starts]
        attacks: list[Attack] = [
            attack if targets is None else MultiTarget(attack=attack, max_targets=targets) for attack in plain
        ]
        return attacks[0] if len(attacks) == 1 else MixedAttack(attacks=attacks)

    def make_trainer(detector: DetectorModule, schedule: Schedule) -> DetectorTrainer:
        assert isinstance(detector, ClusterGuard)  # tells the type checker
        optimizer = schedule.optimizer(detector)
        return AdversarialClusterTrainer(
            detector,
            make_attack(schedule.attack),
            optimizer=optimizer,
            scheduler=None if schedule.scheduler is None else schedule.scheduler(optimizer),
            warmup_epochs=schedule.warmup_epochs,
            loss=ClusterLoss(
                target=_target(adversarial_target, adversarial_margin),
                weight=adversarial_weight,
                floor=adversarial_floor,
                cross_entropy_weight=cross_entropy_weight,
                temperature=temperature,
            ),
            relabel=_relabel(relabel, grading_power),
            ramp_epochs=ramp_epochs,
            refresh_every=refresh_every,
            options=replace(
                schedule.options,
                clip_norm=clip_norm,
                average_decay=average_decay,
                weight_perturbation=weight_perturbation,
            ),
        )

    return Recipe(
        title="L-Ben" if relabel == "original" else "Ours",
        reference="arXiv 2012.03483",
        training_name="l-ben" if relabel == "original" else "ours",
        build=build,
        trainer=make_trainer,
        objective="suspicion",
        variant=partial(make_ours, relabel=relabel),
    )


OURS, L_BEN = make_ours(), make_ours(relabel="original")
