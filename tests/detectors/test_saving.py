"""A save that ends at any moment leaves the old guard or the new one, and readers see one of them at every moment."""

import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from clusterguard import ClusterGuard
from clusterguard.errors import PersistenceError
from safetensors.torch import save
from saving import bits, edit_config, make_guard, network

FILES = ["README.md", "config.json", "model.safetensors"]


def numbered(number: float) -> ClusterGuard:
    guard = make_guard()
    guard.thresholds = torch.full((3,), float(number))
    return guard


def number_in(folder: Path) -> float:
    return float(ClusterGuard.from_pretrained(folder, backbone=network()).thresholds[0])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Killed(BaseException):
    """Ends a save where it is; nothing that it does afterwards reaches the disk."""


class Killer:
    """Counts what this thread does to the files of a folder, and lets it do so much and no more."""

    events = frozenset({"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.link"})
    folder: Path | None = None
    steps_left = 0

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.folder and event in self.events and str(self.folder) in str(arguments[:2]):
            self.steps_left -= 1
            if self.steps_left < 0:
                raise Killed

    def save(self, guard: ClusterGuard, folder: Path, steps: int) -> bool:
        """Save a guard, but for the steps after so many; whether there were any."""
        self.folder, self.steps_left = folder, steps
        try:
            guard.save_pretrained(folder)
        except Killed:
            return True
        finally:
            self.folder = None
        return False


@pytest.fixture(scope="module")
def killer() -> Killer:
    killer = Killer()
    sys.addaudithook(killer)
    return killer


def test_a_save_that_is_killed_before_any_of_its_steps_leaves_the_old_guard_or_the_new_one(tmp_path, killer):
    guard = numbered(0)
    guard.save_pretrained(tmp_path)
    before, is_old, most = 0.0, [], 0
    for steps in range(100):
        guard.thresholds = torch.full((3,), float(steps + 1))
        was_killed = killer.save(guard, tmp_path, steps)
        now = number_in(tmp_path)
        assert now in (before, steps + 1), steps
        is_old.append(now == before)
        before, most = now, max(most, len(names(tmp_path)))
        if not was_killed:
            break
    assert is_old.count(True) > 5  # killed before config.json was replaced
    assert is_old.count(False) > 2  # and after it
    assert most <= 5  # what a killed one left, the next one sweeps
    assert names(tmp_path) == FILES


def test_a_first_save_that_is_killed_can_be_tried_again(tmp_path, killer):
    guard, steps = numbered(7), 0
    while killer.save(guard, tmp_path, steps):
        steps += 1
        if (tmp_path / "config.json").exists():
            assert number_in(tmp_path) == 7
    assert steps > 10
    assert names(tmp_path) == FILES


@pytest.mark.parametrize("successes", range(4))
def test_a_save_that_fails_leaves_a_guard_and_nothing_else_but_its_weights(saved, monkeypatch, successes):
    old, new, original, calls = numbered(1), numbered(2), Path.replace, []
    old.save_pretrained(saved)

    def fail(self: Path, target: Path) -> object:
        calls.append(self)
        if len(calls) > successes:
            raise OSError("no space left on device")
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(PersistenceError, match=r"could not be written .*no space"):
            new.save_pretrained(saved)
    assert number_in(saved) == (1 if successes < 2 else 2)
    assert len(names(saved)) == (4 if successes == 2 else 3)
    new.save_pretrained(saved)
    assert names(saved) == FILES
    assert bits(ClusterGuard.from_pretrained(saved, backbone=network())) == bits(new)


def test_readers_beside_saves_see_a_whole_guard(tmp_path):
    guards, read = [numbered(number) for number in range(2)], []
    guards[0].save_pretrained(tmp_path)

    def write() -> None:
        for number in range(12):
            guards[number % 2].save_pretrained(tmp_path)

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        read.append(number_in(tmp_path))
    writer.join()
    assert {*read} <= {0.0, 1.0}
    assert number_in(tmp_path) == 1


def test_two_saves_at_once_leave_one_of_the_guards(tmp_path):
    writers = [threading.Thread(target=numbered(number).save_pretrained, args=(tmp_path,)) for number in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert number_in(tmp_path) in range(6)
    assert names(tmp_path) == FILES


def test_a_reader_who_got_the_config_before_a_save_reads_the_new_guard(saved, monkeypatch):
    original = json.loads
    late = iter([numbered(5)])

    def loads(text: bytes) -> object:
        value = original(text)
        for guard in late:  # between the config and the weights, once
            guard.save_pretrained(saved)
        return value

    with monkeypatch.context() as patch:
        patch.setattr(json, "loads", loads)
        assert number_in(saved) == 5


def test_what_interrupted_saves_left_is_swept_and_nothing_else(saved, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for folder in (elsewhere, saved / ".saving.abcd_123"):
        folder.mkdir(exist_ok=True)
        (folder / "README.md").write_text("text")
    (saved / ".saving.linked00").symlink_to(elsewhere)
    weights = (saved / "model.safetensors").read_bytes()
    of_others = ["model-00001-of-00002.safetensors", f"model-{'0' * 64}.safetensors"]
    contents = {hashlib.sha256(content).hexdigest(): content for content in (save({"weight": torch.ones(1)}), b"text")}
    of_others = sorted([*of_others, *(f"model-{digest}.safetensors" for digest in contents)])
    for name, content in zip(of_others, (contents.get(name[6:70], weights) for name in of_others), strict=True):
        (saved / name).write_bytes(content)
    (saved / f"model-{hashlib.sha256(weights).hexdigest()}.safetensors").write_bytes(weights)  # of an interrupted save
    make_guard().save_pretrained(saved)
    assert names(saved) == [".saving.linked00", *FILES[:2], *of_others, FILES[2]]
    assert names(elsewhere) == ["README.md"]


@pytest.mark.parametrize("content", [save({"weight": torch.ones(1)}), b"", b"text"])
@pytest.mark.parametrize("beside_a_config", [False, True])
def test_weights_of_another_program_are_not_overwritten(saved, content, beside_a_config):
    (saved / "model.safetensors").write_bytes(content)
    if not beside_a_config:
        (saved / "config.json").unlink()
    before = names(saved)
    with pytest.raises(PersistenceError, match=r"model\.safetensors is not clusterguard's; choose another folder"):
        make_guard().save_pretrained(saved)
    assert (saved / "model.safetensors").read_bytes() == content
    assert names(saved) == before


def test_a_digest_that_leads_to_another_folder_is_not_followed(saved, tmp_path):
    (saved / "model-inner").mkdir()
    (saved / f"model-{'0' * 64}.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    edit_config(saved, weights_sha256=f"inner/../model-{'0' * 64}")
    with pytest.raises(PersistenceError, match=r"[/\\]model\.safetensors is not the file"):
        ClusterGuard.from_pretrained(saved, backbone=network())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_is_killed_at_a_random_moment_leaves_a_guard(tmp_path):
    guards = [numbered(0), numbered(1)]
    guards[0].save_pretrained(tmp_path)
    chosen, was_amid = random.Random(0), 0
    for _ in range(60):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of forks beside threads
            child = os.fork()
        while child == 0:
            for guard in guards:
                guard.save_pretrained(tmp_path)
        time.sleep(chosen.uniform(0.02, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert number_in(tmp_path) in (0, 1)
        assert len(names(tmp_path)) <= 5  # what they left does not pile up
        was_amid += names(tmp_path) != FILES
    assert was_amid > 3
    numbered(2).save_pretrained(tmp_path)
    assert number_in(tmp_path) == 2
    assert names(tmp_path) == FILES
