"""Training that goes on from a checkpoint, with the loaders that people have."""

import io
import random
import secrets
import warnings
from collections import deque
from itertools import count
from types import ModuleType

import numpy as np
import pytest
import torch
from clusterguard import AdversarialClusterTrainer
from clusterguard.errors import PersistenceError
from clusterguard.training._loader_state import LoaderState
from clusterguard.training._replay import Replay
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from trainings import ATTACK, new_guard, weights

LABELS = torch.arange(60) % 3
DATA = TensorDataset(torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(3)), LABELS)
GLOBAL = np.random.default_rng(0)


def seeded():
    return torch.Generator().manual_seed(7)


class Noisy(Dataset):
    """The data, with noise from any generator."""

    def __init__(self, draw, **held):
        self.draw = draw
        self.__dict__ |= held

    def __len__(self):
        return 60

    def __getitem__(self, index):
        image, label = DATA[index]
        return (0.8 * image + 0.2 * self.draw(self)).clamp(0, 1).float(), label


class DrawsFromItsModule(Dataset):
    def __len__(self):
        return 60

    def __getitem__(self, index):
        image, label = DATA[index]
        return (image * noise()).float(), label


def noise():
    return GLOBAL.random()


class Slotted:
    __slots__ = ("generator",)

    def __init__(self):
        self.generator = random.Random(4)


class CountsItsPasses(Sampler):
    def __init__(self):
        self.passes = 0

    def __len__(self):
        return 60

    def __iter__(self):
        self.passes += 1
        return iter(torch.randperm(60, generator=torch.Generator().manual_seed(self.passes)).tolist())


class ShufflesInPlace(Sampler):
    def __init__(self, order):
        self.order = order

    def __len__(self):
        return 60

    def __iter__(self):
        if isinstance(self.order, torch.Tensor):
            self.order[:] = self.order[torch.randperm(60)]
        else:
            np.random.shuffle(self.order)  # noqa: NPY002  # as people do
        return iter([int(index) for index in self.order])


class Stream(IterableDataset):
    def __init__(self):
        self.generator = seeded()

    def __iter__(self):
        return (DATA[index] for index in torch.randperm(60, generator=self.generator).tolist())


def noisy(draw, **held):
    return Noisy(draw, **held)


LOADERS = {
    "random sampler": lambda: DataLoader(DATA, 10, sampler=RandomSampler(DATA, generator=seeded())),
    "weighted sampler": lambda: DataLoader(
        DATA, 10, sampler=WeightedRandomSampler([1.0, 2.0, 3.0] * 20, 60, generator=seeded())
    ),
    "subset sampler": lambda: DataLoader(DATA, 10, sampler=SubsetRandomSampler(range(50), generator=seeded())),
    "batch sampler": lambda: DataLoader(
        DATA, batch_sampler=BatchSampler(RandomSampler(DATA, generator=seeded()), 10, drop_last=False)
    ),
    "sampler that counts": lambda: DataLoader(DATA, 10, sampler=CountsItsPasses()),
    "sampler of a list": lambda: DataLoader(DATA, 10, sampler=ShufflesInPlace(list(range(60)))),
    "sampler of an array": lambda: DataLoader(DATA, 10, sampler=ShufflesInPlace(np.arange(60))),
    "sampler of a tensor": lambda: DataLoader(DATA, 10, sampler=ShufflesInPlace(torch.arange(60))),
    "torch's in data": lambda: DataLoader(
        noisy(lambda data: torch.rand(1, generator=data.generator), generator=seeded()), 10
    ),
    "numpy's in data": lambda: DataLoader(noisy(lambda data: data.rng.random(), rng=np.random.default_rng(5)), 10),
    "numpy's old in data": lambda: DataLoader(noisy(lambda data: data.rng.rand(), rng=np.random.RandomState(5)), 10),
    "numpy's other bits in data": lambda: DataLoader(
        noisy(lambda data: data.rng.random(), rng=np.random.Generator(np.random.Philox(5))), 10
    ),
    "python's in nested data": lambda: DataLoader(
        ConcatDataset(
            [
                Subset(noisy(lambda data: data.rng.random(), rng=random.Random(5)), range(30)),
                Subset(DATA, range(30, 60)),
            ]
        ),
        10,
        shuffle=True,
    ),
    "a closure's": lambda: DataLoader(
        (lambda generator: noisy(lambda _: torch.rand(1, generator=generator)))(seeded()), 10
    ),
    "a slot's": lambda: DataLoader(noisy(lambda data: data.inner.generator.random(), inner=Slotted()), 10),
    "a module's": lambda: DataLoader(DrawsFromItsModule(), 10),
    "stream": lambda: DataLoader(Stream(), 10),
    "workers, generator in data": lambda: DataLoader(
        noisy(lambda data: torch.rand(1, generator=data.generator), generator=seeded()), 10, num_workers=1
    ),
    "persistent workers": lambda: DataLoader(
        noisy(lambda data: torch.rand(1)), 10, shuffle=True, num_workers=1, persistent_workers=True
    ),
}


def train(make, file, *, epochs, seed, until=None):
    """A training as in a new process: all that is random begins anew."""
    global GLOBAL
    GLOBAL = np.random.default_rng(0)
    trainer = AdversarialClusterTrainer(new_guard(), ATTACK, warmup_epochs=9)
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    if until is not None:
        after_step = trainer.after_step

        def interrupt(batches):
            after_step(batches)
            if trainer.engine.steps == until:
                raise KeyboardInterrupt

        trainer.after_step = interrupt
    fit = {"epochs": epochs, "checkpoint": file, "checkpoint_every": 2, "calibrate": False, "progress": False}
    if until is None:
        trainer.fit(make(), [DATA[:10]], **fit)
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(make(), [DATA[:10]], **fit)
    return weights(trainer.guard)


@pytest.mark.parametrize("name", LOADERS)
def test_a_resumed_training_is_bit_by_bit_the_uninterrupted_one(name, tmp_path):
    make = LOADERS[name]
    whole = train(make, tmp_path / "whole.pt", epochs=3, seed=1)
    train(make, tmp_path / "run.pt", epochs=3, seed=1, until=9)  # within the second epoch
    assert torch.equal(train(make, tmp_path / "run.pt", epochs=3, seed=99), whole)
    train(make, tmp_path / "epochs.pt", epochs=1, seed=1)
    assert torch.equal(train(make, tmp_path / "epochs.pt", epochs=3, seed=99), whole)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: DataLoader(noisy(lambda data: data.rng.random(), rng=random.SystemRandom()), 10),
            "operating system",
        ),
        (lambda: DataLoader(noisy(lambda data: next(data.places) % 2, places=count()), 10), "is an iterator"),
        (lambda: DataLoader(DATA, 10, num_workers=1, in_order=False), "in_order=False"),
    ],
)
def test_what_cannot_be_resumed_is_said_before_training_that_has_a_checkpoint(make, reason, tmp_path):
    trainer = AdversarialClusterTrainer(new_guard(), ATTACK, warmup_epochs=1)
    fit = {"epochs": 1, "calibrate": False, "progress": False}
    with pytest.warns(UserWarning, match=rf"not be the same as without the interruption, because .*{reason}"):
        trainer.fit(make(), [DATA[:10]], checkpoint=tmp_path / "run.pt", **fit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdversarialClusterTrainer(new_guard(), ATTACK, warmup_epochs=1).fit(make(), [DATA[:10]], **fit)


class Carrying(Dataset):
    """Numbers, with one added that changes from item to item in some way; class attributes may be given."""

    def __init__(self, change, **held):
        self.change = change
        self.__dict__ |= held

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.tensor([index + float(self.change(self))])


def carrying(change, *, of_class=None, **held):
    return DataLoader(type("Own", (Carrying,), of_class or {})(change, **held), 2)


def add_to_itself(data):
    data.count += 1
    return data.count


def add_to_its_class(data):
    type(data).count += 1
    return data.count


def add_to_first(data):
    data.count[0] += 1
    return data.count[0]


def make_if_none(data):
    data.rng = data.rng or np.random.default_rng(5)
    return data.rng.random()


def make_if_absent(make):
    def change(data):
        if not hasattr(data, "rng"):
            data.rng = make()
        return data.rng.random() if isinstance(data.rng, random.Random) else torch.rand(1, generator=data.rng)

    return change


helpers = ModuleType("helpers")
exec("def noise():\n    return RNG.random()", vars(helpers))


def draw_from_a_module(data):
    return helpers.RNG.random()


def call_a_module(data):
    return helpers.noise()


def turn(data):
    data.order.rotate(1)
    data.order = type(data.order)(data.order)
    return data.order[0]


class LazyStream(IterableDataset):
    def __iter__(self):
        if not hasattr(self, "rng"):
            self.rng = random.Random(8)
        return (torch.tensor([self.rng.random()]) for _ in range(6))


class Ordered(Sampler):
    """A sampler that moves an order, or an epoch, of any type."""

    def __init__(self, **held):
        self.__dict__ |= held

    def __iter__(self):
        if hasattr(self, "order"):
            order = list(self.order)
            self.order = type(self.order)(order[1:] + order[:1])
            return iter(list(self.order))
        self.state["epoch"] += 1
        return iter(torch.randperm(6, generator=torch.Generator().manual_seed(self.state["epoch"])).tolist())

    def __len__(self):
        return 6


def ordered(**held):
    return DataLoader(torch.arange(6.0)[:, None], 2, sampler=Ordered(**held))


CARRIED = {
    "made if none": lambda: carrying(make_if_none, rng=None),
    "python's made if absent": lambda: carrying(make_if_absent(lambda: random.Random(3))),
    "torch's made if absent": lambda: carrying(make_if_absent(seeded)),
    "made by a stream": lambda: DataLoader(LazyStream(), 2),
    "class": lambda: carrying(add_to_itself, of_class={"count": 0}),
    "class itself": lambda: carrying(add_to_its_class, of_class={"count": 0}),
    "list of the class": lambda: carrying(add_to_first, of_class={"count": [0]}),
    "another module's": lambda: carrying(draw_from_a_module),
    "another module's function": lambda: carrying(call_a_module),
    "many": lambda: carrying(lambda data: data.rngs[299].random(), rngs=[random.Random(index) for index in range(300)]),
    "many by name": lambda: carrying(
        lambda data: data.rngs["299"].random(), rngs={str(index): random.Random(index) for index in range(300)}
    ),
    "list": lambda: carrying(add_to_first, count=[0, "name"]),
    "dict": lambda: carrying(add_to_first, count={0: 0, "deeper": [(1, 2)]}),
    "tensor": lambda: carrying(add_to_first, count=torch.zeros(2)),
    "array": lambda: carrying(add_to_first, count=np.zeros(2)),
    "number of numpy's": lambda: carrying(add_to_itself, count=np.int64(0)),
    "deque": lambda: carrying(turn, order=deque(range(7), maxlen=9)),
    "slot": lambda: carrying(lambda data: add_to_itself(data.inner), inner=SlottedCount()),
    "order in a tuple": lambda: ordered(order=tuple(range(6))),
    "order in a deque": lambda: ordered(order=deque(range(6))),
    "epoch in a dict": lambda: ordered(state={"epoch": 0}),
}


class SlottedCount:
    __slots__ = "count"

    def __init__(self):
        self.count = 0


def anew(make):
    """A replay as in a new process."""
    helpers.RNG = np.random.default_rng(6)
    return Replay(make(), torch.device("cpu"))


@pytest.mark.parametrize("taken", [3, 8])
@pytest.mark.parametrize("name", CARRIED)
def test_what_a_loader_carries_comes_back_in_a_new_process(name, taken):
    replay = anew(CARRIED[name])
    assert replay.is_repeatable()
    for _ in range(taken + taken // 3):  # a pass has 3 batches, and then it ends
        next(replay, None)
    state, file = replay.state_dict(), io.BytesIO()
    torch.save(state["start"].pop("loader"), file)
    file.seek(0)
    expected = [batch.tolist() for _ in range(3) for batch in replay]
    resumed = anew(CARRIED[name])
    assert resumed.is_repeatable()
    resumed.load_state_dict({**state, "start": {**state["start"], "loader": torch.load(file, weights_only=True)}})
    assert [batch.tolist() for _ in range(3) for batch in resumed] == expected


@pytest.mark.parametrize("name", CARRIED)
def test_what_is_drawn_undisturbed_leaves_no_trace_in_what_a_loader_carries(name):
    plain, disturbed = anew(CARRIED[name]), None
    expected = [batch.tolist() for _ in range(2) for batch in plain]
    disturbed = anew(CARRIED[name])
    with disturbed.undisturbed():
        list(disturbed.loader)
    assert [batch.tolist() for _ in range(2) for batch in disturbed] == expected


def counts_where_nobody_looks():
    count = 0

    def change(data):
        nonlocal count
        count += 1
        return count

    return carrying(change)


@pytest.mark.parametrize(
    "make",
    [
        counts_where_nobody_looks,
        lambda: carrying(lambda data: torch.rand(1, generator=torch.Generator().manual_seed(secrets.randbits(40)))),
    ],
)
def test_a_loader_that_differs_from_itself_is_noticed_before_and_after_an_interruption(make):
    replay = anew(make)
    assert not replay.is_repeatable()
    next(replay)
    with pytest.warns(UserWarning, match="gives other batches than before: its images have changed, or it has"):
        anew(make).load_state_dict(replay.state_dict())


def test_a_loader_whose_first_batch_does_not_come_again_is_warned_of_once_before_training(tmp_path):
    drawn = 0

    def draw(_):
        nonlocal drawn
        drawn += 1
        return drawn % 7 / 7

    trainer = AdversarialClusterTrainer(new_guard(), ATTACK, warmup_epochs=1)
    with pytest.warns(UserWarning, match="because the training loader, begun again .* gives other batches") as warned:
        trainer.fit(
            DataLoader(noisy(draw), 10),
            [DATA[:10]],
            epochs=1,
            checkpoint=tmp_path / "run.pt",
            calibrate=False,
            progress=False,
        )
    assert len(warned) == 1


def test_changed_images_are_noticed_when_the_training_goes_on():
    replay = Replay([(DATA[:10])], torch.device("cpu"))
    next(replay)
    state = replay.state_dict()
    Replay([(DATA[:10])], torch.device("cpu")).load_state_dict(state)  # the same: no warning
    with pytest.warns(UserWarning, match="its images have changed"):
        Replay([(DATA[10:20])], torch.device("cpu")).load_state_dict(state)


def test_what_only_shares_its_name_with_an_attribute_is_left_alone():
    script = ModuleType("script")
    exec("def change(own):\n    return own.stats", vars(script))
    script.stats = SlottedCount()
    loader = carrying(script.change, stats=0)
    state = LoaderState(loader)
    before = state.get()
    script.stats.count += 1
    state.set(before)
    assert script.stats.count == 1


@pytest.mark.parametrize("batch", [torch.eye(2).to_sparse(), torch.ones(2, device="meta"), [], None, torch.ones(0)])
def test_batches_of_any_kind_can_be_replayed(batch):
    replay = Replay([batch], torch.device("cpu"))
    assert replay.is_repeatable()
    next(replay)
    Replay([[1, 2]], torch.device("cpu")).load_state_dict({**replay.state_dict(), "digest": 0})


def test_another_loaders_generators_are_refused():
    state = Replay(LOADERS["random sampler"](), torch.device("cpu")).state_dict()
    with pytest.raises(PersistenceError, match="generators that it had when it was interrupted"):
        Replay(DataLoader(DATA, 10), torch.device("cpu")).load_state_dict(state)


def test_what_a_loader_was_made_with_is_not_brought_back():
    class Folder(Dataset):
        def __init__(self, root):
            self.root, self.passes = root, 0

    old, new = Folder("old"), Folder("new")
    state = LoaderState(old)
    old.passes = 3
    LoaderState(new).set(state.changed(state.get()))
    assert (new.root, new.passes) == ("new", 3)


def test_the_search_ends_in_a_loop_and_in_a_large_data_set():
    class Node:
        pass

    first, second = Node(), Node()
    first.next, second.next, first.names = second, first, [(str(index), index) for index in range(1_000_000)]
    first.boxes = [{"name": str(index), "box": [index, index]} for index in range(10_000)]
    second.generator = seeded()
    assert list(LoaderState(first).get()["generators"]) == ["loader.next.generator"]


def test_calibration_leaves_no_trace_in_what_is_drawn_afterwards(blobs):
    def fit(*parts, calibrate):
        guard = new_guard()
        trainer = AdversarialClusterTrainer(guard, ATTACK, warmup_epochs=9)
        torch.manual_seed(1)
        train, calibration = DataLoader(DATA, 10, shuffle=True), DataLoader(blobs.dataset, 60, shuffle=True)
        for epochs in parts:
            trainer.fit(train, calibration, epochs=epochs, calibrate=calibrate, progress=False)
        return weights(guard)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # too few are classified correctly, perhaps
        assert torch.equal(fit(1, 2, 3, calibrate=True), fit(3, calibrate=False))
