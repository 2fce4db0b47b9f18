import json
import math
import re
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from clusterguard import Calibration, ClusterGuard
from clusterguard.errors import ConfigurationError, PersistenceError, UnsupportedBackboneError
from hypothesis import given, settings
from hypothesis import strategies as st
from saving import OwnNetwork, assert_equal, bits, make_guard, network
from torch import nn
from torchvision import models


@settings(max_examples=15)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
def test_a_guard_comes_back_bit_by_bit(data, dtype):
    classes, block = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 3))
    guard = ClusterGuard(
        network(),
        classes,
        representation_dim=classes * block,
        center_scale=data.draw(st.floats(0.125, 128)),
        mean=data.draw(st.lists(st.floats(-1, 1), min_size=3, max_size=3)),
        std=data.draw(st.lists(st.floats(0.1, 2), min_size=3, max_size=3)),
    )
    guard.to(dtype).eval()
    thresholds = data.draw(st.lists(st.floats(width=32, allow_infinity=False), min_size=classes, max_size=classes))
    guard.thresholds = torch.tensor(thresholds)
    if all(map(math.isfinite, thresholds)):
        exact, counts, rates = tuple(guard.thresholds.tolist()), (120,) * classes, (0.01,) * classes
        guard.calibration = Calibration(exact, counts, 500, rates, 0.01, "conformal", pooled=(1,))
    with tempfile.TemporaryDirectory() as folder:
        guard.save_pretrained(folder)
        again = ClusterGuard.from_pretrained(folder, backbone=network())
    assert again.thresholds.dtype == torch.float32
    assert_equal(guard, again, torch.rand(5, 3, 2, 2).to(dtype))


@pytest.mark.parametrize(
    ("make", "shape", "source"),
    [
        (lambda: timm.create_model("test_resnet", in_chans=1, drop_rate=0.1, num_classes=7), (1, 32, 32), "timm"),
        (lambda: timm.create_model("resnet18", output_stride=8, global_pool="max"), (3, 32, 32), "timm"),
        (lambda: timm.create_model("test_vit", img_size=32), (3, 32, 32), "timm"),
        (lambda: timm.models.test_resnet(in_chans=1), (1, 32, 32), "timm"),  # keeps no record of its arguments
        (models.resnet18, (3, 32, 32), "torchvision"),
        (lambda: models.squeezenet1_1(num_classes=5), (3, 32, 32), "torchvision"),
        (lambda: models.googlenet(init_weights=False, transform_input=True), (3, 32, 32), "torchvision"),
    ],
)
def test_backbones_of_timm_and_torchvision_are_rebuilt_without_network_and_randomness(
    make, shape, source, tmp_path, monkeypatch
):
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("network")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the classifier of SqueezeNet cannot be kept
        guard = make_guard(make())
    guard.save_pretrained(tmp_path)
    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    randomness = torch.get_rng_state()
    again = ClusterGuard.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), randomness)
    assert json.loads((tmp_path / "config.json").read_text())["backbone"]["source"] == source
    assert_equal(guard, again, torch.rand(2, *shape))


def test_parts_in_other_dtypes_and_tied_weights_come_back(tmp_path):
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    backbone[3].weight = backbone[1].weight
    guard = make_guard(backbone)
    guard.encoder[1].double()
    guard.save_pretrained(tmp_path)
    again = ClusterGuard.from_pretrained(tmp_path, backbone=backbone)
    assert bits(again) == bits(guard)
    assert again.encoder[0][3].weight is again.encoder[0][1].weight


def test_a_module_of_your_own_must_be_handed_in(saved, tmp_path):
    with pytest.raises(PersistenceError, match=r"OwnNetwork; build that module .* pass backbone=module"):
        ClusterGuard.from_pretrained(saved)
    with pytest.raises(UnsupportedBackboneError, match="call it if it makes a model"):
        ClusterGuard.from_pretrained(saved, backbone=OwnNetwork)
    images = torch.rand(2, 1, 6, 6)
    backbone = OwnNetwork(nn.Conv2d(1, 2, 3), nn.Flatten())
    guard = ClusterGuard(backbone, 2, example=images)
    guard.save_pretrained(tmp_path / "convolution")
    assert bits(ClusterGuard.from_pretrained(tmp_path / "convolution", backbone=backbone)) == bits(guard)
    guard.image_shape = "any"
    guard.save_pretrained(tmp_path / "convolution")
    with pytest.raises(UnsupportedBackboneError, match="pass example=images"):
        ClusterGuard.from_pretrained(tmp_path / "convolution", backbone=backbone)
    again = ClusterGuard.from_pretrained(tmp_path / "convolution", backbone=backbone, example=images)
    assert bits(again) == bits(guard)


@pytest.mark.parametrize("part", ["conv1", "maxpool", "act1"])
def test_a_model_that_was_changed_is_no_longer_its_recipe(part, tmp_path):
    model = timm.create_model("test_resnet", in_chans=1)
    if part == "conv1":
        model.conv1[0].padding = (0, 0)  # the same names and shapes, another function
    else:
        setattr(model, part, nn.Identity())
    guard = make_guard(model)
    with pytest.warns(UserWarning, match=rf"test_resnet.* differs at {part}.* will need backbone="):
        guard.save_pretrained(tmp_path)
    with pytest.raises(PersistenceError, match="pass backbone=module"):
        ClusterGuard.from_pretrained(tmp_path)
    assert_equal(guard, ClusterGuard.from_pretrained(tmp_path, backbone=model), torch.rand(2, 1, 32, 32))


def test_an_existing_folder_keeps_what_is_not_a_guards(saved):
    (saved / "notes.txt").write_text("mine")
    guard = make_guard(num_classes=4)
    guard.save_pretrained(saved)
    assert (saved / "notes.txt").read_text() == "mine"
    assert_equal(guard, ClusterGuard.from_pretrained(saved, backbone=network()), torch.rand(2, 3, 2, 2))


@pytest.mark.parametrize(("name", "content"), [("README.md", "# My project"), ("config.json", '{"model_type": "vit"}')])
def test_files_of_others_are_not_overwritten(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(PersistenceError, match=rf"{name} is not clusterguard's; choose another folder"):
        make_guard().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == content
    with pytest.raises(PersistenceError, match="expected a folder, got the file"):
        make_guard().save_pretrained(tmp_path / name)


def test_the_config_can_be_read_and_records_the_training(tmp_path):
    guard = make_guard(timm.create_model("test_resnet", in_chans=1, num_classes=3))
    guard.save_pretrained(tmp_path, training={"epochs": 30, "attack": "PGD(eps=0.3)"})
    config = json.loads((tmp_path / "config.json").read_text())
    arguments = {"in_chans": 1, "num_classes": 3}
    assert config["format_version"] == 1
    assert config["backbone"] == {"source": "timm", "name": "test_resnet.r160_in1k", "arguments": arguments}
    assert config["guard"]["num_classes"] == config["guard"]["representation_dim"] == 3
    assert config["guard"]["center_scale"] == 10.0
    assert config["guard"]["dtype"] == "float32"
    assert len(config["guard"]["mean"]) == len(config["guard"]["std"]) == 1
    assert config["calibration"] is None
    assert config["training"] == {"epochs": 30, "attack": "PGD(eps=0.3)"}
    assert config["versions"]["torch"] == version("torch")  # which leaves out what it was built for


@pytest.mark.parametrize("training", [{"loss": math.nan}, {"attack": object()}])
def test_training_that_is_not_json_is_refused_before_anything_is_written(training, tmp_path):
    with pytest.raises(ConfigurationError, match="expected training to hold what JSON has"):
        make_guard().save_pretrained(tmp_path / "new", training=training)
    assert not (tmp_path / "new").exists()


def test_an_id_goes_to_the_hub(saved, monkeypatch):
    asked = {}

    def snapshot_download(repo_id: str, **options: object) -> str:
        asked.update(options, repo_id=repo_id)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    ClusterGuard.from_pretrained("someone/guard", backbone=network(), revision="v2")
    assert (asked["repo_id"], asked["revision"]) == ("someone/guard", "v2")
    assert asked["allow_patterns"] == ["model.safetensors", "config.json"]


def test_nothing_large_is_fetched_from_the_hub_before_its_config_is_a_guards(saved, monkeypatch):
    def snapshot_download(repo_id: str, *, allow_patterns: list[str], **_: object) -> str:
        assert allow_patterns == ["config.json"]
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    (saved / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(PersistenceError, match=r"config\.json describes no guard"):
        ClusterGuard.from_pretrained("someone/llama")


@pytest.mark.parametrize("name", ["someone/guard", "guard", "runs/demo"])
def test_what_is_neither_folder_nor_on_the_hub_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = f"got '{name}': there is no such folder in {re.escape(str(tmp_path))}, and the Hub says: .*snapshot"
    with pytest.raises(PersistenceError, match=expected):
        ClusterGuard.from_pretrained(name, local_files_only=True, cache_dir=tmp_path)


PATHS = ["no/such/folder", "/no/such", "./guard", "../guard", "~/guard", "no/such/", "no\\such", Path("no/such")]


@pytest.mark.parametrize("name", PATHS, ids=str)
def test_a_path_without_a_folder_is_named_and_asks_no_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(PersistenceError, match=rf"got {re.escape(str(name))}, which does not exist; mend the path"):
        ClusterGuard.from_pretrained(name)


def test_saving_says_nothing_where_there_is_nothing_to_say(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_guard().save_pretrained(tmp_path)
