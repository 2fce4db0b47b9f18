"""Images that must be refused, by every way to a verdict: pixels out of [0, 1], and those that are not finite."""

import copy
import math
import types

import clusterguard as cg
import onnxruntime
import pytest
import torch
from clusterguard.detection import class_margins
from clusterguard.errors import ConfigurationError, InputError
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

SHAPE, CLASSES = (1, 4, 4), 3
BAD = [1.0003, -0.0003, 1.5, -7.0, 1e30, -1e30, math.inf, -math.inf, math.nan]
BAD_IN_BFLOAT16 = [value for value in BAD if not 1 < value < 1.004]  # in which 1.0003 is 1


class Brightness(cg.DetectorModule):
    """A detector as users write them, which squashes whatever it gets."""

    def evidence(self, images):
        pixels = images.flatten(1)[:, :CLASSES].sigmoid()
        return cg.Evidence(pixels, 1 - pixels)


class InheritedBrightness(Brightness):
    def evidence(self, images):
        scores, suspicion = super().evidence(images)
        return cg.Evidence(scores, suspicion / 2)


class Borrowing:
    def evidence(self, images):
        return Brightness.evidence.__wrapped__(self, images)


class Borrowed(Borrowing, cg.DetectorModule):
    """Its `evidence` comes from a class that knows nothing of detectors."""


def assigned(is_to_class):
    """A detector whose `evidence` is assigned when it is made already, as patches and notebooks do."""

    class Late(Brightness):
        pass

    detector, evidence = Late(CLASSES), Brightness.evidence.__wrapped__
    if is_to_class:
        Late.evidence = evidence
    else:
        detector.evidence = types.MethodType(evidence, detector)
    return with_thresholds(detector)


@pytest.mark.parametrize("is_to_class", [True, False])
def test_detection_and_graphs_refuse_also_where_evidence_was_assigned_later(is_to_class):
    detector = assigned(is_to_class)
    program = cg.deployment.export_program(detector, some_images()).module()
    for value in BAD:
        images, is_bad = spoilt(value)
        verdict = detector.detect(images, check=False)
        assert torch.equal(verdict.is_adversarial, is_bad), value
        assert torch.equal(program(images)[2], is_bad), value
        assert torch.equal(program(images)[0], verdict.labels)
    with pytest.raises(InputError, match="floating-point images"):
        detector.detect(torch.zeros(2, *SHAPE, dtype=torch.uint8), check=False)


def network(out):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, out), nn.Sigmoid())


def with_thresholds(detector):
    detector.thresholds = torch.full((CLASSES,), 1e30)
    return detector.eval()


def a_guard():
    return with_thresholds(cg.ClusterGuard(network(8), CLASSES, mean=[0.4], std=[0.3]))


def compiled():
    guard = a_guard()
    guard.compile(backend="eager")
    return guard


MAKERS = {
    "guard": a_guard,
    "compiled": compiled,
    "confidence": lambda: with_thresholds(cg.detectors.ConfidenceDetector(network(CLASSES), CLASSES)),
    "consistent": lambda: with_thresholds(cg.detectors.ConsistentDetector(a_guard(), radius=0.1)),
    "unanimous": lambda: with_thresholds(cg.detectors.UnanimousDetector(a_guard(), a_guard())),
    "subclass": lambda: with_thresholds(Brightness(CLASSES)),
    "inherited": lambda: with_thresholds(InheritedBrightness(CLASSES)),
    "borrowed": lambda: with_thresholds(Borrowed(CLASSES)),
}


@pytest.fixture(params=MAKERS)
def detector(request):
    torch._dynamo.reset()
    return MAKERS[request.param]()


def some_images(count=6):
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def spoilt(value, dtype=torch.float32):
    """Images of which the second and the last have one such pixel, and which those are."""
    images = some_images().to(dtype)
    images[1, 0, 2, 3] = images[5, 0, 0, 0] = value
    return images, torch.tensor([False, True, False, False, False, True])


def verdict_of(detector, evidence):
    return cg.decide(evidence, detector.thresholds).is_adversarial


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what torch deprecates
def test_an_image_with_a_bad_pixel_is_refused_and_its_neighbours_are_judged_as_ever(detector):
    expected = detector.detect(some_images())
    shared = cg.detectors.WithThresholds(detector, torch.full((CLASSES,), torch.inf))
    for value in BAD:
        images, is_bad = spoilt(value)
        verdict = detector.detect(images, check=False)
        assert torch.equal(verdict.is_adversarial, is_bad), value
        assert verdict.distances[is_bad].isposinf().all()
        for part, other in zip(verdict, expected, strict=True):
            assert torch.equal(part[~is_bad], other[~is_bad])
        evidence = detector.evidence(images)
        assert torch.equal(verdict_of(detector, evidence), is_bad)
        assert torch.equal(verdict_of(shared, shared.evidence(images)), is_bad)
        assert class_margins(evidence, detector.thresholds)[is_bad].isposinf().all()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(detector.detect(images, check=False).is_adversarial, is_bad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_bad_pixels_are_refused_in_every_precision_by_the_same_bounds_as_the_check(dtype):
    guard = a_guard().to(dtype)
    for value in BAD_IN_BFLOAT16 if dtype == torch.bfloat16 else BAD:
        images, is_bad = spoilt(value, dtype)
        if dtype == torch.float16 and abs(value - 1) < 0.001:
            continue  # which is 1 there, too
        assert torch.equal(guard.detect(images, check=False).is_adversarial, is_bad), value
        if images.isfinite().all():
            with pytest.raises(InputError, match="images in \\[0, 1\\]"):
                guard.detect(images)
    for value in (-1e-4, 0.0, 1.0, 1 + 1e-4):
        images, _ = spoilt(value, dtype)
        assert not guard.detect(images).is_adversarial.any()


def test_nothing_is_gained_where_pixels_are_tolerated(detector):
    images = some_images()
    images[0, 0, 0, :2] = torch.tensor([-1e-4, 1 + 1e-4])
    images[3] = 1 + 9e-5
    for got, expected in zip(detector.evidence(images), detector.evidence(images.clamp(0, 1)), strict=True):
        assert torch.equal(got, expected)
    detector.detect(images)


def test_distances_of_a_guard_are_refused_in_the_same_way():
    guard = a_guard()
    for value in BAD:
        images, is_bad = spoilt(value)
        assert torch.equal(guard.distances(images).isposinf().all(dim=1), is_bad)
    images = torch.full((1, *SHAPE), 1 + 5e-5)
    assert torch.equal(guard.distances(images), guard.distances(torch.ones(1, *SHAPE)))


@given(st.lists(st.floats(0, 1, width=32), min_size=16, max_size=16))
def test_evidence_of_images_in_the_box_and_its_gradient_are_those_of_the_bare_network(pixels):
    guard, images = GUARD, torch.tensor(pixels).view(1, *SHAPE)
    results = []
    for distances in (
        lambda x: guard.evidence(x).suspicion,
        lambda x: guard.head.distances(guard.encoder((x - guard.normalize.mean) / guard.normalize.std)),
    ):
        leaf = images.clone().requires_grad_()
        output = distances(leaf)
        results.append((output.detach(), torch.autograd.grad(output.square().sum(), leaf)[0]))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


GUARD = a_guard()
EXPORTABLE = [name for name in MAKERS if name not in ("consistent", "compiled")]


@pytest.mark.parametrize("name", EXPORTABLE)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_exported_graphs_refuse_them_too(name, tmp_path):
    detector = MAKERS[name]()
    path = cg.export_onnx(detector, tmp_path / "graph.onnx", some_images())
    session, loaded = onnxruntime.InferenceSession(str(path)), cg.load_onnx(path)
    program = cg.deployment.export_program(detector, some_images()).module()
    for value in [*BAD, -1e-4, 1 + 1e-4]:
        images, is_bad = spoilt(value)
        is_bad = is_bad & (value in BAD)
        expected = detector.detect(images, check=False)
        assert torch.equal(expected.is_adversarial, is_bad)
        raw = session.run(None, {"images": images.numpy()})
        ways = {
            "onnxruntime": tuple(map(torch.from_numpy, raw)),
            "load_onnx": loaded.detect(images, check=False),
            "its evidence": cg.decide(loaded.evidence(images), loaded.thresholds),
            "torch.export": program(images),
        }
        for way, (labels, distances, refused) in ways.items():
            assert torch.equal(refused, is_bad), (way, value)
            assert torch.equal(labels, expected.labels), (way, value)
            torch.testing.assert_close(distances, expected.distances)


def test_a_graph_in_half_precision_has_the_same_bounds(tmp_path):
    guard = a_guard().half()
    path = cg.export_onnx(guard, tmp_path / "half.onnx", some_images().half())
    session = onnxruntime.InferenceSession(str(path))
    for value, bad in [(-0.0003, True), (-1e-4, False), (1.0, False), (1.001, True), (math.inf, True)]:
        images, is_bad = spoilt(value, torch.float16)
        refused = torch.from_numpy(session.run(None, {"images": images.numpy()})[2])
        assert torch.equal(refused, is_bad & bad), value
        assert torch.equal(guard.detect(images, check=False).is_adversarial, refused)


def test_a_graph_without_the_rule_gets_it_when_it_is_loaded(tmp_path, monkeypatch):
    """As graphs that version 0.1 wrote."""
    with monkeypatch.context() as patch:
        for module in ("_base", "_guard"):
            unruled = f"clusterguard.detectors.{module}.valid_images"
            patch.setattr(unruled, lambda images: (images, images[:, 0, 0, :1] > -1e9))
        path = cg.export_onnx(a_guard(), tmp_path / "old.onnx", some_images())
    images, is_bad = spoilt(1.5)
    raw = onnxruntime.InferenceSession(str(path)).run(None, {"images": images.numpy()})
    assert not raw[2].any()
    assert torch.equal(cg.load_onnx(path).detect(images, check=False).is_adversarial, is_bad)


@pytest.mark.parametrize("suspicion", [torch.zeros(3), torch.zeros(3, 1), torch.zeros(3, 4)])
def test_evidence_of_a_wrong_shape_is_named_instead_of_spread_over_the_batch(suspicion):
    class Wrong(cg.DetectorModule):
        def evidence(self, images):
            return cg.Evidence(torch.zeros(3, 3), suspicion)

    with pytest.raises(InputError, match=r"suspicion of shape \(3, 3\)"):
        Wrong(3).evidence(torch.rand(3, *SHAPE))


@pytest.mark.parametrize("images", [None, [[0.5]], torch.rand(4, 4), torch.zeros(2, *SHAPE, dtype=torch.uint8)])
def test_what_is_no_batch_of_images_is_named(images):
    for detector in (a_guard(), with_thresholds(Brightness(CLASSES))):
        with pytest.raises(InputError, match="expected floating-point images"):
            detector.evidence(images)


class Failing(nn.Module):
    """Raises what torch raises for images that a layer cannot take."""

    def __init__(self, fail):
        super().__init__()
        self.fail = fail

    def forward(self, images):
        self.fail(images)
        return images.flatten(1)


@pytest.mark.parametrize(
    "fail",
    [
        nn.BatchNorm1d(4, track_running_stats=False),  # a ValueError, for features of another number of dimensions
        nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16, track_running_stats=False)),  # a ValueError, for one image
        lambda images: images.mean(4),  # an IndexError
        lambda images: images @ torch.ones(99),  # a RuntimeError
    ],
)
def test_errors_of_torch_for_images_that_a_network_cannot_take_are_ours(fail):
    guard = cg.ClusterGuard(Failing(lambda images: None), CLASSES, example=some_images(), image_shape="any")
    guard.thresholds = torch.ones(CLASSES)
    guard.encoder[0].fail = fail
    with pytest.raises(InputError, match="images that the network can take"):
        guard.detect(some_images(1))


class Noisy(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, images):
        return images.flatten(1) + self.size * torch.randn_like(images.flatten(1))


class Drifting(nn.Module):
    calls = 0

    def forward(self, images):
        self.calls += 1
        return images.flatten(1) * self.calls


@pytest.mark.parametrize("backbone", [Noisy(1e-3), Noisy(1.0), Drifting(), nn.Sequential(nn.Flatten(), Noisy(0.1))])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_detector_that_changes_its_mind_is_neither_calibrated_nor_exported(backbone, tmp_path):
    guard = cg.ClusterGuard(backbone, CLASSES, example=some_images(), image_shape="any")
    loader = [(some_images(300), torch.arange(300) % CLASSES)]
    with pytest.raises(ConfigurationError, match="the same images the same class scores at every call"):
        cg.Calibrator(0.5).fit(guard, loader)
    assert not guard.is_calibrated
    guard.thresholds = torch.ones(CLASSES)
    with pytest.raises(ConfigurationError, match="at every call"):
        cg.deployment.export_program(guard, some_images())
    with pytest.raises(ConfigurationError, match="at every call"):
        cg.export_onnx(guard, tmp_path / "graph.onnx", some_images())
    assert not [*tmp_path.iterdir()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("training", [True, False])
def test_detection_that_is_compiled_refuses_as_well(training):
    torch._dynamo.reset()
    guard, (images, is_bad) = a_guard().train(training), spoilt(1.5)
    detect = torch.compile(lambda x: guard.detect(x, check=False), backend="eager")
    assert torch.equal(detect(images).is_adversarial, is_bad)
    assert {module.training for module in guard.modules()} == {training}


def test_a_copy_refuses_as_well():
    images, is_bad = spoilt(1.5)
    assert torch.equal(copy.deepcopy(a_guard()).detect(images, check=False).is_adversarial, is_bad)
