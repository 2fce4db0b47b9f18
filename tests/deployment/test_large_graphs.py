"""Graphs whose weights do not fit into one file; here the limit is a few hundred bytes instead of 2 GiB."""

import copy
import shutil

import onnx
import pytest
import torch
from clusterguard import Calibrator, ClusterGuard, export_onnx, load_onnx
from clusterguard.deployment import _graph_files as files
from clusterguard.errors import PersistenceError
from exporting import assert_same, run_alone, set_thresholds, spread
from torch import nn


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A guard with more classes than fit into a small tensor, its graph in two files, and images."""
    torch.manual_seed(0)
    guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(16, 300), nn.ReLU()), 300, classifier="new")
    images = torch.rand(300, 1, 4, 4)
    spread(guard, images)
    set_thresholds(guard, images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_LARGEST_GRAPH", 2000)
        return guard, export_onnx(guard, tmp_path_factory.mktemp("large") / "guard.onnx", images), images


@pytest.fixture
def large(exported, tmp_path, monkeypatch):
    """A copy of each."""
    monkeypatch.setattr(files, "_LARGEST_GRAPH", 2000)
    guard, path, images = exported
    shutil.copytree(path.parent, tmp_path / "here")
    return copy.deepcopy(guard), tmp_path / "here" / path.name, images


def weights_of(path):
    (file,) = path.parent.glob(f"{path.name}.*.data")
    return file


def test_weights_lie_beside_the_graph_and_thresholds_in_it(large):
    guard, path, images = large
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, weights_of(path).name]
    assert_same(run_alone(path, images), guard.detect(images))
    graph = onnx.load(path, load_external_data=False).graph
    outside = {tensor.name for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL}
    assert outside
    assert "thresholds" not in outside
    detector = load_onnx(path)
    assert torch.equal(detector.thresholds, guard.thresholds)
    assert_same(detector.detect(images), guard.detect(images))


def test_both_files_can_be_moved_and_calibrated_and_saved_again(large, tmp_path):
    guard, path, images = large
    elsewhere = tmp_path / "elsewhere"
    shutil.move(path.parent, elsewhere)
    detector = load_onnx(elsewhere / path.name)
    labels = guard.detect(images).labels
    with pytest.warns(UserWarning, match="pooled"):
        Calibrator(0.1, scarce="pool").fit(detector, [(images, labels)])
    for target in (elsewhere / path.name, tmp_path / "third" / "other.onnx"):
        saved = detector.save(target)
        assert len(list(saved.parent.iterdir())) == 2
        again = load_onnx(saved)
        assert again.calibration == detector.calibration
        assert_same(again.detect(images), detector.detect(images), rtol=0)


def test_an_export_over_an_older_one_leaves_no_weights_behind(large):
    guard, path, images = large
    first = weights_of(path)
    bystander = path.with_name("guard.onnx.mine.data")
    bystander.touch()
    with torch.no_grad():
        guard.encoder[-1].weight.mul_(1.01)
    export_onnx(guard, path, images)
    assert not first.exists()
    bystander.unlink()
    assert_same(load_onnx(path).detect(images), guard.detect(images))


@pytest.mark.parametrize("name", ["save", "checker"])
def test_a_failing_export_leaves_the_older_one_whole(large, monkeypatch, name):
    guard, path, images = large
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with torch.no_grad():
        guard.encoder[-1].weight.mul_(1.01)
    monkeypatch.setattr(onnx, "save", fail) if name == "save" else monkeypatch.setattr(
        onnx.checker, "check_model", fail
    )
    with pytest.raises(PersistenceError, match=r"could not be written .*no space"):
        export_onnx(guard, path, images)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_missing_weights_are_named(large):
    _, path, _ = large
    detector, name = load_onnx(path), weights_of(path).name
    weights_of(path).unlink()
    with pytest.raises(PersistenceError, match=rf"guard.onnx is missing.*{name}.*put that file there"):
        load_onnx(path)
    with pytest.raises(PersistenceError, match="no longer holds the weights"):
        detector.save(path)


def test_weights_with_another_bit_are_refused(large):
    _, path, _ = large
    file = weights_of(path)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x20
    file.write_bytes(content)
    with pytest.raises(PersistenceError, match="weights or operations are not those that were exported"):
        load_onnx(path)


def test_truncated_weights_are_refused(large):
    _, path, _ = large
    file = weights_of(path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(PersistenceError, match=r"guard\.onnx is missing, damaged") as caught:
        load_onnx(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["../secret", "/etc/passwd", "sub/weights", "link"])
def test_weights_are_read_from_nowhere_but_beside_the_graph(large, place):
    _, path, _ = large
    content = weights_of(path).read_bytes()
    (path.parent.parent / "secret").write_bytes(content)
    (path.parent / "sub").mkdir()
    (path.parent / "sub" / "weights").write_bytes(content)
    (path.parent / "link").symlink_to(path.parent.parent / "secret")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = place
    path.write_bytes(model.SerializeToString())
    with pytest.raises(PersistenceError, match="no plain file beside it"):
        load_onnx(path)
