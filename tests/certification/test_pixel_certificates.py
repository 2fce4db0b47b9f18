"""Certificates against changed pixels, against every change of tiny images and against attacks."""

import itertools

import pytest
import torch
from clusterguard import ClusterGuard
from clusterguard.attacks import NORMS, PGD
from clusterguard.attacks._internal import make_random_search
from clusterguard.certification import certified_radius, certified_success_rate, certify
from clusterguard.detectors import FeatureGaussians, NearestTemplate, make_template_guard
from clusterguard.errors import ConfigurationError, InputError
from torch import nn

RADII = {"linf": 0.2, "l2": 0.5, "l1": 1.5, "l0": 2, "patch": 2}


def make_guard(head, channels=1, thresholds=3.0, seed=0, scale=0.5):
    torch.manual_seed(seed)
    guard = ClusterGuard(nn.Flatten(), head=head, mean=0.5, std=0.8, example=torch.rand(1, channels, 2, 2))
    guard.encoder[1].weight.data.mul_(scale)
    guard.encoder[1].bias.data.mul_(2).add_(2)
    guard.thresholds = torch.full((head.num_classes,), thresholds)
    return guard.requires_grad_(False)


def random_guard(seed, **options):
    return make_guard(NearestTemplate(3, 6), seed=seed, **options)


def changed_images(image, count, values):
    """Every image that differs from one (C, H, W) in at most `count` pixels, with these values for each channel."""
    channels, height, width = image.shape
    colours = [torch.tensor(colour, dtype=image.dtype) for colour in itertools.product(values, repeat=channels)]
    for places in itertools.combinations(range(height * width), count):
        for chosen in itertools.product(colours, repeat=count):
            changed = image.clone()
            for place, colour in zip(places, chosen, strict=True):
                changed[:, place // width, place % width] = colour
            yield changed


@pytest.mark.parametrize("channels", [1, 2])
def test_no_change_of_few_pixels_breaks_a_proof(channels):
    proved = torch.zeros(2)
    for seed, count in itertools.product(range(4), (1, 2)):
        guard = random_guard(seed, channels=channels, thresholds=2.2, scale=0.3)
        images = torch.rand(5, channels, 2, 2).round(decimals=1)
        labels = guard.distances(images).argmin(dim=1)
        certificate = certify(guard, images, labels, eps=count, norm="l0")
        for row, image in enumerate(images):
            detection = guard.detect(torch.stack([*changed_images(image, count, (0.0, 1.0))]))
            wrong = ~detection.is_adversarial & (detection.labels != labels[row])
            kept = ~detection.is_adversarial & (detection.labels == labels[row])
            assert not (wrong.any() and certificate.is_secure[row])
            assert kept.all() or not certificate.is_kept[row]
        proved += torch.tensor([certificate.is_secure.sum(), certificate.is_kept.sum()])
    assert (proved > 0).all()
    assert (proved < 40).all()


def test_with_two_templates_the_proof_is_exact():
    """Without refusals one linear function decides, so corners of the cube are the worst that an attacker can do."""
    guard = make_guard(NearestTemplate(2, 2), thresholds=torch.inf, seed=3, scale=0.8)
    guard.encoder[1].bias.data.add_(10)  # costs above 0, where the head does not cut them off
    images = torch.rand(20, 1, 2, 2)
    labels = guard.distances(images).argmin(dim=1)
    unbroken = []
    for count in (1, 2):
        secure = certify(guard, images, labels, eps=count, norm="l0").is_secure
        changed = [torch.stack([*changed_images(image, count, (0.0, 1.0))]) for image in images]
        labels_of = [guard.detect(others).labels for others in changed]
        expected = [bool((found == label).all()) for found, label in zip(labels_of, labels, strict=True)]
        assert secure.tolist() == expected
        unbroken += expected
    assert 0 < sum(unbroken) < 40


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("head", [NearestTemplate(3, 6), FeatureGaussians(3, 4), None])
def test_attacks_break_no_certified_image(norm, head):
    if head is None:
        torch.manual_seed(5)
        guard = ClusterGuard(nn.Flatten(), 3, example=torch.rand(1, 1, 2, 2))
        guard.thresholds = torch.full((3,), 9.0)
    else:
        guard = make_guard(head, thresholds=1.5, seed=5)
        if isinstance(guard.head, FeatureGaussians):
            guard.head.centers.normal_()
    guard.requires_grad_(False)
    images = torch.rand(20, 1, 2, 2)
    labels = guard.distances(images).argmin(dim=1)
    eps = RADII[norm]
    certificate = certify(guard, images, labels, eps=eps, norm=norm)
    attacks = [
        PGD(norm=norm, eps=eps, step_size=NORMS[norm].step_size(eps, (1, 2, 2), share=0.2), steps=20),
        make_random_search(norm, eps=eps, queries=100),
    ]
    for attack in attacks:
        detection = guard.detect(attack(guard, images, labels, generator=torch.Generator().manual_seed(0)))
        broken = ~detection.is_adversarial & (detection.labels != labels)
        assert not (broken & certificate.is_secure).any()
        assert not (detection.is_adversarial & certificate.is_kept).any()


@pytest.mark.parametrize("norm", NORMS)
def test_radii_are_the_largest_that_are_proved(norm):
    guard = random_guard(2)
    images = torch.rand(6, 1, 2, 2)
    labels = guard.distances(images).argmin(dim=1)
    radii = certified_radius(guard, images, labels, norm=norm, tolerance=0.01)
    step = NORMS[norm].grain or 0.01
    assert (certify(guard, images, labels, eps=radii, norm=norm).is_secure | (radii == 0)).all()
    more = (radii + step).clamp_max(NORMS[norm].largest(images.shape[1:]))
    assert not (certify(guard, images, labels, eps=more, norm=norm).is_secure & (more > radii)).any()
    assert radii.max() > 0


@pytest.mark.parametrize("norm", ["l0", "patch"])
def test_whole_radii_are_exact_and_at_most_the_largest(norm):
    guard = random_guard(2)
    images = torch.rand(6, 1, 2, 2)
    labels = guard.distances(images).argmin(dim=1)
    exact = certified_radius(guard, images, labels, norm=norm)
    assert torch.equal(certified_radius(guard, images, labels, norm=norm, tolerance=100), exact)
    assert torch.equal(certified_radius(guard, images, labels, norm=norm, largest=1.5), exact.clamp_max(1))
    with pytest.raises(ConfigurationError, match=r"largest radius in \[1, [24]\]"):
        certified_radius(guard, images, labels, norm=norm, largest=0.5)


def test_refusal_adds_to_the_radius():
    guard = random_guard(1, thresholds=torch.inf)
    images = torch.rand(40, 1, 2, 2)
    labels = guard.distances(images).argmin(dim=1)
    without = certified_radius(guard, images, labels, norm="l1", tolerance=0.01)
    guard.thresholds = guard.distances(images).amin(dim=1).quantile(0.9).expand(3).clone()
    with_refusal = certified_radius(guard, images, labels, norm="l1", tolerance=0.01)
    assert (with_refusal >= without - 0.01).all()
    assert (with_refusal > without + 0.01).any()


def test_a_loader_has_an_upper_bound_in_any_norm():
    torch.manual_seed(0)
    labels = torch.arange(120) % 2
    images = 0.5 * torch.rand(120, 1, 3, 3) + 0.5 * labels.view(-1, 1, 1, 1)
    guard = make_template_guard([(images, labels)], 2, templates=2)
    guard.thresholds = torch.full((2,), torch.inf)
    rates = [certified_success_rate(guard, [(images, labels)], eps=eps, norm="l0").value for eps in (0, 1, 3, 9)]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0, 1)


def test_other_networks_and_methods_are_refused():
    guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), 2)
    guard.thresholds = torch.ones(2)
    images, labels = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    with pytest.raises(ConfigurationError, match="one linear layer of the pixels, as make_template_guard makes it"):
        certify(guard, images, labels, eps=1, norm="l0")
    linear = random_guard(0)
    with pytest.raises(ConfigurationError, match="method='intervals' in l0"):
        certify(linear, images, labels, eps=1, norm="l0", method="linear")
    with pytest.raises(InputError, match="from 0 to 4 in l0"):
        certify(linear, images, labels, eps=5, norm="l0")
    with pytest.raises(ConfigurationError, match="expected a number as eps"):
        certify(linear, images, labels, eps="3", norm="l0")
    with pytest.raises(ConfigurationError, match="expected a norm"):
        certify(linear, images, labels, eps=1, norm="l7")


def cut(costs):
    """Costs as they are, except that the second class gets cheap below 6.5."""
    return costs - 100 * (6.5 - costs).relu() * torch.tensor([0.0, 1.0])


@pytest.mark.parametrize(
    "change",
    [
        lambda encoder: setattr(
            encoder[1], "forward", lambda x: cut(nn.functional.linear(x, *encoder[1].parameters()))
        ),
        lambda encoder: setattr(encoder, "forward", lambda x: cut(encoder[1](x.flatten(1)))),
        lambda encoder: setattr(encoder[0], "forward", lambda x: x.flatten(1) - 10 * (-x.flatten(1)).relu()),
        lambda encoder: encoder[1].register_forward_hook(lambda _, __, costs: cut(costs)),
        lambda encoder: nn.modules.module.register_module_forward_hook(
            lambda module, _, out: cut(out) if module is encoder[1] else None
        ),
        lambda encoder: encoder.append(encoder[0]),
    ],
    ids=["layer", "encoder", "flatten", "hook", "global hook", "twice"],
)
def test_a_layer_that_computes_something_else_is_refused(change):
    """Random points of a ball of 2 among 400 pixels would not meet the two that matter."""
    guard = ClusterGuard(nn.Flatten(), head=NearestTemplate(2, 2), mean=0.5, std=1.0, example=torch.rand(1, 1, 20, 20))
    guard.thresholds = torch.ones(2)
    layer = guard.requires_grad_(False).encoder[1]
    layer.weight.zero_()
    layer.weight[:, :8] = torch.tensor([[-1.0], [1.0]])
    layer.bias.fill_(4)
    images, labels = torch.ones(1, 1, 20, 20), torch.tensor([0])
    assert certify(guard, images, labels, eps=2, norm="l0").is_secure
    hook = change(guard.encoder)
    try:
        with pytest.raises(ConfigurationError, match="one linear layer"):
            certify(guard, images, labels, eps=2, norm="l0")
    finally:
        if isinstance(hook, torch.utils.hooks.RemovableHandle):
            hook.remove()


def test_an_image_that_is_not_finite_is_not_proved():
    guard = random_guard(0)
    images = torch.rand(2, 1, 2, 2)
    images[0, 0, 0, 0] = torch.nan
    assert certify(guard, images, torch.tensor([0, 0]), eps=0, norm="l0").is_secure.tolist()[0] is False


@pytest.mark.parametrize("norm", ["linf", "l0", "l1", "l2", "patch"])
def test_pixels_that_rounding_moved_out_of_the_range_are_those_that_the_network_sees(norm):
    head = NearestTemplate(2, 2)
    guard = ClusterGuard(nn.Flatten(), head=head, mean=0.5, std=1.0, example=torch.rand(1, 1, 8, 8))
    guard.requires_grad_(False)
    layer = guard.encoder[1]
    layer.weight[0], layer.weight[1] = 1.0, 0.0
    layer.bias.copy_(torch.tensor([32.0, 64.004]))
    guard.thresholds = torch.tensor([64.002, 0.0])
    images, labels = torch.ones(20, 1, 8, 8), torch.zeros(20, dtype=torch.long)
    images[1], labels[1] = 1 + 9e-5, 1
    verdict = guard.detect(images)
    assert (verdict.labels[1], verdict.is_adversarial[1]) == (0, False)  # so the image is broken as it is
    assert not certify(guard, images, labels, eps=0.0, norm=norm).is_secure[1]
    eps, seen = 0.01 if norm == "linf" else 1.0, images.clamp(0, 1)
    assert torch.equal(*(certify(guard, part, labels, eps=eps, norm=norm).is_secure for part in (images, seen)))
    assert torch.equal(*(certified_radius(guard, part, labels, norm=norm) for part in (images, seen)))
