"""Folders from strangers: nothing is fetched, run, or built large before it is known to fit."""

import hashlib
import json
import os
import re
import threading
from pathlib import Path

import pytest
import timm
import torch
from clusterguard import ClusterGuard
from clusterguard.detectors import _folders
from clusterguard.detectors._backbone_recipes import at_most
from clusterguard.errors import ConfigurationError, PersistenceError
from safetensors.torch import load
from saving import assert_equal, assert_refused, edit_config, make_guard, network, put_weights
from torch import nn
from torchvision import models

HEAVIER = [
    ("timm", "resnet18", {"num_classes": 60000}),  # makes more than its weights could need
    ("timm", "vit_tiny_patch16_224", {"depth": 50000}),
    ("timm", "vit_tiny_patch16_224", {"embed_dim": 49152, "num_heads": 3}),
    ("timm", "vit_tiny_patch16_224", {"img_size": 4096}),
    ("timm", "swin_tiny_patch4_window7_224", {"img_size": 3584, "window_size": 7}),
    ("torchvision", "vgg11", {}),
    ("torchvision", "vit_h_14", {}),
    ("torchvision", "densenet121", {"bn_size": 4096}),
]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    make_guard(timm.create_model("test_resnet", num_classes=3)).save_pretrained(folder)
    return folder


@pytest.fixture
def from_timm(original, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((original / name).read_bytes())
    return tmp_path


def put_option(folder: Path, **options: object) -> None:
    settings = json.loads((folder / "config.json").read_text())["guard"]
    edit_config(folder, guard=settings | options)


@pytest.mark.parametrize(("source", "name", "arguments"), HEAVIER, ids=str)
def test_a_network_that_the_file_has_no_weights_for_is_never_built(source, name, arguments, from_timm, monkeypatch):
    devices, build = [], _folders.build_backbone

    def watched(recipe: dict[str, object]) -> nn.Module:
        devices.append(torch.empty(0).device.type)
        return build(recipe)

    monkeypatch.setattr(_folders, "build_backbone", watched)
    edit_config(from_timm, backbone={"source": source, "name": name, "arguments": arguments})
    assert_refused(from_timm, r"does not fit what config\.json describes")
    assert devices == ["meta"]


def test_room_is_left_for_the_old_classifier_and_no_more(from_timm, monkeypatch):
    recipe = json.loads((from_timm / "config.json").read_text())["backbone"]
    edit_config(from_timm, backbone=recipe | {"arguments": {"num_classes": 21841}})
    ClusterGuard.from_pretrained(from_timm)
    monkeypatch.setattr(_folders, "_SPARE_ROOM", 0)
    assert_refused(from_timm, r"expected a network of at most \d+ bytes, as its weights have")


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_classes", 10**11), ("representation_dim", 3 * 10**10), ("dtype", "int8"), ("dtype", "load")],
)
def test_no_number_takes_memory_and_no_word_names_a_function(option, value, saved):
    put_option(saved, **{option: value})
    assert_refused(saved, f"does not fit backbone=OwnNetwork.*{option if option != 'dtype' else value}", network())


@pytest.mark.parametrize("name", ["thresholds", "normalize.mean"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16])
def test_weights_of_another_kind_are_refused(name, dtype, saved):
    if (name, dtype) == ("normalize.mean", torch.float16):
        return
    tensor = load((saved / "model.safetensors").read_bytes())[name]
    put_weights(saved, **{name: tensor.to(dtype)})
    assert_refused(saved, "does not fit .*expected (torch.float32|thresholds of float32) for", network())


@pytest.mark.parametrize("make", [models.densenet121, lambda: timm.create_model("swin_s3_tiny_224", num_classes=5)])
def test_networks_of_many_parts_come_back(make, tmp_path):
    guard = make_guard(make())
    guard.save_pretrained(tmp_path)
    again = ClusterGuard.from_pretrained(tmp_path)
    assert again.state_dict().keys() == guard.state_dict().keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 60 + b"]" * 60, "at most 50 levels"),
        (b'{"format": ' * 60 + b"1" + b"}" * 60, "at most 50 levels"),
        (b" " * 2**24 + b"{}", "at most 16777216 bytes"),
    ],
    ids=["lists", "objects", "size"],
)
def test_a_config_is_neither_deep_nor_large(saved, content, message):
    (saved / "config.json").write_bytes(content)
    assert_refused(saved, rf"config\.json is damaged or cannot be read \(ValueError: expected .*{message}", network())


def test_a_guard_is_not_saved_with_records_that_could_not_be_read(tmp_path):
    training: list[object] = []
    for _ in range(60):
        training = [training]
    with pytest.raises(ConfigurationError, match=r"room for, got more .* 50 levels.*; leave some out"):
        make_guard().save_pretrained(tmp_path / "new", training=training)
    assert not (tmp_path / "new").exists()


def test_a_wide_representation_is_refused_before_a_layer_of_it_is_made(saved, monkeypatch):
    put_option(saved, representation_dim=3 * 10**7)
    put_weights(saved, extra=torch.zeros(0, 3 * 10**7))
    devices, make = [], ClusterGuard.__init__

    def watched(guard, *args, **options):
        devices.append(torch.empty(0).device.type)
        make(guard, *args, **options)

    monkeypatch.setattr(ClusterGuard, "__init__", watched)
    assert_refused(saved, "does not fit", backbone=network())
    assert devices == ["meta"]


def test_links_to_files_work(saved, tmp_path):
    for name in ("config.json", "model.safetensors"):  # as in the cache of the Hugging Face Hub
        (tmp_path / name).symlink_to((saved / name).rename(saved / f"blob of {name}"))
    guard = ClusterGuard.from_pretrained(tmp_path, backbone=network())
    guard.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").is_symlink()
    assert_equal(guard, ClusterGuard.from_pretrained(tmp_path, backbone=network()), torch.rand(2, 3, 2, 2))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_pipes_devices_and_folders_are_not_read(saved, name, kind):
    (saved / name).unlink()
    if kind == "pipe":
        os.mkfifo(saved / name)
    elif kind == "device":
        (saved / name).symlink_to("/dev/zero")
    else:
        (saved / name).mkdir()
    assert_refused(
        saved, rf"expected an ordinary file, got a folder, a pipe or a device in .*{re.escape(name)}", network()
    )
    with pytest.raises(PersistenceError, match=rf"{re.escape(name)} is not clusterguard's"):
        make_guard().save_pretrained(saved)


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**42]}},
        {"w": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}},
        {"w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        {"w": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}},
        {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "vw"},  # the same bytes twice
        {"w": 3},
        [],
    ],
    ids=str,
)
def test_a_header_tells_what_is_in_its_file(saved, header):
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(4)
    (saved / "model.safetensors").write_bytes(content)
    edit_config(saved, weights_sha256=hashlib.sha256(content).hexdigest())
    assert_refused(saved, r"model\.safetensors is no safetensors file", network())


def test_infinite_thresholds_are_not_calibrated(saved):
    put_weights(saved, thresholds=torch.tensor([1.0, torch.inf, 2.0]))
    with pytest.warns(UserWarning, match="expected finite thresholds in .*; the detector is not calibrated"):
        guard = ClusterGuard.from_pretrained(saved, backbone=network())
    assert not guard.is_calibrated
    assert guard.detect(torch.rand(4, 3, 2, 2), check=False).is_adversarial.all()
    guard = make_guard()
    guard.thresholds = torch.tensor([1.0, torch.inf, 2.0])
    assert not guard.is_calibrated
    guard.save_pretrained(saved)
    assert "None: fit them with" in (saved / "README.md").read_text()


def test_parts_are_counted_where_they_are_put_together():
    others = threading.Thread(target=lambda: nn.Sequential(*(nn.ReLU() for _ in range(50))))
    with at_most(3):
        nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU())
        others.start()
        others.join()
        with pytest.raises(ConfigurationError, match="at most 3 parts"):
            nn.Sequential(nn.ReLU())
    nn.Sequential(nn.ReLU())
