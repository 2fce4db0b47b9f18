"""Patches of a given side, at any place and with any value, are a threat model like the norms."""

import pytest
import torch
from clusterguard import Evidence, WorstCaseSuite, evaluate, success_margin
from clusterguard.attacks import Metered, Patch, PatchAttack, Polish, get_norm
from clusterguard.errors import ConfigurationError
from torch import nn
from torch.nn import functional


class Sticker(nn.Module):
    """Accepts a wrong label in so far as one block of 2 x 2 pixels, anywhere in the image, is a white diagonal."""

    thresholds = torch.tensor([0.5, 0.5])
    block = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])

    def evidence(self, images):
        likeness = functional.conv2d(images.mean(dim=1, keepdim=True), self.block[None, None]).flatten(1).amax(dim=1)
        away = 2 - likeness
        return Evidence(torch.stack([away - 0.5, torch.zeros_like(away)], dim=1), torch.stack([0 * away, away], dim=1))


@pytest.fixture
def cases(small_guard):
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return images, small_guard(images).argmax(1)


def margins_of(guard, images, labels, targets=None):
    return success_margin(guard.evidence(images), guard.thresholds, labels, targets)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_size_is_the_side_of_the_square_that_covers_the_change():
    changes = torch.zeros(5, 3, 6, 7)
    changes[1, 2, 4, 4] = -0.1
    changes[2, 0, 1, 1], changes[2, 1, 3, 2] = 0.5, 0.5  # rows 1 to 3
    changes[3, :, 0, 0], changes[3, :, 0, 6] = 1.0, 1.0  # columns 0 to 6
    changes[4] = 1.0
    assert Patch().size(changes).tolist() == [0, 1, 3, 7, 7]


def test_only_one_pixel_is_always_inside():
    assert [Patch().pixels_inside(eps, (3, 6, 6)) for eps in (0, 1, 4)] == [0, 1, 1]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_the_patch_that_opens_a_door_is_found(channels, shape):
    images, labels = torch.full((8, channels, *shape), 0.5), torch.zeros(8, dtype=torch.int64)
    attacked = PatchAttack(eps=2)(Sticker(), images, labels, generator=seeded())
    assert (margins_of(Sticker(), attacked, labels) <= 0).sum() >= 6
    assert (Patch().size(attacked - images) <= 2).all()
    alone = PatchAttack(eps=1, rounds=6)(Sticker(), images, labels, generator=seeded())
    assert (margins_of(Sticker(), alone, labels) > 0).all()


@pytest.mark.parametrize("eps", [0, 1, 3, 8])
def test_patches_lower_margins_inside_one_square(small_guard, cases, eps):
    images, labels = cases
    attacked = PatchAttack(eps=eps, rounds=4)(small_guard, images, labels, generator=seeded())
    assert (Patch().size(attacked - images) <= eps).all()
    assert ((attacked >= 0) & (attacked <= 1)).all()
    before, after = (margins_of(small_guard, x, labels) for x in (images, attacked))
    assert (after <= before).all()
    assert (after < before)[before > 0].all() == (eps > 0)


def test_a_larger_patch_breaks_more(small_guard, cases):
    report = evaluate(
        small_guard,
        {str(eps): PatchAttack(eps=eps, rounds=6) for eps in (1, 3, 8)},
        [cases],
        generator=seeded(),
        sanity_images=0,
    )
    counts = [result.success.count for result in report.results]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
    assert [(result.norm, result.invalid) for result in report.results] == [("patch", 0)] * 3


def test_what_is_broken_costs_nothing_more(small_guard, cases):
    images, labels = cases
    small_guard.thresholds = torch.full((3,), 1e3)
    metered = Metered(small_guard)
    assert torch.equal(PatchAttack(eps=3)(metered, images, (labels + 1) % 3), images)
    assert metered.cost == (len(images), 0)


def test_a_suite_of_patches_is_no_weaker_than_the_attack(small_guard, cases, light_suites):
    images, labels = cases
    suite = WorstCaseSuite("patch", eps=3, budget="quick")
    result = suite.run(small_guard, images, labels, generator=seeded())
    assert (get_norm("patch").size(result.images - images) <= 3).all()
    alone = PatchAttack(eps=3, rounds=2)(small_guard, images, labels, generator=seeded())
    hit, missed = (margins_of(small_guard, x, labels) for x in (alone, result.images))
    assert not ((hit <= 0) & (missed > 0)).any()
    assert 0 < (missed <= 0).sum() < 20


def test_other_attacks_take_patches_too(small_guard, cases):
    attack = Polish(norm="patch", eps=3, rounds=2, halvings=1, tries=2, steps=3)
    attacked = attack(small_guard, *cases, generator=seeded())
    assert (Patch().size(attacked - cases[0]) <= 3).all()


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"proposals": 0}, {"steps": 0}, {"step_size": 0}, {"eps": -1}])
def test_options_are_checked_at_once(wrong):
    with pytest.raises(ConfigurationError, match="expected"):
        PatchAttack(**({"eps": 3} | wrong))
