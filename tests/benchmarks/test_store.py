import torch

from benchmarks.store import Store


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
