import hashlib
import json
import math
import pickle
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from clusterguard import Calibration, Calibrator, ClusterGuard, WorstCaseSuite, evaluate
from clusterguard.errors import ConfigurationError, PersistenceError, UnsupportedBackboneError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn
from torchvision import models


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.ReLU())


def make_guard(backbone: nn.Module | None = None, num_classes: int = 3) -> ClusterGuard:
    guard = ClusterGuard(backbone or network(), num_classes)
    guard.thresholds = torch.linspace(9, 11, num_classes)
    return guard.eval()


def bits(guard: ClusterGuard) -> dict[str, tuple[torch.dtype, bytes]]:
    return {
        name: (own.dtype, own.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, own in guard.state_dict().items()
    }


def assert_equal(guard: ClusterGuard, again: ClusterGuard, images: torch.Tensor) -> None:
    assert bits(again) == bits(guard)
    assert again.calibration == guard.calibration
    assert not any(module.training for module in again.modules())
    for ours, theirs in zip(guard.detect(images, check=False), again.detect(images, check=False), strict=True):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    make_guard().save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def replace_weights(folder: Path, content: bytes) -> None:
    """Weights that the config vouches for."""
    (folder / "model.safetensors").write_bytes(content)
    edit_config(folder, weights_sha256=hashlib.sha256(content).hexdigest())


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
    thresholds = data.draw(st.lists(st.floats(width=32), min_size=classes, max_size=classes))
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
    with pytest.raises(PersistenceError, match=r"Sequential; build that module .* pass backbone=module"):
        ClusterGuard.from_pretrained(saved)
    images = torch.rand(2, 1, 6, 6)
    backbone = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())
    guard = ClusterGuard(backbone, 2, example=images)
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


def truncate(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-7])


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def lose_a_class(folder: Path) -> None:
    own = json.loads((folder / "config.json").read_text())["guard"]
    edit_config(folder, guard={**own, "num_classes": 1})


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
        (lose_a_class, r"does not fit .*num_classes of at least 2"),
        (lambda folder: replace_weights(folder, b"not tensors"), r"model.safetensors is no safetensors file"),
        (lambda folder: replace_weights(folder, save({"w": torch.ones(1)})), r"(?s)does not fit .*Missing key"),
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
    with pytest.raises(PersistenceError, match="multiple values"):
        ClusterGuard.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["hf-hub:someone/model", "local-dir:/tmp", "no_such_model"])
def test_a_recipe_names_a_model_of_the_library_and_nothing_else(name, tmp_path):
    make_guard(timm.create_model("test_resnet")).save_pretrained(tmp_path)
    edit_config(tmp_path, backbone={"source": "timm", "name": name, "arguments": {}})
    with pytest.raises(PersistenceError, match=r"does not fit what config\.json describes"):
        ClusterGuard.from_pretrained(tmp_path)


@pytest.mark.parametrize("method", ["write_bytes", "replace"])
@pytest.mark.parametrize("successes", range(3))
def test_an_interrupted_save_leaves_the_old_guard_or_none_never_a_mixture(saved, monkeypatch, method, successes):
    old = ClusterGuard.from_pretrained(saved, backbone=network())
    new = make_guard()
    new.thresholds = torch.tensor([1.0, 2.0, 3.0])
    original, calls = getattr(Path, method), []

    def fail(self: Path, *arguments: object) -> object:
        calls.append(self)
        if len(calls) > successes:
            raise OSError("no space left on device")
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, fail)
        with pytest.raises(OSError, match="no space"):
            new.save_pretrained(saved)
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    if method == "write_bytes" or successes == 0:
        assert bits(ClusterGuard.from_pretrained(saved, backbone=network())) == bits(old)
    else:
        with pytest.raises(PersistenceError, match="interrupted save; download it or save the guard again"):
            ClusterGuard.from_pretrained(saved, backbone=network())
    new.save_pretrained(saved)
    assert bits(ClusterGuard.from_pretrained(saved, backbone=network())) == bits(new)


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
    guard = make_guard(timm.create_model("test_resnet", in_chans=1))
    guard.save_pretrained(tmp_path, training={"epochs": 30, "attack": "PGD(eps=0.3)"})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format_version"] == 1
    assert config["backbone"] == {"source": "timm", "name": "test_resnet.r160_in1k", "arguments": {"in_chans": 1}}
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


def section(card: str, title: str) -> str:
    return card.split(f"## {title}\n")[1].split("\n## ")[0]


def test_a_card_states_what_is_known_and_no_figure_else(tmp_path):
    guard = make_guard()
    guard.reset_calibration()
    guard.save_pretrained(tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "clusterguard"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.license is None
    assert section(card.text, "Measured").strip() == "Not measured: no evaluation was handed in."
    assert section(card.text, "Training").strip() == "Not recorded."
    assert "until then everything is refused" in section(card.text, "Thresholds")
    assert not any(
        character.isdigit() for title in ("Thresholds", "Measured") for character in section(card.text, title)
    )
    assert "prove nothing about others" in card.text
    assert "backbone=your_module" in card.text


def test_a_card_shows_the_calibration_and_the_evaluation_of_this_guard(small_guard, blobs, tmp_path):
    labels = torch.cat([labels for _, labels in blobs])
    images = small_guard.clusters.centers.repeat(200, 1)  # a guard that is right on these "images"
    guard = ClusterGuard(nn.Flatten(), 3, representation_dim=6, example=images.view(-1, 1, 2, 3)).eval()
    with torch.no_grad():
        guard.encoder[-1].weight.copy_(10 * torch.eye(6))
        guard.encoder[-1].bias.zero_()
    loader = [((images / 10).view(-1, 1, 2, 3), labels)]
    calibration = Calibrator(0.05).fit(guard, loader)
    report = evaluate(guard, WorstCaseSuite("linf", eps=0.01, budget="quick"), loader, sanity_images=0)
    guard.save_pretrained(tmp_path, model_card_kwargs={"evaluation": report})  # as push_to_hub hands it over
    assert report.to_markdown() in (tmp_path / "README.md").read_text()
    guard.save_pretrained(tmp_path, evaluation=report)
    card = (tmp_path / "README.md").read_text()
    assert report.to_markdown() in card
    assert "rate of 0.05 on 600 benign images. 600 of these are classified correctly, 200 in the smallest" in card
    assert (
        ClusterGuard.from_pretrained(tmp_path, backbone=nn.Flatten(), example=loader[0][0]).calibration == calibration
    )
    guard.thresholds = guard.thresholds + 1  # neither the record nor the report is about these
    with pytest.raises(ConfigurationError, match="evaluate it again"):
        guard.save_pretrained(tmp_path, evaluation=report)
    guard.save_pretrained(tmp_path)
    assert "nothing is known of their false-positive rate" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["calibration"] is None


def test_an_id_goes_to_the_hub(saved, monkeypatch):
    asked = {}

    def snapshot_download(repo_id: str, **options: object) -> str:
        asked.update(options, repo_id=repo_id)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    ClusterGuard.from_pretrained("someone/guard", backbone=network(), revision="v2")
    assert (asked["repo_id"], asked["revision"]) == ("someone/guard", "v2")
    assert asked["allow_patterns"] == ["model.safetensors", "config.json"]


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such", "someone/guard"])
def test_what_is_neither_folder_nor_on_the_hub_is_named(name, tmp_path):
    with pytest.raises(PersistenceError, match=f"expected a folder, or a guard's id .* got '{name}'"):
        ClusterGuard.from_pretrained(name, local_files_only=True, cache_dir=tmp_path)


def test_a_guard_is_pushed_to_the_hub_with_its_card(monkeypatch):
    pushed = {}

    class Hub:
        def __init__(self, token: str | None = None) -> None:
            pass

        def create_repo(self, repo_id: str, **_: object) -> object:
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: object) -> str:
            pushed.update({path.name: path.read_bytes() for path in folder_path.iterdir()})
            return repo_id

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    guard = make_guard()
    assert isinstance(guard, huggingface_hub.ModelHubMixin)
    assert guard.push_to_hub("someone/guard", config={"epochs": 3}) == "someone/guard"
    assert set(pushed) == {"model.safetensors", "config.json", "README.md"}
    assert json.loads(pushed["config.json"])["training"] == {"epochs": 3}


def test_saving_says_nothing_where_there_is_nothing_to_say(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_guard().save_pretrained(tmp_path)
