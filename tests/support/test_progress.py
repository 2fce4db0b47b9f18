"""Progress files are read whole or not at all, and say what is wrong with them."""

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


def test_a_file_that_would_unpack_to_gigabytes_is_refused(file, tmp_path):
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for part in whole.namelist():
            packed.writestr(part, whole.read(part))
    with pytest.raises(PersistenceError, match="compressed"):
        read_progress(bomb, "count", hint=HINT)


def test_what_cannot_be_kept_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(PersistenceError, match="progress of a count: expected tensors"):
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
