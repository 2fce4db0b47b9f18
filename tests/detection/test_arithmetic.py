"""Where guards judge and proofs are made float32 is IEEE float32, whatever the process is set to, and only there."""

import random
import threading

import pytest
import torch
from certifiable import guard_of
from clusterguard import ClusterGuard, certify
from clusterguard.detection import Arithmetic, full_precision, judge
from clusterguard.errors import ConfigurationError
from torch import nn

HAS_NAMES = hasattr(torch._C, "_get_fp32_precision_getter")
NAMES = [("generic", "all")]
NAMES += [(backend, use) for backend in ("cuda", "mkldnn") for use in ("all", "matmul", "conv", "rnn")]
IEEE = {"matmul": "highest", "nnpack": False, **(dict.fromkeys(NAMES, "ieee") if HAS_NAMES else {"cudnn": False})}


def is_ieee(seen):
    return {name: seen[name] for name in IEEE} == IEEE


def settings():
    """All of torch's settings; those that contradict each other, which torch refuses to read, as "raises"."""

    def read(function, *args):
        try:
            return function(*args)
        except RuntimeError:
            return "raises"

    values = {
        "matmul": read(torch.get_float32_matmul_precision),
        "cudnn": read(torch._C._get_cudnn_allow_tf32),
        "nnpack": torch._C._get_nnpack_enabled(),
    }
    return values | ({name: torch._C._get_fp32_precision_getter(*name) for name in NAMES} if HAS_NAMES else {})


def scramble(generator):
    """As users leave the settings: by the newer names, by the older ones, in any order."""
    for _ in range(generator.randint(1, 5)):
        if HAS_NAMES and generator.random() < 0.6:
            name, value = generator.choice(NAMES), generator.choice(["none", "ieee", "tf32", "bf16"])
            torch._C._set_fp32_precision_setter(*name, "tf32" if name[0] == "cuda" and value == "bf16" else value)
        elif generator.random() < 0.5:
            torch.set_float32_matmul_precision(generator.choice(["highest", "high", "medium"]))
        else:
            torch.backends.cudnn.allow_tf32 = generator.random() < 0.5


@pytest.fixture(autouse=True)
def restored():
    """Other tests get the settings that a fresh process has."""
    yield
    for name in NAMES if HAS_NAMES else ():
        torch._C._set_fp32_precision_setter(*name, "none")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


def inherited():
    """Settings under each value of the one that all others fall back on: what is set itself does not follow it."""
    if not HAS_NAMES:
        return [settings()]
    before, seen = torch._C._get_fp32_precision_getter(*NAMES[0]), []
    for value in ("ieee", "tf32", "none", before):
        torch._C._set_fp32_precision_setter(*NAMES[0], value)
        seen.append(settings())
    return seen


@pytest.mark.parametrize("seed", range(40))
def test_every_setting_is_ieee_inside_and_as_it_was_after(seed):
    scramble(random.Random(seed))
    before = inherited()
    with full_precision(), full_precision():
        assert is_ieee(settings())
        assert settings()["cudnn"] is False or before[-1]["cudnn"] == "raises"  # the older flag can be read
    assert inherited() == before


def test_settings_come_back_after_an_error():
    torch.set_float32_matmul_precision("medium")
    before = settings()
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert settings() == before


def test_the_first_thread_in_and_the_last_one_out_switch():
    torch.set_float32_matmul_precision("medium")
    before, inside, outside, seen = settings(), threading.Event(), threading.Event(), []

    def long():
        with full_precision():
            inside.set()
            outside.wait(10)
            seen.append(settings())

    thread = threading.Thread(target=long)
    thread.start()
    assert inside.wait(10)
    with full_precision():
        seen.append(settings())
    seen.append(settings())  # the other thread is still inside
    outside.set()
    thread.join()
    assert len(seen) == 3
    assert all(map(is_ieee, seen))
    assert settings() == before


class Spying(nn.Module):
    """A body that writes down the settings under which it runs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def note(self):
        self.seen.append(settings())

    def forward(self, images):
        self.note()
        return images.flatten(1)


def test_guards_judge_and_are_certified_in_ieee_float32():
    guard = ClusterGuard(Spying(), 2, example=torch.rand(1, 1, 2, 2)).eval()
    guard.thresholds = torch.ones(2)
    spy, images, labels = guard.encoder[0], torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0])
    torch.set_float32_matmul_precision("medium")
    before = settings()
    for use in (
        lambda: guard.detect(images),
        lambda: judge(guard, [(images, labels)]),
        lambda: certify(guard, images, labels, eps=0.1),
    ):
        spy.seen.clear()
        use()
        assert spy.seen
        assert all(map(is_ieee, spy.seen))
        assert settings() == before


def test_a_guard_that_fails_leaves_the_settings_as_they_were(monkeypatch):
    guard = guard_of(dtype=torch.float32)
    torch.set_float32_matmul_precision("high")
    before = settings()
    monkeypatch.setattr(guard.encoder[0], "forward", lambda images: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        guard.detect(torch.rand(1, 1, 2, 2))
    assert settings() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_only_arithmetic_with_known_rounding_is_followed(dtype):
    with pytest.raises(ConfigurationError, match="float32 or float64"):
        Arithmetic.of(dtype)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_detection_runs_in_ieee_float32_too(monkeypatch, training):
    torch._dynamo.reset()
    guard, batch = ClusterGuard(Spying(), 2, example=torch.rand(3, 1, 2, 2)), torch.rand(3, 1, 2, 2)
    guard.thresholds = torch.ones(2)
    expected, compiled = guard.detect(batch).labels, []

    def backend(graph, _):
        compiled.append(graph)
        return graph

    seen = []  # of the class, because in train mode a copy of the body is read
    monkeypatch.setattr(Spying, "note", torch.compiler.disable(lambda _: seen.append(settings())))
    detect = torch.compile(lambda values: guard.train(training).detect(values).labels, backend=backend)
    torch.set_float32_matmul_precision("medium")
    before = settings()
    for _ in range(2):
        assert torch.equal(detect(batch), expected)
        assert settings() == before
    assert len(seen) == 2
    assert all(map(is_ieee, seen))
    assert compiled
