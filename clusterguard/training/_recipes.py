"""Trainings that are put together: the paper's, one of what has helped since, and one for proofs."""

import math
from typing import TYPE_CHECKING

from clusterguard.attacks import APGD, PGD
from clusterguard.detection import Calibrator, Loader, number_of_batches
from clusterguard.detectors import ClusterGuard
from clusterguard.errors import ConfigurationError
from clusterguard.training._adversarial import AdversarialClusterTrainer
from clusterguard.training._certified import CertifiedTrainer
from clusterguard.training._options import TrainingOptions
from torch.optim import Adam
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
    """The paper's training: PGD from the image itself, Adam at 1e-3, nothing else. Its epochs are 50 on MNIST.

    Args:
        guard: trained in place, on its own device.
        norm: of the training attack.
        eps: radius of the training attack; the default is the paper's for MNIST, 0.03 its for CIFAR10.
        step_size: of the training attack; for CIFAR10 0.007.
        steps: of the training attack; for CIFAR10 20.
        calibrator: fits the final thresholds; None takes `Calibrator()`.

    Raises:
        ConfigurationError: an option out of its range.

    Reference:
        arXiv 2012.03483, section 5.

    Example:
        >>> import torch
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 4, 4))
        >>> paper(guard).attack.start
        'image'
    """
    attack = PGD(norm=norm, eps=eps, step_size=step_size, steps=steps, keep="last")
    return AdversarialClusterTrainer(guard, attack, calibrator=calibrator)


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
    """What has helped: a random start, a radius that grows, steps that find their length, one cycle of the rate.

    The growing radius is what counts most. From a random start at its full radius, the guard learns to hide its
    gradients instead of separating: the training attack all but stops succeeding, and the worst-case suite breaks
    nearly all. Where both are trained like this, separating did not beat plain adversarial training of the same head
    (``relabel=Original()``) under that suite at the radius of training; the results pages have the figures.

    Args:
        guard: trained in place, on its own device.
        train_loader: what `fit` will get; its length sets the schedule.
        epochs: that `fit` will get.
        eps: radius of the training attack.
        norm: of the training attack.
        steps: of the training attack, which is APGD at the margin.
        learning_rate: at its highest, of Adam.
        calibrator: fits the final thresholds; None takes `Calibrator()`.
        accelerator: see `TrainingOptions`.

    Returns:
        The trainer, to be fitted for that many epochs.

    Raises:
        ConfigurationError: an option out of its range, or a loader that does not tell its length.

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
    optimizer, scheduler, options = _one_cycle(guard, train_loader, epochs, learning_rate, accelerator)
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
    """For proofs in l∞: `CertifiedTrainer` with a radius that grows over half of the epochs, and one cycle of the rate.

    An epoch costs about three plain ones, a fraction of one against an attack; take many. On small networks and images
    of few colours this has been by far the strongest guard against l∞; see the results pages for what it costs in
    accuracy, and for other norms.

    Args:
        guard: trained in place, on its own device; its network as in `certify`, best a small one, and best with weights
            by `clusterguard.training.initialise`.
        train_loader: what `fit` will get; its length sets the schedule.
        epochs: that `fit` will get, best some tens.
        eps: radius in l∞; the largest that is asked about.
        bound_weight: of the bounds in the loss, in (0, 1]; a smaller one gives accuracy and takes proofs.
        learning_rate: at its highest, of Adam.
        calibrator: fits the final thresholds; None takes `Calibrator()`.
        accelerator: see `TrainingOptions`.

    Returns:
        The trainer, to be fitted for that many epochs.

    Raises:
        ConfigurationError: an option out of its range, or a loader that does not tell its length.

    Example:
        >>> import torch
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 4, 4))
        >>> loader = [(torch.rand(20, 1, 4, 4), torch.arange(20) % 2)]
        >>> certified(guard, loader, epochs=40, eps=0.3).ramp_epochs
        20.0
    """
    optimizer, scheduler, options = _one_cycle(guard, train_loader, epochs, learning_rate, accelerator)
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
    guard: ClusterGuard, train_loader: Loader, epochs: int, learning_rate: float, accelerator: "Accelerator | None"
) -> tuple[Adam, OneCycleLR, TrainingOptions]:
    """Adam, one cycle of its learning rate over all steps, and the options that go with it."""
    if epochs < 1:
        raise ConfigurationError(f"expected at least 1 epoch, got {epochs}")
    batches = number_of_batches(train_loader)
    if not batches:
        raise ConfigurationError("expected a training loader of a known length of at least one batch, for the schedule")
    options = TrainingOptions(schedule_every="step", accelerator=accelerator)
    taken = math.ceil(batches / options.make_accelerator().num_processes)  # batches are dealt out to processes
    total = epochs * math.ceil(taken / options.batches_per_step)
    optimizer = Adam(guard.parameters(), lr=learning_rate)
    return optimizer, OneCycleLR(optimizer, learning_rate, total_steps=total), options
