import copy

import pytest
import torch
from clusterguard import PGD, ClusterGuard
from clusterguard._support import check_detector
from clusterguard.deployment import export_program
from clusterguard.detection import Calibration
from clusterguard.errors import ConfigurationError, InputError, NotCalibratedError
from torch import nn
from torchvision import models


def test_a_guard_is_a_detector_and_a_classifier(small_guard):
    images = torch.rand(5, 1, 8, 8)
    check_detector(small_guard)
    assert small_guard.represent(images).shape == (5, 6)
    distances = small_guard.distances(images)
    detection = small_guard.detect(images)
    assert torch.equal(detection.labels, small_guard(images).argmax(1))
    torch.testing.assert_close(detection.distances, distances.amin(1))
    assert torch.equal(detection.is_adversarial, distances.amin(1) > 14.0)


def test_uncalibrated_detection_says_what_to_call(small_guard):
    small_guard.reset_calibration()
    assert not small_guard.is_calibrated
    with pytest.raises(NotCalibratedError, match=r"Calibrator\(false_positive_rate=0.01\).fit"):
        small_guard.detect(torch.rand(1, 1, 8, 8))
    assert small_guard.detect(torch.rand(4, 1, 8, 8), check=False).is_adversarial.all()


@pytest.mark.parametrize("pixel", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Sigmoid(), nn.Hardtanh()])
def test_an_image_that_is_not_finite_is_refused_and_its_neighbours_are_not(pixel, activation):
    guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(16, 4), activation), 2, example=torch.rand(1, 1, 4, 4))
    guard.thresholds = torch.full((2,), 1e6)
    images = torch.rand(3, 1, 4, 4)
    images[1, 0, 2, 2] = pixel
    assert guard.detect(images).is_adversarial.tolist() == [False, True, False]


def test_representations_that_are_not_finite_are_refused(small_guard):
    small_guard.thresholds = torch.full((3,), torch.inf)
    with torch.no_grad():
        small_guard.encoder[-1].weight[0] = torch.nan
    assert small_guard.detect(torch.rand(4, 1, 8, 8)).is_adversarial.all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(1, 8, 8), r"shape \(B, C, H, W\)"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "divide 8-bit images by 255"),
        (torch.full((1, 1, 8, 8), 1.01), "do not normalise them yourself"),
        (torch.full((1, 1, 8, 8), 200.0), "divide 8-bit images by 255"),
        (torch.zeros(3), "are images and labels in their places"),
        (torch.full((1, 1, 8, 8), -0.01), r"expected images in \[0, 1\]"),
    ],
)
def test_images_of_the_wrong_kind_are_named(small_guard, images, message):
    for call in (small_guard.detect, small_guard):  # also where gradients are recorded, as they usually are
        with pytest.raises(InputError, match=message):
            call(images)


def test_rounding_beyond_the_box_is_tolerated(small_guard):
    small_guard.detect(torch.full((1, 1, 8, 8), -3e-8))


def test_detect_leaves_every_mode_as_it_was_and_uses_eval_mode():
    torch.manual_seed(0)
    frozen = nn.BatchNorm2d(1).eval()
    guard = ClusterGuard(
        nn.Sequential(nn.Conv2d(1, 1, 3), frozen, nn.Dropout(0.9), nn.Flatten()),
        2,
        example=torch.rand(2, 1, 8, 8),
    ).train()
    guard.encoder[0][1].eval()
    guard.thresholds = torch.full((2,), 100.0)
    modes = [module.training for module in guard.modules()]
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(guard.detect(images).distances, guard.detect(images).distances)
    assert [module.training for module in guard.modules()] == modes
    assert True in modes
    assert False in modes


def test_thresholds_travel_in_the_state_dict_and_stay_exact_in_half_precision(small_guard):
    small_guard.thresholds = torch.tensor([1.0 / 3, 2.0, 7.7])
    exact = small_guard.thresholds.clone()
    copy = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU()), 3, representation_dim=6)
    copy.load_state_dict(small_guard.state_dict())
    assert copy.is_calibrated
    assert torch.equal(copy.thresholds, exact)
    small_guard.to(torch.bfloat16)
    assert torch.equal(small_guard.thresholds, exact)
    assert small_guard.detect(torch.rand(2, 1, 8, 8).bfloat16()).distances.dtype == torch.float32


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, lambda guard: guard.to(torch.bfloat16)])
def test_a_rate_holds_only_in_the_precision_in_which_it_was_fitted(small_guard, convert):
    record = Calibration((1.0, 2.0, 3.0), (90,) * 3, 300, (0.01,) * 3, 0.01, "conformal")
    small_guard.thresholds = torch.tensor(record.thresholds)
    small_guard.calibration = record
    assert small_guard.double().float().cpu().calibration == record
    with pytest.warns(UserWarning, match=r"fitted in another precision.* calibrate the detector again"):
        convert(small_guard)
    assert small_guard.calibration is None
    small_guard.calibration = record  # as if calibrated in this precision
    with pytest.warns(UserWarning, match="fitted in another precision"):
        small_guard.float()


@pytest.mark.parametrize(("part", "dtype"), [("encoder", torch.float16), ("normalize", torch.float64)])
def test_a_guard_of_which_a_part_was_cast_says_so(small_guard, part, dtype):
    getattr(small_guard, part).to(dtype)
    ours, others = (torch.float32, dtype) if part == "encoder" else (dtype, torch.float32)
    with pytest.raises(ConfigurationError, match=f"one data type, .*encoder has {others} .* have {ours}; convert"):
        small_guard.detect(torch.rand(2, 1, 8, 8), check=False)


def test_normalisation_is_inside():
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    example = torch.rand(2, 3, 2, 2)
    plain = ClusterGuard(backbone, 2, example=example)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    normalised = ClusterGuard(backbone, 2, mean=mean, std=std, example=example)
    normalised.encoder.load_state_dict(plain.encoder.state_dict())
    by_hand = (example - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(normalised.represent(example), plain.represent(by_hand))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_guard_of_a_model_in_another_precision_takes_the_images_of_this_model(dtype):
    model = models.resnet18(num_classes=4).to(dtype)
    images = torch.rand(3, 3, 32, 32)
    guard, cast = ClusterGuard(model), ClusterGuard(model.float()).to(dtype)
    assert torch.allclose(guard.distances(images.to(dtype)), cast.distances(images.to(dtype)), rtol=1e-5)
    assert guard.thresholds.dtype == torch.float32


def test_a_guard_is_on_the_device_of_its_model():
    guard = ClusterGuard(models.resnet18(num_classes=4).to("meta"))
    assert {tensor.device.type for tensor in guard.state_dict().values()} == {"meta"}
    assert guard.distances(torch.rand(3, 3, 32, 32, device="meta")).shape == (3, 4)


def test_normalisation_for_other_channels_is_refused():
    guard = ClusterGuard(nn.Flatten(), 2, mean=[0.5] * 3, std=[0.5] * 3, example=torch.rand(1, 3, 2, 2))
    with pytest.raises(InputError, match="3 channels, as mean and std have, got 1"):
        guard(torch.rand(1, 1, 2, 2))


@pytest.mark.parametrize(("mean", "std"), [([0.5] * 3, [0.5] * 2), ([0.5], [0.0]), ([0.5], [-1.0])])
def test_normalisation_that_cannot_work_is_refused(mean, std):
    with pytest.raises(ConfigurationError, match="mean and std"):
        ClusterGuard(nn.Flatten(), 2, mean=mean, std=std, example=torch.rand(1, 1, 2, 2))


@pytest.mark.parametrize("number", ["10", 10.0, True])
def test_a_number_of_classes_that_is_no_whole_number_is_refused(number):
    with pytest.raises(ConfigurationError, match="expected a whole number as num_classes"):
        ClusterGuard(nn.Flatten(), num_classes=number)


def test_a_backbone_that_does_not_tell_its_classes_needs_num_classes():
    with pytest.raises(ConfigurationError, match="pass num_classes"):
        ClusterGuard(nn.Flatten(), example=torch.rand(1, 1, 2, 2))


def counting_backend():
    """A list that grows at each run of a graph, and the backend of torch.compile that makes it grow."""
    runs = []

    def backend(graph, inputs):
        def run(*arguments):
            runs.append(graph)
            return graph(*arguments)

        return run

    return runs, backend


@pytest.fixture
def fresh_compiler():
    """What was compiled before counts towards a limit, beyond which torch compiles nothing any more."""
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what torch deprecates
@pytest.mark.usefixtures("fresh_compiler")
def test_representations_outlive_the_next_call_of_a_graph_that_reuses_its_memory(small_guard):
    """As CUDA graphs do."""

    def reusing(graph, inputs):
        memory = torch.empty(4, small_guard.head.representation_dim)

        def run(*given):
            (output,) = graph(*given)
            return (memory.copy_(output),)

        return run

    batches = torch.rand(2, 4, 1, 8, 8)
    with torch.no_grad():
        expected = [small_guard.represent(images) for images in batches]
        small_guard.compile(backend=reusing)
        actual = [small_guard.represent(images) for images in batches]
    assert all(map(torch.equal, actual, expected))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what torch deprecates
@pytest.mark.usefixtures("fresh_compiler")
def test_any_number_of_guards_can_be_compiled():
    """Torch compiles a function eight times for different modules, and then no more."""
    runs, backend = counting_backend()
    images = torch.rand(2, 1, 2, 2)
    for width in range(3, 15):
        guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(4, width)), num_classes=2, example=images)
        guard.compile(backend=backend)
        guard.distances(images)
    assert len(runs) == 12


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what torch deprecates
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # and looks at gradients that are none
@pytest.mark.filterwarnings("ignore:Guards may run slower")
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_guard_does_the_same_and_is_saved_copied_and_exported_as_before(small_guard, tmp_path):
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    attack = PGD(eps=0.2, step_size=0.05, steps=5)
    expected, attacked = small_guard.detect(images), attack(small_guard, images, labels)
    runs, backend = counting_backend()
    compiled = copy.deepcopy(small_guard)
    compiled.compile(backend=backend)
    torch.testing.assert_close(compiled.detect(images).distances, expected.distances)
    torch.testing.assert_close(attack(compiled, images, labels), attacked)
    assert len(runs) == 8  # detection, a look at gradients, and the attack's all ran through the graph
    copied = copy.deepcopy(compiled)
    runs.clear()
    torch.testing.assert_close(copied.detect(images).distances, expected.distances)
    assert not runs
    assert compiled.state_dict().keys() == small_guard.state_dict().keys()
    program = export_program(compiled, images)
    torch.testing.assert_close(program.module()(images)[1], expected.distances)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.filterwarnings("ignore:Guards may run slower")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("factor", [0.0, 1.1, torch.nan])
def test_a_compiler_that_gets_gradients_wrong_is_found_out_before_an_attack_believes_them(small_guard, factor):
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])

    class Distort(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return values.clone()

        @staticmethod
        def backward(ctx, gradient):
            return factor * gradient

    def miscompile(graph, inputs):
        return lambda *arguments: tuple(Distort.apply(output) for output in graph(*arguments))

    small_guard.compile(backend=miscompile)
    small_guard.detect(images)  # no gradient, no harm
    with pytest.raises(ConfigurationError, match="wrong input gradients"):
        PGD(eps=0.2, step_size=0.05, steps=5)(small_guard, images, labels)


def test_images_that_the_network_does_not_take_get_advice():
    guard = ClusterGuard(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), 3)
    with pytest.raises(InputError, match=r"permute\(0, 3, 1, 2\) puts the channels first"):
        guard.distances(torch.rand(2, 8, 8, 3))
    with pytest.raises(InputError, match=r"guard.float\(\) makes float32 of the guard"):
        guard.bfloat16().distances(torch.rand(2, 3, 8, 8))
    two = ClusterGuard(guard.encoder.float(), 3, mean=(0.5, 0.5))
    with pytest.raises(InputError, match="2 channels, as mean and std have, got 3"):
        two.distances(torch.rand(2, 3, 8, 8))
