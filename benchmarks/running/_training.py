"""Train the detectors of the comparison, or load them. A killed training resumes from its last checkpoint."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from clusterguard import PGD, DetectorModule, TrainingOptions
from clusterguard.attacks import NoisyFGSM, Precision
from clusterguard.errors import ConfigurationError, TrainingStoppedError
from clusterguard.training import OverfittingCheck
from torch import Generator, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR

from benchmarks.data import DataSet, FloatBatches, Images, load_data_set
from benchmarks.detectors import (
    CompileChoice,
    CompileMode,
    Features,
    Recipe,
    Schedule,
    build_network,
    make_recipe,
    quickest_mode,
)
from benchmarks.experiments import Cell, Training
from benchmarks.running._clock import Clock, OutOfTimeError
from benchmarks.running._store import Store, provenance

JUDGED_AT_ONCE = 500  # images in a batch that is judged without gradients
HELD_OUT = 256  # training images that catastrophic overfitting is looked for on instead
STEPS_AT_RISK = 100  # steps that a killed training repeats at most
DETECTORS_KEPT = 4  # few are kept in memory, since cells of one training follow each other


class Trainings:
    """The detectors of cells and their data. Each detector is trained once and kept in a store.

    Args:
        store: store of weights and results.
        device: device to compute on.
        data: folder of data sets, see `benchmarks.data.data_root`.
        clock: time budget.
        progress: whether to show progress bars.
        compiled: mode of torch.compile for the networks. None does not compile. "auto" measures once for each network
            which mode is fastest on this device. Results agree up to rounding.
    """

    def __init__(
        self,
        store: Store,
        *,
        device: torch.device,
        data: Path | None = None,
        clock: Clock | None = None,
        progress: bool = False,
        compiled: CompileChoice | None = None,
    ) -> None:
        self.store = store
        self.device = device
        self.data = data
        self.clock = Clock() if clock is None else clock
        self.progress = progress
        self.compiled = compiled
        self._modes: dict[tuple[str, str], CompileMode | None] = {}
        self._sets: dict[str, DataSet] = {}
        self._trained: dict[tuple[str, str], tuple[DetectorModule, dict[str, Any]]] = {}

    def dataset(self, name: str) -> DataSet:
        """A data set by name. Its training and calibration images are on the device."""
        if name not in self._sets:
            loaded = load_data_set(name, self.data)
            train, calibration = loaded.train.to(self.device), loaded.calibration.to(self.device)
            self._sets[name] = replace(loaded, train=train, calibration=calibration)
        return self._sets[name]

    def detector(self, cell: Cell) -> tuple[DetectorModule, dict[str, Any]]:
        """The detector of a cell and the record of its training.

        The detector is trained and finished by its recipe, but not calibrated.

        Raises:
            OutOfTimeError: the budget is used up. The next call resumes the training.
        """
        name = cell.detector, cell.training.key
        if name not in self._trained:
            recipe, data = make_recipe(cell.detector, cell.training.options), self.dataset(cell.training.dataset)
            trained, record = train_detector(
                cell.training,
                recipe,
                data,
                self.store,
                device=self.device,
                clock=self.clock,
                progress=self.progress,
                compiled=self.compile_mode(cell.training),
            )
            batches = FloatBatches(data.train.head(cell.training.images), JUDGED_AT_ONCE)
            finished = recipe.finish(trained.eval(), batches).to(self.device).eval().requires_grad_(False)
            latest = list(self._trained.items())[1 - DETECTORS_KEPT :]
            self._trained = dict(latest) | {name: (finished, record)}
        return self._trained[name]

    def compile_mode(self, training: Training) -> CompileMode | None:
        """The mode in which the network of a training is compiled. None if it is not compiled."""
        if self.compiled != "auto":
            return self.compiled
        name = training.dataset, training.model
        if name not in self._modes:
            shape = self.dataset(training.dataset).image_shape
            network = build_network(training.model, shape).to(self.device).eval()
            images = torch.rand(training.batch_size, *shape, device=self.device)
            self._modes[name] = quickest_mode(network, images)
        return self._modes[name]


def train_detector(
    training: Training,
    recipe: Recipe,
    data: DataSet,
    store: Store,
    *,
    device: torch.device,
    clock: Clock,
    progress: bool = False,
    compiled: CompileMode | None = None,
) -> tuple[DetectorModule, dict[str, Any]]:
    """Train a detector, or load its weights if the store has them.

    Args:
        training: definition of the training.
        recipe: recipe that builds and trains the detector.
        data: data set to train on.
        store: store of weights.
        device: device to compute on.
        clock: time budget.
        progress: whether to show progress bars.
        compiled: mode of torch.compile for the network, which stays compiled afterwards. None does not compile.

    Returns:
        The detector, not calibrated, and the record of its training.

    Raises:
        OutOfTimeError: the budget is used up. The next call resumes the training.
    """
    torch.manual_seed(training.seed)
    detector = recipe.build(build_network(training.model, data.image_shape)).to(device)
    if compiled is not None:
        for network in networks_in(detector):
            network.compile(mode=compiled)
    saved = store.load_weights(training.key)
    if saved is not None:
        detector.load_state_dict(saved[0])
        return detector, saved[1]["record"]

    images, check = data.train.head(training.images), None
    if recipe.attacked and training.noise:
        held_out = Images(*(part[-HELD_OUT:] for part in images))
        images, check = images.head(-HELD_OUT), look_for_overfitting(training, held_out)
    batches = FloatBatches(
        images,
        training.batch_size,
        shuffle=True,
        augment=training.augment,
        cutmix=training.cutmix,
        generator=Generator().manual_seed(training.seed),
    )
    try:
        history = recipe.trainer(detector, make_schedule(training, len(batches))).fit(
            batches,
            FloatBatches(data.calibration, JUDGED_AT_ONCE),
            epochs=training.epochs,
            checkpoint=store.work(training.key) / "training.pt",
            checkpoint_every=STEPS_AT_RISK,
            stop_when=lambda: clock.is_ending,
            generator=Generator(device).manual_seed(training.seed),
            calibrate=False,
            overfitting=check,
            progress=progress,
        )
    except TrainingStoppedError as error:
        raise OutOfTimeError from error
    state = detector.state_dict()
    if training.half:
        state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
        detector.load_state_dict(state)  # evaluate the rounded weights, which are the ones that are kept
    record = {
        "definition": asdict(training),
        "epochs": len(history),
        "seconds": round(sum(epoch.seconds for epoch in history), 1),
        "last": {
            key: value
            for key, value in asdict(history[-1]).items()
            if isinstance(value, str) or (isinstance(value, int | float) and math.isfinite(value))
        },
        "provenance": provenance(device) | {"compiled": compiled},
    }
    store.save_weights(training.key, state, {"record": record})
    store.remove_work(training.key)
    return detector, record


def look_for_overfitting(training: Training, held_out: Images) -> OverfittingCheck:
    """The check for catastrophic overfitting of a training with one attack step, by PGD with ten."""
    norm, eps = training.attack["norm"], training.attack["eps"]
    precision: Precision = "bf16" if training.mixed_precision else "float32"
    attack = PGD(norm=norm, eps=eps, step_size=eps / 4, steps=10, start="random", precision=precision)
    return OverfittingCheck(FloatBatches(held_out, HELD_OUT), attack)


def make_attack(training: Training) -> PGD:
    """The training attack that a training names.

    Raises:
        ConfigurationError: there is noise, and more than one step.
    """
    attack = PGD(**training.attack)
    if not training.noise:
        return attack
    if attack.steps != 1:
        raise ConfigurationError(f"expected an attack of one step with noise, got {training.attack}")
    noisy = NoisyFGSM(norm=attack.norm, eps=attack.eps, noise=training.noise, step_size=training.attack["step_size"])
    return noisy.as_pgd()


def networks_in(detector: nn.Module) -> list[Features]:
    """The networks that a detector runs. A guard runs a copy of the network that it was built from."""
    return [module for module in detector.modules() if isinstance(module, Features)]


def make_schedule(training: Training, steps: int) -> Schedule:
    """Make the optimizer, scheduler and attack that a training names. `steps` is the number of steps in an epoch."""

    def make_optimizer(module: nn.Module) -> Optimizer:
        rate, decay = training.learning_rate, training.weight_decay
        if training.optimizer == "sgd":
            return SGD(module.parameters(), lr=rate, momentum=0.9, weight_decay=decay, nesterov=True)
        return Adam(module.parameters(), lr=rate, weight_decay=decay)

    def make_scheduler(optimizer: Optimizer) -> LRScheduler:
        if training.schedule == "one-cycle":
            return OneCycleLR(optimizer, training.learning_rate, total_steps=training.epochs * steps)
        if training.schedule == "cosine":
            return CosineAnnealingLR(optimizer, training.epochs)
        return MultiStepLR(optimizer, [training.epochs // 2, training.epochs * 3 // 4])

    return Schedule(
        attack=make_attack(training),
        optimizer=make_optimizer,
        scheduler=None if training.schedule == "constant" else make_scheduler,
        options=TrainingOptions(
            schedule_every="step" if training.schedule == "one-cycle" else "epoch",
            average_decay=1 - 1 / max(2.0, training.average_share * training.epochs * steps)
            if training.average_share
            else None,
            precision="bf16" if training.mixed_precision else "float32",
        ),
        warmup_epochs=training.warmup_epochs,
    )
