import errno
import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from clusterguard import ClusterGuard
from clusterguard.detectors import _guard_files
from clusterguard.errors import PersistenceError
from safetensors.torch import save
from saving import assert_refused, edit_config, make_guard, network, read_config
from torch import nn


def replace_weights(folder: Path, content: bytes) -> None:
    """Weights that the config vouches for."""
    (folder / "model.safetensors").write_bytes(content)
    edit_config(folder, weights_sha256=hashlib.sha256(content).hexdigest())


def truncate(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-7])


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def lose_a_class(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())["guard"]
    edit_config(folder, guard={**settings, "num_classes": 1})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"expected config.json in .*, found none"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"expected model.safetensors in .*, found none"),
        (truncate, r"model.safetensors is not the file .* cut off"),
        (flip_a_bit, r"model.safetensors is not the file .* damaged"),
        (lambda folder: (folder / "config.json").write_text('{"format": "cluster'), r"config.json is damaged"),
        (lambda folder: (folder / "config.json").write_bytes(b"\x80\x02"), r"config.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config.json describes no guard"),
        (lambda folder: edit_config(folder, format="transformers"), r"config.json describes no guard"),
        (
            lambda folder: edit_config(folder, format_version=2),
            r"version 1 or older in .*, got 2; upgrade clusterguard",
        ),
        (lambda folder: edit_config(folder, guard={}), r"does not fit .*num_classes"),
        (lambda folder: edit_config(folder, calibration={"alpha": 1}), r"does not fit .*alpha"),
        (lose_a_class, r"does not fit .*num_classes=1"),
        (lambda folder: replace_weights(folder, b"not tensors"), r"model.safetensors is no safetensors file"),
        (lambda folder: replace_weights(folder, save({"w": torch.ones(1)})), r"does not fit .*num_classes=3"),
        (
            lambda folder: replace_weights(folder, save({"thresholds": torch.ones(3), "w": torch.ones(3)})),
            r"does not fit .*Missing key",
        ),
    ],
)
def test_whatever_is_wrong_with_a_folder_is_named(saved, damage, message):
    damage(saved)
    with pytest.raises(PersistenceError, match=message) as caught:
        ClusterGuard.from_pretrained(saved, backbone=network())
    assert str(saved) in str(caught.value)


def test_a_backbone_of_another_shape_is_refused(saved):
    other = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6), nn.ReLU())
    with pytest.raises(PersistenceError, match=r"(?s)does not fit backbone=Sequential.*size mismatch"):
        ClusterGuard.from_pretrained(saved, backbone=other)


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained", "pretrained_cfg"])
def test_nothing_is_ever_unpickled_not_even_if_a_foreign_config_asks_for_it(argument, tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for name in ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler"):
        monkeypatch.setattr(name, refuse)
    make_guard(timm.create_model("test_resnet")).save_pretrained(tmp_path)
    ClusterGuard.from_pretrained(tmp_path)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({}))
    recipe = json.loads((tmp_path / "config.json").read_text())["backbone"]
    edit_config(tmp_path, backbone={**recipe, "arguments": {argument: str(tmp_path / "evil.pt")}})
    with pytest.raises(PersistenceError, match="settings that a recipe may hold"):
        ClusterGuard.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["hf-hub:someone/model", "local-dir:/tmp", "no_such_model"])
def test_a_recipe_names_a_model_of_the_library_and_nothing_else(name, tmp_path):
    make_guard(timm.create_model("test_resnet")).save_pretrained(tmp_path)
    edit_config(tmp_path, backbone={"source": "timm", "name": name, "arguments": {}})
    with pytest.raises(PersistenceError, match=r"does not fit what config\.json describes"):
        ClusterGuard.from_pretrained(tmp_path)


def test_the_folder_around_a_guard_names_the_guard(small_guard, tmp_path):
    small_guard.save_pretrained(tmp_path / "night")
    with pytest.raises(PersistenceError, match=r"found none; is .*night meant\?"):
        ClusterGuard.from_pretrained(tmp_path)


def places(value, before=()):
    """The path of each value inside a config, and whether it is that of a name."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from (((*before, key), False), *([((*before, key), True)] if isinstance(value, dict) else []))
        yield from places(inner, (*before, key))


@pytest.mark.parametrize("text", ["two\nlines", "two\u2028lines\x1b[2J", {"two\nlines": "two\nlines"}])
@pytest.mark.parametrize("backbone", [network, lambda: None])
def test_an_error_is_one_line_whatever_a_config_holds(saved, text, backbone):
    whole, messages = json.dumps(read_config(saved)), []
    for path, is_name in [*places(json.loads(whole))]:
        config = json.loads(whole)
        holder = config
        for key in path[:-1]:
            holder = holder[key]
        holder[str(text) if is_name else path[-1]] = holder.pop(path[-1]) if is_name else text
        (saved / "config.json").write_text(json.dumps(config))
        try:
            ClusterGuard.from_pretrained(saved, backbone=backbone())
        except PersistenceError as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert [message for message in messages if not message.isprintable()] == []


@pytest.mark.parametrize("name", ["two\nlines", "two\u2028lines"])
def test_a_head_of_any_name_is_an_error_of_one_line_that_says_what_to_do(saved, name):
    settings = json.loads((saved / "config.json").read_text())["guard"]
    edit_config(saved, guard={**settings, "head": {**settings["head"], "type": name}})
    assert_refused(saved, r"the head two lines; pass a head", network())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_disk_that_cannot_be_read_is_an_error_that_names_the_file(saved, name, monkeypatch):
    class Failing:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, attribute):
            return getattr(self.file, attribute)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def read(self, *_):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    usual = _guard_files.open_ordinary
    monkeypatch.setattr(
        _guard_files, "open_ordinary", lambda path: (Failing if Path(path).name == name else lambda x: x)(usual(path))
    )
    with pytest.raises(PersistenceError, match=rf"{name} .*cannot be read .*Input/output error"):
        ClusterGuard.from_pretrained(saved)


def test_weights_of_a_wrong_size_are_refused_without_reading_them(saved, monkeypatch):
    with (saved / "model.safetensors").open("r+b") as file:
        file.truncate(2**40)  # takes no room on the disk
    monkeypatch.setattr(hashlib, "sha256", None)
    with (
        (saved / "model.safetensors").open("rb") as file,
        pytest.raises(PersistenceError, match="other sizes than it has room for"),
    ):
        _guard_files.WeightsFile(saved / "model.safetensors", file, "").header()
