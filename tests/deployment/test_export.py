import copy
import logging
import sys
import threading
import time
import warnings

import pytest
import timm
import torch
from clusterguard import ClusterGuard, Detection, DetectorModule, Evidence, decide, export_onnx, load_onnx
from clusterguard.deployment import export_program, load_program, save_program
from clusterguard.detection import full_precision
from clusterguard.detectors import ConfidenceDetector, WithThresholds
from clusterguard.errors import (
    ConfigurationError,
    InputError,
    MissingDependencyError,
    NotCalibratedError,
    PersistenceError,
)
from exporting import assert_same, flat_guard, run_alone, set_thresholds, spread
from torch import Tensor, nn
from torch.nn.functional import pad

IMAGES = torch.rand(5, 1, 6, 6, generator=torch.Generator().manual_seed(0))
BACKBONES = {
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    ),
    "resnet": lambda: timm.create_model("test_resnet", in_chans=1, num_classes=10, drop_rate=0.5),
    "vit": lambda: timm.create_model("test_vit", in_chans=1, num_classes=10, img_size=32),
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
    guard.thresholds = torch.full((4,), torch.finfo(torch.float32).max)
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


def test_a_program_judges_no_images_of_another_kind_than_it_was_exported_for(exported):
    _, program, _, images = exported
    judge = program.module()
    for wrong in (images[..., :-1], images[..., :-1, :], images.expand(-1, 3, -1, -1), images[:, 0]):
        with pytest.raises(AssertionError, match="Guard failed"):
            judge(wrong)
    with pytest.raises(RuntimeError, match="dtype"):
        judge(images.double())


def test_a_graph_does_not_follow_its_detector(tmp_path):
    guard, images = flat_guard(), torch.rand(8, 1, 4, 4)
    program = export_program(guard, images)
    before = guard.detect(images)
    guard.thresholds = guard.thresholds * 0
    with torch.no_grad():
        guard.encoder[-1].weight.zero_()
    assert_same(Detection(*program.module()(images)), before)


def test_damage_of_a_saved_program_is_noticed(tmp_path):
    guard, images = flat_guard(), torch.rand(8, 1, 4, 4)
    guard.thresholds = torch.full_like(guard.thresholds, 9.0)
    file, expected = save_program(guard, tmp_path / "guard.pt2", images), guard.detect(images)
    assert_same(Detection(*load_program(file).module()(images)), expected)
    assert_same(Detection(*torch.export.load(file).module()(images)), expected)  # without this library
    content, refused = file.read_bytes(), 0
    for place in range(0, len(content), len(content) // 40):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        try:
            program = load_program(file)
        except PersistenceError:
            refused += 1
        else:
            assert_same(Detection(*program.module()(images)), expected)
    assert refused > 10
    torch.export.save(export_program(guard, images), file)
    with pytest.raises(PersistenceError, match="not written by save_program"):
        load_program(file)


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
    thresholds = {"call Calibrator": [torch.nan, 9.0], "infinite ones for classes 0, 1": [torch.inf, -torch.inf]}
    for problem, values in thresholds.items():
        guard.thresholds = torch.tensor(values)
        for export in (export_program, lambda guard, images: export_onnx(guard, tmp_path / "guard.onnx", images)):
            with pytest.raises(NotCalibratedError, match=problem):
                export(guard, torch.rand(1, 1, 4, 4))
    assert not list(tmp_path.iterdir())


class Branching(nn.Module):
    """Does one thing with a few images and another with many, or with dark images and bright ones."""

    def __init__(self, of_images):
        super().__init__()
        self.linear, self.of_images = nn.Linear(16, 8), of_images

    def forward(self, images):
        features = self.linear(images.flatten(1))
        return features if (images.mean() > 0.9 if self.of_images else len(images) < 9) else features * 2


@pytest.mark.parametrize("of_images", [True, False])
def test_a_network_that_torch_cannot_follow_is_refused_in_a_sentence(of_images, tmp_path, capfd, caplog, monkeypatch):
    for name in ("torch.fx.experimental.symbolic_shapes", "torch.export"):  # which hand nothing on
        monkeypatch.setattr(logging.getLogger(name), "handlers", [caplog.handler])
    images = torch.rand(2, 1, 4, 4)
    guard = ClusterGuard(Branching(of_images), 2, example=images)
    guard.thresholds = torch.full((2,), 9.0)
    for export in (export_program, lambda guard, images: export_onnx(guard, tmp_path / "guard.onnx", images)):
        with pytest.raises(ConfigurationError, match=r"torch\.export can follow .*What went wrong: ") as caught:
            export(guard, images)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_graph_of_a_detector_for_every_shape_says_that_it_takes_one():
    detector = ConfidenceDetector(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), 4, image_shape="any")
    detector.thresholds = torch.ones(4)
    with pytest.warns(UserWarning, match=r"every shape, but the graph will take those of shape \(1, 6, 6\) alone"):
        export_program(detector, IMAGES)


def test_a_timm_backbone_tells_the_size_of_its_images():
    guard = ClusterGuard(timm.create_model("test_vit", in_chans=1, num_classes=2, img_size=48))
    guard.thresholds = torch.full((2,), 10.0)
    assert export_program(guard).module()(torch.rand(3, 1, 48, 48))[0].shape == (3,)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_are_named(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"run: pip install .*{package}"):
        load_onnx(tmp_path) if package == "onnxruntime" else export_onnx(flat_guard(), tmp_path / "guard.onnx")


def test_thresholds_that_were_set_by_hand_have_no_record(exported):
    assert load_onnx(exported[2]).calibration is None


def test_exporters_warnings_and_prints_stay_out_of_sight(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_onnx(export_onnx(flat_guard(), tmp_path / "guard.onnx", torch.rand(1, 1, 4, 4)))
    assert capfd.readouterr() == ("", "")


def test_graphs_hold_no_casts_of_an_autocast_around_the_export(tmp_path):
    guard, images = ClusterGuard(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), 2, example=IMAGES), IMAGES
    guard.thresholds = torch.full((2,), 20.0)
    expected = guard.detect(images)
    with torch.autocast("cpu", torch.bfloat16):
        path = export_onnx(guard, tmp_path / "guard.onnx", images)
        program = export_program(guard, images)
        assert torch.equal(guard.detect(images).distances, expected.distances)
    for verdict in (load_onnx(path).detect(images), Detection(*program.module()(images))):
        torch.testing.assert_close(verdict.distances, expected.distances, rtol=1e-5, atol=1e-5)


def test_exports_in_two_threads_beside_a_detection_leave_the_process_as_it_was():
    guard, images = flat_guard(), torch.rand(2, 1, 4, 4)
    before, errors = (sys.stderr, [*warnings.filters], logging.getLogger("torch.export").level), []

    def export():
        try:
            with full_precision():  # as detect does
                export_program(guard, images)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=export) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)  # so that the first to begin is the first to end
    for thread in threads:
        thread.join()
    assert errors == []
    assert (sys.stderr, warnings.filters, logging.getLogger("torch.export").level) == before


class Waiting(nn.Module):
    """Lets others go on in the middle of an export, and waits for them."""

    def __init__(self):
        super().__init__()
        self.flatten, self.begun, self.read = nn.Flatten(), threading.Event(), threading.Event()

    def __deepcopy__(self, memo):
        return self

    def forward(self, images):
        if torch.compiler.is_compiling():
            self.begun.set()
            self.read.wait(30)
        return self.flatten(images)


def test_others_read_as_ever_while_a_thread_exports():
    waiting, images = Waiting(), torch.rand(6, 1, 4, 4)
    slow = ClusterGuard(nn.Sequential(waiting, nn.Linear(16, 8)), 3, example=images)
    slow.thresholds = torch.ones(3)
    guard = flat_guard().train()
    expected = guard.detect(images)
    thread = threading.Thread(target=export_program, args=(slow, images))
    thread.start()
    try:
        assert waiting.begun.wait(30)
        assert_same(guard.detect(images), expected, rtol=0)  # in train mode, which takes a view
        with pytest.raises(InputError, match="images"):
            guard.evidence(images[0])
        assert guard.training
    finally:
        waiting.read.set()
        thread.join()


def test_what_is_no_module_of_ours_is_not_exported():
    guard = ClusterGuard(nn.Flatten(), 2, example=IMAGES)
    with pytest.raises(ConfigurationError, match="expected a DetectorModule such as a guard, got WithThresholds"):
        export_program(WithThresholds(guard, torch.full((2,), 20.0)), IMAGES)
