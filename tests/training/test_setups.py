"""The set-ups of trainings that people have: they work, or are refused before the first step."""

import copy
import re

import pytest
import torch
from clusterguard import (
    APGD,
    PGD,
    AdversarialClusterTrainer,
    Calibrator,
    ClusterGuard,
    TrainingOptions,
    WorstCaseSuite,
    evaluate,
)
from clusterguard.attacks import Boundary
from clusterguard.errors import ConfigurationError, InputError, TooFewCalibrationExamplesError
from torch import nn
from torch.utils.data import ChainDataset, DataLoader, IterableDataset, Subset, TensorDataset
from trainings import ATTACK, held_out, new_guard, train, weights

CALIBRATOR = Calibrator(0.1, scarce="pool")
pytestmark = pytest.mark.filterwarnings("ignore:.*too few correctly classified")  # after so short a training


def fit(guard, loader, calibration=None, *, epochs=1, attack=ATTACK, **options):
    fit_options = {name: options.pop(name) for name in ("unpack", "calibrate") if name in options}
    trainer = AdversarialClusterTrainer(guard, attack, calibrator=CALIBRATOR, **options)
    calibration = list(loader) if calibration is None else calibration
    trainer.fit(loader, calibration, epochs=epochs, progress=False, **{"calibrate": False, **fit_options})
    return trainer


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


def test_a_stream_trains_and_calibrates_as_the_data_set_does(blobs):
    plain, streamed = new_guard(), new_guard()
    fit(plain, DataLoader(blobs.dataset, 60), held_out(blobs), epochs=4, calibrate=True)
    stream = DataLoader(Stream(blobs.dataset), 60)
    fit(streamed, stream, DataLoader(Stream(held_out(blobs).dataset), 60), epochs=4, calibrate=True)
    assert torch.equal(weights(plain), weights(streamed))
    assert torch.equal(plain.thresholds, streamed.thresholds)


@pytest.mark.parametrize("unpack", [None, lambda batch: (batch["photo"], batch["kind"])])
def test_batches_of_other_forms_train_as_pairs_do(blobs, unpack):
    names = ("image", "label") if unpack is None else ("photo", "kind")
    dicts = [dict(zip(names, batch, strict=True)) for batch in blobs]
    plain, other = new_guard(), new_guard()
    fit(plain, list(blobs))
    fit(other, dicts, unpack=unpack)
    assert torch.equal(weights(plain), weights(other))


@pytest.mark.parametrize("warmup_epochs", [0, 1])
def test_a_last_batch_of_one_image_is_trained_on_without_its_statistics(blobs, warmup_epochs):
    guard = new_guard(nn.BatchNorm1d(16))
    data = TensorDataset(*(part[:61] for part in blobs.dataset.tensors))
    norm, seen = guard.encoder[0][3], []
    norm.register_forward_hook(lambda module, inputs, output: seen.append((len(output), module.training)))
    with pytest.warns(UserWarning, match="one image only"):
        fit(guard, DataLoader(data, 60), warmup_epochs=warmup_epochs)
    assert [training for count, training in seen if count == 60 * (2 - warmup_epochs)][-1]
    assert not seen[-1][1]
    assert norm.running_var.isfinite().all()
    assert norm.num_batches_tracked == 1
    assert norm.training == guard.training


def train_on_single_images(blobs, norm, *, stride, warmup_epochs=0):
    """Three batches of one image; its maps have one pixel at a stride of 8."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(1, 2, stride, stride=stride), norm, nn.ReLU(), nn.Flatten())
    guard = ClusterGuard(backbone, num_classes=3, example=torch.rand(2, 1, 8, 8))
    fit(guard, DataLoader(Subset(blobs.dataset, range(3)), 1), list(blobs), warmup_epochs=warmup_epochs)
    return guard.encoder[0][1]


@pytest.mark.parametrize("warmup_epochs", [0, 1])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_one_image_of_large_maps_has_statistics_and_is_normalised_by_them(blobs, kind, warmup_epochs):
    norm = train_on_single_images(blobs, kind(2), stride=2, warmup_epochs=warmup_epochs)  # a warning would be an error
    assert norm.num_batches_tracked == 3
    train_on_single_images(blobs, nn.BatchNorm2d(2, track_running_stats=False), stride=2, warmup_epochs=warmup_epochs)


@pytest.mark.parametrize("warmup_epochs", [0, 1])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_one_image_of_one_pixel_is_normalised_by_running_statistics_and_warned_of_once(blobs, kind, warmup_epochs):
    with pytest.warns(UserWarning, match="one image only") as warned:
        norm = train_on_single_images(blobs, kind(2), stride=8, warmup_epochs=warmup_epochs)
    assert len(warned) == 1
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("warmup_epochs", [0, 1])
def test_one_image_of_one_pixel_without_running_statistics_is_refused_in_a_sentence(blobs, warmup_epochs):
    with pytest.raises(ConfigurationError, match=r"encoder\.0\.1 with track_running_stats=False .*drop_last=True"):
        train_on_single_images(
            blobs, nn.BatchNorm2d(2, track_running_stats=False), stride=8, warmup_epochs=warmup_epochs
        )


@pytest.mark.parametrize("whole", [True, False])
def test_frozen_batch_normalisation_does_not_move_and_keeps_its_mode(blobs, whole):
    guard = new_guard(nn.BatchNorm1d(16, affine=not whole), nn.Linear(16, 16), nn.BatchNorm1d(16))
    frozen, free = guard.encoder[0][3], guard.encoder[0][5]
    if whole:  # in a block of which every parameter is frozen; it has none of its own
        guard.encoder[0] = nn.Sequential(guard.encoder[0][:4].requires_grad_(False), guard.encoder[0][4], free)
    frozen.requires_grad_(False)
    guard.train()
    before = copy.deepcopy((frozen.running_mean, free.running_mean))
    fit(guard, blobs)
    assert torch.equal(frozen.running_mean, before[0])
    assert not torch.equal(free.running_mean, before[1])
    assert frozen.training == free.training == guard.training


class Counting(nn.Module):
    """Changes with every batch that it sees in train mode, in a buffer and in an attribute."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, features):
        self.seen += self.training
        self.calls += self.training
        return features * (1 + self.seen / 9)


MOVING = {
    "batch norm": lambda: nn.BatchNorm2d(2),
    "batch norm without parameters": lambda: nn.BatchNorm2d(2, affine=False),
    "instance norm": lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
    "instance norm without parameters": lambda: nn.InstanceNorm2d(2, track_running_stats=True),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 2, 3)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Conv2d(2, 2, 3)),
    "counter": Counting,
}


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_module_that_is_wholly_frozen_does_not_change(blobs, name):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Sequential(MOVING[name](), nn.Dropout(0.5)))
    guard = ClusterGuard(nn.Sequential(block, nn.Flatten(), nn.LazyLinear(8)), 3, example=torch.rand(2, 1, 8, 8))
    frozen, images = guard.encoder[0][0].requires_grad_(False), torch.rand(2, 1, 8, 8)
    before, state = frozen(images), copy.deepcopy(frozen.state_dict())
    fit(guard, blobs)
    torch.testing.assert_close(frozen.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(frozen(images), before)
    frozen.requires_grad_(True)
    fit(guard, blobs)
    assert not torch.equal(frozen(images), before)


def test_a_norm_without_parameters_beside_frozen_layers_moves_unless_it_is_named(blobs):
    for names in (frozenset(), frozenset({"encoder.0.3"})):
        guard = new_guard(nn.BatchNorm1d(16, affine=False), nn.Linear(16, 16))
        guard.encoder[0][1].requires_grad_(False)
        guard.frozen = names
        fit(guard, blobs)
        assert bool(guard.encoder[0][3].num_batches_tracked) != bool(names)


@pytest.mark.parametrize("parts", [(2, 4), (1, 2, 3, 4), (4, 4)])
def test_averaged_training_in_parts_is_training_at_once(blobs, parts):
    at_once, in_parts = new_guard(nn.BatchNorm1d(16)), new_guard(nn.BatchNorm1d(16))
    options = TrainingOptions(average_decay=0.9)
    fit(at_once, blobs, epochs=4, options=options)
    trainer = AdversarialClusterTrainer(in_parts, ATTACK, calibrator=CALIBRATOR, options=options)
    for epochs in parts:
        trainer.fit(blobs, held_out(blobs), epochs=epochs, progress=False)
    at_once.reset_calibration()
    in_parts.reset_calibration()
    torch.testing.assert_close(in_parts.state_dict(), at_once.state_dict(), rtol=0, atol=0, equal_nan=True)


def test_weights_that_somebody_has_changed_between_two_trainings_stay(blobs):
    guard = new_guard()
    options = TrainingOptions(average_decay=0.9)
    trainer = fit(guard, blobs, options=options, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-4))
    guard.load_state_dict({name: tensor + 1 for name, tensor in guard.state_dict().items()})
    changed = weights(guard)
    trainer.fit(blobs, blobs, epochs=2, calibrate=False, progress=False)
    assert (weights(guard) - changed).abs().max() < 1  # the average of old and new, by a short step


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_training_works_where_gradients_are_off(blobs, context):
    plain, guard = new_guard(), new_guard()
    fit(plain, blobs, held_out(blobs), calibrate=True)
    with context():
        fit(guard, [tuple(part.clone() for part in batch) for batch in blobs], held_out(blobs), calibrate=True)
    assert torch.equal(weights(plain), weights(guard))


def test_thresholds_of_inference_mode_take_part_in_attacks_and_training(blobs):
    guard = new_guard()
    train(guard, blobs, epochs=3, calibrate=False)
    with torch.inference_mode():
        CALIBRATOR.fit(guard, blobs)
    assert not guard.thresholds.is_inference()
    images, labels = next(iter(blobs))
    assert APGD(eps=0.1, steps=5)(guard, images, labels).shape == images.shape
    fit(guard, blobs)


def test_a_guard_of_inference_mode_is_refused(blobs):
    with torch.inference_mode():
        guard = new_guard()
    with pytest.raises(ConfigurationError, match=r"inside torch\.inference_mode"):
        fit(guard, blobs)


@pytest.mark.parametrize("make", [lambda loader: loader, lambda loader: DataLoader(loader.dataset, 50)])
def test_calibration_with_the_training_images_is_warned_of(blobs, make):
    with pytest.warns(UserWarning, match="images that are trained on"):
        fit(new_guard(), blobs, make(blobs), calibrate=True)


@pytest.mark.parametrize(
    ("make", "error", "reason"),
    [
        (lambda images, labels: iter([(images, labels)]), ConfigurationError, "passed through repeatedly"),
        (lambda images, labels: TensorDataset(images, labels), ConfigurationError, "DataLoader"),
        (lambda images, labels: None, ConfigurationError, "passed through repeatedly"),
        (lambda images, labels: [(images, nn.functional.one_hot(labels).float())], InputError, "integer labels"),
        (lambda images, labels: [(images, labels.float())], InputError, "integer labels"),
        (lambda images, labels: [((images * 255).byte(), labels)], InputError, "255"),
        (lambda images, labels: [(images, labels + 1)], InputError, "labels from 0 to 2"),
        (lambda images, labels: [(images, labels, labels)], InputError, "pass unpack="),
        (lambda images, labels: [{"x": images, "y": labels}], InputError, "pass unpack="),
        (lambda images, labels: [], InputError, "empty"),
    ],
)
def test_loaders_that_cannot_be_trained_with_are_refused_before_the_first_step(blobs, make, error, reason):
    guard = new_guard()
    before = weights(guard)
    with pytest.raises(error, match=reason):
        fit(guard, make(*next(iter(blobs))), list(blobs))
    assert torch.equal(weights(guard), before)


class OnePass(IterableDataset):
    """A stream that is read from one iterator, and so once."""

    def __init__(self, items):
        self.items = iter(items)

    def __iter__(self):
        return self.items


class Restarting(OnePass):
    """It looks like one that is read once, but begins anew."""

    def __init__(self, items):
        self.given = items

    def __iter__(self):
        self.items = iter(self.given)
        return self

    def __next__(self):
        return next(self.items)


class Plain:
    """A loader that is nothing of torch's."""

    def __init__(self, batches):
        self.batches = (batch for batch in batches)

    def __iter__(self):
        return self.batches


@pytest.mark.parametrize(
    "make",
    [
        lambda data: DataLoader(OnePass(data), 60),
        lambda data: DataLoader(ChainDataset([Stream(data), OnePass(data)]), 60),
        lambda data: Plain(DataLoader(data, 60)),
        lambda data: DataLoader((item for item in data), 60),
        lambda data: (batch for batch in DataLoader(data, 60)),
    ],
)
@pytest.mark.parametrize("whose", ["training", "calibration"])
def test_a_loader_of_one_pass_is_refused_before_training(blobs, make, whose):
    guard, data = new_guard(), Subset(blobs.dataset, range(120))
    before = weights(guard)
    loaders = {"training": list(blobs), "calibration": list(blobs), whose: make(data)}
    with pytest.raises(
        ConfigurationError, match=f"expected a {whose} loader that .* repeatedly.*one pass only.*new iter"
    ):
        fit(guard, *loaders.values())
    assert torch.equal(weights(guard), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_begins_anew_in_every_pass_is_not_taken_for_one_of_one_pass(blobs, workers):
    data = Subset(blobs.dataset, range(120))
    stream = (OnePass if workers else Restarting)(list(data))  # workers have copies, a new one for each pass
    plain, streamed = new_guard(), new_guard()
    fit(plain, DataLoader(data, 60), list(blobs), epochs=2)
    fit(streamed, DataLoader(stream, 60, num_workers=workers), list(blobs), epochs=2)
    assert torch.equal(weights(plain), weights(streamed))


def test_a_loader_that_is_empty_from_its_second_pass_on_is_told_to_begin_anew(blobs):
    class Hidden(OnePass):
        def __iter__(self):
            return (item for item in self.items)

    with pytest.raises(InputError, match=r"none of its images in epoch 2; let its __iter__ begin anew"):
        fit(new_guard(), DataLoader(Hidden(blobs.dataset), 300), list(blobs), epochs=2)
    with pytest.raises(InputError, match=r"an empty pass; let its __iter__ begin anew"):
        fit(new_guard(), list(blobs), DataLoader(Hidden(blobs.dataset), 300), epochs=2, refresh_every=1)


def test_looking_for_loaders_of_one_pass_leaves_no_trace(blobs, monkeypatch):
    class Shuffled:
        def __iter__(self):
            return iter([batches[index] for index in torch.randperm(len(batches))])

    batches, looked, unlooked = list(blobs), new_guard(), new_guard()
    torch.manual_seed(5)
    fit(looked, Shuffled(), batches)
    monkeypatch.setattr("clusterguard.training._preparing.check_passes", lambda *_: None)
    torch.manual_seed(5)
    fit(unlooked, Shuffled(), batches)
    assert torch.equal(weights(looked), weights(unlooked))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda images, labels: ((images * 255).byte(), labels), InputError),
        (lambda images, labels: (images * 255, labels), InputError),
        (lambda images, labels: (images[..., :4], labels), InputError),
        (lambda images, labels: (images[:8], labels[:8]), TooFewCalibrationExamplesError),
    ],
)
def test_a_calibration_loader_that_will_not_do_is_refused_before_training(blobs, change, error):
    guard = new_guard()
    before = weights(guard)
    with pytest.raises(error):
        fit(guard, blobs, [change(*next(iter(held_out(blobs))))], calibrate=True)
    assert torch.equal(weights(guard), before)


def test_labels_of_any_integer_type_will_do(blobs):
    plain, small = new_guard(), new_guard()
    fit(plain, list(blobs))
    fit(small, [(images, labels.to(torch.int8)) for images, labels in blobs])
    assert torch.equal(weights(plain), weights(small))


@pytest.mark.parametrize(
    "make",
    [
        lambda eps: PGD(eps=eps, step_size=1.0),
        lambda eps: APGD(eps=eps),
        lambda eps: Boundary(norm="linf", eps=eps),
        lambda eps: WorstCaseSuite("linf", eps=eps),
    ],
)
def test_a_radius_of_8_bit_pixels_is_refused_at_once(make):
    with pytest.raises(ConfigurationError, match=re.escape("8 / 255")):
        make(8)
    make(1.0)
    make(8 / 255)


@pytest.mark.parametrize(("norm", "largest"), [("l2", 8.0), ("l1", 64.0), ("l0", 64)])
def test_a_radius_that_covers_the_box_is_refused_by_whoever_sees_the_images_first(small_guard, blobs, norm, largest):
    images, labels = next(iter(blobs))
    attack = APGD(norm=norm, eps=largest + 1, steps=2)
    calls = (
        lambda: attack(small_guard, images, labels),
        lambda: evaluate(small_guard, attack, [(images, labels)]),
        lambda: fit(new_guard(), [(images, labels)], attack=attack, warmup_epochs=1),
    )
    for call in calls:
        with pytest.raises(ConfigurationError, match=re.escape("8 / 255")):
            call()
    APGD(norm=norm, eps=largest, steps=1)(small_guard, images, labels)
    with pytest.raises(ConfigurationError, match=re.escape("8 / 255")):
        WorstCaseSuite(norm, eps=largest + 1, references=(images, labels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibrator": 0.01}, "expected calibrator to be a Calibrator, such as .* got 0.01"),
        ({"options": {"accumulate": 2}}, "expected options to be TrainingOptions"),
        ({"attack": PGD}, r"such as PGD\(eps=0.1\), got PGD"),
        ({"generator": 42}, "expected generator to be a torch.Generator"),
        ({"unpack": 3}, "expected unpack to be a function of a batch, got 3"),
    ],
)
def test_options_of_another_kind_are_named(blobs, options, message):
    fit_options = {name: options[name] for name in ("generator", "unpack") if name in options}
    made = {"attack": ATTACK, **{name: value for name, value in options.items() if name not in fit_options}}
    with pytest.raises(ConfigurationError, match=message):
        AdversarialClusterTrainer(new_guard(), **made).fit(blobs, held_out(blobs), epochs=1, **fit_options)


def test_sparse_images_are_named(blobs):
    images, labels = blobs.dataset[:20]
    with pytest.raises((ConfigurationError, InputError), match="images"):
        fit(new_guard(), [(images.to_sparse(), labels)], [(images, labels)], calibrate=True)


def test_autocast_around_a_training_does_not_change_its_precision(blobs):
    plain, around = new_guard(), new_guard()
    fit(plain, blobs)
    with torch.autocast("cpu", torch.bfloat16):
        fit(around, blobs)
    assert torch.equal(weights(plain), weights(around))
