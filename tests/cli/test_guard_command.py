"""`clusterguard guard`: from a file of weights to a calibrated guard, without training."""

import json
import re

import pytest
import timm
import torch
from clusterguard import ClusterGuard
from clusterguard.cli import app
from clusterguard.cli._classifiers import make_backbone
from clusterguard.cli._pictures import load_part
from clusterguard.detectors import FeatureGaussians
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from typer.testing import CliRunner

OPTIONS = ["--model", "timm:test_resnet", "--image-size", 16, "--channels", 1, "--false-positive-rate", 0.1]


def run(*arguments):
    return CliRunner().invoke(app, ["guard", *map(str, arguments)])


@pytest.fixture(scope="module")
def model(photos):
    """A classifier of the photos, trained in the usual way."""
    torch.manual_seed(0)
    pictures = load_part(str(photos), "train", image_size=16, channels=1, seed=0)
    network = timm.create_model("test_resnet", in_chans=1, num_classes=len(pictures.classes))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(10):
        for images, labels in DataLoader(pictures, 32, shuffle=True, drop_last=True):
            normalised = (images - 0.45) / 0.225  # the mean of timm's three channels
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(normalised), labels).backward()
            optimizer.step()
    return network.eval()


@pytest.fixture
def weights(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors"


def test_a_trained_classifier_becomes_a_calibrated_guard(photos, weights, tmp_path):
    result = run("--data", photos, "--weights", weights, "--output", tmp_path / "guard", *OPTIONS, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["is_calibrated"]
    assert told["training"]["weights"] == "mine.safetensors"
    assert told["alignment"]["distance_after"] < told["alignment"]["distance_before"]
    assert re.search(r"accuracy \d\.\d+ before, \d\.\d+ after", result.stderr)
    guard = ClusterGuard.from_pretrained(tmp_path / "guard")
    images, labels = next(iter(DataLoader(load_part(str(photos), "test", image_size=16, channels=1, seed=0), 1000)))
    assert (guard.detect(images).labels == labels).double().mean() > 0.9
    assert list(guard.class_names) == told["guard"]["class_names"]


def test_gaussians_of_features_are_fitted_if_asked_for(photos, weights, tmp_path):
    result = run("--data", photos, "--weights", weights, "--output", tmp_path / "g", *OPTIONS, "--fit", "gaussians")
    assert result.exit_code == 0, result.output
    assert re.search(r"Gaussians of \d+ features.*accuracy \d\.\d+ before, \d\.\d+ after", result.stderr)
    guard = ClusterGuard.from_pretrained(tmp_path / "g")
    assert type(guard.head) is FeatureGaussians
    images, labels = next(iter(DataLoader(load_part(str(photos), "test", image_size=16, channels=1, seed=0), 1000)))
    assert (guard.detect(images).labels == labels).double().mean() > 0.8


@pytest.mark.parametrize(
    ("key", "prefix"),
    [("", "module."), ("state_dict", "model."), ("model", "module._orig_mod."), ("model_state_dict", "")],
)
def test_checkpoints_of_torch_are_read(key, prefix, photos, model, tmp_path):
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "last.pth")
    result = run("--data", photos, "--weights", tmp_path / "last.pth", "--output", tmp_path / "guard", *OPTIONS)
    assert result.exit_code == 0, result.output


def test_what_does_not_fit_is_said_in_one_line_and_leaves_nothing(photos, model, tmp_path):
    torch.save({"head.weight": torch.ones(3)}, tmp_path / "other.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "code.pt")  # a pickled module, which could run code
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.safetensors").write_text("hello")
    result = run("--data", photos, "--weights", tmp_path / "code.pt", "--output", tmp_path / "guard", *OPTIONS)
    assert re.fullmatch(
        r"error: \S*code.pt is damaged or holds other things than tensors.* model.state_dict\(\) instead\n",
        result.stderr,
    )
    whole = (tmp_path / "other.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    problems = {"other.pt": "does not fit ResNet", "list.pt": "does not fit ResNet"}
    problems |= {"text.safetensors": "is damaged or holds no weights", "half.pt": "is damaged"}
    for name, problem in problems.items():
        result = run("--data", photos, "--weights", tmp_path / name, "--output", tmp_path / "guard", *OPTIONS)
        assert result.exit_code == 1
        assert re.fullmatch(rf"error: \S*{name} {problem}.*\n", result.stderr), result.stderr
        assert not (tmp_path / "guard").exists()


def test_the_normalisation_of_the_training_can_be_passed(photos, weights, tmp_path):
    result = run(
        *("--data", photos, "--weights", weights, "--output", tmp_path / "guard", *OPTIONS),
        *("--mean", "0.4", "--std", "0.3", "--json"),
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["guard"]
    assert (told["mean"], told["std"]) == (pytest.approx([0.4]), pytest.approx([0.3]))
    result = run("--data", photos, "--weights", weights, "--output", tmp_path / "other", *OPTIONS, "--mean", "half")
    assert result.exit_code == 2
    assert "expected numbers such as" in result.stderr


def test_a_download_that_fails_is_explained(photos, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", offline)
    result = run("--data", photos, "--pretrained", "--output", tmp_path / "guard", *OPTIONS)
    assert result.exit_code == 1
    assert re.match(
        r"error: the weights of timm:test_resnet cannot be downloaded .* leave out --pretrained", result.stderr
    )
    with pytest.raises(OSError, match="Name or service"):  # nothing is downloaded, so nothing is said of downloads
        make_backbone("timm:test_resnet", num_classes=3, channels=1, pretrained=False)


def test_a_model_that_knows_nothing_is_refused(photos, weights, tmp_path):
    for choice in ([], ["--weights", weights, "--pretrained"]):
        result = run("--data", photos, "--output", tmp_path / "guard", *OPTIONS, *choice)
        assert result.exit_code == 2
        assert "either --weights FILE or" in result.stderr


def test_another_guard_is_not_overwritten(photos, weights, tmp_path):
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "config.json").write_text("{}")
    result = run("--data", photos, "--weights", weights, "--output", tmp_path / "guard", *OPTIONS)
    assert result.exit_code == 1
    assert "expected an empty folder, got" in result.stderr  # also if this command wrote it
    assert "choose another folder" in result.stderr
