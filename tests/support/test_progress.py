"""Progress files are read whole or not at all, and say what is wrong with them."""

import contextlib
import os
import sys
import time
import warnings
import zipfile

import pytest
import torch
from clusterguard._support import digest_of, previous, read_progress, save_progress
from clusterguard.errors import PersistenceError
from hypothesis import given
from hypothesis import strategies as st

HINT = "delete it"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "state.pt"
    save_progress(path, "count", {"step": 1, "weights": torch.arange(50.0)})
    return path


def test_what_was_written_is_read_and_the_one_before_is_kept(file):
    save_progress(file, "count", {"step": 2})
    assert read_progress(file, "count", hint=HINT).state == {"step": 2}
    assert read_progress(previous(file), "count", hint=HINT).state["step"] == 1


def test_a_damaged_file_gives_way_to_the_one_before(file):
    save_progress(file, "count", {"step": 2})
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=r"state.pt is damaged; going on from .*state.pt.previous"):
        assert read_progress(file, "count", hint=HINT).state["step"] == 1


def test_no_file_is_no_progress(tmp_path):
    assert read_progress(tmp_path / "state.pt", "count", hint=HINT) is None


def rewrite(file, **changes):
    record = torch.load(file, weights_only=True)
    torch.save(record | changes, file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": {"step": 7}}, "another digest"),
        ({"digest": None}, "another digest"),
        ({"version": 2}, "newer clusterguard, in version 2"),
        ({"version": "1"}, "newer clusterguard"),
        ({"kind": "recipe"}, "progress of a 'recipe', expected a count"),
        ({"format": "cooking"}, "no progress file"),
        ({"state": [1]}, "no progress file"),
    ],
)
def test_what_is_something_else_is_said_in_a_sentence(file, changes, message):
    rewrite(file, **changes)
    with pytest.raises(PersistenceError, match=rf"state.pt .*{message}.*; delete it"):
        read_progress(file, "count", hint=HINT)


def test_any_flipped_bit_is_noticed_or_changes_nothing(file):
    whole = file.read_bytes()
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        try:
            state = read_progress(file, "count", hint=HINT).state
        except PersistenceError:
            continue
        assert state["step"] == 1
        assert torch.equal(state["weights"], torch.arange(50.0))


def test_the_only_whole_file_outlives_a_kill_at_any_moment_of_the_next_write(file, monkeypatch):
    save_progress(file, "count", {"step": 2})
    file.write_bytes(file.read_bytes()[:-9])
    for name in ("fsync", "link", "replace", "rename"):
        if hasattr(os, name):
            with monkeypatch.context() as patched:
                patched.setattr(os, name, lambda *_, **__: sys.exit("killed"))
                with contextlib.suppress(SystemExit):
                    save_progress(file, "count", {"step": 3})
        with contextlib.suppress(UserWarning), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert read_progress(file, "count", hint=HINT).state["step"] in (1, 3)
    save_progress(file, "count", {"step": 4})
    assert sorted(path.name for path in file.parent.iterdir()) == ["state.pt", "state.pt.previous"]


def nested(depth):
    value = [1]
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        nested(60),
        {"key": nested(22)},
        torch.zeros(1).expand(10**14),
        torch.zeros(3, 3).to_sparse(),
        torch.zeros(3, device="meta"),
        torch.zeros(3, dtype=torch.complex64).conj(),
        torch.zeros(3, dtype=torch.complex64).conj().imag,
        torch.zeros(3),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("key", ["state", "kind", "version", "format", "digest"])
def test_a_crafted_file_is_refused_in_a_moment(tmp_path, key, value):
    record = {"format": "clusterguard progress", "version": 1, "kind": "count", "digest": "0", "state": {}}
    torch.save(record | {key: {"a": value} if key == "state" else value}, tmp_path / "state.pt")
    started = time.process_time()
    with pytest.raises(PersistenceError, match=r"state\.pt .*; delete it") as caught:
        read_progress(tmp_path / "state.pt", "count", hint=HINT)
    assert time.process_time() - started < 5
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", [nested(60), torch.zeros(3, 3).to_sparse(), torch.zeros(3, device="meta")])
def test_what_could_not_be_read_again_is_not_written(tmp_path, value):
    with pytest.raises(PersistenceError, match="cannot keep the progress of a count"):
        save_progress(tmp_path / "state.pt", "count", {"value": value})


def test_shared_and_conjugate_values_come_back(tmp_path):
    shared, tensor, other = (1, 2), torch.tensor([1 + 2j]), torch.tensor([3 + 2j])
    save_progress(tmp_path / "state.pt", "count", {"many": [shared] * 1000, "one": tensor.conj(), "part": other.imag})
    state = read_progress(tmp_path / "state.pt", "count", hint=HINT).state
    assert (state["many"], state["one"].tolist(), state["part"].tolist()) == ([shared] * 1000, [1 - 2j], [2.0])


def test_a_file_that_would_unpack_to_gigabytes_is_refused(file, tmp_path):
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for part in whole.namelist():
            packed.writestr(part, whole.read(part))
    with pytest.raises(PersistenceError, match="compressed"):
        read_progress(bomb, "count", hint=HINT)


def test_what_cannot_be_kept_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(PersistenceError, match="progress of a count: TypeError: expected tensors"):
        save_progress(tmp_path / "state.pt", "count", {"step": object()})
    assert not list(tmp_path.iterdir())


@given(VALUES, VALUES)
def test_equal_values_alone_have_equal_digests(one, other):
    assert (digest_of(one) == digest_of(other)) == (repr(one) == repr(other))


def test_tensors_differ_by_value_shape_and_type():
    ones = torch.ones(4)
    others = [2 * ones, ones.view(2, 2), ones.half(), ones.bool(), ones[:0], ones[:3]]
    assert len({digest_of(tensor) for tensor in [ones, *others]}) == 1 + len(others)
    assert digest_of(torch.ones(2, 4).T) == digest_of(torch.ones(4, 2))
