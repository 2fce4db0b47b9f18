import copy
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from clusterguard import FGSM, PGD, AdversarialClusterTrainer, Calibrator, ClusterGuard, TrainingOptions
from clusterguard.attacks import MixedAttack
from clusterguard.errors import ConfigurationError
from clusterguard.training import Graded, Original, _losses
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from trainings import ATTACK, fit, new_guard, weights


def test_gradients_are_clipped_to_the_norm_asked_for(blobs):
    guard = new_guard()
    before = weights(guard)
    fit(guard, [next(iter(blobs))], epochs=1, options=TrainingOptions(clip_norm=0.5))
    assert (weights(guard) - before).norm().item() == pytest.approx(0.5e-3, rel=1e-3)


def test_the_detector_ends_with_the_average_of_its_weights(blobs):
    plain, averaged, path = new_guard(), new_guard(), []
    trainer = AdversarialClusterTrainer(plain, ATTACK, optimizer=torch.optim.SGD(plain.parameters(), lr=1e-3))
    trainer.after_step = lambda batches: path.append(weights(plain))
    trainer.fit(blobs, blobs, epochs=2, calibrate=False, progress=False)
    averaging = AdversarialClusterTrainer(
        averaged,
        ATTACK,
        optimizer=torch.optim.SGD(averaged.parameters(), lr=1e-3),
        options=TrainingOptions(average_decay=0.8),
    )
    averaging.after_step = lambda batches: None
    averaging.fit(blobs, blobs, epochs=2, calibrate=False, progress=False)
    expected = path[0]
    for step in path[1:]:
        expected = 0.8 * expected + 0.2 * step
    torch.testing.assert_close(weights(averaged), expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(weights(averaged), weights(plain))


def test_batchnorm_statistics_are_averaged_with_the_weights(blobs):
    guard = new_guard(nn.BatchNorm1d(16))
    fit(guard, blobs, options=TrainingOptions(average_decay=0.9))
    plain = new_guard(nn.BatchNorm1d(16))
    fit(plain, blobs)
    assert not torch.equal(guard.encoder[0][3].running_mean, plain.encoder[0][3].running_mean)


def test_a_scheduler_may_step_every_step(blobs):
    guard = new_guard()
    optimizer = torch.optim.SGD(guard.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    options = TrainingOptions(schedule_every="step", clip_norm=1e-6)
    fit(guard, [next(iter(blobs))] * 3, optimizer=optimizer, scheduler=scheduler, options=options)
    assert optimizer.param_groups[0]["lr"] == 0.5**6


def test_accumulated_gradients_are_those_of_a_larger_batch(blobs, fresh_accelerate):
    large = new_guard()
    fit(large, DataLoader(blobs.dataset, batch_size=120), relabel=Original())
    small = new_guard()
    options = TrainingOptions(accelerator=Accelerator(cpu=True, gradient_accumulation_steps=2))
    trainer = fit(small, blobs, relabel=Original(), options=options)
    assert trainer.engine.steps == 10
    torch.testing.assert_close(weights(small), weights(large), rtol=1e-4, atol=1e-6)


def test_mixed_precision_trains_in_bfloat16_with_float32_losses_and_leaves_the_guard_in_float32(
    blobs, fresh_accelerate
):
    seen = set()
    guard = new_guard()
    guard.encoder[0][1].register_forward_hook(
        lambda module, inputs, output: seen.add((output.dtype, output.requires_grad))
    )
    trainer = fit(
        guard, blobs, epochs=4, options=TrainingOptions(accelerator=Accelerator(cpu=True, mixed_precision="bf16"))
    )
    assert (torch.bfloat16, True) in seen  # training and attack
    assert (torch.float32, True) not in seen
    assert (torch.float32, False) in seen  # thresholds
    assert trainer.history[-1].loss < trainer.history[0].loss
    seen.clear()
    assert guard.distances(next(iter(blobs))[0]).dtype == torch.float32
    assert seen == {(torch.float32, True)}


class Notebook(GeneralTracker):
    """A tracker that remembers."""

    name = "notebook"
    requires_logging_directory = False
    tracker = None

    def __init__(self):
        super().__init__()
        self.pages, self.epochs = {}, []

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **_):
        if "epoch" in values:
            self.epochs.append((step, values["epoch"]))
        else:
            self.pages[step] = values


def test_trackers_are_told_what_matters(blobs, fresh_accelerate):
    notebook = Notebook()
    accelerator = Accelerator(cpu=True, log_with=notebook)
    accelerator.init_trackers("run")
    calibrator = Calibrator(0.1)
    fit(
        new_guard(),
        blobs,
        epochs=3,
        calibrator=calibrator,
        options=TrainingOptions(accelerator=accelerator, log_every=6),
    )
    assert list(notebook.pages) == [6, 12, 18, 24, 30]
    assert notebook.epochs == [(10, 1), (20, 2), (30, 3)]
    last = notebook.pages[30]
    assert set(last) == {
        "loss",
        "loss/classes",
        "loss/adversarial",
        "accuracy",
        "attack_success_rate",
        "learning_rate",
        "images_per_second",
        "false_positive_rate",
        *(f"threshold/{index}" for index in range(3)),
    }
    assert last["loss"] == pytest.approx(last["loss/classes"] + last["loss/adversarial"], rel=1e-5)
    assert 0 <= last["false_positive_rate"] <= 1
    assert last["learning_rate"] == 1e-3


def test_a_ramp_lets_the_attack_grow_after_the_warm_up(blobs):
    seen = []

    class Spy:
        norm, eps = "linf", 0.4

        def __init__(self, factor=1.0):
            self.factor = factor

        def scaled(self, factor):
            return Spy(factor)

        def __call__(self, detector, images, labels, *, targets=None, generator=None):
            seen.append(self.factor)
            return images

    fit(new_guard(), blobs, epochs=4, attack=Spy(), warmup_epochs=1, ramp_epochs=2)
    assert len(seen) == 30
    assert seen[:20] == pytest.approx([max(1e-3, index / 20) for index in range(20)])
    assert seen[20:] == [1.0] * 10


def test_a_mixed_attack_takes_each_in_turn_at_random_and_scales_them_all(linear_detector):
    images, labels = torch.rand(4, 1, 4, 4), torch.zeros(4).long()
    mixed = MixedAttack(attacks=(FGSM(eps=0.1), FGSM(norm="l2", eps=0.3)))
    each = [attack(linear_detector, images, labels) for attack in mixed.attacks]
    generator = torch.Generator().manual_seed(0)
    runs = [mixed(linear_detector, images, labels, generator=generator) for _ in range(20)]
    chosen = [[torch.equal(attacked, single) for single in each] for attacked in runs]
    assert all(sum(one) == 1 for one in chosen)
    assert 4 < sum(one[0] for one in chosen) < 16
    assert [attack.eps for attack in mixed.scaled(0.5).attacks] == [0.05, 0.15]
    assert (mixed.norm, mixed.eps) == (None, None)
    alike = MixedAttack(attacks=(FGSM(eps=0.1), PGD(eps=0.1, step_size=0.1)))
    assert (alike.norm, alike.eps) == ("linf", 0.1)
    with pytest.raises(ConfigurationError, match="at least one"):
        MixedAttack(attacks=())


def test_graded_labels_divide_small_perturbations_between_both_centres(blobs, monkeypatch):
    shares = []
    original = _losses.cluster_terms

    def spy(clusters, representations, labels, adversarial_share, *others):
        shares.append(adversarial_share)
        return original(clusters, representations, labels, adversarial_share, *others)

    monkeypatch.setattr(_losses, "cluster_terms", spy)
    images, labels = next(iter(blobs))
    wrong = torch.roll(images, 1, dims=0)  # of another class, so the trained guard gives them another label

    class Halfway:
        norm, eps = "linf", 1.0

        def __call__(self, detector, images, labels, **_):
            return wrong

    guard = new_guard()
    fit(guard, blobs, epochs=8, attack=lambda *_, **__: pytest.fail("attacked"), warmup_epochs=8)
    shares.clear()
    trainer = AdversarialClusterTrainer(guard, Halfway(), relabel=Graded(2.0))
    trainer.fit([(images, labels)], blobs, epochs=1, calibrate=False, progress=False)
    attacked = shares[0][len(images) :]
    size = (wrong - images).abs().flatten(1).amax(1) / Halfway.eps
    expected = 1 - (1 - size) ** 2
    assert (attacked > 0).float().mean() > 0.6
    torch.testing.assert_close(attacked[attacked > 0], expected[attacked > 0])
    assert not shares[0][: len(images)].any()


@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": 0.0},
        {"weight_perturbation": 0.0},
        {"clip_norm": math.nan},
        {"average_decay": 1.0},
        {"schedule_every": "batch"},
        {"log_every": 0},
        {"log_every": 1.5},
        {"accumulate": "4"},
        {"accumulate": 1.5},
        {"accumulate": True},
        {"clip_norm": "1"},
        {"average_decay": "0.9"},
        {"weight_perturbation": [0.1]},
    ],
)
def test_options_are_checked_at_once(options):
    with pytest.raises(ConfigurationError, match="expected"):
        TrainingOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relabel": Graded(), "attack": lambda *_, **__: None}, "norm and a positive eps"),
        ({"ramp_epochs": -1.0}, "ramp_epochs"),
        ({"ramp_epochs": 1.0, "attack": lambda *_, **__: None}, "scaled"),
        ({"ramp_epochs": "1"}, "a number as ramp_epochs, got '1'"),
        ({"warmup_epochs": 1.5}, "a whole number as warmup_epochs"),
        ({"refresh_every": "10"}, "a whole number as refresh_every"),
    ],
)
def test_an_attack_must_have_what_the_options_need(options, message):
    options = {"attack": ATTACK, **options}
    with pytest.raises(ConfigurationError, match=message):
        AdversarialClusterTrainer(new_guard(), **options)


def test_training_does_not_touch_how_the_detector_works(blobs):
    guard = new_guard()
    before = copy.deepcopy(guard)
    fit(guard, blobs, epochs=1)
    assert type(guard) is ClusterGuard
    assert guard.state_dict().keys() == before.state_dict().keys()
    assert "forward" not in vars(guard)


def test_a_transform_that_mixes_labels_is_refused():
    with pytest.raises(ConfigurationError, match="got CutMix, which mixes labels too"):
        TrainingOptions(augment=v2.CutMix(num_classes=3))
