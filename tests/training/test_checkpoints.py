import pytest
import torch
from clusterguard._support import previous
from clusterguard.errors import InputError, PersistenceError
from clusterguard.training._checkpoints import read_checkpoint, save_checkpoint
from torch import nn


def parts(seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(50, 20)
    return {"guard": model, "optimizer": torch.optim.Adam(model.parameters()), "scheduler": None}


def save(path, seed, step):
    save_checkpoint(path, parts=parts(seed), values={"step": step})


def load_checkpoint(path, parts):
    checkpoint = read_checkpoint(path)
    with checkpoint.restored(parts):
        return checkpoint.values


@pytest.fixture
def path(tmp_path):
    """Two checkpoints, one behind the other."""
    file = tmp_path / "run.pt"
    save(file, 1, 1)
    save(file, 2, 2)
    return file


def test_the_last_checkpoint_is_read_back(path):
    fresh = parts()
    assert load_checkpoint(path, parts=fresh) == {"step": 2}
    assert torch.equal(fresh["guard"].weight, parts(2)["guard"].weight)
    assert sorted(file.name for file in path.parent.iterdir()) == ["run.pt", "run.pt.previous"]


def test_no_file_is_no_checkpoint(tmp_path):
    assert read_checkpoint(tmp_path / "none.pt") is None


@pytest.mark.parametrize("where", [0, 40, 1500, 3000, -300, -1])
def test_a_flipped_bit_is_noticed_or_harmless(path, where):
    content = bytearray(path.read_bytes())
    content[where] ^= 0x10
    path.write_bytes(content)
    fresh = parts()
    try:
        values = load_checkpoint(path, parts=fresh)
    except UserWarning:  # warnings are errors here
        return
    assert values == {"step": 2}
    assert torch.equal(fresh["guard"].weight, parts(2)["guard"].weight)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_gives_way_to_the_one_before_with_a_warning(path, kept):
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    fresh = parts()
    with pytest.warns(UserWarning, match="run.pt is damaged; going on from .*run.pt.previous"):
        assert load_checkpoint(path, parts=fresh) == {"step": 1}
    assert torch.equal(fresh["guard"].weight, parts(1)["guard"].weight)


def test_where_the_last_file_was_deleted_the_previous_one_is_not_taken_without_a_word(path):
    path.unlink()
    with pytest.warns(UserWarning, match=r"run.pt is missing; going on from .*run.pt.previous; delete that too"):
        assert load_checkpoint(path, parts=parts()) == {"step": 1}


def test_nothing_whole_is_an_error_and_changes_nothing(path):
    for file in (path, previous(path)):
        file.write_bytes(b"not a checkpoint")
    fresh = parts()
    with pytest.raises(PersistenceError, match=r"run.pt is damaged.*delete it"):
        load_checkpoint(path, parts=fresh)
    assert torch.equal(fresh["guard"].weight, parts()["guard"].weight)


def test_another_runs_checkpoint_is_refused_and_changes_nothing(path):
    other = {"guard": nn.Linear(50, 7), "optimizer": None, "scheduler": None}
    with pytest.raises(PersistenceError, match="another run"):
        load_checkpoint(path, parts=other)
    model = nn.Linear(50, 7)
    weight = model.weight.detach().clone()
    other = {"guard": model, "optimizer": torch.optim.Adam(model.parameters()), "scheduler": None}
    with pytest.raises(PersistenceError, match="does not fit"):
        load_checkpoint(path, parts=other)
    assert torch.equal(model.weight, weight)


@pytest.mark.parametrize("failure", [InputError, KeyboardInterrupt])
def test_what_fails_while_restoring_undoes_it(path, failure):
    fresh = parts()

    def fail():
        with read_checkpoint(path).restored(fresh):
            assert torch.equal(fresh["guard"].weight, parts(2)["guard"].weight)
            raise failure

    with pytest.raises(failure):
        fail()
    assert torch.equal(fresh["guard"].weight, parts()["guard"].weight)


def test_a_part_that_refuses_in_its_own_way_undoes_the_others(path):
    class Picky(nn.Module):
        def load_state_dict(self, state_dict):
            if state_dict:
                raise TypeError("not mine")

    fresh = parts() | {"optimizer": Picky()}
    with pytest.raises(PersistenceError, match="does not fit"):
        read_checkpoint(path).restored(fresh).__enter__()
    assert torch.equal(fresh["guard"].weight, parts()["guard"].weight)


def test_a_failing_write_leaves_the_old_ones(path):
    with pytest.raises(PersistenceError, match=r"run\.pt cannot keep .* got function"):
        save_checkpoint(path, parts=parts(3), values={"code": lambda: None})
    assert load_checkpoint(path, parts=parts()) == {"step": 2}


def test_a_disk_that_is_full_is_named_and_the_checkpoint_before_stays(path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(PersistenceError, match=r"run\.pt could not be written \(RuntimeError: Pytorch.*start again"):
        save(path, 3, 3)
    assert load_checkpoint(path, parts=parts()) == {"step": 2}
