"""Batches in the forms that people have."""

import contextlib

import pytest
import torch
from clusterguard import FGSM, Calibrator, certified_success_rate, evaluate
from clusterguard.detection import judge, unpack_batch
from clusterguard.detection._internal import have_common_images, number_of_batches, set_epoch
from clusterguard.errors import InputError
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    random_split,
)

IMAGES, LABELS = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    "batch",
    [
        (IMAGES, LABELS),
        [IMAGES, LABELS],
        (IMAGES, LABELS, ["a", "b", "c", "d"]),
        (IMAGES, LABELS, torch.rand(4), {"path": "x"}),
        {"image": IMAGES, "label": LABELS, "index": torch.arange(4)},
        {"pixel_values": IMAGES, "labels": LABELS},
        {"img": IMAGES, "target": LABELS},
    ],
)
def test_usual_batches_are_read_as_images_and_labels(batch):
    images, labels = unpack_batch(batch)
    assert images is IMAGES
    assert labels is LABELS


@pytest.mark.parametrize(
    "batch",
    [
        IMAGES,
        (IMAGES,),
        (IMAGES, LABELS, torch.arange(4)),  # either could be the labels
        (torch.arange(4), IMAGES, LABELS),
        (IMAGES, IMAGES, LABELS),
        {"image": IMAGES},
        {"image": IMAGES, "pixel_values": IMAGES, "label": LABELS},
        {"image": IMAGES, "fine_label": LABELS, "coarse_label": LABELS},
        "batch",
        None,
    ],
)
def test_a_batch_that_can_be_read_in_two_ways_or_none_asks_for_unpack(batch):
    with pytest.raises(InputError, match="pass unpack="):
        unpack_batch(batch)


@given(st.permutations(["images", "labels", "index", "path"]))
def test_unpack_reads_any_order(order):
    parts = {"images": IMAGES, "labels": LABELS, "index": torch.arange(4), "path": list("abcd")}
    batch = tuple(parts[name] for name in order)
    images, labels = unpack_batch(batch, lambda fields: (fields[order.index("images")], fields[order.index("labels")]))
    assert images is IMAGES
    assert labels is LABELS


def test_unpack_must_return_a_pair():
    with pytest.raises(InputError, match="expected unpack to return a pair"):
        unpack_batch((IMAGES, LABELS), lambda batch: batch[0])


def test_every_function_of_a_loader_takes_unpack_and_gives_the_same(small_guard):
    labels = small_guard.detect(IMAGES).labels
    pairs, other = [(IMAGES, labels)], [(torch.arange(4), IMAGES, labels)]
    unpack = {"unpack": lambda batch: batch[1:]}
    small_guard.thresholds = torch.full((3,), 50.0)
    attack = FGSM(eps=0.1)
    for function in (
        lambda loader, **options: judge(small_guard, loader, **options).detection.distances.tolist(),
        lambda loader, **options: (
            evaluate(small_guard, attack, loader, calibration_loader=loader, sanity_images=0, **options).accuracy
        ),
        lambda loader, **options: certified_success_rate(small_guard, loader, eps=0.01, **options),
        lambda loader, **options: Calibrator(0.5, scarce="pool").fit(small_guard, loader, **options).thresholds,
    ):
        with pytest.warns() if "Calibrator" in function.__code__.co_names else contextlib.nullcontext():
            assert function(other, **unpack) == function(pairs)
        with pytest.raises(InputError, match="unpack"):
            function(other)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(IMAGES, LABELS, strict=True))


def test_a_stream_has_no_number_of_batches():
    assert number_of_batches(DataLoader(Stream(), 2)) is None
    assert number_of_batches(DataLoader(TensorDataset(IMAGES, LABELS), 3)) == 2


def test_samplers_are_told_the_epoch():
    data = TensorDataset(IMAGES, LABELS)
    sampler = DistributedSampler(data, num_replicas=1, rank=0)
    set_epoch(DataLoader(data, sampler=sampler), 3)
    assert sampler.epoch == 3
    set_epoch([(IMAGES, LABELS)], 3)  # nothing to tell


DATA = TensorDataset(IMAGES, LABELS)
HALVES = random_split(DATA, [2, 2])


OTHER = [(torch.rand(1, 8, 8), 0), (torch.rand(1, 8, 8), 1)]  # a list will do as a data set


def joined(*parts):
    """Some images of each of two data sets."""
    return DataLoader(ConcatDataset([Subset(data, part) for data, part in zip((DATA, OTHER), parts, strict=True)]))


def drawing(indices):
    return DataLoader(DATA, sampler=SubsetRandomSampler(indices))


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        (DataLoader(DATA), DataLoader(DATA, shuffle=True), True),
        (DataLoader(DATA), DataLoader(TensorDataset(IMAGES, LABELS)), True),
        (DataLoader(HALVES[0]), DataLoader(HALVES[1]), False),
        (DataLoader(HALVES[0]), DataLoader(DATA), True),
        (DataLoader(Subset(Subset(DATA, [0, 1, 2]), [0, 1])), DataLoader(Subset(DATA, [1, 3])), True),
        (DataLoader(Subset(Subset(DATA, [0, 1, 2]), [0, 1])), DataLoader(Subset(DATA, [2, 3])), False),
        (
            DataLoader(DATA, sampler=SubsetRandomSampler([0, 1])),
            DataLoader(DATA, sampler=SubsetRandomSampler([2])),
            False,
        ),
        (
            DataLoader(DATA, sampler=SubsetRandomSampler([0, 1])),
            DataLoader(DATA, sampler=SubsetRandomSampler([1])),
            True,
        ),
        (
            DataLoader(DATA, batch_sampler=BatchSampler(SubsetRandomSampler([0]), 1, drop_last=False)),
            drawing([1]),
            False,
        ),
        (DataLoader(DATA, batch_sampler=[[0], [1]]), DataLoader(DATA, batch_sampler=[[2]]), False),  # cannot be told
        (DataLoader(DATA, sampler=RandomSampler(DATA)), DataLoader(HALVES[0]), True),
        (DataLoader(DATA), [(IMAGES, LABELS)], True),
        (DataLoader(DATA), [(IMAGES.clone(), LABELS)], False),
        (DataLoader(TensorDataset(IMAGES[:2], LABELS[:2])), DataLoader(TensorDataset(IMAGES[1:], LABELS[1:])), True),
        (DataLoader(TensorDataset(IMAGES[:2], LABELS[:2])), DataLoader(TensorDataset(IMAGES[2:], LABELS[2:])), False),
        (DataLoader(ConcatDataset(HALVES)), DataLoader(DATA), True),
        (joined([0, 1], [0]), joined([1], [1]), True),
        (joined([0, 1], [0]), joined([2, 3], [0]), True),  # of the second data set
        (joined([0, 1], [0]), joined([2, 3], [1]), False),
        (joined([0, 1], [0]), DataLoader(Subset(DATA, [3])), False),
        (joined([0, 3], [0]), DataLoader(Subset(DATA, [3])), True),
    ],
)
def test_shared_images_are_noticed_where_they_are_certain(first, second, shared):
    assert have_common_images(first, second) == have_common_images(second, first) == shared
    assert have_common_images(first, first)


def test_lists_share_images_if_they_share_a_batch():
    batches = [(IMAGES, LABELS), (IMAGES.clone(), LABELS)]
    assert have_common_images(batches, batches[1:])
    assert not have_common_images(batches[:1], batches[1:])  # labels are often the same


@pytest.mark.parametrize(
    ("batch", "shared"),
    [
        ((IMAGES, LABELS.clone()), True),
        ({"image": IMAGES, "label": LABELS.clone()}, True),
        ((IMAGES[2:], LABELS[2:]), True),  # a part of the same memory
        ((IMAGES.clone(), LABELS), False),
        ((LABELS, LABELS, IMAGES), False),  # it cannot be told which are the images
        (None, False),
    ],
)
def test_lists_share_images_if_batches_of_theirs_share_the_images_memory(batch, shared):
    assert have_common_images([(IMAGES, LABELS)], [batch]) == shared


def test_other_objects_that_read_the_same_files_are_noticed(tmp_path):
    class Files(Dataset):
        def __init__(self, count):
            self.samples = [(str(tmp_path / f"{index}.png"), 0) for index in range(count)]

        def __len__(self):
            return len(self.samples)

    class Downloaded(Dataset):
        def __init__(self, train):
            self.root, self.train = tmp_path, train

        def __len__(self):
            return 5

    assert have_common_images(DataLoader(Files(6)), DataLoader(Subset(Files(9), [1, 8])))
    assert not have_common_images(DataLoader(Files(6)), DataLoader(Subset(Files(9), [6, 8])))
    assert have_common_images(DataLoader(Downloaded(True)), DataLoader(Downloaded(True)))
    assert not have_common_images(DataLoader(Downloaded(True)), DataLoader(Downloaded(False)))
