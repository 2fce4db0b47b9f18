"""The guard of the library, trained so that certificates hold for it. A certificate holds for every attack."""

from dataclasses import replace

from clusterguard import CertifiedTrainer, ClusterGuard, DetectorModule, DetectorTrainer
from clusterguard.training import initialise
from torch import nn

from benchmarks.detectors._ours import OURS
from benchmarks.detectors._recipe import Recipe, Schedule


def make_certified(
    *,
    ramp_epochs: float = 10.0,
    bound_weight: float = 0.5,
    center_weight: float = 0.02,
    temperature: float = 1.0,
    regularization: float = 0.0,
    stability_weight: float = 0.0,
    bound_radius: float | None = None,
    clip_norm: float | None = None,
) -> Recipe:
    """A recipe for the guard of the library with the certified trainer of the library.

    The radius is that of the experiment's training attack.

    Args:
        ramp_epochs: number of epochs over which the radius grows.
        bound_weight: weight of the loss of the bounds.
        center_weight: weight of the distance to the centres.
        temperature: temperature of the cross-entropies.
        regularization: weight of the terms that keep intervals tight and balanced while the radius grows.
        stability_weight: weight of the term that keeps ReLUs on one side.
        bound_radius: radius of the balls that are bounded; None takes that of the attack.
        clip_norm: largest norm of a gradient.
    """

    def build(network: nn.Module) -> DetectorModule:
        guard = OURS.build(network)
        initialise(guard)
        return guard

    def make_trainer(detector: DetectorModule, schedule: Schedule) -> DetectorTrainer:
        assert isinstance(detector, ClusterGuard)  # tells the type checker
        optimizer = schedule.optimizer(detector)
        return CertifiedTrainer(
            detector,
            eps=schedule.attack.eps,
            optimizer=optimizer,
            scheduler=None if schedule.scheduler is None else schedule.scheduler(optimizer),
            warmup_epochs=schedule.warmup_epochs,
            ramp_epochs=ramp_epochs,
            bound_weight=bound_weight,
            center_weight=center_weight,
            temperature=temperature,
            regularization=regularization,
            stability_weight=stability_weight,
            bound_radius=bound_radius,
            options=replace(schedule.options, clip_norm=clip_norm),
        )

    return replace(
        OURS,
        title="Certified",
        reference="Gowal et al., On the effectiveness of interval bound propagation (2018)",
        training_name="certified",
        build=build,
        trainer=make_trainer,
        attacked=False,
        # One for the image, and one each for the centre and the radius of its box; an attack with eight steps more.
        passes=3 if bound_radius is None else 11,
        with_options=make_certified,
    )


CERTIFIED = make_certified()
