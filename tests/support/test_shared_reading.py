"""Several threads that read one module, which others put into train mode or train meanwhile."""

import copy
import functools
import threading
import types

import clusterguard as cg
import pytest
import torch
from clusterguard._support import evaluation_mode
from clusterguard.errors import ConfigurationError
from torch import nn
from torch.nn.utils import parametrizations

IMAGES = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))


class Gate(nn.Module):
    """Lets everybody through, but stops the first who comes after `close` until `open` is set.

    Copies are the same gate.
    """

    def __init__(self):
        super().__init__()
        self.state = types.SimpleNamespace(is_closed=False)

    def __deepcopy__(self, memo):  # events cannot be copied
        copied = Gate()
        copied.state = self.state
        return copied.train(self.training)

    is_in = property(lambda self: self.state.is_in)
    open = property(lambda self: self.state.open)

    def close(self):
        vars(self.state).update(is_closed=True, is_in=threading.Event(), open=threading.Event())

    def forward(self, images):
        if self.state.is_closed:
            self.state.is_closed = False
            self.state.is_in.set()
            self.state.open.wait(30)
        return images


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def paused_guard():
    """A calibrated guard in eval mode, whose gate lets everybody through until `close` is called."""
    gate = Gate()
    backbone = nn.Sequential(gate, nn.BatchNorm2d(1), nn.Dropout(0.9), nn.Flatten())
    guard = cg.ClusterGuard(backbone, 2, example=IMAGES)
    guard.thresholds = torch.full((2,), 100.0)
    return guard, gate


class Reader(threading.Thread):
    """A thread that detects, and is inside the gate of the guard when this is made."""

    def __init__(self, guard, gate):
        super().__init__()
        self.guard, self.verdict, self.error = guard, None, None
        gate.close()
        self.start()
        assert gate.is_in.wait(30)

    def run(self):
        try:
            self.verdict = self.guard.detect(IMAGES)
        except ConfigurationError as error:
            self.error = str(error)


def test_a_guard_that_another_thread_puts_into_train_mode_is_read_to_the_end_in_eval_mode():
    guard, gate = paused_guard()
    expected, statistics = guard.detect(IMAGES), guard.encoder[0][1].running_mean.clone()
    reader = Reader(guard, gate)
    thread = threading.Thread(target=guard.train)
    thread.start()
    thread.join(0.05)
    assert not guard.training  # it waits
    gate.open.set()
    assert_equal(guard.detect(IMAGES), expected)  # and who comes in the meantime does not
    for other in (reader, thread):
        other.join(30)
    assert_equal(reader.verdict, expected)
    assert torch.equal(guard.encoder[0][1].running_mean, statistics)
    assert all(module.training for module in guard.modules())


def test_a_guard_in_train_mode_stays_there_for_others_while_a_thread_reads_it():
    guard, gate = paused_guard()
    expected, statistics = guard.detect(IMAGES), guard.encoder[0][1].running_mean.clone()
    reader = Reader(guard.train(), gate)
    assert all(module.training for module in guard.modules())
    guard.eval().train()  # it need not wait
    gate.open.set()
    reader.join(30)
    assert_equal(reader.verdict, expected)
    assert torch.equal(guard.encoder[0][1].running_mean, statistics)
    guard(IMAGES)
    assert not torch.equal(guard.encoder[0][1].running_mean, statistics)


def test_a_part_that_is_put_into_train_mode_meanwhile_is_an_error():
    guard, gate = paused_guard()
    reader = Reader(guard, gate)
    guard.encoder.train()
    gate.open.set()
    reader.join(30)
    assert "was put into train mode while it was read" in reader.error


@pytest.mark.parametrize("part", ["weights", "statistics"])
def test_weights_and_statistics_that_change_under_a_guard_in_train_mode_are_an_error(part):
    guard, gate = paused_guard()
    reader = Reader(guard.train(), gate)
    if part == "weights":
        torch.nn.init.zeros_(guard.encoder[-1].weight)
    else:
        guard(IMAGES)  # as a training does before it takes a step
    gate.open.set()
    reader.join(30)
    assert "weights or buffers of this ClusterGuard changed while it was read" in reader.error
    guard.detect(IMAGES)


def test_a_guard_whose_evidence_switches_its_dropout_does_not_wait_for_itself():
    class Sampling(cg.ClusterGuard):
        def evidence(self, images):
            self.train()
            try:
                return super().evidence(images)
            finally:
                self.eval()

    guard = Sampling(nn.Sequential(nn.Flatten(), nn.Dropout()), 2, example=IMAGES)
    guard.detect(IMAGES, check=False)
    assert not guard.training


def test_two_threads_that_take_gradients_through_a_classifier_leave_its_parameters_trainable():
    """What is shown to other libraries: one thread stays inside while the other comes and leaves."""
    guard, gate = paused_guard()
    gradients = {}

    def attack(name):
        leaf = IMAGES.clone().requires_grad_()
        cg.attacks.as_classifier(guard)(leaf).square().sum().backward()
        gradients[name] = leaf.grad

    thread = threading.Thread(target=attack, args=("first",))
    gate.close()
    thread.start()
    assert gate.is_in.wait(30)
    attack("second")
    gate.open.set()
    thread.join(30)
    assert torch.equal(gradients["first"], gradients["second"])
    assert all(parameter.requires_grad and parameter.grad is None for parameter in guard.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_many_threads_that_detect_attack_and_certify_agree_and_leave_no_trace(training):
    torch.manual_seed(0)
    guard = cg.ClusterGuard(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()),
        2,
        example=IMAGES,
    )
    guard.thresholds = torch.full((2,), 30.0)
    labels, attack = torch.arange(8) % 2, cg.PGD(eps=0.1, step_size=0.05, steps=2)
    reads = [
        lambda: [guard.detect(IMAGES).distances],
        lambda: [attack(guard, IMAGES, labels)],
        lambda: list(cg.certify(guard, IMAGES, labels, eps=0.01)),
    ]
    expected = [read() for read in reads]
    guard.train(training)
    before, failures = copy.deepcopy(guard.state_dict()), []

    def work(turn):
        for step in range(12):
            which = (turn + step) % len(reads)
            if not all(map(torch.equal, reads[which](), expected[which])):
                failures.append(which)

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    torch.testing.assert_close(dict(guard.state_dict()), dict(before), rtol=0, atol=0)
    assert {module.training for module in guard.modules()} == {training}


class Singleton(nn.Dropout):
    def __deepcopy__(self, memo):
        return self


class Merging(nn.Linear):
    """It overrides `train` to add a part to its weight in eval mode, as layers with adapters do."""

    def train(self, mode=True):
        if mode != self.training:
            self.weight.data += -1 if mode else 1
        return super().train(mode)


class TestViews:
    def test_they_share_parameters_but_those_that_a_switch_may_merge(self):
        model = nn.Sequential(nn.Linear(2, 2), Merging(2, 2), nn.BatchNorm1d(2))
        with evaluation_mode(model) as read:
            shared = [mine is its for mine, its in zip(model.parameters(), read.parameters(), strict=True)]
            assert shared == [True, True, False, False, True, True]
            assert torch.equal(read[2].running_mean, model[2].running_mean)
            read[2].running_mean += 1  # a note of a layer, which is lost with the view
            assert model[2].running_mean.eq(0).all()
            assert torch.equal(read[1].weight, model[1].weight + 1)

    def test_they_have_their_own_hooks_methods_and_shared_modules(self):
        model = nn.Sequential(nn.Sequential(nn.Dropout()), parametrizations.weight_norm(nn.Linear(6, 6)), nn.Dropout())
        model.append(model[2])
        model[0].forward = types.MethodType(lambda self, images: self[0](images), model[0])
        model[2].register_forward_hook(functools.partial(lambda whole, *_: _[-1] * (1 + whole.training), model))
        with evaluation_mode(model) as read:
            assert torch.equal(read(IMAGES), read[1](IMAGES))
            assert read[2] is read[3]
        assert model.training

    @pytest.mark.parametrize("reason", ["hook", "method", "cannot pickle", "shared by copies"])
    def test_what_has_none_is_refused_in_train_mode(self, reason):
        model = nn.Sequential(nn.Dropout(), nn.Flatten())
        if reason == "hook":
            model[0].register_forward_hook(lambda *_: model.training)
        elif reason == "method":
            dropout = model[0]
            model.append(type("Calling", (nn.Module,), {"forward": lambda _, images: dropout(images)})())
        elif reason == "cannot pickle":
            model[0].lock = threading.Lock()
        else:
            model.append(Singleton())
        said = "holds on to a module" if reason in ("hook", "method") else reason
        with pytest.raises(ConfigurationError, match=f"{said}.*call its eval"), evaluation_mode(model):
            pass
        with evaluation_mode(model.eval()) as read:
            assert read is model
