"""The method of the paper, and its ablation L-Ben, which gives every attacked image its original class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

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
from clusterguard.errors import ConfigurationError
from clusterguard.training import ClusterLoss, Graded, Opposite, Origin, Original, Outside, Relabel, Separate, Target
from torch import nn

from benchmarks.detectors._recipe import Recipe, Schedule


@dataclass(frozen=True, kw_only=True)
class AttackChanges:
    """What a recipe changes about the training attack of the experiment.

    Attributes:
        method: algorithm. "apgd" takes as many steps as the attack of the experiment, but adapts their size and keeps
            the best iterate.
        start: start of the attack, or several of which each batch takes one. The paper starts at the image. That of
            N-FGSM is not to be changed.
        objective: objective of the attack.
        radii: radii by norm, of which each batch takes one. None takes the norm and radius of the experiment's attack.
        targets: number of wrong classes, the most promising ones, that the attack aims at in turn. None does not aim.
    """

    method: Literal["pgd", "apgd"] = "pgd"
    start: str | Sequence[str] = "image"
    objective: str = "suspicion"
    radii: Mapping[str, float] | None = None
    targets: int | None = None

    def apply(self, given: PGD) -> Attack:
        """Make the training attack of the recipe from that of the experiment."""
        budgets = {given.norm: given.eps} if self.radii is None else self.radii
        starts = [self.start] if isinstance(self.start, str) else self.start
        plain = [self._descend(given, norm, eps, start) for norm, eps in budgets.items() for start in starts]
        attacks: list[Attack] = [
            attack if self.targets is None else MultiTarget(attack=attack, max_targets=self.targets) for attack in plain
        ]
        return attacks[0] if len(attacks) == 1 else MixedAttack(attacks=attacks)

    def _descend(self, given: PGD, norm: str, eps: float, start: str) -> Attack:
        """One attack from one start. Its step is the same share of the radius in every norm."""
        is_noisy = callable(given.start)
        if is_noisy and (start != "image" or self.method != "pgd"):
            raise ConfigurationError(f"expected N-FGSM as it is, got start {start!r} and method {self.method!r}")
        if self.method == "apgd":
            return APGD(norm=norm, eps=eps, steps=given.steps, start=start, objective=self.objective)
        size = given.step_size if eps == given.eps else given.step_size / given.eps * eps
        attack = replace(given, norm=norm, eps=eps, step_size=size)
        return replace(attack, start=given.start if is_noisy else start, objective=self.objective, keep="last")


def make_ours(
    *,
    relabel: Relabel = Separate(),  # noqa: B008  # values of this kind cannot change
    loss: ClusterLoss = ClusterLoss(),  # noqa: B008
    attack: AttackChanges = AttackChanges(),
    options: TrainingOptions = TrainingOptions(),  # noqa: B008
    refresh_every: int = 10,
    ramp_epochs: float = 0.0,
    center_scale: float = 10.0,
    block: int = 1,
) -> Recipe:
    """A recipe for the guard of the library with the adversarial trainer of the library.

    Args:
        relabel: rule for the labels of attacked images. `Separate()` is the method of the paper, and `Original()` is
            L-Ben.
        loss: training loss.
        attack: changes to the training attack of the experiment.
        options: options of training, of which `clip_norm`, `average_decay` and `weight_perturbation` are used. The
            experiment sets the others.
        refresh_every: number of steps between updates of the thresholds that decide which attacks got through.
        ramp_epochs: number of epochs over which the radius of the training attack grows.
        center_scale: scale of the cluster centres, M in the paper.
        block: number of dimensions of the representation for each class, l in the paper.
    """

    def build(network: nn.Module) -> ClusterGuard:
        example = torch.zeros(1, *cast(tuple[int, ...], network.image_shape))
        return ClusterGuard(
            network, num_classes=10, representation_dim=10 * block, center_scale=center_scale, example=example
        )

    def make_trainer(detector: DetectorModule, schedule: Schedule) -> DetectorTrainer:
        assert isinstance(detector, ClusterGuard)  # tells the type checker
        optimizer = schedule.optimizer(detector)
        chosen = {name: value for name in _STEPS if (value := getattr(options, name)) is not None}
        return AdversarialClusterTrainer(
            detector,
            attack.apply(schedule.attack),
            optimizer=optimizer,
            scheduler=None if schedule.scheduler is None else schedule.scheduler(optimizer),
            warmup_epochs=schedule.warmup_epochs,
            loss=loss,
            relabel=relabel,
            ramp_epochs=ramp_epochs,
            refresh_every=refresh_every,
            options=replace(schedule.options, **chosen),
        )

    is_ablation = isinstance(relabel, Original)
    return Recipe(
        title="L-Ben" if is_ablation else "Ours",
        reference="arXiv 2012.03483",
        training_name="l-ben" if is_ablation else "ours",
        build=build,
        trainer=make_trainer,
        objective="suspicion",
        with_options=partial(make_from_options, relabel),
    )


# Names of options in the definitions of experiments, and the fields of values that they stand for. Definitions are
# hashed, so the names stay as they are whatever the library calls its fields.
_LOSS = {
    "adversarial_weight": "weight",
    "adversarial_floor": "floor",
    "cross_entropy_weight": "cross_entropy_weight",
    "temperature": "temperature",
}
_ATTACK = {name: name for name in ("method", "start", "objective", "radii", "targets")}
_STEPS = {name: name for name in ("clip_norm", "average_decay", "weight_perturbation")}
_OTHERS = {name: name for name in ("refresh_every", "ramp_epochs", "center_scale", "block")}


def make_from_options(default: Relabel, /, **options: Any) -> Recipe:
    """A recipe from the options that the definition of an experiment names.

    Args:
        default: rule for the labels of attacked images, for definitions that name none.
        **options: options by the names in definitions. "relabel" and "grading_power" name a `Relabel`,
            "adversarial_target" and "adversarial_margin" a `Target`. The other names are those of `_LOSS`, `_ATTACK`,
            `_STEPS` and `_OTHERS`.

    Raises:
        ConfigurationError: an option has an unknown name or value.
    """
    left = dict(options)
    rule, power = left.pop("relabel", None), left.pop("grading_power", Graded().power)
    place, margin = left.pop("adversarial_target", "origin"), left.pop("adversarial_margin", Outside().margin)
    rules: dict[str, Relabel] = {"separate": Separate(), "original": Original(), "graded": Graded(power)}
    places: dict[str, Target] = {"origin": Origin(), "opposite": Opposite(), "outside": Outside(margin)}
    recipe = make_ours(
        relabel=default if rule is None else _choose("relabel", rule, rules),
        loss=ClusterLoss(target=_choose("adversarial_target", place, places), **_take(left, _LOSS)),
        attack=AttackChanges(**_take(left, _ATTACK)),
        options=TrainingOptions(**_take(left, _STEPS)),
        **_take(left, _OTHERS),
    )
    if left:
        raise ConfigurationError(f"{recipe.title} has no options {sorted(left)}")
    return recipe


def _take(options: dict[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """Take options out of a dict, and give them the names of fields."""
    return {field: options.pop(name) for name, field in fields.items() if name in options}


def _choose(option: str, name: str, values: Mapping[str, Any]) -> Any:
    if name not in values:
        raise ConfigurationError(f"expected {option} among {', '.join(values)}, got {name!r}")
    return values[name]


OURS, L_BEN = make_ours(), make_ours(relabel=Original())
