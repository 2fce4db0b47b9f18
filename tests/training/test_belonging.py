"""A checkpoint belongs to the run that wrote it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from clusterguard import (
    FGSM,
    PGD,
    AdversarialClusterTrainer,
    Calibrator,
    CertifiedTrainer,
    ClusterGuard,
    TrainingOptions,
)
from clusterguard._support import read_progress, save_progress
from clusterguard.attacks import MixedAttack
from clusterguard.detectors import ConfidenceDetector
from clusterguard.errors import PersistenceError
from clusterguard.training import ClusterLoss, DetectorTrainer, Graded, Original, Outside, TrainingStep
from clusterguard.training._contents import describe_contents
from clusterguard.training._descriptions import describe
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from trainings import ATTACK, new_guard

DATA = TensorDataset(torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(12) % 3)
LOADER = DataLoader(DATA, 6)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def fit(file, *, epochs=1, train=LOADER, calibration=LOADER, generator=None, guard=new_guard, **options):
    options = {"attack": ATTACK, "optimizer": partial(Adam, lr=1e-3), "refresh_every": 2, **options}
    trainer = AdversarialClusterTrainer(guard(), **options)
    fit = {"checkpoint": file, "generator": generator, "calibrate": False, "progress": False}
    return trainer.fit(train, calibration, epochs=epochs, **fit)


def changed(index, amount=1):
    """The data with another image, 0, or another label, 1, in the middle."""
    parts = [part.clone() for part in DATA.tensors]
    parts[index][7] -= amount
    return TensorDataset(*parts)


class InAttributes(Dataset):
    """A data set of a user's own, which holds pixels and labels in lists and arrays."""

    def __init__(self, pixels):
        self.pixels, self.labels, self.root = pixels.numpy(), DATA.tensors[1].tolist(), "elsewhere"

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return torch.from_numpy(self.pixels[index]), self.labels[index]


def another_guard(**other):
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(64, 16), other.pop("activation", nn.ReLU())
    guard = ClusterGuard(nn.Sequential(*layers), 3, example=torch.rand(2, 1, 8, 8), **other)
    guard.encoder[0][1].requires_grad_(not other.get("class_names"))
    return guard


OTHERS = [
    ({"train": DataLoader(changed(0, 0.1), 6)}, r"training\.dataset\.tensors was 2 parts \w+, is 2 parts \w+"),
    ({"train": DataLoader(changed(1), 6)}, r"training\.dataset\.tensors was"),
    ({"calibration": DataLoader(changed(1), 6)}, r"calibration\.dataset\.tensors was"),
    ({"guard": partial(another_guard, mean=0.5)}, r"detector\.normalize\.mean was \(0\), is \(0.5\)"),
    ({"guard": partial(another_guard, center_scale=9)}, r"detector\.head\.center_scale was 10, is 9"),
    ({"guard": partial(another_guard, activation=nn.Tanh())}, r"detector\.encoder\.0\.2 was ReLU, is Tanh"),
    ({"guard": partial(another_guard, class_names=["a", "b", "c"])}, r"fixed weights was \{\}, is \{'enc"),
    ({"attack": PGD(eps=0.2, step_size=0.05, steps=3, keep="last")}, "attack.eps was 0.1, is 0.2"),
    ({"attack": FGSM(eps=0.1)}, "attack was PGD, is FGSM"),
    ({"loss": ClusterLoss(weight=0.5)}, "loss.weight was 1, is 0.5"),
    ({"loss": ClusterLoss(target=Outside())}, "loss.target was Origin, is Outside"),
    ({"relabel": Original()}, "relabel was Separate, is Original"),
    ({"warmup_epochs": 1}, "warmup_epochs was 0, is 1"),
    ({"ramp_epochs": 2.5}, "ramp_epochs was 0, is 2.5"),
    ({"refresh_every": 5}, "refresh_every was 2, is 5"),
    ({"refresh_batches": 1}, "refresh_batches was 4, is 1"),
    ({"calibrator": Calibrator(0.2)}, "calibrator.false_positive_rate was 0.01, is 0.2"),
    ({"options": TrainingOptions(clip_norm=1.0)}, "options.clip_norm was None, is 1"),
    ({"options": TrainingOptions(average_decay=0.9)}, "options.average_decay was None, is 0.9"),
    ({"options": TrainingOptions(weight_perturbation=0.1)}, "options.weight_perturbation was None, is 0.1"),
    ({"options": TrainingOptions(schedule_every="step")}, "options.schedule_every was 'epoch', is 'step'"),
    ({"options": TrainingOptions(accumulate=2)}, "options.accumulate was 1, is 2"),
    ({"optimizer": partial(SGD, lr=1e-3)}, "optimizer was Adam, is SGD"),
    ({"optimizer": partial(Adam, lr=1e-2)}, "optimizer.lr was 0.001, is 0.01"),
    ({"optimizer": partial(Adam, betas=(0.8, 0.999))}, r"optimizer.betas was \(0.9, 0.999\), is \(0.8, 0.999\)"),
    ({"scheduler": partial(StepLR, step_size=1)}, "scheduler was None, is StepLR"),
    ({"generator": seeded(4)}, "seed of the generator was None, is 4"),
    ({"train": DataLoader(DATA, 4)}, "training batches was 2, is 3; training batch size was 6, is 4"),
    ({"train": DataLoader(TensorDataset(*DATA[:11]), 6)}, "training images was 12, is 11"),
    ({"calibration": [DATA[:6]]}, "calibration batches was 2, is 1"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    file = tmp_path_factory.mktemp("run") / "run.pt"
    fit(file)
    return file


@pytest.mark.parametrize(("other", "change"), OTHERS, ids=[change[:30] for _, change in OTHERS])
def test_a_checkpoint_of_another_run_is_refused_in_one_sentence_that_names_the_difference(written, other, change):
    before = written.read_bytes()
    with pytest.raises(
        PersistenceError,
        match=rf"run\.pt belongs to another run: .*{change}.*; choose another file, or delete it to start anew",
    ) as caught:
        fit(written, **other)
    assert "\n" not in str(caught.value)
    assert written.read_bytes() == before


def test_a_run_of_the_same_options_goes_on_whatever_may_differ(written, tmp_path):
    file = tmp_path / "run.pt"
    file.write_bytes(written.read_bytes())
    watched = PGD(eps=0.1, step_size=0.05, steps=3, keep="last", on_step=lambda *_: None)
    torch.manual_seed(99)
    assert len(fit(file, epochs=3, attack=watched, options=TrainingOptions(log_every=3))) == 3
    assert len(fit(file, epochs=3)) == 3


class Noise:
    """An attack of a user's own."""

    def __init__(self, scale, extra=None):
        self.scale, self.extra, self.calls = scale, extra, 0

    def __call__(self, detector, images, labels, *, targets=None, generator=None):
        self.calls += 1
        return (images + self.scale).clamp(0, 1)


def noise(scale, how="closure"):
    def in_closure(detector, images, labels, *, targets=None, generator=None):
        return (images + scale).clamp(0, 1)

    def by_default(detector, images, labels, *, targets=None, generator=None, scale=scale):
        return (images + scale).clamp(0, 1)

    if how == "object":
        return Noise(scale)
    if how == "method":
        return Noise(scale).__call__
    if how == "number":
        numbers = {0.1: lambda _, images, *__, **___: images * 0.1, 0.2: lambda _, images, *__, **___: images * 0.2}
        return numbers[scale]
    return in_closure if how == "closure" else by_default


@pytest.mark.parametrize("how", ["object", "method", "closure", "default", "number"])
def test_other_settings_inside_code_of_a_users_own_are_refused(tmp_path, how):
    fit(tmp_path / "run.pt", attack=noise(0.1, how))
    fit(tmp_path / "run.pt", attack=noise(0.1, how))
    with pytest.raises(PersistenceError, match=r"belongs to another run: attack\.\S+ was \(?0\.1\)?, is \(?0\.2\)?;"):
        fit(tmp_path / "run.pt", attack=noise(0.2, how))


def test_what_may_change_by_itself_or_cannot_be_compared_is_said_once(tmp_path):
    attack = Noise(0.1, extra=object())
    loaders = [DataLoader(DATA, 6, shuffle=True, generator=seeded(seed)) for seed in (1, 2)]
    fit(tmp_path / "run.pt", attack=attack, train=loaders[0])
    calls = attack.calls
    with pytest.warns(UserWarning, match="Make sure that it is the same one: ") as caught:
        fit(tmp_path / "run.pt", attack=attack, train=loaders[1])
    assert str(caught[0].message).partition(" one: ")[2] == (
        f"attack.extra is an unknown object, which cannot be compared; attack.calls was 0, is {calls}; training seed "
        "of the loader was 1, is 2"
    )
    assert len(caught) == 1


class Drawn(Dataset):
    """A data set that makes its images when they are asked for."""

    def __init__(self, change):
        self.change = change

    def __len__(self):
        return len(DATA)

    def __getitem__(self, index):
        image, label = DATA[index]
        return self.change(image), label


@pytest.mark.parametrize("part", ["train", "calibration"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_other_images_are_noticed_by_the_first_batch_if_the_data_set_does_not_hold_them(tmp_path, part, epochs):
    loaders = {"train": DataLoader(Drawn(torch.clone), 6), "calibration": DataLoader(Drawn(torch.clone), 6)}
    fit(tmp_path / "run.pt", **loaders)
    with pytest.warns(UserWarning, match="gives other batches than before: its images have changed"):
        fit(tmp_path / "run.pt", epochs=epochs, **loaders | {part: DataLoader(Drawn(torch.fliplr), 6)})


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda pixels: [(pixels[:6], DATA.tensors[1][:6]), (pixels[6:], DATA.tensors[1][6:])], "training content was"),
        (lambda pixels: DataLoader(InAttributes(pixels), 6), r"training\.dataset\.pixels was 12 parts"),
        (lambda pixels: DataLoader(ConcatDataset([InAttributes(pixels)] * 2), 6), r"datasets\.0\.pixels was"),
    ],
)
def test_data_of_a_users_own_are_compared_by_what_they_hold(tmp_path, make, change):
    pixels = DATA.tensors[0].clone()
    fit(tmp_path / "run.pt", train=make(pixels))
    fit(tmp_path / "run.pt", train=make(pixels))
    pixels[7, 0, 3, 3] = 0.5
    with pytest.raises(PersistenceError, match=change):
        fit(tmp_path / "run.pt", train=make(pixels))


def test_files_are_compared_by_name_size_and_a_sample_of_their_bytes_wherever_they_lie(tmp_path):
    def describe_folder(name, **files):
        for file, content in {"a/1.png": b"one", "b/2.png": b"two", **files}.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_bytes(content)
        return describe_contents("training", ImageFolder(tmp_path / name))

    first = describe_folder("first")
    assert {"training.samples", "training.targets"} <= set(first)
    assert describe_folder("copy") == first
    for name, content in {"a/1.png": b"uno", "b/2.png": b"zwei", "b/3.png": b"two"}.items():
        assert describe_folder(name[:3] + content.decode(), **{name: content}) != first


def test_the_same_trainer_goes_on_after_its_scheduler_has_changed_the_rate(tmp_path):
    def new_trainer(epochs):
        return AdversarialClusterTrainer(
            new_guard(),
            ATTACK,
            optimizer=lambda parameters: SGD(parameters, lr=0.1),
            scheduler=lambda optimizer: LambdaLR(optimizer, lambda epoch: (epoch + 1) / epochs),
        )

    trainer = new_trainer(2)
    for epochs in (1, 2):
        trainer.fit(LOADER, LOADER, epochs=epochs, checkpoint=tmp_path / "run.pt", calibrate=False, progress=False)
    with pytest.warns(UserWarning, match=r"it is the same one: scheduler\.lr_lambdas\.0\.epochs was 2, is 4"):
        history = new_trainer(4).fit(
            LOADER, LOADER, epochs=4, checkpoint=tmp_path / "run.pt", calibrate=False, progress=False
        )
    assert len(history) == 4


def test_what_an_older_checkpoint_does_not_know_is_no_difference(written, tmp_path):
    file = tmp_path / "run.pt"
    state = read_progress(written, "training", hint="").state
    del state["values"]["descriptions"][0]["refresh_every"]
    save_progress(file, "training", state)
    fit(file, refresh_every=5)
    del state["values"]["descriptions"]
    del state["values"]["first_weights"]
    save_progress(file, "training", state)
    with pytest.warns(UserWarning, match=r"older clusterguard.*class names, first weights.*is not compared"):
        fit(file, attack=FGSM(eps=0.1))


def test_many_differences_are_counted(written):
    loss, options = ClusterLoss(target=Outside(), weight=0.5, floor=0.1), TrainingOptions(clip_norm=1.0, accumulate=2)
    others = {"loss": loss, "options": options, "relabel": Graded(), "warmup_epochs": 1, "ramp_epochs": 1}
    with pytest.raises(PersistenceError, match=r"another run: ([^;]+; ){10}2 more; choose"):
        fit(written, **others, refresh_every=3, refresh_batches=2, generator=seeded(3), calibration=[DATA[:6]])


def test_certified_training_has_options_of_its_own(tmp_path):
    options = {"optimizer": partial(SGD, lr=1e-3), "warmup_epochs": 0.0}
    run = {"epochs": 1, "checkpoint": tmp_path / "run.pt", "calibrate": False, "progress": False}
    CertifiedTrainer(new_guard(), eps=0.1, **options).fit(LOADER, LOADER, **run)
    with pytest.raises(PersistenceError, match=r"another run: eps was 0\.1, is 0\.2; ramp_epochs was 10, is 3; choose"):
        CertifiedTrainer(new_guard(), eps=0.2, ramp_epochs=3, **options).fit(LOADER, LOADER, **run)


class Smoothing(DetectorTrainer):
    """A user's own trainer."""

    def __init__(self, smoothing):
        torch.manual_seed(0)
        detector = ConfidenceDetector(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), 3)
        super().__init__(detector, optimizer=partial(SGD, lr=0.1))
        self.smoothing = smoothing

    def training_step(self, images, labels, generator):
        logits = self.detector(images)
        loss = cross_entropy(logits, labels, label_smoothing=self.smoothing)
        return TrainingStep(loss, (logits.argmax(1) == labels).sum())


class Described(Smoothing):
    def defining_options(self):
        return {"smoothing": self.smoothing}


def test_a_users_trainer_says_what_defines_its_runs_if_it_wants_to(tmp_path):
    def run(trainer, name):
        trainer.fit(LOADER, LOADER, epochs=1, checkpoint=tmp_path / name, calibrate=False, progress=False)

    run(Smoothing(0.1), "plain.pt")
    run(Smoothing(0.2), "plain.pt")
    run(Described(0.1), "described.pt")
    run(Described(0.1), "described.pt")
    with pytest.raises(PersistenceError, match=r"smoothing was 0\.1, is 0\.2"):
        run(Described(0.2), "described.pt")
    with pytest.raises(PersistenceError, match="trainer was Described, is Smoothing"):
        run(Smoothing(0.1), "described.pt")


class Plain:
    """Prints as Python makes it, with an address."""

    def attack(self, *_):
        """Bound."""


@dataclass
class Holding:
    inner: object
    number: float = 0.1


class Printing:
    def __repr__(self):
        return f"Printing({object()!r})"


def options_without_names():
    """Options whose Python repr has addresses in it, or an order of its own."""
    return {
        "function": lambda images: images,
        "object": Plain(),
        "method": Plain().attack,
        "class": Plain,
        "in a dataclass": Holding(Plain()),
        "printing": Printing(),
        "partial": partial(print, Plain(), end=Plain()),
        "list": [Plain(), Holding(Plain)],
        "mapping": {"key": Plain(), 3: Plain()},
        "set": {"one", "two", "three", "four"},
        "tensor": torch.arange(3.0),
        "module": nn.Linear(2, 2),
        "namespace": SimpleNamespace(a=Plain()),
        "deep": Holding(Holding(Holding(Holding(Holding(Holding(Holding(Holding(Holding(Plain()))))))))),
        "mixed": MixedAttack(attacks=(ATTACK, Plain())),
    }


def test_descriptions_are_the_same_in_every_process():
    code = "import json, test_belonging as t; print(json.dumps(t.describe(t.options_without_names())))"
    path = os.pathsep.join(path for path in sys.path if path)
    descriptions = []
    for seed in "12":
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
        descriptions.append(json.loads(done.stdout))
    assert descriptions[0] == descriptions[1]
    assert not any("0x" in text for text in descriptions[0].values())
    assert descriptions[0]["in a dataclass"] == "Holding"
    assert descriptions[0]["in a dataclass.inner"] == "Plain"
    assert descriptions[0]["mixed.attacks.0.eps"] == "0.1"


@pytest.mark.parametrize(
    ("one", "other"),
    [(torch.zeros(3), torch.ones(3)), ([1] * 500 + [2], [1] * 500 + [3]), (print, len), ({1, 2}, {1, 3}), (1, None)],
    ids=str,
)
def test_what_differs_is_described_differently(one, other):
    assert describe({"option": one}) != describe({"option": other})


@pytest.mark.parametrize(
    ("one", "other"), [(1, 1.0), (torch.tensor(0.5), 0.5), ([1, 2], (1, 2.0)), (lambda a: a, lambda b: b)]
)
def test_what_does_the_same_is_described_the_same(one, other):
    assert describe({"option": one}) == describe({"option": other})


def test_other_places_of_a_subset_are_other_data(tmp_path):
    fit(tmp_path / "run.pt", train=DataLoader(Subset(DATA, range(10)), 6))
    for places in ([*range(9), 11], range(1, 11)):
        with pytest.raises(PersistenceError, match="belongs to another run"):
            fit(tmp_path / "run.pt", train=DataLoader(Subset(DATA, places), 6))
