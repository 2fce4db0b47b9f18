import os
import sys

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
