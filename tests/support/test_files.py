import os

import pytest
import torch
from clusterguard._support import write_atomically
from safetensors.torch import save_file


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

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
