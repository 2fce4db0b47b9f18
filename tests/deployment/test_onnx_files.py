import copy
from pathlib import Path

import clusterguard
import numpy as np
import onnx
import pytest
import torch
from clusterguard import Calibrator, decide, export_onnx, load_onnx
from clusterguard.errors import ConfigurationError, InputError, NotCalibratedError, PersistenceError
from exporting import assert_same, flat_guard, run_alone
from onnxruntime.quantization import quantize_dynamic


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    guard, images = flat_guard(), torch.rand(400, 1, 4, 4)
    loader = [(images, guard.detect(images).labels)]
    Calibrator(0.1, scarce="error").fit(guard, loader)
    return guard, export_onnx(guard, tmp_path_factory.mktemp("onnx") / "guard.onnx", images), loader


def test_the_file_says_what_it_is_and_nothing_of_this_machine(calibrated):
    guard, path, _ = calibrated
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["clusterguard"] == clusterguard.__version__
    assert properties["num_classes"] == "3"
    assert properties["false_positive_rate"] == "0.1"
    assert properties["method"] == "conformal"
    assert str(Path(clusterguard.__file__).parent).encode() not in path.read_bytes()
    shapes = [value.type.tensor_type.shape.dim for value in [*model.graph.input, *model.graph.output]]
    assert [shape[0].dim_param for shape in shapes] == ["batch"] * 4
    detector = load_onnx(path)
    assert torch.equal(detector.thresholds, guard.thresholds)
    assert detector.calibration == guard.calibration
    assert (detector.class_names, detector.card) == (None, None)  # the guard has none


def test_an_exported_graph_can_be_calibrated_again(calibrated, tmp_path):
    guard, path, loader = calibrated
    guard, detector = copy.deepcopy(guard), load_onnx(path)
    expected = Calibrator(0.3).fit(guard, loader)
    fitted = Calibrator(0.3).fit(detector, loader)
    assert fitted.counts == expected.counts
    np.testing.assert_allclose(fitted.thresholds, expected.thresholds, rtol=1e-5)
    saved = detector.save(tmp_path / "again.json")  # by whose name ONNX would choose another format
    assert load_onnx(saved).calibration == fitted
    images = loader[0][0]
    assert_same(run_alone(saved, images), detector.detect(images), rtol=0)
    assert not torch.equal(run_alone(saved, images).is_adversarial, run_alone(path, images).is_adversarial)
    detector.reset_calibration()
    with pytest.raises(NotCalibratedError):
        detector.detect(images)
    with pytest.raises(NotCalibratedError):
        detector.save(saved)
    assert load_onnx(saved).calibration == fitted


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
    quantize_dynamic(path, tmp_path / "int8.onnx", reduce_range=True)  # else sums saturate on CPUs without VNNI
    detector = load_onnx(tmp_path / "int8.onnx")
    assert torch.equal(detector.thresholds, guard.thresholds)
    assert detector.calibration == guard.calibration
    with pytest.raises(PersistenceError, match="thresholds"):
        load_onnx(flipped(tmp_path / "int8.onnx", guard.thresholds.numpy().tobytes(), tmp_path / "damaged.onnx"))
    images = loader[0][0]
    exact, rounded = guard.detect(images).distances, detector.detect(images).distances
    assert 1e-4 < ((exact - rounded) / exact).abs().median() < 0.05
    Calibrator(0.1).fit(detector, loader)
    assert not torch.equal(detector.thresholds, guard.thresholds)
    assert_same(run_alone(detector.save(tmp_path / "int8.onnx"), images), detector.detect(images), rtol=0)


def flipped(path: Path, content: bytes, to: Path) -> Path:
    """A copy in which one bit of this content, an exponent's where it is of numbers, is another."""
    whole = bytearray(path.read_bytes())
    whole[whole.index(content) + 3] ^= 0x20
    to.write_bytes(whole)
    return to


def test_a_graph_with_another_bit_in_its_thresholds_or_weights_is_refused(calibrated, tmp_path):
    guard, path, _ = calibrated
    weights = guard.encoder[0][1].weight.detach().numpy().tobytes()
    for content, what in (
        (guard.thresholds.numpy().tobytes(), "thresholds, or the record"),
        (b'_rate": 0.1', "thresholds, or the record"),
        (weights, "weights or operations"),
    ):
        with pytest.raises(PersistenceError, match=rf"guard\.onnx is missing, damaged.*{what}"):
            load_onnx(flipped(path, content, tmp_path / "guard.onnx"))


def test_any_flipped_bit_is_harmless_or_refused(calibrated, tmp_path):
    _, path, loader = calibrated
    whole, images, expected = path.read_bytes(), loader[0][0], load_onnx(path).detect(loader[0][0])
    generator, refused = torch.Generator().manual_seed(0), 0
    for position in torch.randint(8 * len(whole), (60,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        (tmp_path / "guard.onnx").write_bytes(damaged)
        try:
            detector = load_onnx(tmp_path / "guard.onnx")
        except PersistenceError:
            refused += 1
            continue
        assert_same(detector.detect(images), expected, rtol=0)
    assert refused > 20


def test_a_graph_without_a_digest_as_older_versions_wrote_it_is_read(calibrated, tmp_path):
    model = onnx.load(calibrated[1])
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties.pop("digest")
    onnx.helper.set_model_props(model, properties)
    onnx.save(model, tmp_path / "old.onnx")
    detector = load_onnx(tmp_path / "old.onnx")
    assert torch.equal(detector.thresholds, calibrated[0].thresholds)
    assert {entry.key for entry in onnx.load(detector.save(tmp_path / "new.onnx")).metadata_props} > {"digest"}


def test_a_graph_with_infinite_thresholds_is_not_calibrated(calibrated, tmp_path):
    model = onnx.load(calibrated[1])
    onnx.helper.set_model_props(model, {"clusterguard": "0.2"})  # no digest, as in older versions
    (initializer,) = (entry for entry in model.graph.initializer if entry.name == "thresholds")
    initializer.raw_data = torch.full_like(calibrated[0].thresholds, torch.inf).numpy().tobytes()
    onnx.save(model, tmp_path / "open.onnx")
    with pytest.warns(UserWarning, match=r"expected finite thresholds in .*open\.onnx, got infinite ones"):
        detector = load_onnx(tmp_path / "open.onnx")
    assert not detector.is_calibrated
    with pytest.raises(NotCalibratedError):
        detector.detect(torch.rand(2, 1, 4, 4))


def test_a_card_with_a_flipped_bit_is_noticed(calibrated, tmp_path):
    detector, text = load_onnx(calibrated[1]), "Refuses 1 % of benign images."
    detector.card = text
    path = detector.save(tmp_path / "guard.onnx")
    content = path.read_bytes()
    assert load_onnx(path).card == text
    path.write_bytes(content.replace(b"Refuses 1 %", b"Refuses 0 %"))
    with pytest.raises(PersistenceError, match="its card is not the one that was exported"):
        load_onnx(path)


def test_a_graph_whose_weights_another_tool_moved_out_keeps_its_digest(calibrated, tmp_path):
    _, path, loader = calibrated
    onnx.save(onnx.load(path), tmp_path / "two.onnx", save_as_external_data=True, location="w", size_threshold=99)
    assert_same(load_onnx(tmp_path / "two.onnx").detect(loader[0][0]), load_onnx(path).detect(loader[0][0]), rtol=0)


def test_a_folder_is_no_place_for_a_graph(calibrated, tmp_path):
    guard, path, _ = calibrated
    with pytest.raises(ConfigurationError, match=rf"got the folder {tmp_path}; .*guard\.onnx"):
        export_onnx(guard, tmp_path, torch.rand(1, 1, 4, 4))
    with pytest.raises(ConfigurationError, match="got the folder"):
        load_onnx(path).save(tmp_path)


def test_a_graph_needs_a_name_in_utf_8(calibrated, tmp_path):
    with pytest.raises(ConfigurationError, match="expected a path in UTF-8"):
        export_onnx(calibrated[0], tmp_path / "\udcff.onnx", torch.rand(1, 1, 4, 4))


def test_a_failing_export_leaves_the_old_file(calibrated, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    guard, path, loader = calibrated
    before = path.read_bytes()
    monkeypatch.setattr(onnx, "save", fail)
    with pytest.raises(PersistenceError, match=r"could not be written .*no space"):
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
    with pytest.raises(
        PersistenceError, match=r"other\.onnx is missing, damaged, or not written by export_onnx|no file .*other\.onnx"
    ):
        load_onnx(tmp_path / "other.onnx")


def test_threads_of_a_graph_need_not_spin(calibrated):
    _, path, loader = calibrated
    plain, quiet = load_onnx(path), load_onnx(path, spinning=False)
    key = "session.intra_op.allow_spinning"
    options = [detector._session.get_session_options() for detector in (plain, quiet)]
    assert [entries.get_session_config_entry(key) for entries in options] == ["1", "0"]
    assert_same(plain.detect(loader[0][0]), quiet.detect(loader[0][0]), rtol=0)
