import os
import signal
import subprocess
import sys

import pytest
from clusterguard._support import only_writer, read_progress, save_progress
from clusterguard.errors import PersistenceError

HAS_FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
HOLD = """
import os, sys, time
from clusterguard._support import only_writer
with only_writer(sys.argv[1]):
    worker = os.fork() if int(sys.argv[2]) else -1
    if worker:
        print(worker, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.pt"


def test_a_name_that_is_too_long_is_an_error_of_ours(tmp_path):
    path = tmp_path / ("x" * 300)
    for use in (
        only_writer(path).__enter__,
        lambda: save_progress(path, "count", {}),
        lambda: read_progress(path, "count", hint=""),
    ):
        with pytest.raises(PersistenceError, match="File name too long"):
            use()


def test_a_second_writer_in_the_same_process_is_told_so_until_the_first_has_ended(path):
    reason = r"run\.pt is being written by another run; wait"
    with only_writer(path), pytest.raises(PersistenceError, match=reason), only_writer(path):
        pass
    with only_writer(path), only_writer(path.with_name("other.pt")):
        pass
    assert not list(path.parent.iterdir())


def test_a_writer_that_fails_lets_go(path):
    with pytest.raises(KeyboardInterrupt), only_writer(path):
        raise KeyboardInterrupt
    with only_writer(path):
        pass


@pytest.mark.parametrize("forks", [False, pytest.param(True, marks=HAS_FORKS)])
def test_a_process_holds_its_lock_until_it_is_killed_whatever_becomes_of_its_workers(path, forks):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path), str(int(forks))], stdout=-1, text=True) as other:
        try:
            worker = int(other.stdout.readline())
            with pytest.raises(PersistenceError, match="another run"), only_writer(path):
                pass
        finally:
            other.kill()
            other.stdout.close()
    try:
        with only_writer(path):
            pass
    finally:
        if forks:
            os.kill(worker, signal.SIGKILL)


def test_a_lock_that_was_deleted_while_it_was_waited_for_does_not_count(path, monkeypatch):
    lock = path.with_name("run.pt.lock")
    opened = type(lock).open
    late = []

    def open_late(self, *mode):
        handle = opened(self, *mode)
        if not late:
            late.append(self)
            self.unlink()  # by who held it until now
        return handle

    monkeypatch.setattr(type(lock), "open", open_late)
    with only_writer(path):
        assert lock.exists()
        with pytest.raises(PersistenceError), only_writer(path):
            pass


def test_what_is_no_lock_is_named(path):
    path.with_name("run.pt.lock").mkdir()
    reason = r"run\.pt cannot be locked \(FileExists.*; delete run\.pt\.lock"
    with pytest.raises(PersistenceError, match=reason), only_writer(path):
        pass


class Process:
    """One of two processes of a training, as far as locking goes."""

    num_processes = 1

    def __init__(self, index):
        self.process_index, self.is_main_process = index, not index


def test_processes_of_one_training_write_together(path):
    first, second, refused = Process(0), Process(1), pytest.raises(PersistenceError)
    with only_writer(path, first), only_writer(path, second), refused, only_writer(path, Process(0)):
        pass
