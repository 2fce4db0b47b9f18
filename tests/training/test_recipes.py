import pytest
import torch
from clusterguard import PGD, ClusterGuard, recipes
from clusterguard.attacks import NoisyFGSM
from clusterguard.errors import ConfigurationError
from clusterguard.training import Separate, crop_and_flip
from torch import nn
from trainings import held_out


@pytest.fixture
def guard():
    torch.manual_seed(0)
    return ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU()), num_classes=3)


def test_the_papers_recipe_has_no_ingredient_that_the_paper_lacks(guard):
    trainer = recipes.paper(guard)
    assert (trainer.attack.eps, trainer.attack.step_size, trainer.attack.steps) == (0.3, 0.01, 40)
    assert (trainer.attack.start, trainer.attack.objective, trainer.attack.keep) == ("image", "suspicion", "last")
    assert (trainer.ramp_epochs, trainer.warmup_epochs, trainer.relabel) == (0, 0, Separate())
    assert (trainer.options.clip_norm, trainer.options.average_decay, trainer.scheduler) == (None, None, None)


@pytest.fixture(params=[recipes.robust, recipes.single_step, recipes.certified], ids=lambda recipe: recipe.__name__)
def recipe(request):
    return request.param


@pytest.mark.parametrize("epochs", [1, 7])
def test_a_recipes_schedule_ends_with_its_epochs(recipe, guard, blobs, epochs):
    trainer = recipe(guard, blobs, epochs=epochs, eps=0.2)
    history = trainer.fit(blobs, blobs, epochs=epochs, calibrate=False, progress=False)
    assert trainer.scheduler.last_epoch == epochs * len(blobs)
    assert trainer.optimizer.param_groups[0]["lr"] < 4e-4  # a tenth of its highest
    assert len(history) == epochs


def test_a_recipe_learns(recipe, guard, blobs):
    eps = 0.06 if recipe is recipes.single_step else 0.2  # its noise and its step go three times as far
    trainer = recipe(guard, blobs, epochs=18, eps=eps)
    history = trainer.fit(blobs, held_out(blobs), epochs=18, progress=False)
    assert guard.is_calibrated
    assert history[-1].accuracy > 0.97
    assert history[-1].attack_success_rate < 0.2


def test_the_single_step_recipe_takes_an_attack_an_optimizer_and_averages_the_last_steps(guard, blobs):
    pgd = PGD(eps=0.1, step_size=0.125, steps=1, start="random", keep="last")
    trainer = recipes.single_step(
        guard,
        blobs,
        epochs=20,
        eps=0.1,
        attack=pgd,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        augment=crop_and_flip,
        ramp_epochs=2,
    )
    assert (trainer.attack, trainer.ramp_epochs, trainer.options.augment) == (pgd, 2, crop_and_flip)
    assert trainer.options.average_decay == 0.9  # ten of 200 steps
    rates = []
    for _ in range(199):
        trainer.optimizer.step()
        trainer.scheduler.step()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert 0.49 < max(rates) <= 0.5
    default = recipes.single_step(guard, blobs, epochs=1, eps=0.1)
    assert default.attack == NoisyFGSM(eps=0.1)
    assert default.options.average_decay == 0.5


def test_the_certified_recipe_weighs_bounds_as_asked(guard, blobs):
    assert recipes.certified(guard, blobs, epochs=2, eps=0.1, bound_weight=0.05).bound_weight == 0.05
    with pytest.raises(ConfigurationError, match="bound_weight"):
        recipes.certified(guard, blobs, epochs=2, eps=0.1, bound_weight=0)


@pytest.mark.parametrize("options", [{"epochs": 0}, {"eps": -1.0}])
def test_what_cannot_be_trained_is_refused(recipe, guard, blobs, options):
    with pytest.raises(ConfigurationError, match="expected"):
        recipe(guard, blobs, **{"epochs": 2, "eps": 0.1, **options})


@pytest.mark.parametrize("loader", [iter([]), []])
def test_a_loader_without_a_length_is_refused(recipe, guard, loader):
    with pytest.raises(ConfigurationError, match="length"):
        recipe(guard, loader, epochs=2, eps=0.1)
