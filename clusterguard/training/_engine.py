"""Steps of the optimizer: on one device or many, clipped, averaged, and undone when the loss explodes."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from clusterguard._support import OneProcess
from clusterguard.detection import Loader
from clusterguard.detectors import DetectorModule
from clusterguard.errors import ConfigurationError, TrainingDivergedError
from clusterguard.training import _optimizers as optimizers
from clusterguard.training._checkpoints import EpochTotals, Stateful
from clusterguard.training._options import TrainingOptions
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from accelerate import Accelerator

_REMEMBER_EVERY = 10  # steps between copies of good weights
_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # accelerate's names; they compare equal to strings


class TrainingStep(NamedTuple):
    """What one batch gave.

    Attributes:
        loss: a scalar, to be minimised.
        correct: how many images of the batch were labelled rightly, (); benign ones where they are looked at.
        successes: how many training attacks got through, (); None if there was no attack.
        terms: what the loss is made of, scalars by name, for trackers.
        again: makes the loss once more at the detector's weights of that moment, of the same images, attacked ones as
            they are; None takes the whole step again, attack included. For weight perturbation.
    """

    loss: Tensor
    correct: Tensor
    successes: Tensor | None = None
    terms: Mapping[str, Tensor] | None = None
    again: Callable[[], Tensor] | None = None


class _WholeStep(nn.Module):
    """What is prepared for devices and processes: a forward pass that is a whole training step.

    So the attack in it runs on the bare detector, and gradients are exchanged once, for the step's loss.
    """

    def __init__(self, detector: DetectorModule, training_step: Callable[..., TrainingStep]) -> None:
        super().__init__()
        self.detector = detector
        self.training_step = training_step

    def forward(
        self, images: Tensor, labels: Tensor, generator: Generator | None, again: Callable[[], Tensor] | None = None
    ) -> Any:
        """The step of a batch; or the loss of one that was taken before, again."""
        return self.training_step(images, labels, generator) if again is None else again()


class TrainingEngine:
    """Takes steps for a trainer; everything about devices, processes and precision is accelerate's.

    Args:
        detector: whose parameters the optimizer has; moved where the accelerator says.
        training_step: images (B, C, H, W), labels (B,), generator -> `TrainingStep`.
        optimizer: of the detector's parameters.
        scheduler: or None.
        options: how steps are taken.

    Attributes:
        steps: of the optimizer, so far.

    Raises:
        ConfigurationError: an accelerator that shards the detector.
    """

    def __init__(
        self,
        detector: DetectorModule,
        training_step: Callable[..., TrainingStep],
        *,
        optimizer: Optimizer,
        scheduler: Any,
        options: TrainingOptions,
    ) -> None:
        self.detector, self.scheduler, self.options = detector, scheduler, options
        self.accelerator: Accelerator | OneProcess = options.make_accelerator()
        if self.accelerator.distributed_type in _SHARDED:
            raise ConfigurationError(
                "expected an accelerator whose processes each hold the whole detector, as with DDP, got "
                f"{self.accelerator.distributed_type.value}: attacks and thresholds need all weights. "
                "Launch without it, and accelerate takes DDP"
            )
        self.steps = 0
        self._module: nn.Module = self.accelerator.prepare_model(_WholeStep(detector, training_step))
        self._given_optimizer = optimizer
        self._optimizer = self.accelerator.prepare_optimizer(optimizer)
        self._gathered = 0  # batches whose gradients wait for the next step
        self._has_warned = False  # of a batch of one image
        decay = options.average_decay
        average = None if decay is None else get_ema_multi_avg_fn(decay)
        self._average = None if decay is None else AveragedModel(detector, multi_avg_fn=average, use_buffers=True)
        self._last_good: tuple[int, dict[str, Tensor]] = (0, {})
        self._before_average: dict[str, Tensor] | None = None

    @property
    def shared(self) -> "Accelerator | None":
        """The accelerator whose processes share work with this one; None if this process is alone."""
        return None if isinstance(self.accelerator, OneProcess) else self.accelerator

    @property
    def device(self) -> torch.device:
        """The detector's."""
        return self.detector.thresholds.device

    @property
    def parts(self) -> dict[str, Stateful | None]:
        """What a checkpoint holds of it."""
        return {
            "guard": self.detector,
            "optimizer": self._optimizer,
            "scheduler": self.scheduler,
            "average": self._average,
            "scaler": self.accelerator.scaler,
        }

    def check(self, batches: int | None, epochs: int, *, resumable: bool) -> None:
        """The optimizer and the scheduler can do what a training asks of them.

        Args:
            batches: of an epoch, in this process; None if that is not known.
            epochs: in all.
            resumable: whether there will be checkpoints.

        Raises:
            ConfigurationError: they cannot, or the detector was made in inference mode.

        Warns:
            UserWarning: the optimizer holds some of the detector's trainable parameters only.
        """
        for name, own in _everything(self.detector):
            if own.is_inference() and own is not self.detector.thresholds:
                raise ConfigurationError(
                    f"expected a detector that can be trained, got one made inside torch.inference_mode() ({name}); "
                    "make it outside"
                )
        optimizers.check_optimizer(self._given_optimizer, self.detector)
        every, group = self.options.schedule_every, self.options.batches_per_step
        in_an_epoch = 1 if every == "epoch" else None if batches is None else -(-batches // group)
        steps = None if in_an_epoch is None else epochs * in_an_epoch
        optimizers.check_scheduler(self.scheduler, self._given_optimizer, every=every, steps=steps, resumable=resumable)
        if resumable:
            optimizers.check_keepable(self._given_optimizer, self.scheduler)

    def begin(self) -> None:
        """Make ready for a training: no gradients are left over, and averaged weights give way to those that train."""
        with self._in_sync():
            self._optimizer.zero_grad()
        self._gathered, self._has_warned = 0, False
        before, self._before_average = self._before_average, None
        if before is None or self._average is None:
            return
        pairs = zip(self.detector.parameters(), self._average.module.parameters(), strict=True)
        if all(torch.equal(own, average) for own, average in pairs):  # nobody has changed them meanwhile
            self.detector.load_state_dict(before)

    def share(self, loader: Loader) -> Loader:
        """The part of the training batches that this process takes.

        Raises:
            ConfigurationError: several processes, and a loader of which accelerate knows no parts.
        """
        if isinstance(self.accelerator, OneProcess) or self.accelerator.num_processes == 1:
            return loader
        if not isinstance(loader, DataLoader):
            raise ConfigurationError(f"expected a DataLoader, to train in several processes, got {type(loader)}")
        shared: Loader = self.accelerator.prepare_data_loader(loader, device_placement=False)
        return shared

    def take_step(self, images: Tensor, labels: Tensor, generator: Generator | None) -> tuple[TrainingStep, bool]:
        """Descend the loss of a batch.

        A batch of one image has no statistics of its own where feature maps have one pixel, so batch normalisation
        takes it with its running ones there.

        Returns:
            What the batch gave; and whether the optimizer has taken a step, or gradients accumulate still.

        Raises:
            TrainingDivergedError: the loss is NaN or infinite, in this process or another.
            ConfigurationError: the batch has one image, of which batch normalisation has no statistics of any kind.

        Warns:
            UserWarning: batch normalisation takes its running statistics, for the first time since `begin`.
        """
        completes = self._gathered + 1 >= self.options.batches_per_step
        batch = _usable(images).to(self.device), _usable(labels).to(self.device).long(), generator
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
        """Take a step along the gradients of the batches since the last one, be they fewer than a step should have.

        Returns:
            Whether there were any.
        """
        if not self._gathered:
            return False
        if self._gathered < self.options.batches_per_step:
            self._complete_group()
        if self.options.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.detector.parameters(), self.options.clip_norm)
        with self._in_sync():
            self._optimizer.step()
            self._optimizer.zero_grad()
        self._gathered = 0
        self.steps += 1
        if self._average is not None:
            self._average.update_parameters(self.detector)
        optimizers.after_step(self.scheduler, every=self.options.schedule_every, steps=self.steps)
        return True

    def _of_one_image(self) -> AbstractContextManager[None]:
        def warn() -> None:
            if not self._has_warned:
                warnings.warn(
                    "a batch has one image only, of which batch normalisation can take no statistics, so it took the "
                    "running ones; drop_last=True of the DataLoader leaves such a batch out",
                    stacklevel=2,
                )
            self._has_warned = True

        return _single_image(self.detector, synchronised=self.accelerator.num_processes > 1, warn=warn)

    def _add_gradients(self, loss: Tensor) -> None:
        # Not accelerate's backward, which divides by the number of batches that its newest accelerator was given.
        scaled, scaler = loss / self.options.batches_per_step, self.accelerator.scaler
        (scaled if scaler is None else scaler.scale(scaled)).backward()

    def _complete_group(self) -> None:
        """Make of the gradients of a few batches their mean, over all processes, which have not exchanged them yet."""
        factor = self.options.batches_per_step / self._gathered
        held = [own for group in self._optimizer.param_groups for own in group["params"] if own.grad is not None]
        means = self.accelerator.reduce([own.grad for own in held], "mean")
        for own, mean in zip(held, means, strict=True):
            own.grad.copy_(mean * factor)

    @contextmanager
    def _in_sync(self) -> Iterator[None]:
        """Let accelerate's optimizer act, whatever the script has last told accelerate about accumulation."""
        before, self.accelerator.sync_gradients = self.accelerator.sync_gradients, True
        try:
            yield
        finally:
            self.accelerator.sync_gradients = before

    def _descend_from_above(self, batch: tuple[Tensor, Tensor, Generator | None], perturbation: float) -> TrainingStep:
        """A step whose gradient is taken where the loss is higher; it reports the loss where the weights are."""
        accelerator = self.accelerator
        with accelerator.no_sync(self._module):
            step: TrainingStep = self._module(*batch)
        self._check_loss(step.loss.detach())
        moving = [own for own in self.detector.parameters() if own.requires_grad and own.ndim > 1]
        gradients = torch.autograd.grad(step.loss, moving, allow_unused=True, materialize_grads=True) if moving else ()
        # Processes that moved apart would take the gradients of different networks for one.
        directions = accelerator.reduce(list(gradients), "mean")
        with _moved(self.detector, moving, directions, perturbation):
            again = self._module(*batch, step.again)
            loss = again if isinstance(again, Tensor) else again.loss
            is_finite = self._is_finite(loss.detach())
            if is_finite:
                self._add_gradients(loss)
        if not is_finite:
            self._give_up(loss.detach())
        return step._replace(loss=step.loss.detach(), again=None)

    def end_epoch(self, totals: EpochTotals, epochs: int) -> EpochTotals:
        """All processes' totals; the scheduler steps if epochs are what it counts.

        Args:
            totals: of this process.
            epochs: that are over, this one included.
        """
        totals = self._sum(totals)
        loss = totals.loss / max(1, totals.steps)
        optimizers.after_epoch(self.scheduler, every=self.options.schedule_every, epochs=epochs, loss=loss)
        return totals

    def _sum(self, totals: EpochTotals) -> EpochTotals:
        if self.accelerator.num_processes == 1:
            return totals
        own = [totals.steps, totals.loss, totals.images, totals.correct, totals.attacked, totals.successes]
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        summed = self.accelerator.reduce(torch.tensor(own, dtype=dtype, device=self.device), "sum").tolist()
        steps, loss, images, correct, attacked, successes = summed
        return EpochTotals(steps, loss, images, correct, attacked, successes, totals.seconds)

    def finish(self) -> None:
        """Give the detector the average of its weights, if one is kept; a further training goes on from its own."""
        if self._average is not None and self._average.n_averaged:
            self._before_average = {name: own.clone() for name, own in self.detector.state_dict().items()}
            self.detector.load_state_dict(self._average.module.state_dict())

    def report(self, values: Mapping[str, float]) -> None:
        """Hand numbers to the accelerator's trackers."""
        self.accelerator.log({"learning_rate": self._optimizer.param_groups[0]["lr"], **values}, step=self.steps)

    @property
    def is_reporting(self) -> bool:
        """Whether a report is due."""
        return bool(self.accelerator.trackers) and self.steps % self.options.log_every == 0

    def _check_loss(self, loss: Tensor) -> None:
        """A finite loss vouches for the weights that made it: remember them now and then; else go back to them."""
        if not self._is_finite(loss):
            self._give_up(loss)
        if self.steps % _REMEMBER_EVERY == 0 or not self._last_good[1]:
            state = self.detector.state_dict()
            self._last_good = self.steps, {name: value.clone() for name, value in state.items()}

    def _is_finite(self, loss: Tensor) -> bool:
        """Whether it is in every process."""
        return bool(self.accelerator.gather(loss.isfinite()).all())

    def _give_up(self, loss: Tensor) -> None:
        step, weights = self._last_good if self._last_good[1] else (self.steps, self.detector.state_dict())
        self.detector.load_state_dict(weights)
        raise TrainingDivergedError(
            f"the loss became {loss.item()} at step {self.steps}; the detector holds the weights of step {step} again. "
            "Lower the learning rate, clip gradients, or train with fewer or smaller attack steps first"
        )


@contextmanager
def _moved(
    detector: nn.Module, parameters: Sequence[Tensor], directions: Sequence[Tensor], share: float
) -> Iterator[None]:
    """Each parameter moved in its direction by a share of its norm; afterwards all is as it was, bit by bit.

    Buffers too: what BatchNorm sees of a network that nobody will keep is not to be remembered.
    """
    kept = {name: own.detach().clone() for name, own in _everything(detector)}
    try:
        with torch.no_grad():
            for own, direction in zip(parameters, directions, strict=True):
                length = direction.norm().clamp_min(torch.finfo(direction.dtype).tiny)  # no gradient: no move
                own.add_(direction / length * (share * own.norm()))
        yield
    finally:
        with torch.no_grad():
            for name, own in _everything(detector):
                own.copy_(kept[name])


def _everything(detector: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, also those that a state dict leaves out."""
    yield from detector.named_parameters()
    yield from detector.named_buffers()


def _usable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one made in inference mode, which autograd would refuse."""
    return tensor.clone() if tensor.is_inference() else tensor


@contextmanager
def _single_image(detector: nn.Module, *, synchronised: bool, warn: Callable[[], None]) -> Iterator[None]:
    """Batch normalisation of one image: by its own statistics where maps have several pixels, else by the running ones.

    Args:
        detector: whose layers in train mode take part.
        synchronised: whether `SyncBatchNorm` sees images of other processes, too.
        warn: called when running statistics are taken.
    """
    layers = {
        name: layer
        for name, layer in detector.named_modules()
        if isinstance(layer, _BatchNorm) and not (synchronised and isinstance(layer, nn.SyncBatchNorm))
    }
    names = {layer: name for name, layer in layers.items()}
    switched: set[nn.Module] = set()

    def before(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        values: Tensor = [*inputs, *named.values()][0]
        if math.prod(values.shape[2:]) > 1 or len(values) > 2:  # 2: the image and the attacked one
            return
        if layer.running_mean is None:
            raise ConfigurationError(
                f"expected batches of at least two images, for {names[layer]} with track_running_stats=False has no "
                "statistics to take in place of those of a single image, got a batch of one; pass drop_last=True to "
                "the DataLoader"
            )
        if layer.training:
            layer.training = False
            switched.add(layer)
            warn()

    def after(layer: nn.Module, *_: Any) -> None:
        if layer in switched:
            switched.remove(layer)
            layer.training = True

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in names]
    hooks += [layer.register_forward_hook(after, always_call=True) for layer in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
