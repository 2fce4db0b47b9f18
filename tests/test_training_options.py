import copy
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from clusterguard import (
    FGSM,
    PGD,
    AdversarialClusterTrainer,
    Calibrator,
    ClusterGuard,
    DetectorTrainer,
    MixedAttack,
    TrainingOptions,
    TrainingStep,
)
from clusterguard.errors import ConfigurationError, TrainingDivergedError
from torch import nn
from torch.utils.data import DataLoader

ATTACK = PGD(eps=0.1, step_size=0.05, steps=3, keep="last")


def new_guard(*layers):
    torch.manual_seed(0)
    return ClusterGuard(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), *layers), 3, example=torch.rand(2, 1, 8, 8)
    )


def fit(guard, loader, *, epochs=2, attack=ATTACK, **options):
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(guard.parameters(), lr=1e-3)
    trainer = AdversarialClusterTrainer(guard, attack, optimizer=optimizer, refresh_every=3, **options)
    trainer.fit(loader, loader, epochs=epochs, calibrate=False, progress=False)
    return trainer


def weights(guard):
    return torch.cat([parameter.detach().flatten() for parameter in guard.parameters()])


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps one state a process; each of these tests wants its own."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


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
    fit(large, DataLoader(blobs.dataset, batch_size=120), relabel="original")
    small = new_guard()
    options = TrainingOptions(accelerator=Accelerator(cpu=True, gradient_accumulation_steps=2))
    trainer = fit(small, blobs, relabel="original", options=options)
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
        self.pages = {}

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **_):
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
    last = notebook.pages[30]
    assert set(last) == {
        "loss",
        "loss/own",
        "loss/adversarial",
        "accuracy",
        "attack_success_rate",
        "learning_rate",
        "images_per_second",
        "false_positive_rate",
        *(f"threshold/{index}" for index in range(3)),
    }
    assert last["loss"] == pytest.approx(last["loss/own"] + last["loss/adversarial"], rel=1e-5)
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
    found = [mixed(linear_detector, images, labels, generator=generator) for _ in range(20)]
    chosen = [[torch.equal(attacked, own) for own in each] for attacked in found]
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
    import clusterguard.training as training

    original = training.cluster_terms

    def spy(clusters, representations, labels, is_separate, *others):
        shares.append(is_separate)
        return original(clusters, representations, labels, is_separate, *others)

    monkeypatch.setattr(training, "cluster_terms", spy)
    images, labels = next(iter(blobs))
    wrong = torch.roll(images, 1, dims=0)  # of another class, so the trained guard gives them another label

    class Halfway:
        norm, eps = "linf", float((wrong - images).abs().amax()) * 2

        def __call__(self, detector, images, labels, **_):
            return wrong

    guard = new_guard()
    fit(guard, blobs, epochs=8, attack=lambda *_, **__: pytest.fail("attacked"), warmup_epochs=8)
    shares.clear()
    trainer = AdversarialClusterTrainer(guard, Halfway(), relabel="graded", grading_power=2.0)
    trainer.fit([(images, labels)], blobs, epochs=1, calibrate=False, progress=False)
    attacked = shares[0][len(images) :]
    size = (wrong - images).abs().flatten(1).amax(1) / Halfway.eps
    expected = 1 - (1 - size) ** 2
    assert (attacked > 0).float().mean() > 0.6
    torch.testing.assert_close(attacked[attacked > 0], expected[attacked > 0])
    assert not shares[0][: len(images)].any()


class Plain(DetectorTrainer):
    """Cross-entropy, remembering the loss of every pass."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = []

    def training_step(self, images, labels, generator):
        logits = self.detector(images)
        loss = nn.functional.cross_entropy(logits, labels)
        self.losses.append(loss.detach())
        return TrainingStep(loss, (logits.argmax(1) == labels).sum())


def moved_up(guard, loss_of, share):
    """A copy whose matrices lie a share of their norms up the loss, by hand."""
    above = copy.deepcopy(guard)
    loss_of(above).backward()
    with torch.no_grad():
        for own in above.parameters():
            if own.ndim > 1:
                own += share * own.norm() * own.grad / own.grad.norm()
    above.zero_grad()
    return above


def test_perturbed_weights_give_the_gradient_and_the_old_ones_take_the_step(blobs):
    guard, (images, labels) = new_guard(nn.BatchNorm1d(16)), next(iter(blobs))
    expected, plain = copy.deepcopy(guard), copy.deepcopy(guard)

    def loss_of(model):
        return nn.functional.cross_entropy(model(images), labels)

    above = moved_up(expected, loss_of, 0.05)
    loss_of(above).backward()
    with torch.no_grad():
        for own, other in zip(expected.parameters(), above.parameters(), strict=True):
            own -= 0.1 * other.grad
    for model, options in ((guard, TrainingOptions(weight_perturbation=0.05)), (plain, TrainingOptions())):
        trainer = Plain(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), options=options)
        trainer.fit([(images, labels)], blobs, epochs=1, calibrate=False, progress=False)
        assert trainer.history[0].loss == pytest.approx(trainer.losses[0].item())
        assert len(trainer.losses) == (1 if model is plain else 2)
    torch.testing.assert_close(weights(guard), weights(expected), rtol=1e-4, atol=1e-6)
    assert (weights(guard) - weights(plain)).norm() > 1e-5
    statistics = [dict(model.named_buffers()) for model in (guard, plain)]
    assert all(torch.equal(value, statistics[1][name]) for name, value in statistics[0].items() if "running" in name)
    assert statistics[0]["encoder.0.3.num_batches_tracked"] == 1


def test_without_a_gradient_nothing_moves(blobs):
    class Flat(Plain):
        def training_step(self, images, labels, generator):
            step = super().training_step(images, labels, generator)
            return step._replace(loss=0 * step.loss)

    guard = new_guard()
    optimizer = torch.optim.SGD(guard.parameters(), lr=0.1)
    trainer = Flat(guard, optimizer=optimizer, options=TrainingOptions(weight_perturbation=100.0))
    trainer.fit([next(iter(blobs))], blobs, epochs=1, calibrate=False, progress=False)
    assert trainer.losses[0] == trainer.losses[1]
    assert torch.equal(weights(guard), weights(new_guard()))


def test_where_only_biases_are_trained_nothing_moves(blobs):
    guards = [new_guard(), new_guard()]
    for guard, options in zip(guards, (TrainingOptions(weight_perturbation=0.1), None), strict=True):
        for own in guard.parameters():
            own.requires_grad_(own.ndim == 1)
        fit(guard, blobs, epochs=1, options=options)
    assert torch.equal(weights(guards[0]), weights(guards[1]))
    assert not torch.equal(weights(guards[0]), weights(new_guard()))


def test_weight_perturbation_attacks_each_batch_once_and_off_it_costs_nothing(blobs):
    passes, attacks = [], []

    def attack(detector, images, labels, **_):
        attacks.append(detector.detector)
        return images

    for options in (TrainingOptions(), TrainingOptions(weight_perturbation=0.01)):
        guard = new_guard()
        guard.encoder.register_forward_hook(lambda module, *_: passes.append(module.training))
        fit(guard, [next(iter(blobs))] * 2, epochs=1, attack=attack, options=options)
        assert len(attacks) == 2
        assert passes.count(True) == 2 * (1 if options.weight_perturbation is None else 2)
        passes.clear()
        attacks.clear()


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_weights_are_put_back_exactly_when_the_second_pass_fails(blobs, failure):
    guard = new_guard(nn.BatchNorm1d(16))

    class Failing(Plain):
        def training_step(self, images, labels, generator):
            step = super().training_step(images, labels, generator)
            if len(self.losses) == 2:
                assert not torch.equal(weights(guard), before)
                raise failure
            statistics.append(guard.encoder[0][3].running_mean.clone())
            return step

    before, statistics = weights(guard), []
    trainer = Failing(guard, options=TrainingOptions(weight_perturbation=0.1))
    with pytest.raises(failure):
        trainer.fit(blobs, blobs, epochs=1, calibrate=False, progress=False)
    assert torch.equal(weights(guard), before)
    assert torch.equal(guard.encoder[0][3].running_mean, statistics[0])


def test_a_loss_that_explodes_at_perturbed_weights_leaves_the_ones_before(blobs):
    guard = new_guard()

    class Exploding(Plain):
        def training_step(self, images, labels, generator):
            step = super().training_step(images, labels, generator)
            return step if len(self.losses) % 2 else step._replace(loss=step.loss * torch.inf)

    before = weights(guard)
    optimizer = torch.optim.SGD(guard.parameters(), lr=0.1)
    trainer = Exploding(guard, optimizer=optimizer, options=TrainingOptions(weight_perturbation=0.1))
    with pytest.raises(TrainingDivergedError, match="inf at step 0"):
        trainer.fit(blobs, blobs, epochs=1, calibrate=False, progress=False)
    assert torch.equal(weights(guard), before)
    assert all(own.grad is None or own.grad.isfinite().all() for own in guard.parameters())


def test_weight_perturbation_goes_on_from_within_an_epoch_to_the_same_weights(blobs, tmp_path):
    def make():
        guard = new_guard(nn.BatchNorm1d(16), nn.Dropout(0.2))
        options = TrainingOptions(weight_perturbation=0.02, average_decay=0.9, clip_norm=5.0)
        return AdversarialClusterTrainer(guard, ATTACK, refresh_every=3, options=options)

    loader = DataLoader(blobs.dataset, batch_size=100, shuffle=True)
    straight, stopped, resumed = make(), make(), make()
    torch.manual_seed(3)
    straight.fit(loader, blobs, epochs=2, calibrate=False, progress=False)

    def stop(batches, after=stopped.after_step):
        after(batches)
        if stopped.engine.steps == 9:
            raise KeyboardInterrupt

    stopped.after_step = stop
    options = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 2, "calibrate": False, "progress": False}
    torch.manual_seed(3)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(loader, blobs, epochs=2, **options)
    resumed.fit(loader, blobs, epochs=2, **options)
    ends = [{**dict(own.guard.named_buffers()), "weights": weights(own.guard)} for own in (straight, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0] if name != "thresholds")


def test_accumulated_batches_are_each_perturbed_on_their_own(blobs, fresh_accelerate):
    guard, (images, labels) = new_guard(), next(iter(blobs))
    halves = [(images[:30], labels[:30]), (images[30:], labels[30:])]
    expected = copy.deepcopy(guard)
    gradients = []
    for own_images, own_labels in halves:

        def loss_of(model, own_images=own_images, own_labels=own_labels):
            return nn.functional.cross_entropy(model(own_images), own_labels)

        above = moved_up(expected, loss_of, 0.05)
        loss_of(above).backward()
        gradients.append([own.grad for own in above.parameters()])
    with torch.no_grad():
        for own, first, second in zip(expected.parameters(), *gradients, strict=True):
            own -= 0.1 * (first + second) / 2
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    options = TrainingOptions(weight_perturbation=0.05, accelerator=accelerator)
    trainer = Plain(guard, optimizer=torch.optim.SGD(guard.parameters(), lr=0.1), options=options)
    trainer.fit(halves, blobs, epochs=1, calibrate=False, progress=False)
    assert trainer.engine.steps == 1
    torch.testing.assert_close(weights(guard), weights(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": 0.0},
        {"weight_perturbation": 0.0},
        {"clip_norm": math.nan},
        {"average_decay": 1.0},
        {"schedule_every": "batch"},
        {"log_every": 0},
    ],
)
def test_options_are_checked_at_once(options):
    with pytest.raises(ConfigurationError, match="expected"):
        TrainingOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relabel": "graded", "attack": lambda *_, **__: None}, "norm and a positive eps"),
        ({"relabel": "graded", "grading_power": 0.0}, "grading_power"),
        ({"ramp_epochs": -1.0}, "ramp_epochs"),
        ({"ramp_epochs": 1.0, "attack": lambda *_, **__: None}, "scaled"),
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
