import pytest
import torch
from clusterguard import evaluate
from clusterguard.errors import InputError
from clusterguard.evaluation import estimate_breakable
from hypothesis import given
from hypothesis import strategies as st

MASKS = st.integers(1, 60).flatmap(
    lambda count: st.tuples(*(st.lists(st.booleans(), min_size=count, max_size=count) for _ in range(2)))
)


@given(MASKS)
def test_the_estimate_lies_between_what_was_broken_and_all_images(masks):
    first, second = map(torch.tensor, masks)
    estimate = estimate_breakable(first, second)
    low, high = estimate.interval
    assert int((first | second).sum()) == estimate.either <= low <= estimate.total <= high <= len(first)
    assert estimate_breakable(second, first) == estimate


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_runs_that_agree_leave_nothing(mask):
    broken = torch.tensor(mask)
    assert estimate_breakable(broken, broken).total == broken.sum()


@pytest.mark.parametrize(("breakable", "chance"), [(300, 0.5), (300, 0.8), (60, 0.6)])
def test_independent_runs_reveal_how_many_images_can_be_broken(breakable, chance):
    generator = torch.Generator().manual_seed(0)
    runs = torch.rand(2, 400, breakable, generator=generator) < chance
    unbreakable = torch.zeros(2, 400, 500 - breakable, dtype=torch.bool)
    estimates = [estimate_breakable(*pair) for pair in torch.cat([runs, unbreakable], dim=2).unbind(dim=1)]
    assert sum(estimate.total for estimate in estimates) / 400 == pytest.approx(breakable, rel=0.02)
    inside = sum(low <= breakable <= high for *_, (low, high) in estimates) / 400
    assert inside > 0.88


@pytest.mark.parametrize("second", [torch.zeros(3, dtype=torch.bool), torch.zeros(4), [True] * 4])
def test_masks_that_do_not_belong_together_are_refused(second):
    with pytest.raises(InputError, match="expected bool second of shape"):
        estimate_breakable(torch.zeros(4, dtype=torch.bool), second)


def test_an_attack_evaluated_twice_is_compared_with_itself(trained_guard, images, labels):
    def lucky(detector, images, labels, *, targets=None, generator=None):
        chosen = torch.rand(len(images), generator=generator) < 0.5
        start = images[torch.randperm(len(images), generator=generator)]
        return torch.where(chosen[:, None, None, None], start, images)

    lucky.norm, lucky.eps = "linf", 1.0
    attacks = {"first": lucky, "second": lucky}
    sanity = evaluate(
        trained_guard, attacks, [(images, labels)], generator=torch.Generator().manual_seed(0), sanity_images=5
    ).sanity
    assert any(text.startswith("first and second are the same attack") for text in sanity.warnings)
    once = evaluate(trained_guard, {"first": lucky}, [(images, labels)], sanity_images=5).sanity
    assert not any("same attack" in text for text in once.warnings)
