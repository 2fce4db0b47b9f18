"""The paper's method, and its ablation L-Ben, which gives every attacked image its original class."""

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
    TrainingOptions,
)
from clusterguard.attacks import Attack, MixedAttack, MultiTarget
from clusterguard.training import ClusterLoss, Graded, Opposite, Origin, Original, Outside, Relabel, Separate, Target
from torch import nn

from benchmarks.detectors.recipe import Recipe, Schedule


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
    """The library's guard, trained by the library's trainer.

    Args:
        relabel: "separate" is the paper's method, "original" L-Ben.
        center_scale: M.
        block: l, dimensions of the representation a class.
        adversarial_weight: of the loss of attacks that got through.
        adversarial_floor: the share of attacks that this loss is a mean over at least.
        adversarial_target: where they are sent: "origin", "opposite" or "outside".
        adversarial_margin: for "outside".
        cross_entropy_weight: of cross-entropy beside the likelihood.
        temperature: of that.
        refresh_every: steps between refreshes of the thresholds that say what got through.
        method: "apgd" takes as many steps as the experiment's attack, but finds their lengths and keeps the best.
        start: of the training attack, or several, another one a batch; the paper's starts at the image.
        objective: of the training attack.
        ramp_epochs: over which its radius grows.
        clip_norm: of the gradient.
        average_decay: of the average of weights.
        weight_perturbation: γ of adversarial weight perturbation.
        radii: by norm; another norm a batch, instead of the training attack's own.
        targets: aim at so many classes in turn, the most promising ones.
        grading_power: for relabel "graded".
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
            options=TrainingOptions(
                clip_norm=clip_norm,
                average_decay=average_decay,
                weight_perturbation=weight_perturbation,
                schedule_every=schedule.schedule_every,
            ),
        )

    return Recipe(
        title="L-Ben" if relabel == "original" else "Ours",
        reference="arXiv 2012.03483",
        training="l-ben" if relabel == "original" else "ours",
        build=build,
        trainer=make_trainer,
        objective="suspicion",
        variant=partial(make_ours, relabel=relabel),
    )


OURS, L_BEN = make_ours(), make_ours(relabel="original")
