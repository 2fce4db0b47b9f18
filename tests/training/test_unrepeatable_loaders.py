"""Loaders whose later batches do not come again, and loaders that only look like it."""

import os
from itertools import cycle

import pytest
import torch
from accelerate import Accelerator
from clusterguard import AdversarialClusterTrainer, TrainingOptions
from clusterguard.detection import Pairs
from clusterguard.training._replay import Replay
from timm.data.loader import MultiEpochsDataLoader
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset
from trainings import ATTACK, new_guard

DATA = TensorDataset(torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(60) % 3)


@pytest.mark.filterwarnings("ignore:.* is not the same as without the interruption")
@pytest.mark.parametrize("first", [1, 45])
@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"shuffle": True}, {"batch_size": None}])
def test_randomness_of_the_system_in_later_images_is_noticed_before_training_and_before_it_goes_on(
    first, options, tmp_path
):
    class Later(Dataset):
        def __len__(self):
            return 60

        def __getitem__(self, index):
            image, label = DATA[index]
            image = image * (1 - int.from_bytes(os.urandom(4), "big") / 2**34 * (index >= first))
            return (image[None], label[None]) if options.get("batch_size", 10) is None else (image, label)

    for epochs in (1, 2):
        trainer = AdversarialClusterTrainer(new_guard(), ATTACK, warmup_epochs=9)
        loader = DataLoader(Later(), **{"batch_size": 10, **options})
        fit = {"epochs": epochs, "checkpoint": tmp_path / "run.pt", "calibrate": False, "progress": False}
        with pytest.warns(UserWarning, match="because the training loader, begun again .* gives other batches"):
            trainer.fit(loader, [DATA[:10]], **fit)


def test_a_loader_that_keeps_its_iterator_is_trained_on_with_a_warning(tmp_path):
    loader = MultiEpochsDataLoader(DATA, batch_size=10, shuffle=True, num_workers=1)
    trainer = AdversarialClusterTrainer(new_guard(), ATTACK, warmup_epochs=9)
    with pytest.warns(UserWarning, match="will not be the same as without the interruption"):
        trainer.fit(loader, [DATA[:10]], epochs=2, checkpoint=tmp_path / "run.pt", calibrate=False, progress=False)
    assert len(trainer.history) == 2


def test_one_process_with_an_accelerator_draws_twice_as_well(tmp_path, fresh_accelerate):
    class Noisy(Dataset):
        def __len__(self):
            return 60

        def __getitem__(self, index):
            return DATA[index][0] * (1 - int.from_bytes(os.urandom(4), "big") / 2**34), DATA[index][1]

    options = TrainingOptions(accelerator=Accelerator(cpu=True))
    trainer = AdversarialClusterTrainer(new_guard(), ATTACK, warmup_epochs=9, options=options)
    with pytest.warns(UserWarning, match="will not be the same as without the interruption|gives other batches"):
        trainer.fit(
            DataLoader(Noisy(), 10),
            [DATA[:10]],
            epochs=1,
            checkpoint=tmp_path / "run.pt",
            calibrate=False,
            progress=False,
        )


class InBuckets(Sampler):
    """Batches of images of one size each, the first of them with an end."""

    def __init__(self, endless):
        self.endless = endless

    def __len__(self):
        if self.endless:
            raise TypeError("endless")
        return 6

    def __iter__(self):
        return (cycle if self.endless else iter)([[*range(start, start + 10)] for start in range(0, 60, 10)])


@pytest.mark.parametrize("endless", [False, True])
def test_images_that_fit_no_other_batch_are_drawn_in_their_own(endless):
    class Sizes(Dataset):
        def __getitem__(self, index):
            return torch.rand(1, 4 + index // 10, 4), index

    assert Replay(Pairs(DataLoader(Sizes(), batch_sampler=InBuckets(endless))), torch.device("cpu")).is_repeatable()
