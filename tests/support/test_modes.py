"""Train and eval mode: modules that have their own way of changing it, and several readers at once."""

import contextlib
import copy
import gc
import os
import pickle
import signal
import threading
import time
import weakref
from contextlib import ExitStack

import clusterguard as cg
import pytest
import torch
from clusterguard._support import evaluation_mode, names_in_eval_mode, training_mode
from clusterguard.detection import full_precision
from clusterguard.errors import ConfigurationError
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torchvision.models.feature_extraction import create_feature_extractor

IMAGES = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))


class Node(nn.Module):
    def __init__(self, *children):
        super().__init__()
        self.parts = nn.ModuleList(children)


class Swapping(Node):
    """It learns of its mode through `train` alone, as a module does that holds one graph for each mode."""

    graph = True

    def train(self, mode=True):
        self.graph = mode
        return super().train(mode)


class Merging(Node):
    """It overrides `eval` too, as layers do that merge weights for inference."""

    graph = True

    def train(self, mode=True):
        self.graph = mode
        return super().train(mode)

    def eval(self):
        super().eval()
        self.graph = False
        return self


trees = st.recursive(
    st.builds(lambda kind: kind(), st.sampled_from([Node, Swapping, Merging])),
    lambda inner: st.builds(
        lambda kind, parts: kind(*parts), st.sampled_from([Node, Swapping, Merging]), st.lists(inner, max_size=3)
    ),
    max_leaves=8,
)


def state_of(module):
    return [(part.training, getattr(part, "graph", None)) for part in module.modules()]


@given(trees, st.data())
def test_whoever_reads_sees_eval_mode_and_changes_no_mode(tree, data):
    modules = list(tree.modules())
    for module in modules:
        module.train(data.draw(st.booleans()))
    before, inside = state_of(tree), []
    for _ in range(data.draw(st.integers(1, 8))):
        if inside and data.draw(st.booleans()):
            inside.pop(data.draw(st.integers(0, len(inside) - 1)))[1].close()
        else:
            module, stack = data.draw(st.sampled_from(modules)), ExitStack()
            inside.append((stack.enter_context(evaluation_mode(module)), stack))
            assert (inside[-1][0] is module) == (not any(part.training for part in module.modules()))
        for read, _ in inside:
            assert not any(mode or graph for mode, graph in state_of(read))
        assert state_of(tree) == before


@given(trees, st.data())
def test_who_trains_reads_the_module_itself_and_finds_each_mode_again(tree, data):
    for module in tree.modules():
        module.train(data.draw(st.booleans()))
    frozen = names_in_eval_mode(tree) - {""}
    with training_mode(tree, frozen=frozen):
        before = state_of(tree)
        with evaluation_mode(tree) as read, evaluation_mode(tree.parts):
            assert read is tree
            assert not any(mode or graph for mode, graph in state_of(tree))
        assert state_of(tree) == before


@given(trees, st.data())
def test_training_wakes_all_but_what_is_frozen(tree, data):
    for module in tree.modules():
        module.train(data.draw(st.booleans()))
    if not tree.training:
        return
    frozen, before = names_in_eval_mode(tree), state_of(tree)
    tree.eval()
    with training_mode(tree, frozen=frozen):
        assert state_of(tree) == before
    assert not any(mode or graph for mode, graph in state_of(tree))


def test_modules_can_be_copied_and_pickled_while_they_are_read():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    with evaluation_mode(model) as read:
        copies = copy.deepcopy(read), pickle.loads(pickle.dumps(read))
    for other in copies:
        assert not other[1].training
        with evaluation_mode(other.train()) as read:
            assert not read[1].training
        assert other[1].training


def test_nothing_of_a_module_is_kept_when_nobody_reads_it_any_more():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    with pytest.raises(ValueError, match="whatever"), evaluation_mode(model):
        raise ValueError("whatever")
    gone = weakref.ref(model[0])
    del model
    gc.collect()
    assert gone() is None


def in_a_child(check):
    """Whether a check holds in a forked process; one that does not end is killed."""
    child = os.fork()
    if not child:
        signal.alarm(10)
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
class TestForking:
    def test_a_fork_in_the_middle_of_a_change_leaves_no_lock_behind(self):
        has_begun = threading.Event()

        class Slow(nn.Dropout):
            def train(self, mode=True):
                has_begun.set()
                time.sleep(0.05)
                return super().train(mode)

        def read():
            with evaluation_mode(slow):
                pass

        slow, other = Slow(), nn.Dropout()
        has_begun.clear()
        thread = threading.Thread(target=read)
        thread.start()
        has_begun.wait(30)

        def check():
            with evaluation_mode(other) as read, full_precision():
                return not read.training

        assert in_a_child(check)
        thread.join(30)

    def test_what_other_threads_read_is_not_read_in_a_child(self):
        model, is_in, may_leave = nn.Dropout().eval(), threading.Event(), threading.Event()

        def read():
            with evaluation_mode(model):
                is_in.set()
                may_leave.wait(30)

        def train():
            with training_mode(model):
                return model.training

        thread = threading.Thread(target=read)
        thread.start()
        is_in.wait(30)
        assert in_a_child(train)  # it does not wait
        may_leave.set()
        thread.join(30)

    def test_a_child_leaves_what_it_was_forked_in(self):
        model = nn.Dropout().eval()
        with evaluation_mode(model):
            child = os.fork()
        if not child:
            with training_mode(model):
                os._exit(not model.training)
        assert os.waitpid(child, 0)[1] == 0


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, images):
        return functional.dropout(self.conv(images).flatten(1), 0.5, training=self.training)


class Extracted(nn.Module):
    """Features by torchvision's tool, which keeps one graph for each mode and swaps them in `train`."""

    def __init__(self):
        super().__init__()
        self.inner = create_feature_extractor(Dropping(), ["dropout"])

    def forward(self, images):
        return self.inner(images)["dropout"]


@pytest.mark.filterwarnings("ignore:no recipe rebuilds this backbone")
@pytest.mark.parametrize("make", [Dropping, Extracted])
def test_a_backbone_whose_dropout_no_flag_reaches_is_used_in_eval_mode_everywhere(make, tmp_path):
    guard = cg.ClusterGuard(make(), 2, mean=[0.0], std=[1.0], example=IMAGES)
    guard.thresholds = torch.full((2,), 100.0)
    expected = guard.detect(IMAGES).distances
    guard.train()
    assert torch.equal(guard.detect(IMAGES).distances, expected)
    assert not torch.equal(guard(IMAGES), guard(IMAGES))  # it is back in train mode
    guard.save_pretrained(tmp_path)
    again = cg.ClusterGuard.from_pretrained(tmp_path, backbone=make(), example=IMAGES)
    assert torch.equal(again.detect(IMAGES).distances, expected)
    program = cg.deployment.export_program(guard, IMAGES).module()
    torch.testing.assert_close(program(IMAGES)[1], expected)


def test_what_is_trained_in_one_thread_is_refused_in_another_and_stays_in_train_mode():
    model, refused = nn.Sequential(nn.BatchNorm1d(3)), []

    def read():
        try:
            with evaluation_mode(model):
                pass
        except ConfigurationError as error:
            refused.append(str(error))

    with training_mode(model):
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
        assert model[0].training
        with evaluation_mode(model):  # the thread that trains may look
            assert not model[0].training
        assert model[0].training
    read()
    assert len(refused) == 1
    assert "another thread trains" in refused[0]


def test_training_waits_for_readers_in_other_threads():
    model, order = nn.Sequential(nn.BatchNorm1d(3)).eval(), []
    is_reading, may_leave = threading.Event(), threading.Event()

    def read():
        with evaluation_mode(model):
            is_reading.set()
            may_leave.wait()
            order.append("read")

    def train():
        with training_mode(model):
            order.append("trained")

    threads = [threading.Thread(target=read), threading.Thread(target=train)]
    threads[0].start()
    is_reading.wait()
    threads[1].start()
    threads[1].join(0.1)
    may_leave.set()
    for thread in threads:
        thread.join()
    assert order == ["read", "trained"]
    assert not model[0].training


def test_a_training_in_one_thread_keeps_its_statistics_whatever_another_does(blobs):
    guard = cg.ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8)), 3)
    images, _ = next(iter(blobs))
    is_over = threading.Event()

    def detect():
        while not is_over.is_set():
            with contextlib.suppress(ConfigurationError):  # while it is trained
                guard.detect(images, check=False)

    thread = threading.Thread(target=detect)
    thread.start()
    cg.AdversarialClusterTrainer(guard, cg.FGSM(eps=0.1)).fit(blobs, blobs, epochs=2, calibrate=False, progress=False)
    is_over.set()
    thread.join()
    assert guard.encoder[0][2].num_batches_tracked == 2 * len(blobs)


class Stubborn(nn.Flatten):
    """Has an `eval` that raises an error, as some wrappers of other people's models do."""

    def eval(self):
        raise NotImplementedError("no\neval")


def test_an_error_of_a_modules_own_eval_is_one_of_ours_and_leaves_no_reader():
    module = nn.Sequential(nn.Dropout(), Stubborn())
    for use in (lambda: evaluation_mode(module).__enter__(), lambda: cg.ClusterGuard(module, 2, example=IMAGES)):
        with pytest.raises(ConfigurationError, match=r"Stubborn, whose eval\(\) raised NotImplementedError: no eval"):
            use()
    assert [part.training for part in module.modules()] == [True, True, True]
    with training_mode(module[0]):
        pass
