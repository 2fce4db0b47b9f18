import pytest
import torch
from clusterguard import PGD, PaperProtocol, RandomTarget, evaluate
from clusterguard.errors import ConfigurationError
from torch.utils.data import DataLoader, TensorDataset


def test_a_row_is_the_worst_of_its_step_sizes(small_guard):
    images = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(images, small_guard(images).argmax(1)), batch_size=30)
    row = PaperProtocol(norm="linf", eps=0.1, step_sizes=(0.001, 0.05), steps=5)
    report = evaluate(small_guard, row.attacks(), loader, sanity_images=0)
    rates = [result.success.value for result in report.results]
    assert len(rates) == 2
    assert report.largest_mean_asr == max(rates)


def test_random_targets_are_wrong_and_follow_the_generator(small_guard):
    asked = []

    def attack(detector, images, labels, *, targets=None, generator=None):
        asked.append(targets)
        return images

    labels = torch.arange(300) % 3
    for seed in (0, 0, 1):
        RandomTarget(attack=attack)(
            small_guard, torch.rand(300, 1, 8, 8), labels, generator=torch.Generator().manual_seed(seed)
        )
    assert (asked[0] != labels).all()
    assert torch.equal(asked[0], asked[1])
    assert not torch.equal(asked[0], asked[2])
    assert len(torch.stack([labels, asked[0]], 1).unique(dim=0)) == 6


def test_targets_that_are_given_are_kept(small_guard):
    labels = torch.arange(6) % 3
    images, targets = torch.rand(6, 1, 8, 8), (labels + 1) % 3
    inner = PGD(eps=0.1, step_size=0.05, steps=3)
    expected = inner(small_guard, images, labels, targets=targets)
    assert torch.equal(RandomTarget(attack=inner)(small_guard, images, labels, targets=targets), expected)


@pytest.mark.parametrize("options", [{"step_sizes": ()}, {"step_sizes": (0.0,)}, {"norm": "l3"}, {"steps": 0}])
def test_options_are_checked_at_once(options):
    with pytest.raises(ConfigurationError, match="expected"):
        PaperProtocol(**({"norm": "linf", "eps": 0.1, "step_sizes": (0.1,)} | options))
