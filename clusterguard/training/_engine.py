"""Optimizer steps on one or many devices, with gradient clipping, weight averaging and a way back from divergence."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from clusterguard._support import OneProcess, check_accelerator
from clusterguard.detection import Loader
from clusterguard.detectors import DetectorModule
from clusterguard.errors import ConfigurationError, TrainingDivergedError, in_one_line
from clusterguard.training import _optimizers as optimizers
from clusterguard.training._batch_norm import single_image
from clusterguard.training._checkpoints import EpochRecord, EpochTotals, Stateful
from clusterguard.training._loader_state import LoaderState
from clusterguard.training._options import TrainingOptions
from clusterguard.training._sampling import augmented
from clusterguard.training._step import TrainingStep, WholeStep
from clusterguard.training._step_precision import StepPrecision
from clusterguard.training._weights import are_equal, moved, named_tensors, usable
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from accelerate import Accelerator

_REMEMBER_EVERY = 10  # number of steps between two copies of weights with a finite loss
_NOTHING_MOVES = "raise the learning rate, which may be 0 or too small, and check that the gradients are not 0"
_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # accelerate's names for ways to shard, which are equal to strings


class TrainingEngine:
    """Takes the optimizer steps of a trainer; accelerate handles devices, processes and precision.

    Args:
        detector: detector to train; it moves to the accelerator's device.
        training_step: function from images (B, C, H, W), labels (B,) and a generator to a `TrainingStep`.
        optimizer: optimizer of the detector's parameters.
        scheduler: scheduler of the optimizer, or None.
        options: options of the steps.
        limit_weights: function that is called after each step, before weights are averaged; None changes nothing.

    Attributes:
        steps: number of optimizer steps so far.
        rate_factor: factor of the learning rate; below 1 after catastrophic overfitting.
        precision: precision and memory layout of the steps.

    Raises:
        ConfigurationError: the accelerator shards the detector, or has a mixed precision although the options name
            another.
    """

    def __init__(
        self,
        detector: DetectorModule,
        training_step: Callable[..., TrainingStep],
        *,
        optimizer: Optimizer,
        scheduler: Any,
        options: TrainingOptions,
        limit_weights: Callable[[], None] | None = None,
    ) -> None:
        self._limit_weights = limit_weights
        self.detector, self.scheduler, self.options = detector, scheduler, options
        self.accelerator: Accelerator | OneProcess = options.make_accelerator()
        if self.accelerator.distributed_type in _SHARDED:
            raise ConfigurationError(
                "expected an accelerator whose processes each hold the whole detector, as with DDP, got "
                f"{self.accelerator.distributed_type.value}: attacks and thresholds need all weights. "
                "Launch without it; accelerate then uses DDP"
            )
        self.steps, self.rate_factor = 0, 1.0
        self.precision = StepPrecision(detector, optimizer, options, self.accelerator)
        step = WholeStep(detector, training_step, self.precision)
        self._module: nn.Module = self.accelerator.prepare_model(step)
        self._bare_optimizer = optimizer
        self._optimizer = self.accelerator.prepare_optimizer(optimizer)
        self._gathered = 0  # number of batches whose gradients wait for the next step
        self._has_warned = False  # whether the warning of a batch of one image was shown
        decay = options.average_decay
        average = None if decay is None else get_ema_multi_avg_fn(decay)
        self._average = None if decay is None else AveragedModel(detector, multi_avg_fn=average, use_buffers=True)
        self._at_first: dict[nn.Parameter, Tensor] = {}  # weights before the first step, until one has moved
        self._last_good: tuple[int, dict[str, Tensor]] = (0, {})
        self._delivered: Mapping[str, Tensor] = {}
        self._before_delivery: dict[str, Tensor] | None = None

    @property
    def shared(self) -> "Accelerator | None":
        """The accelerator whose processes share work with this one, perhaps with none; None for a training without."""
        return None if isinstance(self.accelerator, OneProcess) else self.accelerator

    @property
    def device(self) -> torch.device:
        """The device of the detector."""
        return self.detector.thresholds.device

    @cached_property
    def kept(self) -> LoaderState:
        """The part of the detector's state that its state dict leaves out.

        The first access takes a snapshot, so access it once before training.
        """
        return LoaderState(dict(self.detector.named_modules()), name="detector")

    @property
    def parts(self) -> dict[str, Stateful | None]:
        """The parts whose states a checkpoint holds, by name."""
        return {
            "guard": self.detector,
            "optimizer": self._optimizer,
            "scheduler": self.scheduler,
            "average": self._average,
            "scaler": self.accelerator.scaler,
        }

    def check(self, batches: int | None, epochs: int, *, resumable: bool) -> None:
        """Check that the optimizer and the scheduler suit a training.

        Args:
            batches: number of batches of an epoch in this process; None if it is unknown.
            epochs: total number of epochs.
            resumable: whether there will be checkpoints.

        Raises:
            ConfigurationError: the optimizer or the scheduler does not suit, or the detector was made in inference
                mode.

        Warns:
            UserWarning: the optimizer holds only some of the detector's trainable parameters.
        """
        for name, tensor in named_tensors(self.detector):
            if tensor.is_inference() and tensor is not self.detector.thresholds:
                raise ConfigurationError(
                    f"expected a detector that can be trained, got one made inside torch.inference_mode() ({name}); "
                    "make it outside"
                )
        optimizers.check_optimizer(self._bare_optimizer, self.detector)
        every, group = self.options.schedule_every, self.options.batches_per_step
        in_an_epoch = 1 if every == "epoch" else None if batches is None else -(-batches // group)
        steps = None if in_an_epoch is None else epochs * in_an_epoch
        optimizers.check_scheduler(self.scheduler, self._bare_optimizer, every=every, steps=steps, resumable=resumable)
        if resumable:
            optimizers.check_keepable(self._bare_optimizer, self.scheduler)

    def begin(self) -> None:
        """Prepare for a training: clear gradients, and put trained weights back in place of averaged or best ones."""
        with self._in_sync():
            self._optimizer.zero_grad()
        self._gathered, self._has_warned = 0, False
        before, self._before_delivery = self._before_delivery, None
        if before is not None and are_equal(self.detector.state_dict(), self._delivered):  # nobody has changed it since
            self.detector.load_state_dict(before)

    def share(self, loader: Loader) -> Loader:
        """The part of the training batches that this process takes.

        Raises:
            ConfigurationError: there are several processes, and the loader is not a DataLoader, so that accelerate
                cannot split it; or the state of the accelerator was reset.
        """
        check_accelerator(self.accelerator)
        if isinstance(self.accelerator, OneProcess) or self.accelerator.num_processes == 1:
            return loader
        if not isinstance(loader, DataLoader):
            raise ConfigurationError(f"expected a DataLoader, to train in several processes, got {type(loader)}")
        shared: Loader = self.accelerator.prepare_data_loader(loader, device_placement=False)
        return shared

    def augment(self, images: Tensor) -> Tensor:
        """The images (B, C, H, W) of a batch, on the detector's device and changed as the options say.

        Raises:
            ConfigurationError: the options' function returns something else than as many images.
        """
        if self.options.augment is None:
            return images
        return augmented(self.options.augment, usable(images).to(self.device))

    def take_step(self, images: Tensor, labels: Tensor, generator: Generator | None) -> tuple[TrainingStep, bool]:
        """Add the gradients of a batch, and take a step of the optimizer when enough batches are accumulated.

        A batch of one image has no variance where feature maps have one pixel. Batch normalisation uses its running
        statistics there.

        Returns:
            The training step of the batch, and whether the optimizer took a step.

        Raises:
            TrainingDivergedError: the loss is NaN or infinite, in this process or another.
            ConfigurationError: the batch has one image, and batch normalisation has no running statistics to use.

        Warns:
            UserWarning: batch normalisation used its running statistics, for the first time since `begin`.
        """
        completes = self._gathered + 1 >= self.options.batches_per_step
        images, labels = usable(images).to(self.device), usable(labels).to(self.device).long()
        self.precision.settle(images, labels)
        batch = self.precision.arrange(images), labels, generator
        exchange = nullcontext() if completes else self.accelerator.no_sync(self._module)
        with exchange, self._of_one_image() if len(images) == 1 else nullcontext():
            if self.options.weight_perturbation is None:
                step: TrainingStep = self._module(*batch)
                self._check_loss(step.loss.detach())
                self._add_gradients(step.loss)
            else:
                step = self._descend_from_above(batch, self.options.weight_perturbation)
        self._gathered += 1
        return step, completes and self.apply_gradients()

    def apply_gradients(self) -> bool:
        """Take a step along the accumulated gradients, even if they come from fewer batches than usual.

        Returns:
            Whether there were any gradients.
        """
        if not self._gathered:
            return False
        if self._gathered < self.options.batches_per_step:
            self._complete_group()
        if self.options.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.detector.parameters(), self.options.clip_norm)
        if not self.steps:
            self._at_first = {weight: weight.detach().clone() for weight in self._trainable()}
        with self._in_sync():
            self._step()
            self._optimizer.zero_grad()
        if self._limit_weights is not None:
            self._limit_weights()
        self._gathered = 0
        self.steps += 1
        if any(not torch.equal(weight, before) for weight, before in self._at_first.items()):
            self._at_first = {}
        if self._average is not None:
            self._average.update_parameters(self.detector)
        optimizers.after_step(self.scheduler, every=self.options.schedule_every, steps=self.steps)
        return True

    def _trainable(self) -> list[nn.Parameter]:
        return [weight for weight in self.detector.parameters() if weight.requires_grad]

    def _step(self) -> None:
        try:
            with optimizers.scaled_rates(self._bare_optimizer, self.rate_factor):
                self._optimizer.step()
        except RuntimeError as error:
            if type(error) is not RuntimeError:
                raise  # an error of memory or the device
            raise ConfigurationError(
                f"expected an optimizer that can use this detector's gradients, got {type(self._bare_optimizer)}, "
                "whose step failed; take Adam or SGD, and layers with dense gradients. What went wrong: "
                f"{in_one_line(error)}"
            ) from error

    def _of_one_image(self) -> AbstractContextManager[None]:
        def warn() -> None:
            if not self._has_warned:
                warnings.warn(
                    "a batch has one image only, too few for the statistics of batch normalisation, which used its "
                    "running statistics; pass drop_last=True to the DataLoader to leave such a batch out",
                    stacklevel=2,
                )
            self._has_warned = True

        return single_image(self.detector, synchronised=self.accelerator.num_processes > 1, warn=warn)

    def _add_gradients(self, loss: Tensor) -> None:
        # accelerate's backward would divide by the number of batches of the newest accelerator, not of this one.
        scaled, scaler = loss / self.options.batches_per_step, self.accelerator.scaler
        (scaled if scaler is None else scaler.scale(scaled)).backward()

    def _complete_group(self) -> None:
        """Average the gradients of an incomplete group, over its batches and over all processes.

        The processes have not exchanged these gradients yet, because they do so in the last batch of a full group.
        """
        factor = self.options.batches_per_step / self._gathered
        parameters = [weight for group in self._optimizer.param_groups for weight in group["params"]]
        with_gradients = [weight for weight in parameters if weight.grad is not None]
        means = self.accelerator.reduce([weight.grad for weight in with_gradients], "mean")
        for weight, mean in zip(with_gradients, means, strict=True):
            weight.grad.copy_(mean * factor)

    @contextmanager
    def _in_sync(self) -> Iterator[None]:
        """Make accelerate's optimizer take its step, whatever state of accumulation the script left in accelerate."""
        before, self.accelerator.sync_gradients = self.accelerator.sync_gradients, True
        try:
            yield
        finally:
            self.accelerator.sync_gradients = before

    def _descend_from_above(self, batch: tuple[Tensor, Tensor, Generator | None], perturbation: float) -> TrainingStep:
        """A training step with weight perturbation.

        The gradient is that at perturbed weights with a higher loss. The reported loss is that at the actual weights.
        """
        accelerator = self.accelerator
        with accelerator.no_sync(self._module):
            step: TrainingStep = self._module(*batch)
        self._check_loss(step.loss.detach())
        moving = [weight for weight in self.detector.parameters() if weight.requires_grad and weight.ndim > 1]
        gradients = torch.autograd.grad(step.loss, moving, allow_unused=True, materialize_grads=True) if moving else ()
        # All processes must move the same way, or their averaged gradients would be those of different networks.
        directions = accelerator.reduce(list(gradients), "mean")
        with moved(self.detector, moving, directions, perturbation):
            again = self._module(*batch, step.again)
            loss = again if isinstance(again, Tensor) else again.loss
            is_finite = self._is_finite(loss.detach())
            if is_finite:
                self._add_gradients(loss)
        if not is_finite:
            self._give_up(loss.detach())
        return step._replace(loss=step.loss.detach(), again=None)

    def end_epoch(self, totals: EpochTotals, epochs: int) -> EpochTotals:
        """Step a scheduler that counts epochs, and add up the totals of all processes.

        Args:
            totals: totals of this process.
            epochs: number of finished epochs, this one included.

        Returns:
            The totals of all processes.

        Warns:
            UserWarning: this was the first epoch, and no weight has changed.
        """
        totals = self._sum(totals)
        loss = totals.loss / max(1, totals.steps)
        optimizers.after_epoch(self.scheduler, every=self.options.schedule_every, epochs=epochs, loss=loss)
        if self._at_first and epochs == 1:
            warnings.warn(f"no weight has changed in the first epoch; {_NOTHING_MOVES}", stacklevel=2)
        return totals

    def _sum(self, totals: EpochTotals) -> EpochTotals:
        if self.accelerator.num_processes == 1:
            return totals
        counts = [totals.steps, totals.loss, totals.images, totals.correct, totals.attacked, totals.successes]
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        summed = self.accelerator.reduce(torch.tensor(counts, dtype=dtype, device=self.device), "sum").tolist()
        steps, loss, images, correct, attacked, successes = summed
        return EpochTotals(steps, loss, images, correct, attacked, successes, totals.seconds)

    @contextmanager
    def delivered(self) -> Iterator[None]:
        """Give the detector the averaged weights, if there are any, within the block."""
        if self._average is None or not self._average.n_averaged:
            yield
            return
        trained = {name: tensor.clone() for name, tensor in self.detector.state_dict().items()}
        self.detector.load_state_dict(self._average.module.state_dict())
        try:
            yield
        finally:
            self.detector.load_state_dict(trained)

    def snapshot(self) -> dict[str, Any]:
        """Copies on the CPU of weights, averaged weights and the optimizer's moments, for `go_back`."""
        average = {} if self._average is None else self._average.state_dict()
        moments = self._bare_optimizer.state_dict()["state"]
        copied: dict[str, Any] = _on_cpu(
            {"detector": self.detector.state_dict(), "average": average, "moments": moments}
        )
        return copied

    def go_back(self, snapshot: Mapping[str, Any], *, rate_factor: float) -> None:
        """Restore weights, averaged weights and moments. The scheduler stays where it is.

        Args:
            snapshot: copies that `snapshot` made.
            rate_factor: factor of the learning rate from now on.
        """
        self.detector.load_state_dict(snapshot["detector"])
        if self._average is not None:
            self._average.load_state_dict(snapshot["average"])
        groups = self._bare_optimizer.state_dict()["param_groups"]  # with the rates that a scheduler has set
        self._bare_optimizer.load_state_dict({"state": copy.deepcopy(snapshot["moments"]), "param_groups": groups})
        self._last_good, self.rate_factor = (self.steps, {}), rate_factor

    def finish(self, best: Mapping[str, Tensor]) -> None:
        """Put the best or else averaged weights into the detector; a further training goes on from the trained ones.

        Args:
            best: state dict of the best epoch; an empty one if there is none.

        Raises:
            ConfigurationError: no step since the first one has changed a weight.
        """
        if self._at_first:
            raise ConfigurationError(
                f"expected a training that changes weights, got none changed in {self.steps} step(s); {_NOTHING_MOVES}"
            )
        if not best and self._average is not None and self._average.n_averaged:
            best = self._average.module.state_dict()
        if best:
            self._before_delivery = {name: tensor.clone() for name, tensor in self.detector.state_dict().items()}
            self.detector.load_state_dict(best)
            self._delivered = {name: tensor.clone() for name, tensor in self.detector.state_dict().items()}

    def report(self, values: Mapping[str, float]) -> None:
        """Send numbers to the accelerator's trackers."""
        rate = self.rate_factor * self._optimizer.param_groups[0]["lr"]
        self.accelerator.log({"learning_rate": rate, **values}, step=self.steps)

    def report_epoch(self, record: EpochRecord) -> None:
        """Send the figures of an epoch, and those of its validation images, to the accelerator's trackers."""
        if self.accelerator.trackers:
            figures = {f"validation/{name}": value for name, value in record.validation.items()}
            plain = {"loss": record.loss, "accuracy": record.accuracy, "seconds": record.seconds}
            self.report({f"epoch/{name}": value for name, value in plain.items()} | {"epoch": record.epoch} | figures)

    @property
    def is_reporting(self) -> bool:
        """Whether a report is due."""
        return bool(self.accelerator.trackers) and self.steps % self.options.log_every == 0

    def _check_loss(self, loss: Tensor) -> None:
        """Raise an error if the loss is not finite; otherwise keep a copy of the weights every few steps.

        The copies are good weights, because their loss was finite.
        """
        if not self._is_finite(loss):
            self._give_up(loss)
        if self.steps % _REMEMBER_EVERY == 0 or not self._last_good[1]:
            state = self.detector.state_dict()
            self._last_good = self.steps, {name: value.clone() for name, value in state.items()}

    def _is_finite(self, loss: Tensor) -> bool:
        """Whether the loss is finite in every process."""
        return bool(self.accelerator.gather(loss.isfinite()).all())

    def _give_up(self, loss: Tensor) -> None:
        step, weights = self._last_good if self._last_good[1] else (self.steps, self.detector.state_dict())
        self.detector.load_state_dict(weights)
        raise TrainingDivergedError(
            f"the loss became {loss.item()} at step {self.steps}; the detector holds the weights of step {step} again. "
            "Lower the learning rate, clip gradients, or train with fewer or smaller attack steps first"
        )


def _on_cpu(value: Any) -> Any:
    """A copy of nested dicts with all tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    return {key: _on_cpu(part) for key, part in value.items()} if isinstance(value, Mapping) else value
