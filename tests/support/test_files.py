import os
import sys
from pathlib import Path

import pytest
import torch
from clusterguard._support import check_place, only_writer, read_archive, write_atomically
from clusterguard.cli._classifiers import load_weights
from clusterguard.cli._runs import begin_run
from clusterguard.deployment import load_onnx, read_image
from clusterguard.errors import ClusterGuardError, PersistenceError
from safetensors.torch import save_file
from torch import nn


def test_whoever_may_read_new_files_may_read_written_ones(tmp_path):
    before = os.umask(0o027)
    try:
        path = write_atomically(tmp_path / "weights", lambda file: save_file({"a": torch.zeros(2)}, file))
        other = tmp_path / "other"
        other.touch()
    finally:
        os.umask(before)
    assert path.stat().st_mode == other.stat().st_mode


def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path):
    path = write_atomically(tmp_path / "note.txt", lambda file: file.write_text("first"))

    def fail(file):
        file.write_text("half")
        raise OSError("disk full")

    with pytest.raises(PersistenceError, match=r"note\.txt could not be written \(OSError: disk full\); make room"):
        write_atomically(path, fail)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows locks no folders")
def test_what_a_killed_writer_left_is_removed_by_the_next_one_but_not_what_another_one_uses(tmp_path):
    names = (".a*b.part-x12345_8", ".a*b.part-abcdefgh", ".other.part-x12345_8", ".a*b.versions", ".a*b.part-personal")
    left, young, foreign, versions, personal = (tmp_path / name for name in names)
    for folder in (left, young, foreign, versions, personal):
        folder.mkdir()
    (left / "a*b").touch()
    (personal / "diary").touch()
    for folder in (left, foreign, versions, personal):
        os.utime(folder, (0, 0))

    def write(file):
        os.utime(file.parent, (0, 0))
        write_atomically(tmp_path / "a*b", lambda other: other.write_text("second"))
        assert file.parent.exists()  # although it looks old
        file.write_text("first")

    write_atomically(tmp_path / "a*b", write)
    assert {path.name for path in tmp_path.iterdir()} == {"a*b", *names[1:]}


def test_a_symbolic_link_stays_and_the_file_that_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "note.txt", tmp_path / "disk" / "text"
    link.symlink_to(target)
    for text in ("first", "second"):
        assert write_atomically(link, lambda file, text=text: file.write_text(text)) == link
    assert link.is_symlink()
    assert target.read_text() == link.read_text() == "second"
    assert [*target.parent.iterdir()] == [target]


def lock(path):
    with only_writer(path.with_suffix("")):
        pass


READERS = {
    "archive": read_archive,
    "graph": load_onnx,
    "image": read_image,
    "weights.pt": lambda path: load_weights(nn.Linear(1, 1), path),
    "weights.safetensors": lambda path: load_weights(nn.Linear(1, 1), path),
    "training.json": lambda path: begin_run(path.parent, {}, resume=True),
    "run.lock": lock,
    "output": lambda path: write_atomically(path, lambda file: file.write_text("text")),
    "place": check_place,
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
@pytest.mark.parametrize("name", READERS)
def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(tmp_path, name):
    (tmp_path / "checkpoint.pt").touch()  # training.json is the record of it
    os.mkfifo(tmp_path / name)
    with pytest.raises(ClusterGuardError, match=r"a folder, a pipe or a device|damaged or cannot be read"):
        READERS[name](tmp_path / name)
    assert (tmp_path / name).is_fifo()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system has no /proc")
@pytest.mark.parametrize("name", sorted(set(READERS) - {"run.lock", "output", "place"}))
def test_a_link_to_a_file_of_the_system_is_not_read(tmp_path, name, monkeypatch):
    """Some of these wait for something to read, as a pipe does. They look like ordinary files, which may be empty."""
    (tmp_path / "checkpoint.pt").touch()
    for place in ("/proc/self/status", "/proc/self/../kmsg", "/sys/kernel/notes"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(place)
        monkeypatch.setattr("clusterguard._support._files._open_at_once", pytest.fail)
        if Path(place).exists():
            with pytest.raises(ClusterGuardError, match=r"is empty|one of the system|cannot be read"):
                READERS[name](tmp_path / name)
