"""Functions that make optimizers and schedulers from factories, check them, and step schedulers."""

import inspect
import io
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from clusterguard.errors import ConfigurationError
from torch import nn
from torch.optim import Adam, Optimizer, SparseAdam
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, OneCycleLR, ReduceLROnPlateau, SequentialLR

OptimizerOrFactory: TypeAlias = Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer]
"""An optimizer, or a function that makes one from the detector's parameters."""

SchedulerOrFactory: TypeAlias = LRScheduler | Callable[[Optimizer], Any]
"""A scheduler of torch or timm, or a function that makes one from the optimizer."""

_FACTORY = "optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3)"
_SCHEDULER_FACTORY = "scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)"


def make_optimizer(optimizer: OptimizerOrFactory | None, detector: nn.Module) -> Optimizer:
    """The optimizer itself or the one that a factory makes; Adam with learning rate 1e-3 for None.

    Args:
        optimizer: optimizer or factory of one, as the user passes it to a trainer.
        detector: detector to train.

    Raises:
        ConfigurationError: the detector has no parameters, or `optimizer` neither is an optimizer nor makes one.

    Example:
        >>> import torch
        >>> make_optimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.5), nn.Linear(2, 2)).defaults["lr"]
        0.5
    """
    if optimizer is not None and not callable(optimizer):
        if not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "step")):
            raise ConfigurationError(
                f"expected an optimizer or a function from the parameters to one, got {optimizer!r}; pass {_FACTORY}"
            )
        return optimizer
    parameters = list(detector.parameters())
    if not parameters:
        raise ConfigurationError("expected a detector with parameters to train, got one that has none")
    if optimizer is None:
        return Adam(parameters, lr=1e-3)
    _check_takes_one(optimizer, "the parameters", _FACTORY)
    made = optimizer(parameters)
    if not hasattr(made, "param_groups"):
        raise ConfigurationError(f"expected a function that returns an optimizer, got {type(made)}; such as {_FACTORY}")
    return made


def make_scheduler(scheduler: SchedulerOrFactory | None, optimizer: Optimizer) -> Any:
    """The scheduler itself or the one that a factory makes; None for None.

    Args:
        scheduler: scheduler or factory of one, as the user passes it to a trainer.
        optimizer: optimizer whose learning rate the scheduler sets.

    Raises:
        ConfigurationError: `scheduler` neither is a scheduler nor makes one.

    Example:
        >>> optimizer = make_optimizer(None, nn.Linear(2, 2))
        >>> type(make_scheduler(ReduceLROnPlateau, optimizer)).__name__
        'ReduceLROnPlateau'
    """
    if scheduler is None or (hasattr(scheduler, "step") and not isinstance(scheduler, type)):
        return scheduler
    if callable(scheduler):
        _check_takes_one(scheduler, "the optimizer", _SCHEDULER_FACTORY)
    made = scheduler(optimizer) if callable(scheduler) else scheduler
    if not hasattr(made, "step"):
        raise ConfigurationError(
            f"expected a scheduler, or a function from the optimizer to one, got {type(made)}; such as "
            f"{_SCHEDULER_FACTORY}"
        )
    return made


def _check_takes_one(factory: Callable[..., Any], argument: str, example: str) -> None:
    """Refuse a factory that cannot be called with one argument, such as the class CosineAnnealingLR."""
    try:
        inspect.signature(factory).bind(None)
    except ValueError:  # functions written in C may have no signature
        return
    except TypeError as error:
        name = getattr(factory, "__name__", repr(factory))
        raise ConfigurationError(
            f"expected a function of {argument} alone, got {name} ({error}); pass {example}"
        ) from None


def check_optimizer(optimizer: Any, detector: nn.Module) -> None:
    """Check that an optimizer holds the detector's trainable parameters.

    Args:
        optimizer: optimizer that takes the steps.
        detector: detector to train; its parameters that require gradients are trainable.

    Raises:
        ConfigurationError: all parameters are frozen, the optimizer holds no trainable parameter, or its step needs a
            closure or sparse gradients.

    Warns:
        UserWarning: the optimizer holds only some of the trainable parameters.
    """
    trainable = {name: parameter for name, parameter in detector.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ConfigurationError(
            "expected a detector with parameters to train, got one with all of them frozen; unfreeze some with "
            "parameter.requires_grad_(True)"
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in trainable.items() if id(parameter) not in held]
    if len(missing) == len(trainable):
        raise ConfigurationError(
            "expected an optimizer of the detector's own parameters, got one that holds no trainable parameter. A "
            f"guard copies its backbone, so the backbone's parameters are not the guard's; pass {_FACTORY}, or make "
            "the optimizer from guard.parameters()"
        )
    if missing:
        listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        warnings.warn(
            f"the optimizer lacks {len(missing)} of the detector's {len(trainable)} trainable parameters, which will "
            f"stay as they are: {listed}; pass {_FACTORY} to train them, or freeze them with requires_grad_(False)",
            stacklevel=2,
        )
    if isinstance(optimizer, SparseAdam):
        raise ConfigurationError("expected an optimizer of dense gradients, got SparseAdam; take Adam or SGD")
    if "closure" in _needed(optimizer.step):
        raise ConfigurationError(
            f"expected an optimizer whose step() needs no closure, got {type(optimizer).__name__}; take Adam or SGD"
        )


def check_scheduler(
    scheduler: Any, optimizer: Optimizer, *, every: Literal["epoch", "step"], steps: int | None, resumable: bool
) -> None:
    """Check that the learning rate is not always 0, and that a scheduler can set it until the training ends.

    Args:
        scheduler: scheduler to check, or None.
        optimizer: optimizer that takes the steps.
        every: unit after which the scheduler is stepped.
        steps: total number of times that the scheduler is stepped; None if it is unknown.
        resumable: whether a checkpoint must keep the scheduler's state.

    Raises:
        ConfigurationError: all learning rates are 0 and nothing will change them; or the scheduler belongs to another
            optimizer, its step needs values that a training does not have, it ends too early, or its state cannot be
            kept.
    """
    if scheduler is None:
        if all(
            group.get("lr", 1) == 0 for group in optimizer.param_groups
        ):  # some optimizers find a rate themselves, and have None here
            raise ConfigurationError(
                f"expected a learning rate above 0, got 0 and no scheduler that raises it; pass {_FACTORY}"
            )
        return
    name, needed = type(scheduler).__name__, _needed(scheduler.step)
    theirs = getattr(scheduler, "optimizer", None)
    if theirs is not None and theirs is not optimizer and getattr(theirs, "optimizer", None) is not optimizer:
        raise ConfigurationError(
            f"expected a scheduler of the trainer's optimizer, got a {name} of another one, which would change "
            "nothing; pass scheduler=lambda optimizer: ..., a function from the optimizer to the scheduler"
        )
    if not needed <= {"epoch", "metrics", "metric"}:
        raise ConfigurationError(
            f"expected a scheduler whose step() needs nothing, the epoch or the loss, got a {name} that needs "
            f"{', '.join(sorted(needed))}"
        )
    inner = getattr(scheduler, "lr_scheduler", scheduler)
    if isinstance(inner, ReduceLROnPlateau):
        if inner is not scheduler:
            raise ConfigurationError(
                f"expected torch.optim.lr_scheduler.ReduceLROnPlateau, got a {name}, which does not keep its state"
            )
        if every == "step" or inner.mode != "min":
            raise ConfigurationError(
                "expected ReduceLROnPlateau with mode='min' and schedule_every='epoch', because it gets the mean loss "
                f"of each epoch, got mode={inner.mode!r} and schedule_every={every!r}"
            )
    if steps is not None:
        _check_length(scheduler, steps)
    if resumable and not (hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")):
        raise ConfigurationError(
            f"expected a scheduler with state_dict and load_state_dict, to train with a checkpoint, got {name}"
        )


def _check_length(scheduler: Any, steps: int) -> None:
    """Check that a scheduler, and the schedulers inside it, last for this number of steps."""
    if isinstance(scheduler, OneCycleLR) and steps > scheduler.total_steps:
        raise ConfigurationError(
            f"expected OneCycleLR with total_steps of at least the {steps} steps that this training takes with it, got "
            f"{scheduler.total_steps}"
        )
    if isinstance(scheduler, ChainedScheduler):
        for inner in scheduler._schedulers:
            _check_length(inner, steps)
    if isinstance(scheduler, SequentialLR):
        starts = [0, *scheduler._milestones]
        ends = [*scheduler._milestones, steps + 1]
        for inner, start, end in zip(scheduler._schedulers, starts, ends, strict=True):
            _check_length(inner, min(steps, end - 1) - start)  # the next scheduler takes the step at a milestone


def check_keepable(optimizer: Any, scheduler: Any) -> None:
    """Check that a checkpoint can keep the settings of the optimizer and the scheduler, which must be plain values.

    Raises:
        ConfigurationError: a setting is another object, such as a NumPy number.
    """
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    file = io.BytesIO()
    try:
        torch.save([settings, None if scheduler is None else scheduler.state_dict()], file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise ConfigurationError(
            "expected an optimizer and a scheduler whose states are plain numbers, to train with a checkpoint, got "
            f"other objects; pass float(...) in place of NumPy numbers, and functions in place of objects: {error}"
        ) from None


@contextmanager
def scaled_rates(optimizer: Any, factor: float) -> Iterator[None]:
    """Multiply the learning rates of an optimizer by a factor within the block, whatever a scheduler makes of them."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if rate is not None and factor != 1:
            group["lr"] = factor * rate
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if rate is not None and factor != 1:
                group["lr"] = rate


def after_step(scheduler: Any, *, every: Literal["epoch", "step"], steps: int) -> None:
    """Tell a scheduler that the optimizer has taken a step.

    Args:
        scheduler: scheduler to step, or None.
        every: unit after which the scheduler is stepped; timm's schedulers are told of both steps and epochs.
        steps: number of steps that the optimizer has taken.
    """
    if hasattr(scheduler, "step_update"):
        scheduler.step_update(steps)
    elif scheduler is not None and every == "step":
        _step(scheduler, steps, None)


def after_epoch(scheduler: Any, *, every: Literal["epoch", "step"], epochs: int, loss: float) -> None:
    """Tell a scheduler that an epoch is over.

    Args:
        scheduler: scheduler to step, or None.
        every: unit after which the scheduler is stepped; timm's schedulers are told of both steps and epochs.
        epochs: number of epochs that are over.
        loss: mean loss of the epoch's steps.
    """
    if scheduler is not None and (every == "epoch" or hasattr(scheduler, "step_update")):
        _step(scheduler, epochs, loss)


def _step(scheduler: Any, count: int, loss: float | None) -> None:
    values = {"epoch": count, "metrics": loss, "metric": loss}
    scheduler.step(**{name: values[name] for name in _needed(scheduler.step)})


def _needed(function: Callable[..., Any]) -> set[str]:
    """The names of a function's required arguments."""
    return {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY, parameter.POSITIONAL_ONLY)
    }
