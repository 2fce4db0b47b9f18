import copy
import math

import pytest
import torch
from clusterguard import (
    FGSM,
    PGD,
    AdversarialClusterTrainer,
    ClusterGuard,
    GaussianClusters,
    TrainingOptions,
    WithThresholds,
)
from clusterguard.clusters import cluster_loss, cluster_terms
from clusterguard.errors import (
    ConfigurationError,
    InputError,
    PersistenceError,
    TooFewCalibrationExamplesError,
    TrainingDivergedError,
    TrainingStoppedError,
)
from clusterguard.samples import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ATTACK = PGD(eps=0.1, step_size=0.05, steps=3, keep="last")


def new_guard(*layers: nn.Module, seed: int = 0) -> ClusterGuard:
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), *layers)
    return ClusterGuard(backbone, num_classes=3, example=torch.rand(2, 1, 8, 8))


def train(guard, blobs, *, epochs=2, seed=0, **options):
    fit = {name: options.pop(name) for name in list(options) if name in ("checkpoint", "on_epoch_end", "calibrate")}
    torch.manual_seed(seed)
    optimizer = options.pop("optimizer", None) or torch.optim.Adam(guard.parameters(), lr=5e-3)
    attack = options.pop("attack", ATTACK)
    trainer = AdversarialClusterTrainer(guard, attack, optimizer=optimizer, refresh_every=3, **options)
    loader = DataLoader(blobs.dataset, batch_size=60, shuffle=True)
    return trainer.fit(loader, blobs, epochs=epochs, progress=False, **fit)


def weights(guard):
    return torch.cat([parameter.detach().flatten() for parameter in guard.parameters()])


def test_cluster_loss_by_hand():
    clusters = GaussianClusters(2, center_scale=2.0)
    z = torch.tensor([[2.0, 1.0], [0.0, 0.0], [3.0, 4.0]])
    labels = torch.tensor([0, 1, 0])
    # Own centres: squared distances 1 and 4, mean 2.5; the third is adversarial: 25 from the origin.
    loss = cluster_loss(clusters, z, labels, torch.tensor([False, False, True]), adversarial_weight=0.5)
    assert loss.item() == pytest.approx(0.5 * (2.5 + 0.5 * 25))


def test_cluster_loss_of_equation_31_is_the_likelihoods_logarithm():
    clusters = GaussianClusters(3, 6)
    z, labels = torch.randn(8, 6), torch.arange(8) % 3
    nothing = torch.zeros(8, dtype=torch.bool)
    expected = -clusters.log_likelihood(z).gather(1, labels[:, None]).mean() - 3 * math.log(2 * math.pi)
    torch.testing.assert_close(cluster_loss(clusters, z, labels, nothing), expected, rtol=1e-4, atol=1e-3)


def test_one_epoch_on_real_digits_lowers_the_loss():
    torch.manual_seed(0)
    data = TensorDataset(*(part[:1500] for part in load_digits("train").tensors))
    guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU()), 10, example=data[0][0][None])
    losses = []

    def record(detector, images, labels, *, targets=None, generator=None):
        with torch.no_grad():
            own = guard.clusters.squared_distances(guard.represent(images)).gather(1, labels[:, None])
        losses.append(own.mean().item())
        return FGSM(eps=0.1)(detector, images, labels)

    loader = DataLoader(data, batch_size=100, shuffle=True)
    optimizer = torch.optim.Adam(guard.parameters(), lr=5e-3)
    trainer = AdversarialClusterTrainer(guard, record, optimizer=optimizer)
    trainer.fit(loader, loader, epochs=1, calibrate=False, progress=False)
    assert len(losses) == 15
    assert losses[-1] < 0.7 * losses[0]


def test_a_trained_guard_detects_what_an_untrained_one_lets_through(blobs):
    guard = new_guard()
    history = train(guard, blobs, epochs=15)
    assert guard.is_calibrated
    assert guard.calibration.realised_rate <= 0.01
    assert history[-1].loss < history[0].loss
    assert history[-1].accuracy > 0.97
    assert [record.epoch for record in history] == list(range(1, 16))
    assert math.isfinite(history[-1].mean_threshold)


def test_equal_seeds_give_equal_weights_and_others_do_not(blobs):
    runs = []
    for seed in (0, 0, 1):
        guard = new_guard(nn.Dropout(0.2))
        train(guard, blobs, seed=seed, calibrate=False)
        runs.append(weights(guard))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(blobs, tmp_path):
    straight = new_guard(nn.Dropout(0.2), nn.BatchNorm1d(16))
    whole = train(straight, blobs, epochs=3)

    def interrupt(record):
        if record.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            new_guard(nn.Dropout(0.2), nn.BatchNorm1d(16)),
            blobs,
            epochs=3,
            checkpoint=tmp_path / "run.pt",
            on_epoch_end=interrupt,
        )
    resumed = new_guard(nn.Dropout(0.2), nn.BatchNorm1d(16), seed=5)
    parts = train(resumed, blobs, epochs=3, seed=9, checkpoint=tmp_path / "run.pt")
    assert torch.equal(weights(straight), weights(resumed))
    assert torch.equal(straight.thresholds, resumed.thresholds)
    assert [record.loss for record in parts] == [record.loss for record in whole]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.pt", "run.pt.previous"]


def test_a_run_stopped_after_every_few_steps_ends_where_an_uninterrupted_one_does(blobs, tmp_path):
    def fit(**options):
        trainer = AdversarialClusterTrainer(new_guard(nn.BatchNorm1d(16)), ATTACK, refresh_every=2)
        if options:
            options["stop_when"] = lambda: trainer.engine.steps % 4 == 0
        trainer.fit(blobs, blobs, epochs=2, calibrate=False, progress=False, **options)
        return trainer

    straight = fit()
    for steps in range(4, straight.engine.steps + 1, 4):
        with pytest.raises(TrainingStoppedError, match=rf"after {steps} steps; fit with .*run.pt goes on"):
            fit(checkpoint=tmp_path / "run.pt")
    stopped = fit(checkpoint=tmp_path / "run.pt")
    ends = [{**own.detector.state_dict(), "tau": own.thresholds} for own in (stopped, straight)]
    torch.testing.assert_close(*ends, rtol=0, atol=0, equal_nan=True)
    assert [record.loss for record in stopped.history] == [record.loss for record in straight.history]


def test_what_may_be_stopped_needs_a_checkpoint(blobs):
    trainer = AdversarialClusterTrainer(new_guard(), ATTACK)
    with pytest.raises(ConfigurationError, match="would be lost"):
        trainer.fit(blobs, blobs, epochs=1, stop_when=lambda: True)
    assert not trainer.engine.steps


class Interrupted:
    """Batches that end with Ctrl-C."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        yield from self.batches
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("theirs", "processes", "batches", "error", "reason"),
    [
        ({}, 2, 4, PersistenceError, "written by 2 processes; go on with as many, not with 1"),
        ({"width": 8}, 1, 4, PersistenceError, "does not fit"),
        ({"options": TrainingOptions(average_decay=0.9)}, 1, 4, PersistenceError, "another run"),
        ({}, 1, 1, InputError, "at least 2 batches"),
    ],
)
def test_a_refused_checkpoint_changes_nothing(blobs, tmp_path, theirs, processes, batches, error, reason):
    def new_trainer(width=16, options=None):
        guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 16)), num_classes=3)
        return AdversarialClusterTrainer(guard, ATTACK, refresh_every=1, options=options)

    file, some = tmp_path / "run.pt", list(blobs)[:4]
    with pytest.raises(KeyboardInterrupt):
        new_trainer(**theirs).fit(
            Interrupted(some[:2]), some, epochs=1, checkpoint=file, checkpoint_every=2, calibrate=False, progress=False
        )
    state = torch.load(file)
    state["values"]["processes"] *= processes
    torch.save(state, file)

    trainer = new_trainer()
    trainer.fit(some, some, epochs=1, calibrate=False, progress=False)
    trainer.detector.eval().thresholds = torch.ones(3)

    def everything():
        guard, adam = trainer.detector, trainer.optimizer.state.values()
        rest = trainer.history, trainer.epochs_done, trainer.engine.steps, guard.calibration, guard.training
        return copy.deepcopy(
            [*guard.state_dict().values(), trainer.thresholds, *(t for s in adam for t in s.values())]
        ), rest

    tensors, rest = everything()
    with pytest.raises(error, match=reason):
        trainer.fit(some[:batches], some, epochs=3, checkpoint=file, calibrate=False, progress=False)
    assert everything()[1] == rest
    torch.testing.assert_close(everything()[0], tensors, rtol=0, atol=0)


def test_what_got_through_goes_to_the_origin_and_the_rest_keeps_its_class(blobs, monkeypatch):
    seen = []

    def spy(clusters, representations, labels, is_separate, *others):
        seen.append((representations.detach(), labels, is_separate.bool()))
        return cluster_terms(clusters, representations, labels, is_separate, *others)

    monkeypatch.setattr("clusterguard.training.cluster_terms", spy)
    guard = new_guard()
    before = copy.deepcopy(guard).eval()
    images, labels = next(iter(blobs))
    attacked = PGD(eps=0.5, step_size=0.1, steps=10, keep="last")(
        WithThresholds(before, torch.full((3,), torch.inf)), images, labels
    )
    trainer = AdversarialClusterTrainer(guard, lambda *_, **__: attacked)
    trainer.fit([(images, labels)], blobs, epochs=1, calibrate=False, progress=False)
    _, used_labels, is_separate = seen[0]
    misclassified = before.distances(attacked).argmin(1) != labels  # with thresholds at +inf that is success
    assert 0 < misclassified.sum() < len(labels)
    assert torch.equal(is_separate, torch.cat([torch.zeros(60, dtype=torch.bool), misclassified]))
    assert torch.equal(used_labels, torch.cat([labels, labels]))


def test_relabelling_to_the_original_class_never_uses_the_origin(blobs, monkeypatch):
    monkeypatch.setattr(GaussianClusters, "adversarial_squared_distance", lambda self, z: z.new_full((len(z),), 1e9))
    history = train(new_guard(), blobs, relabel="original", calibrate=False)
    assert history[-1].loss < 1e3
    assert history[-1].attack_success_rate > 0


@pytest.mark.parametrize("relabel", ["separate", "graded"])
@pytest.mark.parametrize("target", ["origin", "opposite", "outside"])
@pytest.mark.parametrize("threshold", [10.0, math.inf])
def test_the_loss_sends_what_got_through_where_it_shall_go(blobs, target, relabel, threshold):
    guard = new_guard()
    options = {"adversarial_target": target, "adversarial_margin": 1.0, "relabel": relabel, "grading_power": 1.0}
    trainer = AdversarialClusterTrainer(guard, ATTACK, **options)
    trainer.attack = lambda detector, images, labels, **_: attacked
    trainer.attack.norm, trainer.attack.eps = "linf", 1.0
    trainer.thresholds.fill_(threshold)
    images, labels = next(iter(blobs))
    attacked = images + 0.5 * (torch.roll(images, 1, dims=0) - images)  # halfway to an image of another class
    term = trainer.training_step(images, labels, None).terms["loss/adversarial"]

    with torch.no_grad():
        z = guard.represent(attacked)
    nearest = torch.cdist(z, guard.clusters.centers).min(dim=1)
    through = (nearest.indices != labels) & (nearest.values <= threshold)
    assert 5 < through.sum() < 55
    edge = 2 * (math.sqrt(50) if threshold == math.inf else threshold)  # centres are 10·√2 apart
    energy = {
        "origin": z.norm(dim=1),
        "opposite": (z + guard.clusters.centers[labels]).norm(dim=1),
        "outside": (edge - nearest.values).clamp_min(0),
    }[target].square()
    shares = through * (1.0 if relabel == "separate" else (attacked - images).abs().flatten(1).amax(dim=1))
    torch.testing.assert_close(term, 0.5 * (shares * energy).sum() / shares.sum())


@pytest.mark.parametrize(("floor", "divisor"), [(0.0, 2), (0.01, 2), (0.5, 30), (1.0, 60)])
def test_a_floor_keeps_few_successes_from_weighing_as_much_as_many(blobs, floor, divisor):
    images, labels = next(iter(blobs))
    torch.manual_seed(0)
    guard = new_guard()
    train(guard, blobs, epochs=8, warmup_epochs=8, calibrate=False)
    attacked = images.clone()
    attacked[:2] = torch.roll(images, 1, dims=0)[:2]  # two images of another class, and no other change
    trainer = AdversarialClusterTrainer(guard.eval(), lambda *_, **__: attacked, adversarial_floor=floor)
    step = trainer.training_step(images, labels, None)
    assert step.successes == 2
    with torch.no_grad():
        expected = 0.5 * guard.represent(attacked[:2]).square().sum() / divisor
    torch.testing.assert_close(step.terms["loss/adversarial"], expected)


def test_cross_entropy_comes_on_top_and_does_not_look_at_what_got_through(blobs):
    batch = next(iter(blobs))
    plain, mixed = (
        AdversarialClusterTrainer(new_guard(), ATTACK, **options).training_step(*batch, None)
        for options in ({}, {"cross_entropy_weight": 3.0, "temperature": 10.0})
    )
    extra = mixed.terms["loss/cross_entropy"]
    torch.testing.assert_close(mixed.loss, plain.loss + 3 * extra)
    assert "loss/cross_entropy" not in plain.terms
    guard, (images, labels) = new_guard(), batch
    attacked = ATTACK(WithThresholds(guard.eval(), torch.full((3,), torch.inf)), images, labels)
    both, twice = torch.cat([images, attacked]), torch.cat([labels, labels])
    with torch.no_grad():
        kept = torch.cat([torch.ones(60, dtype=torch.bool), guard(attacked).argmax(dim=1) == labels])
        expected = nn.functional.cross_entropy(guard(both)[kept] / 10, twice[kept])
    torch.testing.assert_close(extra, expected)


def test_a_batch_without_successful_attacks_trains_on_the_rest(blobs):
    guard = new_guard()
    train(guard, blobs, epochs=8, warmup_epochs=8, calibrate=False)
    history = train(guard, blobs, attack=lambda detector, images, labels, **_: images, calibrate=False)
    assert history[-1].attack_success_rate < 0.02
    assert math.isfinite(history[-1].loss)


def test_warm_up_does_not_attack(blobs):
    history = train(
        new_guard(), blobs, warmup_epochs=2, attack=lambda *_, **__: pytest.fail("attacked"), calibrate=False
    )
    assert all(math.isnan(record.attack_success_rate) for record in history)
    assert history[1].loss < history[0].loss


def test_the_attack_sees_the_guard_in_eval_mode_and_thresholds_that_get_refreshed(blobs):
    seen = []

    def attack(detector, images, labels, *, targets=None, generator=None):
        seen.append(detector.thresholds.clone())
        return ATTACK(detector, images, labels)

    guard = new_guard(nn.BatchNorm1d(16))
    train(guard, blobs, epochs=6, attack=attack, calibrate=False, refresh_batches=10)
    assert seen[0].isinf().all()
    assert seen[2].isinf().all()
    assert seen[-1].isfinite().all()
    assert not guard.is_calibrated  # thresholds for training are not thresholds for use


def test_a_loss_that_is_not_finite_stops_and_keeps_good_weights(blobs):
    guard = new_guard()

    def attack(detector, images, labels, *, targets=None, generator=None):
        calls.append(1)
        return images * torch.nan if len(calls) > 13 else images

    calls: list[int] = []
    guard.thresholds = torch.ones(3)
    with pytest.raises(TrainingDivergedError, match=r"nan at step 13.*weights of step 10"):
        train(guard, blobs, attack=attack)
    assert weights(guard).isfinite().all()
    assert not guard.is_calibrated


def test_a_calibration_set_that_cannot_suffice_is_refused_before_training(blobs):
    few = DataLoader(TensorDataset(*(part[:30] for part in blobs.dataset.tensors)), batch_size=30)
    guard = new_guard()
    before = weights(guard)
    with pytest.raises(TooFewCalibrationExamplesError, match=r"\[10, 10, 10\]"):
        AdversarialClusterTrainer(guard, ATTACK).fit(blobs, few, epochs=1, progress=False)
    assert torch.equal(weights(guard), before)


def test_an_empty_calibration_loader_is_named_instead_of_asked_for_ever(blobs):
    trainer = AdversarialClusterTrainer(new_guard(), PGD(eps=0.1, step_size=0.1, steps=1), refresh_every=1)
    with pytest.raises(InputError, match="empty"):
        trainer.fit(blobs, [], epochs=1, calibrate=False, progress=False)


def test_a_calibration_that_fails_after_training_keeps_the_training(blobs):
    guard = new_guard()
    images, labels = blobs.dataset.tensors
    mislabelled = DataLoader(TensorDataset(images, (labels + 1) % 3), batch_size=60)
    trainer = AdversarialClusterTrainer(guard, ATTACK, warmup_epochs=2)
    with pytest.warns(UserWarning, match="trained, but not calibrated"):
        history = trainer.fit(blobs, mislabelled, epochs=2, progress=False)
    assert len(history) == 2
    assert not guard.is_calibrated


def test_a_scheduler_steps_every_epoch_and_any_optimizer_will_do(blobs):
    guard = new_guard()
    optimizer = torch.optim.SGD(guard.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    train(guard, blobs, optimizer=optimizer, scheduler=scheduler, calibrate=False)
    assert optimizer.param_groups[0]["lr"] == 2.5e-4


@pytest.mark.parametrize(
    "options",
    [
        {"relabel": "x"},
        {"adversarial_weight": -1.0},
        {"adversarial_weight": math.nan},
        {"adversarial_floor": 1.5},
        {"adversarial_target": "elsewhere"},
        {"adversarial_margin": -0.1},
        {"cross_entropy_weight": math.inf},
        {"temperature": 0.0},
        {"refresh_every": 0},
        {"warmup_epochs": -1},
    ],
)
def test_options_are_checked_at_once(options):
    with pytest.raises(ConfigurationError, match="expected"):
        AdversarialClusterTrainer(new_guard(), ATTACK, **options)


def test_a_train_loader_with_a_frozen_batchnorm_keeps_it_frozen(blobs):
    guard = new_guard(nn.BatchNorm1d(16))
    guard.train()
    guard.encoder[0][3].eval()
    mean = guard.encoder[0][3].running_mean.clone()
    train(guard, blobs, calibrate=False)
    assert torch.equal(guard.encoder[0][3].running_mean, mean)
    assert guard.training


def test_a_guard_in_eval_mode_is_trained_in_train_mode_and_given_back_in_eval_mode(blobs):
    guard = new_guard(nn.BatchNorm1d(16)).eval()
    mean = guard.encoder[0][3].running_mean.clone()
    train(guard, blobs, calibrate=False)
    assert not torch.equal(guard.encoder[0][3].running_mean, mean)
    assert not any(module.training for module in guard.modules())


def test_a_guard_takes_the_mode_of_its_backbone():
    backbone = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64))
    assert ClusterGuard(backbone, 2, example=torch.rand(2, 1, 8, 8)).training
    assert not ClusterGuard(backbone.eval(), 2, example=torch.rand(2, 1, 8, 8)).training


@pytest.mark.parametrize("loader", [[], [(torch.zeros(0, 1, 8, 8), torch.zeros(0).long())]])
def test_an_empty_training_loader_is_named(blobs, loader):
    with pytest.raises(InputError, match="image"):
        AdversarialClusterTrainer(new_guard(), ATTACK).fit(loader, blobs, epochs=1, progress=False)


def test_a_loss_that_is_not_finite_at_the_first_step_leaves_the_weights_as_they_were(blobs):
    guard = new_guard()
    before = weights(guard)
    with pytest.raises(TrainingDivergedError, match="nan at step 0"):
        train(guard, blobs, attack=lambda detector, images, labels, **_: images * torch.nan)
    assert torch.equal(weights(guard), before)
