import pytest
import torch
from clusterguard import PGD, evaluate
from clusterguard.attacks import MIM, PaperProtocol, RandomTarget, at_step_sizes
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


@pytest.mark.parametrize("kind", [PGD, MIM])
@pytest.mark.parametrize(("norm", "eps", "sizes"), [("linf", 0.1, [0.01, 0.05]), ("l1", 3.0, [2.0, 0.3, 0.7])])
@pytest.mark.parametrize("stop_early", [False, True])
def test_step_sizes_in_one_batch_find_what_each_finds_alone(small_guard, kind, norm, eps, sizes, stop_early):
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = small_guard(images).argmax(1)
    attack = kind(norm=norm, eps=eps, step_size=1.0, steps=6, stop_early=stop_early, sparsity=None)
    targets = (labels + 1) % 3
    together = at_step_sizes(attack, sizes, small_guard, images, labels, targets=targets)
    assert len(together) == len(sizes)
    for size, attacked in zip(sizes, together, strict=True):
        alone = kind(norm=norm, eps=eps, step_size=size, steps=6, stop_early=stop_early, sparsity=None)
        torch.testing.assert_close(attacked, alone(small_guard, images, labels, targets=targets), rtol=0, atol=1e-5)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("sizes", [[], [0.1, -0.1]])
def test_step_sizes_are_checked(small_guard, sizes):
    with pytest.raises(ConfigurationError, match="expected"):
        at_step_sizes(PGD(eps=0.1, step_size=0.1), sizes, small_guard, torch.rand(2, 1, 8, 8), torch.arange(2))


def test_a_step_size_for_each_image_allows_no_batches():
    with pytest.raises(ConfigurationError, match="batch_size"):
        PGD(eps=0.1, step_size=torch.ones(3), batch_size=2)
