"""The shape of a detector's images: learned once, kept with the detector, and an error if it is another."""

import copy
import json

import clusterguard as cg
import pytest
import torch
from clusterguard.errors import ClusterGuardError, ConfigurationError, InputError, PersistenceError
from saving import read_config
from torch import nn

LABELS = torch.arange(60) % 3


def backbone():
    """It takes images of any size."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 6))


def a_guard(**options):
    guard = cg.ClusterGuard(backbone(), 3, **options)
    guard.thresholds = torch.full((3,), 100.0)
    return guard


def images_of(*shape, count=60):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))


def trained(guard, *shape, **options):
    trainer = cg.AdversarialClusterTrainer(guard, cg.FGSM(eps=0.1))
    loader = [(images_of(*shape), LABELS)]
    trainer.fit(loader, loader, epochs=1, calibrate=False, progress=False, **options)
    return guard


def calibrated(guard, *shape):
    guard.thresholds = torch.full((3,), torch.nan)
    # Labels that the detector gives make enough examples of every class that it knows.
    images = images_of(*shape)
    with torch.no_grad():
        labels = guard.evidence(images).class_scores.argmax(dim=1)
    cg.Calibrator(0.5, scarce="pool").fit(guard, [(images, labels)])
    return guard


WAYS = {
    "trained": lambda: trained(a_guard(), 1, 9, 9),
    "calibrated": lambda: calibrated(a_guard(), 1, 9, 9),
    "example": lambda: a_guard(example=images_of(1, 9, 9)),
    "option": lambda: a_guard(image_shape=(1, 9, 9)),
    "copied": lambda: copy.deepcopy(a_guard(image_shape=[1, 9, 9])),
}


@pytest.mark.filterwarnings("ignore:classes .* have too few")
@pytest.mark.parametrize("way", WAYS)
def test_images_of_another_shape_are_an_error_in_every_way_to_a_verdict(way):
    guard = WAYS[way]()
    guard.thresholds = torch.full((3,), 100.0)
    assert guard.image_shape == (1, 9, 9)
    assert guard.detect(images_of(1, 9, 9)).labels.shape == (60,)
    attack = cg.PGD(eps=0.1, step_size=0.1, steps=1)
    for shape in [(1, 9, 10), (1, 10, 9), (1, 8, 8), (3, 9, 9)]:
        guard.thresholds = torch.full((3,), 100.0)
        other = images_of(*shape)
        calls = [
            lambda x: guard.detect(x),
            lambda x: guard.detect(x, check=False),
            guard.evidence,
            guard.distances,
            guard.represent,
            guard,
            lambda x: attack(guard, x, LABELS),
            lambda x: cg.certify(guard, x, LABELS, eps=0.1),
            lambda x: cg.deployment.export_program(guard, x),
            lambda x: cg.Calibrator(0.5).fit(guard, [(x, LABELS)]),
            lambda x: cg.detectors.ConsistentDetector(guard, radius=0.1).evidence(x),
            lambda x: cg.detectors.WithThresholds(guard, guard.thresholds).evidence(x),
            lambda x: trained(guard, *x.shape[1:]),  # the last, for it forgets the thresholds
        ]
        for call in calls:
            with pytest.raises(InputError, match=r"shape \(1, 9, 9\).*, got \(\d, \d+, \d+\)"):
                call(other)
    assert guard.image_shape == (1, 9, 9)


def test_the_message_says_both_shapes_and_what_to_do():
    with pytest.raises(InputError, match=r"shape \(1, 9, 9\), .*, got \(1, 7, 9\); resize .* None .* \"any\""):
        a_guard(image_shape=(1, 9, 9)).detect(images_of(1, 7, 9))


def test_a_shape_is_learned_once_and_again_only_on_purpose():
    guard = trained(a_guard(), 1, 9, 9)
    with pytest.raises(InputError, match=r"\(1, 9, 9\)"):
        trained(guard, 1, 12, 12)
    guard.image_shape = None
    assert trained(guard, 1, 12, 12).image_shape == (1, 12, 12)


def test_a_shape_that_is_left_free_stays_free():
    guard = trained(a_guard(image_shape="any"), 1, 9, 9)
    assert guard.image_shape == "any"
    trained(guard, 1, 7, 11)
    for shape in [(1, 9, 9), (1, 12, 8)]:
        guard.detect(images_of(*shape), check=False)


def test_batches_of_several_shapes_are_an_error_unless_the_shape_is_free():
    loader = [(images_of(1, size, size), LABELS) for size in (9, 12)]
    for image_shape in (None, "any"):
        trainer = cg.AdversarialClusterTrainer(a_guard(image_shape=image_shape), cg.FGSM(eps=0.1))
        calls = [
            lambda trainer=trainer: trainer.fit(loader, loader, epochs=1, calibrate=False, progress=False),
            lambda shape=image_shape: cg.Calibrator(0.5).fit(
                cg.detectors.ConfidenceDetector(Brightest(), 3, image_shape=shape), relabelled(loader)
            ),
        ]
        for call in calls:
            if image_shape == "any":
                call()
            else:
                with pytest.raises(InputError, match=r"\(1, 9, 9\), .*, got \(1, 12, 12\)"):
                    call()


class Brightest(nn.Module):
    def forward(self, images):
        return 10 * images.flatten(1)[:, :3]


def relabelled(loader):
    return [(images, Brightest()(images).argmax(dim=1)) for images, _ in loader]


def test_a_calibration_that_fails_teaches_no_shape():
    guard = a_guard()
    with pytest.raises(ClusterGuardError):
        cg.Calibrator(0.001).fit(guard, [(images_of(1, 9, 9), LABELS)])
    assert guard.image_shape is None


def test_detectors_that_users_write_learn_it_too():
    class Mine(cg.DetectorModule):
        def evidence(self, images):
            return cg.Evidence(*(part.flatten(1)[:, :3] for part in (images, 1 - images)))

    detector = Mine(3)
    cg.Calibrator(0.5).fit(detector, relabelled([(images_of(1, 3, 3), LABELS)]))
    assert detector.image_shape == (1, 3, 3)
    with pytest.raises(InputError, match=r"\(1, 3, 3\)"):
        detector.evidence(images_of(1, 3, 4))
    with pytest.raises(InputError, match=r"\(3, 4, 4\)"):
        Mine(3, image_shape=(3, 4, 4)).detect(images_of(1, 4, 4), check=False)


@pytest.mark.parametrize(
    "shape", ["all", 28, (28, 28), (1, 0, 9), (1, -1, 9), (1, 9.0, 9), (1, 9, 9, 9), (1, None, 9, 9)]
)
def test_a_shape_that_is_none_is_named(shape):
    with pytest.raises(ConfigurationError, match="image_shape"):
        a_guard(image_shape=shape)


def test_an_example_of_another_shape_than_the_one_given_is_an_error():
    with pytest.raises(InputError, match=r"\(1, 9, 9\)"):
        a_guard(image_shape=(1, 9, 9), example=images_of(1, 8, 8))
    with pytest.raises(InputError, match=r"\(B, C, H, W\)"):
        cg.ClusterGuard(nn.Flatten(), 3, example=torch.rand(1, 9, 9))
    assert a_guard(image_shape="any", example=images_of(1, 8, 8)).image_shape == "any"


@pytest.mark.filterwarnings("ignore:no recipe rebuilds this backbone")
@pytest.mark.parametrize(
    ("shape", "told"),
    [(None, "No shape of images was recorded"), ("any", "of every shape"), ((1, 9, 9), "of shape (1, 9, 9) alone")],
)
def test_a_saved_guard_keeps_its_shape_and_its_card_tells_it(tmp_path, shape, told):
    a_guard(image_shape=shape).save_pretrained(tmp_path)
    assert cg.ClusterGuard.from_pretrained(tmp_path, backbone=backbone()).image_shape == shape
    assert told in (tmp_path / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:no recipe rebuilds this backbone")
def test_a_folder_of_version_0_1_leaves_the_shape_free_and_a_foreign_value_is_refused(tmp_path):
    a_guard(image_shape=(1, 9, 9)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = read_config(tmp_path)
    for foreign in ([1, 9], "all", {"C": 1}, 9, [1, 9, "9"]):
        file.write_text(json.dumps(config | {"guard": config["guard"] | {"image_shape": foreign}}))
        with pytest.raises(PersistenceError, match="image_shape"):
            cg.ClusterGuard.from_pretrained(tmp_path, backbone=backbone())
    del config["guard"]["image_shape"]
    file.write_text(json.dumps(config))
    assert cg.ClusterGuard.from_pretrained(tmp_path, backbone=backbone()).image_shape is None


def test_a_resumed_training_knows_the_shape_even_if_no_epoch_is_left(tmp_path):
    trained(a_guard(), 1, 9, 9, checkpoint=tmp_path / "run.pt")
    resumed = a_guard()
    trained(resumed, 1, 9, 9, checkpoint=tmp_path / "run.pt")
    assert resumed.image_shape == (1, 9, 9)


def test_a_graph_is_exported_at_the_shape_that_was_learned(tmp_path):
    guard = a_guard(image_shape=(1, 9, 9))
    assert cg.load_onnx(cg.export_onnx(guard, tmp_path / "guard.onnx")).image_shape == (1, 9, 9)
    assert cg.deployment.export_program(guard).module()(images_of(1, 9, 9))[0].shape == (60,)
