"""Ready-made trainers: the paper's training, one with later improvements, a fast one, and one for certificates.

They train in bfloat16 where that is faster and works as well, see ``precision="auto"`` of `TrainingOptions`. The
records of epochs say which precision was used.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from clusterguard.attacks import APGD, PGD, Attack, NoisyFGSM
from clusterguard.detection import Calibrator, Loader
from clusterguard.detection._internal import number_of_batches
from clusterguard.detectors import ClusterGuard
from clusterguard.errors import ConfigurationError
from clusterguard.training._adversarial import AdversarialClusterTrainer
from clusterguard.training._certified import CertifiedTrainer
from clusterguard.training._optimizers import OptimizerOrFactory, make_optimizer
from clusterguard.training._options import TrainingOptions
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

if TYPE_CHECKING:
    from accelerate import Accelerator


def paper(
    guard: ClusterGuard,
    *,
    norm: str = "linf",
    eps: float = 0.3,
    step_size: float = 0.01,
    steps: int = 40,
    calibrator: Calibrator | None = None,
) -> AdversarialClusterTrainer:
    """The trainer of the paper, with PGD from the image itself and Adam at 1e-3; the paper takes 50 epochs on MNIST.

    Args:
        guard: guard to train, in place and on its own device.
        norm: norm of the training attack.
        eps: radius of the training attack; the default is the paper's for MNIST, which takes 0.03 for CIFAR10.
        step_size: step size of the training attack; the paper takes 0.007 for CIFAR10.
        steps: number of steps of the training attack; the paper takes 20 for CIFAR10.
        calibrator: calibrator that fits the final thresholds; None takes `Calibrator()`.

    Raises:
        ConfigurationError: an option is out of its range.

    Reference:
        arXiv 2012.03483, section 5.

    Example:
        >>> import torch
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 4, 4))
        >>> paper(guard).attack.start
        'image'
    """
    attack = PGD(norm=norm, eps=eps, step_size=step_size, steps=steps, keep="last")
    options = TrainingOptions(precision="auto")
    return AdversarialClusterTrainer(guard, attack, calibrator=calibrator, options=options)


def robust(
    guard: ClusterGuard,
    train_loader: Loader,
    *,
    epochs: int,
    eps: float,
    norm: str = "linf",
    steps: int = 10,
    learning_rate: float = 4e-3,
    calibrator: Calibrator | None = None,
    accelerator: "Accelerator | None" = None,
) -> AdversarialClusterTrainer:
    """A trainer with improvements on the paper: random starts, a growing radius, APGD and a one-cycle schedule.

    The growing radius matters most. If training starts at the full radius with random starts, the guard learns to mask
    its gradients instead of separating adversarial images. The training attack then almost never succeeds, but the
    worst-case suite breaks nearly all images. We compared the paper's relabelling with plain adversarial training of
    the same head (``relabel=Original()``), both with this recipe. Against the suite at the training radius, the
    paper's relabelling was not better. The results pages have the figures.

    Args:
        guard: guard to train, in place and on its own device.
        train_loader: loader to pass to `fit`; its length sets the schedule.
        epochs: number of epochs to pass to `fit`.
        eps: radius of the training attack.
        norm: norm of the training attack.
        steps: number of steps of the training attack, which is APGD on the margin.
        learning_rate: largest learning rate of Adam.
        calibrator: calibrator that fits the final thresholds; None takes `Calibrator()`.
        accelerator: accelerator as in `TrainingOptions`.

    Returns:
        The trainer, to be fitted with this loader for this number of epochs.

    Raises:
        ConfigurationError: an option is out of its range, or the loader has no known length.

    Reference:
        Croce & Hein, "Reliable evaluation of adversarial robustness" (2020), for the attack; Smith & Topin,
        "Super-convergence" (2018), for the schedule.

    Example:
        >>> import torch
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 4, 4))
        >>> loader = [(torch.rand(20, 1, 4, 4), torch.arange(20) % 2)]
        >>> robust(guard, loader, epochs=12, eps=0.3).ramp_epochs
        4.0
    """
    optimizer = Adam(guard.parameters(), lr=learning_rate)
    scheduler, options = _one_cycle(optimizer, train_loader, epochs, accelerator)
    return AdversarialClusterTrainer(
        guard,
        APGD(norm=norm, eps=eps, steps=steps, start="random"),
        optimizer=optimizer,
        scheduler=scheduler,
        warmup_epochs=epochs // 6,
        ramp_epochs=epochs / 3,
        calibrator=calibrator,
        options=options,
    )


def single_step(
    guard: ClusterGuard,
    train_loader: Loader,
    *,
    epochs: int,
    eps: float,
    norm: str = "linf",
    attack: Attack | None = None,
    optimizer: OptimizerOrFactory | None = None,
    ramp_epochs: float = 0.0,
    augment: Callable[[Tensor], Tensor] | None = None,
    calibrator: Calibrator | None = None,
    accelerator: "Accelerator | None" = None,
) -> AdversarialClusterTrainer:
    """A fast trainer: attacks of one step, a one-cycle schedule, and weights averaged towards the end.

    An epoch costs less than three times as much as one without attacks. Training with a single step can overfit
    catastrophically: the step then hardly ever succeeds, and an attack of several steps nearly always does. So pass
    `fit` an `OverfittingCheck`, which undoes such epochs.

    Args:
        guard: guard to train, in place and on its own device.
        train_loader: loader to pass to `fit`; its length sets the schedule.
        epochs: number of epochs to pass to `fit`; published trainings on CIFAR10 take 15 to 30.
        eps: radius that the guard is trained for.
        norm: norm of the training attack.
        attack: training attack; None takes ``NoisyFGSM(norm=norm, eps=eps)``. That of FGSM-RS is
            ``PGD(eps=eps, step_size=1.25 * eps, steps=1, start="random", keep="last")``.
        optimizer: optimizer or function as in `DetectorTrainer`. Its learning rate is the largest one of the schedule.
            None takes Adam at 2e-3.
        ramp_epochs: number of epochs over which the radius grows.
        augment: function of training images as in `TrainingOptions`, such as `clusterguard.training.crop_and_flip`.
        calibrator: calibrator that fits the final thresholds; None takes `Calibrator()`.
        accelerator: accelerator as in `TrainingOptions`.

    Returns:
        The trainer, to be fitted with this loader for this number of epochs. The guard gets the average of the weights
        of about the last twentieth of the steps.

    Raises:
        ConfigurationError: an option is out of its range, or the loader has no known length.

    Reference:
        Wong, Rice & Kolter, "Fast is better than free: revisiting adversarial training" (2020); de Jorge et al., "Make
        some noise: reliable and efficient single-step adversarial training" (2022).

    Example:
        >>> import torch
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 4, 4))
        >>> loader = [(torch.rand(20, 1, 4, 4), torch.arange(20) % 2)]
        >>> single_step(guard, loader, epochs=15, eps=0.1).attack
        NoisyFGSM(batch_size=None, norm='linf', eps=0.1, objective='suspicion', noise=2.0, step_size=None)
    """
    made = make_optimizer(partial(Adam, lr=2e-3) if optimizer is None else optimizer, guard)
    scheduler, options = _one_cycle(made, train_loader, epochs, accelerator)
    decay = 1 - 1 / max(2.0, scheduler.total_steps / 20)
    return AdversarialClusterTrainer(
        guard,
        NoisyFGSM(norm=norm, eps=eps) if attack is None else attack,
        optimizer=made,
        scheduler=scheduler,
        ramp_epochs=ramp_epochs,
        calibrator=calibrator,
        options=replace(options, average_decay=decay, augment=augment),
    )


def certified(
    guard: ClusterGuard,
    train_loader: Loader,
    *,
    epochs: int,
    eps: float,
    bound_weight: float = 0.5,
    learning_rate: float = 2e-3,
    calibrator: Calibrator | None = None,
    accelerator: "Accelerator | None" = None,
) -> CertifiedTrainer:
    """A trainer for certificates in l∞, whose radius grows over half of the epochs, with a one-cycle schedule.

    An epoch costs about as much as three plain ones, and a fraction of an epoch with an attack, so take many epochs. On
    small networks and images of few colours this has been by far the strongest guard against l∞ attacks. The results
    pages show its cost in accuracy, and figures for other norms.

    Args:
        guard: guard to train, in place and on its own device. Its network is as in `certify`, best a small one with
            weights by `clusterguard.training.initialise`.
        train_loader: loader to pass to `fit`; its length sets the schedule.
        epochs: number of epochs to pass to `fit`; some tens are best.
        eps: radius in l∞; take the largest radius at which proofs are wanted.
        bound_weight: weight of the bounds in the loss, in (0, 1]; a smaller one gives more accuracy but fewer proofs.
        learning_rate: largest learning rate of Adam.
        calibrator: calibrator that fits the final thresholds; None takes `Calibrator()`.
        accelerator: accelerator as in `TrainingOptions`.

    Returns:
        The trainer, to be fitted with this loader for this number of epochs.

    Raises:
        ConfigurationError: an option is out of its range, or the loader has no known length.

    Example:
        >>> import torch
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 4, 4))
        >>> loader = [(torch.rand(20, 1, 4, 4), torch.arange(20) % 2)]
        >>> certified(guard, loader, epochs=40, eps=0.3).ramp_epochs
        20.0
    """
    optimizer = Adam(guard.parameters(), lr=learning_rate)
    scheduler, options = _one_cycle(optimizer, train_loader, epochs, accelerator)
    return CertifiedTrainer(
        guard,
        eps=eps,
        bound_weight=bound_weight,
        optimizer=optimizer,
        scheduler=scheduler,
        warmup_epochs=epochs / 40,
        ramp_epochs=epochs / 2,
        calibrator=calibrator,
        options=options,
    )


def _one_cycle(
    optimizer: Optimizer, train_loader: Loader, epochs: int, accelerator: "Accelerator | None"
) -> tuple[OneCycleLR, TrainingOptions]:
    """A one-cycle schedule over all steps, up to the optimizer's rates, and options that step it with the optimizer."""
    if epochs < 1:
        raise ConfigurationError(f"expected at least 1 epoch, got {epochs}")
    batches = number_of_batches(train_loader)
    if not batches:
        raise ConfigurationError("expected a training loader of known length with at least one batch, for the schedule")
    options = TrainingOptions(schedule_every="step", accelerator=accelerator, precision="auto")
    per_process = math.ceil(batches / options.make_accelerator().num_processes)  # processes share the batches
    total = epochs * math.ceil(per_process / options.batches_per_step)
    rates = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(optimizer, rates, total_steps=total), options
