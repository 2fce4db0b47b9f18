import copy
import sys
import warnings
from pathlib import Path

import clusterguard
import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from clusterguard import Calibrator, ClusterGuard, ConfidenceDetector, Detection, DetectorModule, Evidence, decide
from clusterguard.errors import (
    ConfigurationError,
    InputError,
    MissingDependencyError,
    NotCalibratedError,
    PersistenceError,
)
from clusterguard.export import export_onnx, export_program, load_onnx
from clusterguard.modes import evaluation_mode
from onnxruntime.quantization import quantize_dynamic
from torch import Tensor, nn
from torch.nn.functional import pad


def run_alone(path: Path, images: Tensor) -> Detection:
    """What a user gets who has the file and onnxruntime, and no clusterguard."""
    session = onnxruntime.InferenceSession(path)
    assert [own.name for own in session.get_inputs()] == ["images"]
    assert [own.name for own in session.get_outputs()] == ["labels", "distances", "is_adversarial"]
    return Detection(*map(torch.from_numpy, session.run(None, {"images": images.numpy()})))


def assert_same(found: Detection, expected: Detection, *, rtol: float = 1e-4) -> None:
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.is_adversarial, expected.is_adversarial)
    torch.testing.assert_close(found.distances, expected.distances, rtol=rtol, atol=0, equal_nan=True)


def set_thresholds(detector: DetectorModule, images: Tensor) -> None:
    """About half of the images are refused, and none lies so close to its threshold that rounding decides."""
    detector.reset_calibration()
    distances = detector.detect(images, check=False).distances.sort().values
    middle = distances[len(images) // 4 : -len(images) // 4]
    widest = middle.diff().argmax()
    detector.thresholds = torch.full_like(detector.thresholds, float(middle[widest : widest + 2].mean()))


def spread(guard: ClusterGuard, images: Tensor) -> None:
    """Let the representations of these images vary as if the guard were trained, so that labels differ."""
    last = [layer for layer in guard.encoder.modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad(), evaluation_mode(guard):
        representations = guard.represent(images)
        scale = 5 / representations.std(dim=0)
        last.bias.copy_((last.bias - representations.mean(dim=0)) * scale + 3)
        last.weight.mul_(scale[:, None])


def flat_guard() -> ClusterGuard:
    torch.manual_seed(0)
    guard, images = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU()), 3), torch.rand(200, 1, 4, 4)
    spread(guard, images)
    set_thresholds(guard, images)
    return guard


BACKBONES = {
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    ),
    "resnet": lambda: timm.create_model("test_resnet", in_chans=1, drop_rate=0.5),
    "vit": lambda: timm.create_model("test_vit", in_chans=1, img_size=32),
}


@pytest.fixture(scope="module", params=BACKBONES)
def exported(request, digits, tmp_path_factory):
    """A guard in train mode, whose BatchNorm has seen digits, exported in both ways; and digits."""
    torch.manual_seed(0)
    images = pad(digits.tensors[0][:200], (2, 2, 2, 2))
    guard = ClusterGuard(BACKBONES[request.param](), 10, mean=[0.13], std=[0.31], example=images[:2]).train()
    with torch.no_grad():
        guard(images)
    spread(guard, images)
    set_thresholds(guard, images)
    path = export_onnx(guard, tmp_path_factory.mktemp("onnx") / "guard.onnx", images[:1])
    return guard, export_program(guard, images[:1]), path, images


def test_the_graphs_say_what_the_guard_says(exported):
    guard, program, path, images = exported
    expected = guard.detect(images)
    assert 50 < expected.is_adversarial.sum() < 150
    assert len(expected.labels.unique()) == 10
    assert_same(run_alone(path, images), expected)
    assert_same(load_onnx(path).detect(images), expected)
    assert_same(Detection(*program.module()(images)), expected)
    assert guard.training
    assert all(parameter.requires_grad for parameter in guard.parameters())


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_any_batch_size_will_do(exported, batch):
    guard, program, path, images = exported
    assert_same(run_alone(path, images[:batch]), guard.detect(images[:batch]))
    assert_same(Detection(*program.module()(images[:batch])), guard.detect(images[:batch]))


@pytest.mark.parametrize("pixel", [torch.nan, torch.inf, -torch.inf])
def test_an_image_that_is_not_finite_is_refused_and_its_neighbours_are_not_touched(exported, pixel):
    guard, program, path, images = exported
    images = images[:5].clone()
    images[2, 0, 9, 9] = pixel
    expected = guard.detect(images)
    assert expected.is_adversarial[2]
    assert_same(run_alone(path, images), expected)
    assert_same(Detection(*program.module()(images)), expected)


def test_a_distance_equal_to_the_threshold_is_accepted_and_the_next_larger_is_not(exported):
    _, _, path, images = exported
    detector = load_onnx(path)
    labels, distances, _ = detector.detect(images)
    first = distances[labels == labels[0]][0]
    detector.thresholds = torch.full_like(detector.thresholds, first)
    assert not detector.detect(images).is_adversarial[0]
    detector.thresholds = torch.full_like(detector.thresholds, torch.nextafter(first, torch.tensor(0.0)))
    assert detector.detect(images).is_adversarial[0]


def test_what_overflows_inside_is_refused_even_without_limits(tmp_path):
    """Pixel 0 makes a coordinate whose square overflows, 1 an infinite one, 2 a NaN; 3 lets only the sum overflow."""
    guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(4, 4, bias=False)), 4)
    hidden, last = (layer for layer in guard.modules() if isinstance(layer, nn.Linear))
    with torch.no_grad():
        hidden.weight.copy_(torch.diag(torch.tensor([1e30, 3e38, 3e38, 1.2e19])))
        hidden.weight[3, 2] = 3e38
        hidden.weight[:, 3] = torch.tensor([1.2e19, 0.6e19, 1.2e19, 1.2e19])
        last.weight.copy_(torch.tensor([[1.0, 0, 2, -2], [0, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    guard.thresholds = torch.full((4,), torch.inf)
    images = torch.cat([torch.zeros(1, 4), torch.eye(4)]).view(5, 1, 2, 2)
    expected = guard.detect(images)
    assert expected.is_adversarial.tolist() == [False, True, True, True, True]
    assert expected.distances[4] == torch.inf
    assert_same(run_alone(export_onnx(guard, tmp_path / "guard.onnx", images), images), expected)


def test_any_detector_module_can_be_exported(tmp_path):
    torch.manual_seed(0)
    detector = ConfidenceDetector(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), 3)
    images = torch.rand(40, 1, 4, 4)
    set_thresholds(detector, images)
    fresh = copy.deepcopy(detector)
    fresh._looked = False  # what it does at its first batch must not get into the graph
    assert_same(run_alone(export_onnx(fresh, tmp_path / "detector.onnx", images), images), detector.detect(images))
    assert_same(Detection(*export_program(fresh, images).module()(images)), detector.detect(images))
    assert not fresh._looked


class Ratios(DetectorModule):
    """Suspicion is finite where scores are not."""

    def evidence(self, images: Tensor) -> Evidence:
        flat = images.flatten(1)
        return Evidence(flat[:, :3] / flat[:, 3:4], flat[:, :3])


def test_scores_that_are_not_finite_are_refused_whatever_the_suspicion(tmp_path):
    detector, images = Ratios(3), torch.rand(6, 1, 2, 2)
    detector.thresholds = torch.full((3,), 0.8)
    images[4, 0, 1, 1] = 0
    expected = detector.detect(images)
    assert expected.is_adversarial[4]
    path = export_onnx(detector, tmp_path / "detector.onnx", images)
    assert_same(run_alone(path, images), expected)
    assert_same(decide(load_onnx(path).evidence(images), detector.thresholds), expected)


def test_a_graph_does_not_follow_its_detector(tmp_path):
    guard, images = flat_guard(), torch.rand(8, 1, 4, 4)
    program = export_program(guard, images)
    before = guard.detect(images)
    guard.thresholds = guard.thresholds * 0
    with torch.no_grad():
        guard.encoder[-1].weight.zero_()
    assert_same(Detection(*program.module()(images)), before)
    torch.export.save(program, tmp_path / "guard.pt2")
    assert_same(Detection(*torch.export.load(tmp_path / "guard.pt2").module()(images)), before)


def test_half_precision(tmp_path):
    guard, images = flat_guard().half(), torch.rand(40, 1, 4, 4).half()
    set_thresholds(guard, images)
    expected = guard.detect(images)
    path = export_onnx(guard, tmp_path / "half.onnx", images)
    assert_same(run_alone(path, images), expected, rtol=1e-2)
    assert_same(load_onnx(path).detect(images.float()), expected, rtol=1e-2)
    assert_same(Detection(*export_program(guard, images.float()).module()(images)), expected)
    with pytest.raises(ConfigurationError, match=r"float32 or float16, got torch.bfloat16; export copy.deepcopy"):
        export_onnx(guard.bfloat16(), tmp_path / "half.onnx", images)


def test_detectors_that_cannot_be_exported_say_what_to_do(tmp_path):
    guard = flat_guard()
    with pytest.raises(ConfigurationError, match="pass example=images"):
        export_onnx(guard, tmp_path / "guard.onnx")
    with pytest.raises(InputError, match="divide 8-bit images by 255"):
        export_program(guard, torch.zeros(1, 1, 4, 4, dtype=torch.uint8))
    guard.reset_calibration()
    for export in (export_program, lambda guard, images: export_onnx(guard, tmp_path / "guard.onnx", images)):
        with pytest.raises(NotCalibratedError, match=r"call Calibrator"):
            export(guard, torch.rand(1, 1, 4, 4))
    assert not list(tmp_path.iterdir())


def test_a_timm_backbone_tells_the_size_of_its_images():
    guard = ClusterGuard(timm.create_model("test_vit", in_chans=1, img_size=48), 2)
    guard.thresholds = torch.full((2,), 10.0)
    assert export_program(guard).module()(torch.rand(3, 1, 48, 48))[0].shape == (3,)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_are_named(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf'{package}.*pip install "clusterguard\[export\]"'):
        load_onnx(tmp_path) if package == "onnxruntime" else export_onnx(flat_guard(), tmp_path / "guard.onnx")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    guard, images = flat_guard(), torch.rand(400, 1, 4, 4)
    loader = [(images, guard.detect(images).labels)]
    Calibrator(0.1, scarce="error").fit(guard, loader)
    return guard, export_onnx(guard, tmp_path_factory.mktemp("onnx") / "guard.onnx", images), loader


def test_thresholds_that_were_set_by_hand_have_no_record(exported):
    assert load_onnx(exported[2]).calibration is None


def test_the_file_says_what_it_is_and_nothing_of_this_machine(calibrated):
    guard, path, _ = calibrated
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    properties = {own.key: own.value for own in model.metadata_props}
    assert properties["clusterguard"] == clusterguard.__version__
    assert properties["num_classes"] == "3"
    assert properties["false_positive_rate"] == "0.1"
    assert properties["method"] == "conformal"
    assert str(Path(clusterguard.__file__).parent).encode() not in path.read_bytes()
    shapes = [own.type.tensor_type.shape.dim for own in [*model.graph.input, *model.graph.output]]
    assert [shape[0].dim_param for shape in shapes] == ["batch"] * 4
    detector = load_onnx(path)
    assert torch.equal(detector.thresholds, guard.thresholds)
    assert detector.calibration == guard.calibration


def test_an_exported_graph_can_be_calibrated_again(calibrated, tmp_path):
    guard, path, loader = calibrated
    guard, detector = copy.deepcopy(guard), load_onnx(path)
    expected = Calibrator(0.3).fit(guard, loader)
    found = Calibrator(0.3).fit(detector, loader)
    assert found.counts == expected.counts
    np.testing.assert_allclose(found.thresholds, expected.thresholds, rtol=1e-5)
    saved = detector.save(tmp_path / "again.onnx")
    assert load_onnx(saved).calibration == found
    images = loader[0][0]
    assert_same(run_alone(saved, images), detector.detect(images), rtol=0)
    assert not torch.equal(run_alone(saved, images).is_adversarial, run_alone(path, images).is_adversarial)
    detector.reset_calibration()
    with pytest.raises(NotCalibratedError):
        detector.detect(images)
    with pytest.raises(NotCalibratedError):
        detector.save(saved)
    assert load_onnx(saved).calibration == found


@pytest.mark.parametrize("thresholds", [[5.0, 6.0, 7.0], [torch.inf] * 3, [torch.nan, 10.0, torch.inf], [0.0] * 3])
def test_a_graphs_evidence_and_its_verdicts_agree(calibrated, thresholds):
    _, path, loader = calibrated
    images = loader[0][0][:50].clone()
    images[3, 0, 0, 0], images[4, 0, 0, 0] = torch.nan, torch.inf
    detector = load_onnx(path)
    detector.thresholds = torch.tensor(thresholds)
    detection = detector.detect(images, check=False)
    assert_same(decide(detector.evidence(images), detector.thresholds), detection, rtol=0)
    assert detection.is_adversarial[3:5].all()


def test_images_of_another_size_are_named(calibrated):
    with pytest.raises(InputError, match=r"as the graph was exported for, of shape \(B, 1, 4, 4\).*\(2, 1, 5, 5\)"):
        load_onnx(calibrated[1]).detect(torch.rand(2, 1, 5, 5))


def test_quantised_weights_leave_thresholds_exact_and_can_be_calibrated(calibrated, tmp_path):
    guard, path, loader = calibrated
    quantize_dynamic(path, tmp_path / "int8.onnx")
    detector = load_onnx(tmp_path / "int8.onnx")
    assert torch.equal(detector.thresholds, guard.thresholds)
    assert detector.calibration == guard.calibration
    images = loader[0][0]
    exact, rounded = guard.detect(images).distances, detector.detect(images).distances
    assert 1e-4 < ((exact - rounded) / exact).abs().median() < 0.05
    Calibrator(0.1).fit(detector, loader)
    assert not torch.equal(detector.thresholds, guard.thresholds)
    assert_same(run_alone(detector.save(tmp_path / "int8.onnx"), images), detector.detect(images), rtol=0)


def test_a_failing_export_leaves_the_old_file(calibrated, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    guard, path, loader = calibrated
    before = path.read_bytes()
    monkeypatch.setattr(onnx, "save", fail)
    with pytest.raises(OSError, match="no space"):
        export_onnx(guard, path, loader[0][0])
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def foreign(path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Relu", ["images"], ["labels"])
    graph = onnx.helper.make_graph([node], "g", [value], [onnx.helper.make_empty_tensor_value_info("labels")])
    onnx.save(onnx.helper.make_model(graph), path)


@pytest.mark.parametrize(
    "make",
    [lambda path: None, lambda path: path.write_bytes(b"\xff not a graph"), foreign],
    ids=["missing", "damaged", "foreign"],
)
def test_files_that_are_no_exported_detector_are_named(make, tmp_path):
    make(tmp_path / "other.onnx")
    with pytest.raises(PersistenceError, match=r"other\.onnx is missing, damaged, or not written by export_onnx"):
        load_onnx(tmp_path / "other.onnx")


def test_exporters_warnings_and_prints_stay_out_of_sight(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_onnx(export_onnx(flat_guard(), tmp_path / "guard.onnx", torch.rand(1, 1, 4, 4)))
    assert capfd.readouterr() == ("", "")
