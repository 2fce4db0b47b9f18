import json

import pytest
import torch
from clusterguard.errors import PersistenceError
from made_up_results import find, made_up

from benchmarks.running import Store
from benchmarks.running._store import read_chunk, save_chunk


def test_large_weights_come_in_parts(tmp_path):
    store = Store(tmp_path)
    state = {f"layer{index}": torch.full((1_000_000,), float(index)) for index in range(9)} | {"ids": torch.arange(3)}
    store.save_weights("key", state, {"record": {"epochs": 1}})
    files = sorted((tmp_path / "models").glob("*.safetensors"))
    assert len(files) == 3
    assert max(file.stat().st_size for file in files) < 16 * 2**20
    loaded, record = store.load_weights("key")
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert record["record"] == {"epochs": 1}
    assert store.load_weights("other") is None


def test_no_flipped_bit_changes_weights_silently(tmp_path):
    store, state = Store(tmp_path), {"weight": torch.arange(6.0), "ids": torch.arange(3)}
    store.save_weights("key", state, {"record": {}})
    (file,) = tmp_path.rglob("*.safetensors")
    whole = file.read_bytes()
    for position in range(0, 8 * len(whole), 7):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        file.write_bytes(damaged)
        with pytest.raises(PersistenceError, match=r"record .*key\.json are damaged .*; restore the files, or delete"):
            store.load_weights("key")
    file.unlink()
    with pytest.raises(PersistenceError, match=r"key-1\.safetensors"):
        store.load_weights("key")


def test_weights_whose_record_has_no_digests_are_still_read(tmp_path):
    store = Store(tmp_path)
    store.save_weights("key", {"weight": torch.arange(6.0)}, {"record": {}})
    (file,) = tmp_path.rglob("*.json")
    record = json.loads(file.read_text())
    del record["sha256"], record["digest"]
    file.write_text(json.dumps(record))
    assert store.load_weights("key")[0]["weight"].tolist() == [0, 1, 2, 3, 4, 5]
    file.write_text('{"parts": "one"}')
    with pytest.raises(PersistenceError, match=r"key\.json"):
        store.load_weights("key")


def test_no_flipped_bit_changes_a_chunk_silently(tmp_path):
    file, cpu = tmp_path / "0-0.pt", torch.device("cpu")
    save_chunk(file, {"attacked": {"": torch.arange(6.0)}, "stages": [], "unproved": None})
    assert read_chunk(file, cpu)["attacked"][""].tolist() == [0, 1, 2, 3, 4, 5]
    whole, refused = file.read_bytes(), 0
    for position in range(0, 8 * len(whole), 131):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        file.write_bytes(damaged)
        try:
            assert read_chunk(file, cpu)["attacked"][""].tolist() == [0, 1, 2, 3, 4, 5]
        except PersistenceError as error:
            refused += "0-0.pt" in str(error)
    assert refused
    torch.save({"attacked": {}}, file)
    with pytest.raises(PersistenceError, match=r"0-0\.pt .*; delete it to attack its images again"):
        read_chunk(file, cpu)


def test_results_lie_in_one_readable_file_a_training(tmp_path):
    store = Store(tmp_path, "cpu")
    first, second = find("table2-mnist", detector="ours", seed=0)[:2]
    (other,) = find("table2-mnist", detector="vanilla", attack=first.attack)
    for cell in (first, other, second):
        store.write_cell(cell, made_up({"": "11000000"}) | {"title": cell.title, "training": {"epochs": 3}})
    ours, vanilla = sorted((tmp_path / "cells" / "mnist" / "cpu").iterdir())
    assert ours.name == f"ours-seed0-{first.training.key}.jsonl"
    lines = [json.loads(line) for line in ours.read_text().splitlines()]
    assert lines[0]["training"] == {"epochs": 3}
    assert [line["cell"] for line in lines[1:]] == [first.key, second.key]
    assert len(vanilla.read_text().splitlines()) == 2
    assert store.cell_keys() == Store(tmp_path).cell_keys() == {first.key, second.key, other.key}
    assert store.read_cell(second.key) == {
        **made_up({"": "11000000"}),
        "title": second.title,
        "training": {"epochs": 3},
    }


def test_results_of_a_training_that_was_repeated_keep_the_record_they_belong_to(tmp_path):
    first, second, third = find("table2-mnist", detector="ours", seed=0)[:3]
    for cell, seconds in ((first, 1.0), (second, 2.0), (third, 1.0)):
        Store(tmp_path).write_cell(cell, {"training": {"seconds": seconds}})
    for cell, seconds in ((first, 1.0), (second, 2.0), (third, 1.0)):
        assert Store(tmp_path).read_cell(cell.key) == {"training": {"seconds": seconds}}


def test_a_write_that_was_killed_loses_its_own_cell_alone(tmp_path):
    first, second = find("table2-mnist", detector="ours", seed=0)[:2]
    store = Store(tmp_path)
    store.write_cell(first, {"training": {}, "images": 8})
    (file,) = tmp_path.rglob("*.jsonl")
    whole = file.read_bytes()
    store.write_cell(second, {"training": {}, "images": 9})
    line = file.read_bytes()[len(whole) :]
    for length in range(len(line) - 1):
        file.write_bytes(whole + line[:length])
        assert Store(tmp_path).cell_keys() == {first.key}
    store.write_cell(second, {"training": {}, "images": 9})
    assert store.read_cell(first.key) == {"training": {}, "images": 8}
    assert store.read_cell(second.key) == {"training": {}, "images": 9}


def test_no_flipped_bit_changes_a_result_silently(tmp_path):
    (cell,) = find("table2-mnist", detector="ours", seed=0)[:1]
    result = made_up({"": "11000000"}) | {"training": {"seconds": 1.5}}
    Store(tmp_path).write_cell(cell, result)
    (file,) = tmp_path.rglob("*.jsonl")
    whole, refused = file.read_bytes(), []
    for position in range(len(whole)):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            assert Store(tmp_path).read_cell(cell.key) == result
        except PersistenceError as error:
            refused.append(str(error))
    assert len(refused) > len(whole) / 2
    assert all(str(file) in message for message in refused)
