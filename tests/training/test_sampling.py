"""Classes drawn equally often, transforms on the device, and groups of parameters."""

from functools import partial

import numpy as np
import pytest
import torch
from clusterguard import AdversarialClusterTrainer, TrainingOptions
from clusterguard.errors import ConfigurationError, InputError, TrainingStoppedError
from clusterguard.training import EachImage, balanced_sampler, crop_and_flip
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torchvision.transforms import v2
from trainings import ATTACK, held_out, new_guard, weights

LABELS = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)


class WithTargets(Dataset):
    targets = LABELS.tolist()

    def __len__(self):
        return len(self.targets)


@pytest.mark.parametrize(
    "data",
    [
        LABELS,
        LABELS.tolist(),
        LABELS.numpy(),
        WithTargets(),
        TensorDataset(torch.zeros(1000, 1), LABELS),
        Subset(ConcatDataset([WithTargets(), WithTargets()]), range(1000)),
    ],
    ids=lambda data: type(data).__name__,
)
def test_classes_are_drawn_equally_often(data):
    sampler = balanced_sampler(data, generator=torch.Generator().manual_seed(0))
    assert len(sampler) == 1000
    counts = torch.bincount(LABELS[list(sampler)], minlength=3)
    assert ((counts - 333).abs() < 60).all()


def test_data_without_labels_is_refused():
    with pytest.raises(InputError, match="expected labels, or a data set with targets, got object"):
        balanced_sampler(object())
    with pytest.raises(InputError, match="at least one image"):
        balanced_sampler([])
    for labels in ([-1, 0], ["cat", "dog"], np.array(["cat", "dog"]), [0.5, 1.5], [[0, 1], [1, 0]]):
        with pytest.raises(InputError, match="expected whole numbers"):
            balanced_sampler(labels)


def run(blobs, augment, file=None, stop_at=None, loader=None):
    torch.manual_seed(0)
    guard = new_guard()
    options = TrainingOptions(augment=augment)
    trainer = AdversarialClusterTrainer(guard, ATTACK, options=options)
    trainer.fit(
        loader or DataLoader(Subset(blobs.dataset, range(120)), 30, sampler=None),
        held_out(blobs),
        epochs=2,
        calibrate=False,
        progress=False,
        checkpoint=file,
        stop_when=None if stop_at is None else lambda: trainer.engine.steps == stop_at,
    )
    return weights(guard)


@pytest.mark.filterwarnings("ignore:.*Make sure that it is the same one. options.augment.seen was")
@pytest.mark.parametrize(
    "transform",
    [
        EachImage(v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(8, padding=1)])),
        partial(crop_and_flip, padding=1),
    ],
    ids=["each image", "vectorised"],
)
def test_transforms_run_before_the_attack_and_resume_bit_identically(blobs, tmp_path, transform):
    seen = []

    def augment(images):
        seen.append(images.shape)
        return transform(images)

    through = run(blobs, augment)
    assert seen == [(30, 1, 8, 8)] * 8
    assert not torch.equal(through, run(blobs, None))
    with pytest.raises(TrainingStoppedError):
        run(blobs, augment, tmp_path / "run.pt", stop_at=3)
    assert torch.equal(run(blobs, augment, tmp_path / "run.pt"), through)


def test_images_of_8_bits_are_converted_on_the_device(blobs):
    images, labels = (part[:120] for part in blobs.dataset.tensors)
    grey = (images * 255).round().to(torch.uint8)
    convert = v2.ToDtype(torch.float32, scale=True)
    as_floats = run(blobs, None, loader=DataLoader(TensorDataset(convert(grey), labels), 30))
    assert torch.equal(run(blobs, convert, loader=DataLoader(TensorDataset(grey, labels), 30)), as_floats)


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 100))
def test_a_crop_is_a_window_of_the_padded_image_perhaps_flipped(count, channels, seed):
    images = torch.rand(count, channels, 5, 7)
    cropped = crop_and_flip(images, generator=torch.Generator().manual_seed(seed), padding=2)
    padded = np.pad(images.numpy(), [(0, 0), (0, 0), (2, 2), (2, 2)])
    for picture, piece in zip(padded, cropped.numpy(), strict=True):
        windows = [picture[:, top : top + 5, left : left + 7] for top in range(5) for left in range(5)]
        assert any(np.array_equal(piece, w) or np.array_equal(piece, w[:, :, ::-1]) for w in windows)


def test_crops_differ_between_images_and_flip_half_of_them():
    images = torch.arange(5 * 7.0).view(1, 1, 5, 7).repeat(400, 1, 1, 1) + 1
    cropped = crop_and_flip(images, generator=torch.Generator().manual_seed(0), padding=1)
    assert len(cropped.unique(dim=0)) == 9 * 2
    whole = cropped[(cropped > 0).flatten(1).all(dim=1)]
    assert 0.3 < (whole[:, 0, 0, 0] > whole[:, 0, 0, 1]).double().mean() < 0.7


def test_each_image_draws_for_itself():
    images = torch.rand(64, 1, 4, 4)
    flipped = [EachImage(v2.RandomHorizontalFlip())(images), v2.RandomHorizontalFlip()(images)]
    kept = [(changed == images).flatten(1).all(dim=1).float().mean() for changed in flipped]
    assert 0.2 < kept[0] < 0.8
    assert kept[1] in (0, 1)


@pytest.mark.parametrize(
    ("augment", "error", "message"),
    [
        (lambda images: images[:2], ConfigurationError, "expected augment to return 30 images"),
        (lambda images: None, ConfigurationError, "got NoneType"),
        (v2.Normalize([0.5], [0.25]), InputError, "do not normalise them yourself"),
    ],
)
def test_wrong_transforms_are_refused(blobs, augment, error, message):
    with pytest.raises(error, match=message):
        run(blobs, augment)


def test_what_is_no_function_is_refused():
    for make in (
        lambda: TrainingOptions(augment=3),
        lambda: EachImage(None),
        lambda: crop_and_flip(torch.rand(1, 1, 4, 4), padding=-1),
    ):
        with pytest.raises(ConfigurationError, match="expected"):
            make()


def test_groups_of_parameters_have_rates_of_their_own(blobs):
    guard = new_guard()
    before = {name: weight.clone() for name, weight in guard.named_parameters()}
    *backbone, last = guard.encoder
    groups = [
        {"params": [weight for part in backbone for weight in part.parameters()], "lr": 1e-6},
        {"params": last.parameters(), "lr": 1e-2},
    ]
    trainer = AdversarialClusterTrainer(
        guard,
        ATTACK,
        optimizer=torch.optim.SGD(groups),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
    )
    loader = DataLoader(Subset(blobs.dataset, range(60)), 60)
    trainer.fit(loader, held_out(blobs), epochs=1, calibrate=False, progress=False)
    moved = {name: (weight - before[name]).abs().max().item() for name, weight in guard.named_parameters()}
    assert max(moved[name] for name in moved if not name.startswith("encoder.1")) < 1e-3 * moved["encoder.1.weight"]
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [5e-7, 5e-3]
