import copy
import math

import pytest
import torch
from clusterguard import FGSM, PGD, AdversarialClusterTrainer, ClusterGuard
from clusterguard.detectors import GaussianClusters, WithThresholds
from clusterguard.errors import ConfigurationError
from clusterguard.samples import load_digits
from clusterguard.training import (
    ClusterLoss,
    Graded,
    Opposite,
    Origin,
    Original,
    Outside,
    OverfittingCheck,
    Separate,
    Validation,
    negative_log_likelihood,
)
from clusterguard.training._losses import cluster_terms
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainings import ATTACK, new_guard, train


def test_cluster_loss_by_hand():
    clusters = GaussianClusters(2, center_scale=2.0)
    z = torch.tensor([[2.0, 1.0], [0.0, 0.0], [3.0, 4.0]])
    labels = torch.tensor([0, 1, 0])
    # Own centres: squared distances 1 and 4, mean 2.5; the third is adversarial: 25 from the origin.
    loss = negative_log_likelihood(clusters, z, labels, torch.tensor([False, False, True]), adversarial_weight=0.5)
    assert loss.item() == pytest.approx(0.5 * (2.5 + 0.5 * 25))


def test_cluster_loss_of_equation_31_is_the_likelihoods_logarithm():
    clusters = GaussianClusters(3, 6)
    z, labels = torch.randn(8, 6), torch.arange(8) % 3
    nothing = torch.zeros(8, dtype=torch.bool)
    expected = -clusters.log_likelihood(z).gather(1, labels[:, None]).mean() - 3 * math.log(2 * math.pi)
    torch.testing.assert_close(negative_log_likelihood(clusters, z, labels, nothing), expected, rtol=1e-4, atol=1e-3)


def test_an_attack_that_writes_into_its_images_leaves_the_training_data_alone():
    data = [part[:40].clone() for part in load_digits("train").tensors]
    others = [part[40:80].clone() for part in load_digits("train").tensors]
    before = [part.clone() for part in (*data, *others)]

    def overwrite(detector, images, labels, *, targets=None, generator=None):
        labels.zero_()
        return images.zero_()

    guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU()), 10, example=data[0][:1])
    loader = [tuple(data)]
    checks = {"validation": Validation([tuple(others)]), "overfitting": OverfittingCheck([tuple(others)], overwrite)}
    trainer = AdversarialClusterTrainer(guard, overwrite)
    trainer.fit(loader, loader, epochs=2, calibrate=False, progress=False, **checks)
    assert all(map(torch.equal, (*data, *others), before))


def test_one_epoch_on_real_digits_lowers_the_loss():
    torch.manual_seed(0)
    data = TensorDataset(*(part[:1500] for part in load_digits("train").tensors))
    guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU()), 10, example=data[0][0][None])
    losses = []

    def record(detector, images, labels, *, targets=None, generator=None):
        with torch.no_grad():
            squared = guard.head.squared_distances(guard.represent(images)).gather(1, labels[:, None])
        losses.append(squared.mean().item())
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


def test_what_got_through_goes_to_the_origin_and_the_rest_keeps_its_class(blobs, monkeypatch):
    seen = []

    def spy(clusters, representations, labels, adversarial_share, *others):
        seen.append((representations.detach(), labels, adversarial_share.bool()))
        return cluster_terms(clusters, representations, labels, adversarial_share, *others)

    monkeypatch.setattr("clusterguard.training._losses.cluster_terms", spy)
    guard = new_guard()
    before = copy.deepcopy(guard).eval()
    images, labels = next(iter(blobs))
    attacked = PGD(eps=0.5, step_size=0.1, steps=10, keep="last")(
        WithThresholds(before, torch.full((3,), torch.inf)), images, labels
    )
    trainer = AdversarialClusterTrainer(guard, lambda *_, **__: attacked)
    trainer.fit([(images, labels)], blobs, epochs=1, calibrate=False, progress=False)
    _, used_labels, adversarial_share = seen[0]
    misclassified = before.distances(attacked).argmin(1) != labels  # with thresholds at +inf that is success
    assert 0 < misclassified.sum() < len(labels)
    assert torch.equal(adversarial_share, torch.cat([torch.zeros(60, dtype=torch.bool), misclassified]))
    assert torch.equal(used_labels, torch.cat([labels, labels]))


def test_relabelling_to_the_original_class_never_uses_the_origin(blobs, monkeypatch):
    monkeypatch.setattr(GaussianClusters, "adversarial_energy", lambda self, z: z.new_full((len(z),), 1e9))
    history = train(new_guard(), blobs, relabel=Original(), calibrate=False)
    assert history[-1].loss < 1e3
    assert history[-1].attack_success_rate > 0


@pytest.mark.parametrize("relabel", [Separate(), Graded(1.0)], ids=str)
@pytest.mark.parametrize("target", [Origin(), Opposite(), Outside(1.0)], ids=str)
@pytest.mark.parametrize("threshold", [10.0, math.inf])
def test_the_loss_sends_what_got_through_where_it_shall_go(blobs, target, relabel, threshold):
    guard = new_guard()
    trainer = AdversarialClusterTrainer(guard, ATTACK, loss=ClusterLoss(target=target), relabel=relabel)
    trainer.attack = lambda detector, images, labels, **_: attacked
    trainer.attack.norm, trainer.attack.eps = "linf", 1.0
    trainer.thresholds.fill_(threshold)
    images, labels = next(iter(blobs))
    attacked = images + 0.5 * (torch.roll(images, 1, dims=0) - images)  # halfway to an image of another class
    term = trainer.training_step(images, labels, None).terms["loss/adversarial"]

    with torch.no_grad():
        z = guard.represent(attacked)
    nearest = torch.cdist(z, guard.head.centers).min(dim=1)
    through = (nearest.indices != labels) & (nearest.values <= threshold)
    assert 5 < through.sum() < 55
    edge = 2 * (math.sqrt(50) if threshold == math.inf else threshold)  # centres are 10·√2 apart
    energy = {
        Origin(): z.norm(dim=1),
        Opposite(): (z + guard.head.centers[labels]).norm(dim=1),
        Outside(1.0): (edge - nearest.values).clamp_min(0),
    }[target].square()
    shares = through * (1.0 if relabel == Separate() else (attacked - images).abs().flatten(1).amax(dim=1))
    torch.testing.assert_close(term, 0.5 * (shares * energy).sum() / shares.sum())


@pytest.mark.parametrize(("floor", "divisor"), [(0.0, 2), (0.01, 2), (0.5, 30), (1.0, 60)])
def test_a_floor_keeps_few_successes_from_weighing_as_much_as_many(blobs, floor, divisor):
    images, labels = next(iter(blobs))
    torch.manual_seed(0)
    guard = new_guard()
    train(guard, blobs, epochs=8, warmup_epochs=8, calibrate=False)
    attacked = images.clone()
    attacked[:2] = torch.roll(images, 1, dims=0)[:2]  # two images of another class, and no other change
    trainer = AdversarialClusterTrainer(guard.eval(), lambda *_, **__: attacked, loss=ClusterLoss(floor=floor))
    step = trainer.training_step(images, labels, None)
    assert step.successes == 2
    with torch.no_grad():
        expected = 0.5 * guard.represent(attacked[:2]).square().sum() / divisor
    torch.testing.assert_close(step.terms["loss/adversarial"], expected)


def test_cross_entropy_comes_on_top_and_does_not_look_at_what_got_through(blobs):
    batch = next(iter(blobs))
    plain, mixed = (
        AdversarialClusterTrainer(new_guard(), ATTACK, **options).training_step(*batch, None)
        for options in ({}, {"loss": ClusterLoss(cross_entropy_weight=3.0, temperature=10.0)})
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


@pytest.mark.parametrize(
    "options",
    [
        {"relabel": "x"},
        {"relabel": Separate},
        {"loss": Origin()},
        {"refresh_every": 0},
        {"warmup_epochs": -1},
    ],
)
def test_options_are_checked_at_once(options):
    with pytest.raises(ConfigurationError, match="expected"):
        AdversarialClusterTrainer(new_guard(), ATTACK, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClusterLoss(weight=-1.0), "weight of at least 0"),
        (lambda: ClusterLoss(weight=math.nan), "weight of at least 0"),
        (lambda: ClusterLoss(weight=None), "a number as weight"),
        (lambda: ClusterLoss(floor=1.5), "floor in"),
        (lambda: ClusterLoss(target="origin"), "Origin"),
        (lambda: ClusterLoss(target=Outside), "Origin"),
        (lambda: ClusterLoss(cross_entropy_weight=math.inf), "cross_entropy_weight"),
        (lambda: ClusterLoss(temperature=0.0), "positive temperature"),
        (lambda: ClusterLoss(temperature="1"), "a number as temperature"),
        (lambda: Outside(-0.1), "margin of at least 0"),
        (lambda: Graded(0.0), "positive power"),
    ],
)
def test_losses_and_relabelling_check_themselves(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_a_guard_and_an_attack_in_the_wrong_order_are_named():
    with pytest.raises(ConfigurationError, match="expected a ClusterGuard and an attack, in this order, got PGD and C"):
        AdversarialClusterTrainer(ATTACK, new_guard())
