"""The head of templates, and the guard and the trainer around it."""

import pytest
import torch
from clusterguard import Calibrator, ClusterGuard, certify, export_onnx, load_onnx
from clusterguard.certification import Interval
from clusterguard.detectors import NearestTemplate, make_template_guard
from clusterguard.errors import ConfigurationError, InputError
from clusterguard.training import TemplateTrainer, TrainingOptions
from torch import nn


@pytest.fixture
def data():
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    images = 0.4 * torch.rand(300, 1, 4, 4)
    images[torch.arange(300), 0, labels] += 0.6  # a bright row for each class
    return images, labels


def parts(data):
    """Disjoint halves of the images, as loaders for training and calibration."""
    images, labels = data
    return [(images[:150], labels[:150])], [(images[150:], labels[150:])]


@pytest.fixture
def trained(data):
    guard = make_template_guard([data], 3, templates=2)
    TemplateTrainer(guard, pixels=1, calibrator=Calibrator(0.1)).fit(*parts(data), epochs=30, progress=False)
    return guard


def test_the_distance_is_the_smallest_cost_of_the_class():
    costs = torch.tensor([[4.0, 2.0, -1.0, 3.0]])
    assert NearestTemplate(2, 4).distances(costs).tolist() == [[2.0, 0.0]]
    with pytest.raises(ConfigurationError, match="multiple of num_classes=3"):
        NearestTemplate(3, 4)


def test_the_first_templates_are_the_first_images_of_each_class(data):
    images, labels = data
    guard = make_template_guard([(images[:100], labels[:100]), (images[100:], labels[100:])], 3, templates=2)
    layer = guard.encoder[1]
    first = torch.stack([images[labels == label][:2] for label in range(3)]).flatten(0, 1)
    smooth = nn.functional.avg_pool2d(first, 3, stride=1, padding=1, count_include_pad=False)
    assert torch.equal(layer.weight, 0.5 * (1 - 2 * smooth).flatten(1))
    assert (guard.distances(images) >= 0).all()
    with pytest.raises(InputError, match="class 0 has 100"):
        make_template_guard([data], 3, templates=101)
    with pytest.raises(InputError, match="images of one shape"):
        make_template_guard([data, (torch.rand(3, 1, 5, 5), torch.arange(3))], 3, templates=101)
    with pytest.raises(ConfigurationError, match="at least 1 template"):
        make_template_guard([data], 3, templates=0)


def test_after_training_no_pixel_adds_more_than_one(data, trained):
    images, labels = data
    assert trained.encoder[1].weight.abs().max() <= 1
    assert (trained.detect(images).labels == labels).float().mean() > 0.98
    flipped = images.clone()
    flipped[:, 0, 2, 2] = 1 - flipped[:, 0, 2, 2].round()
    moved = (trained.distances(flipped) - trained.distances(images)).abs()
    assert moved.max() <= 1 + 1e-4
    assert (trained.encoder(trained.normalize(torch.rand(50, 1, 4, 4).round())) >= -1e-4).all()


def test_channels_share_what_a_pixel_may_add():
    images, labels = torch.rand(20, 3, 4, 4), torch.arange(20) % 2
    loader = [(images, labels)]
    guard = make_template_guard(loader, 2, templates=1)
    TemplateTrainer(guard).fit(loader, loader, epochs=1, calibrate=False, progress=False)
    assert guard.encoder[1].weight.abs().max() <= 1 / 3 + 1e-6


@pytest.mark.parametrize("channels", [1, 3])
def test_averaged_templates_keep_the_limits(channels):
    images, labels = torch.rand(60, channels, 4, 4), torch.arange(60) % 3
    loader = [(images[:30], labels[:30]), (images[30:], labels[30:])]
    guard = make_template_guard(loader, 3, templates=2)
    options = TrainingOptions(average_decay=0.5)
    trainer = TemplateTrainer(guard, optimizer=torch.optim.SGD(guard.parameters(), lr=5.0), options=options)
    trainer.fit(loader, loader, epochs=3, calibrate=False, progress=False)
    layer = guard.encoder[1]
    assert layer.weight.unflatten(1, (channels, 16)).abs().sum(dim=1).max() <= 1 + 1e-6
    assert (layer.bias >= layer.weight.abs().sum(dim=1) / 2 - 1e-5).all()


def test_it_is_saved_and_exported_like_any_guard(data, trained, tmp_path):
    images, labels = data
    trained.save_pretrained(tmp_path / "guard")
    again = ClusterGuard.from_pretrained(tmp_path / "guard")
    assert torch.equal(again.distances(images), trained.distances(images))
    assert certify(again, images[:5], labels[:5], eps=1, norm="l0").is_secure.any()
    export_onnx(trained, tmp_path / "guard.onnx", images[:1])
    detection = load_onnx(tmp_path / "guard.onnx").detect(images[:20])
    assert detection.labels.tolist() == trained.detect(images[:20]).labels.tolist()


def test_interval_bounds_hold_for_any_network(data):
    torch.manual_seed(1)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 6))
    guard = ClusterGuard(backbone, head=NearestTemplate(3, 6), example=data[0][:1]).requires_grad_(False)
    guard.encoder[-1].bias += 1  # costs above 0, where the head does not cut them off
    guard.thresholds = torch.full((3,), torch.inf)
    images = data[0][:30]
    labels = guard.distances(images).argmin(dim=1)
    certificate = certify(guard, images, labels, eps=0.05)
    assert certificate.is_secure.any()
    for sign in (-1, 1):
        moved = guard.detect((images + 0.05 * sign).clamp(0, 1))
        assert not (certificate.is_secure & ~moved.is_adversarial & (moved.labels != labels)).any()
    point = Interval(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 2.0]]))
    assert point.lowest_above(torch.tensor([1])).tolist() == [[-1.0, 0.0]]


def test_the_trainer_refuses_other_guards(data):
    guard = ClusterGuard(nn.Flatten(), 3, example=data[0][:1])
    with pytest.raises(ConfigurationError, match=r"as make_template_guard (or make_local_guard )?returns it"):
        TemplateTrainer(guard)
    with pytest.raises(ConfigurationError, match=r"with mean=0\.5, std=1\.0"):
        TemplateTrainer(ClusterGuard(nn.Flatten(), head=NearestTemplate(3, 6), std=0.2, example=data[0][:1]))
    with pytest.raises(ConfigurationError, match="positive temperature"):
        TemplateTrainer(make_template_guard([data], 3, templates=1), temperature=0)
