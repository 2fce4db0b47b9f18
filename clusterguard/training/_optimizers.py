"""The optimizers and schedulers that people bring: made by factories, checked before the first step, and stepped."""

import inspect
import io
import pickle
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import torch
from clusterguard.errors import ConfigurationError
from torch import nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, OneCycleLR, ReduceLROnPlateau, SequentialLR

MakeOptimizer: TypeAlias = Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer]
"""An optimizer, or a function that makes one of the detector's parameters."""

MakeScheduler: TypeAlias = LRScheduler | Callable[[Optimizer], Any]
"""A scheduler, torch's or timm's, or a function that makes one of the optimizer."""

_FACTORY = "optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3)"
_SCHEDULER_FACTORY = "scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)"


def make_optimizer(given: MakeOptimizer | None, detector: nn.Module) -> Optimizer:
    """The optimizer that was given, or that the factory makes; Adam with learning rate 1e-3 where there is none.

    Args:
        given: as the user gave it.
        detector: whose parameters are to be trained.

    Raises:
        ConfigurationError: the detector has no parameters, or what was given is no optimizer and makes none.

    Example:
        >>> import torch
        >>> make_optimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.5), nn.Linear(2, 2)).defaults["lr"]
        0.5
    """
    if given is not None and not callable(given):
        if not (hasattr(given, "param_groups") and hasattr(given, "step")):
            raise ConfigurationError(
                f"expected an optimizer or a function from the parameters to one, got {given!r}; pass {_FACTORY}"
            )
        return given
    parameters = list(detector.parameters())
    if not parameters:
        raise ConfigurationError("expected a detector with parameters to train, got one that has none")
    if given is None:
        return Adam(parameters, lr=1e-3)
    _check_takes_one(given, "the parameters", _FACTORY)
    made = given(parameters)
    if not hasattr(made, "param_groups"):
        raise ConfigurationError(f"expected a function that returns an optimizer, got {type(made)}; such as {_FACTORY}")
    return made


def make_scheduler(given: MakeScheduler | None, optimizer: Optimizer) -> Any:
    """The scheduler that was given, or that the factory makes; None where there is none.

    Args:
        given: as the user gave it.
        optimizer: whose learning rate it sets.

    Raises:
        ConfigurationError: what was given is no scheduler and makes none.

    Example:
        >>> optimizer = make_optimizer(None, nn.Linear(2, 2))
        >>> type(make_scheduler(ReduceLROnPlateau, optimizer)).__name__
        'ReduceLROnPlateau'
    """
    if given is None or (hasattr(given, "step") and not isinstance(given, type)):
        return given
    if callable(given):
        _check_takes_one(given, "the optimizer", _SCHEDULER_FACTORY)
    made = given(optimizer) if callable(given) else given
    if not hasattr(made, "step"):
        raise ConfigurationError(
            f"expected a scheduler, or a function from the optimizer to one, got {type(made)}; such as "
            f"{_SCHEDULER_FACTORY}"
        )
    return made


def _check_takes_one(factory: Callable[..., Any], argument: str, example: str) -> None:
    """A factory can be called with one argument; a class such as CosineAnnealingLR wants more."""
    try:
        inspect.signature(factory).bind(None)
    except ValueError:  # some that are written in C do not tell what they take
        return
    except TypeError as error:
        name = getattr(factory, "__name__", repr(factory))
        raise ConfigurationError(
            f"expected a function of {argument} alone, got {name} ({error}); pass {example}"
        ) from None


def check_optimizer(optimizer: Any, detector: nn.Module) -> None:
    """An optimizer moves what is to be trained.

    Args:
        optimizer: that takes the steps.
        detector: whose parameters are to be trained, those that require gradients.

    Raises:
        ConfigurationError: all parameters are frozen, the optimizer holds none of those that are not, or its step needs
            a closure.

    Warns:
        UserWarning: it holds some of them only.
    """
    trainable = {name: own for name, own in detector.named_parameters() if own.requires_grad}
    if not trainable:
        raise ConfigurationError(
            "expected a detector with parameters to train, got one with all of them frozen; unfreeze some with "
            "parameter.requires_grad_(True)"
        )
    held = {id(own) for group in optimizer.param_groups for own in group["params"]}
    missing = [name for name, own in trainable.items() if id(own) not in held]
    if len(missing) == len(trainable):
        raise ConfigurationError(
            "expected an optimizer of the detector's own parameters, got one that holds none of those that train. A "
            f"guard copies its backbone, so the backbone's parameters are not the guard's; pass {_FACTORY}, or make "
            "the optimizer of guard.parameters()"
        )
    if missing:
        some = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        warnings.warn(
            f"the optimizer lacks {len(missing)} of the detector's {len(trainable)} trainable parameters, which will "
            f"stay as they are: {some}; pass {_FACTORY} to train them, or freeze them with requires_grad_(False)",
            stacklevel=2,
        )
    if "closure" in _needed(optimizer.step):
        raise ConfigurationError(
            f"expected an optimizer whose step() needs no closure, got {type(optimizer).__name__}; take Adam or SGD"
        )


def check_scheduler(
    scheduler: Any, optimizer: Optimizer, *, every: Literal["epoch", "step"], steps: int | None, resumable: bool
) -> None:
    """A scheduler sets this optimizer's learning rate, and can do so to the end.

    Args:
        scheduler: or None.
        optimizer: that takes the steps.
        every: when it is stepped.
        steps: how many times in all; None where that is not known.
        resumable: whether its state has to be kept in a checkpoint.

    Raises:
        ConfigurationError: it is another optimizer's, wants numbers that a training does not have, ends too early, or
            its state cannot be kept.
    """
    if scheduler is None:
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
                "expected ReduceLROnPlateau with mode='min' and schedule_every='epoch', for it is given the mean loss "
                f"of each epoch, got mode={inner.mode!r} and schedule_every={every!r}"
            )
    if steps is not None:
        _check_length(scheduler, steps)
    if resumable and not (hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")):
        raise ConfigurationError(
            f"expected a scheduler with state_dict and load_state_dict, to train with a checkpoint, got {name}"
        )


def _check_length(scheduler: Any, steps: int) -> None:
    """A scheduler, and those that it is made of, last for so many steps."""
    if isinstance(scheduler, OneCycleLR) and steps > scheduler.total_steps:
        raise ConfigurationError(
            f"expected OneCycleLR with total_steps of at least the {steps} steps that this training takes with it, got "
            f"{scheduler.total_steps}"
        )
    if isinstance(scheduler, ChainedScheduler):
        for own in scheduler._schedulers:
            _check_length(own, steps)
    if isinstance(scheduler, SequentialLR):
        starts = [0, *scheduler._milestones]
        for own, start, end in zip(scheduler._schedulers, starts, [*scheduler._milestones, steps + 1], strict=True):
            _check_length(own, min(steps, end - 1) - start)  # the step at a milestone is the next one's


def check_keepable(optimizer: Any, scheduler: Any) -> None:
    """A checkpoint can keep what the optimizer and the scheduler are made with: it takes numbers, but no objects.

    Raises:
        ConfigurationError: there is something else among it, such as a number of NumPy's.
    """
    settings = [{name: own for name, own in group.items() if name != "params"} for group in optimizer.param_groups]
    file = io.BytesIO()
    try:
        torch.save([settings, None if scheduler is None else scheduler.state_dict()], file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise ConfigurationError(
            "expected an optimizer and a scheduler whose states are plain numbers, to train with a checkpoint, got "
            f"other objects; pass float(...) in place of numbers of NumPy's, and functions in place of objects: {error}"
        ) from None


def after_step(scheduler: Any, *, every: Literal["epoch", "step"], steps: int) -> None:
    """Tell a scheduler that the optimizer has taken a step.

    Args:
        scheduler: or None.
        every: when it is stepped; timm's are told of everything.
        steps: how many the optimizer has taken.
    """
    if hasattr(scheduler, "step_update"):
        scheduler.step_update(steps)
    elif scheduler is not None and every == "step":
        _step(scheduler, steps, None)


def after_epoch(scheduler: Any, *, every: Literal["epoch", "step"], epochs: int, loss: float) -> None:
    """Tell a scheduler that an epoch is over.

    Args:
        scheduler: or None.
        every: when it is stepped; timm's are told of everything.
        epochs: how many are over.
        loss: mean of the epoch's steps.
    """
    if scheduler is not None and (every == "epoch" or hasattr(scheduler, "step_update")):
        _step(scheduler, epochs, loss)


def _step(scheduler: Any, count: int, loss: float | None) -> None:
    values = {"epoch": count, "metrics": loss, "metric": loss}
    scheduler.step(**{name: values[name] for name in _needed(scheduler.step)})


def _needed(function: Callable[..., Any]) -> set[str]:
    """The names of the arguments that a call cannot leave out."""
    return {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY, parameter.POSITIONAL_ONLY)
    }
