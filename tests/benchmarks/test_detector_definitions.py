"""Every detector of the comparison is what its paper says."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from clusterguard import PGD
from clusterguard.attacks import Problem, get_norm, get_objective
from clusterguard.detection import judge, roc_auc
from clusterguard.detectors import WithThresholds
from clusterguard.errors import InputError
from scipy.ndimage import median_filter
from sklearn.covariance import EmpiricalCovariance
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, TensorDataset
from trained_detectors import ATTACK, IMAGES, INFINITE, LABELS, TRAINING, trained

from benchmarks.detectors import RECIPES
from benchmarks.detectors import _ccat as ccat
from benchmarks.detectors import _fs as fs
from benchmarks.detectors import _lid as lid
from benchmarks.detectors import _madry as madry
from benchmarks.detectors import _maha as maha
from benchmarks.detectors import _networks as networks
from benchmarks.detectors import _rectified_rejection as rectified_rejection
from benchmarks.detectors import _trades as trades
from benchmarks.detectors import _vanilla as vanilla


def test_trades_without_a_budget_is_cross_entropy_and_with_one_is_more():
    detector = WithThresholds(trained("trades"), INFINITE)
    images, labels = IMAGES[:40], LABELS[:40]

    def loss(eps, **options):
        attack = dataclasses.replace(ATTACK, eps=eps, **options)
        return trades.trades_loss(detector, images, labels, attack, torch.Generator().manual_seed(0)).loss.item()

    plain = vanilla.vanilla_loss(detector, images, labels, None, None).loss.item()
    assert loss(0.0) == pytest.approx(plain, abs=1e-6)
    assert loss(0.2) > plain + 0.1
    # Options that would split the batch, or drop images from it, do not reach an objective with a row per image.
    assert loss(0.2, batch_size=7, stop_early=True) == loss(0.2)


def test_trades_attack_moves_predictions_further_than_noise_does():
    detector = WithThresholds(trained("trades"), INFINITE)
    with torch.no_grad():
        benign = detector.evidence(IMAGES[:40]).class_scores.log_softmax(dim=1)
    attack = dataclasses.replace(ATTACK, objective=trades.away_from(benign), start=trades.start_near_image, keep="last")
    noise = dataclasses.replace(ATTACK, eps=0.2, steps=1, step_size=1e-9, start="random", keep="last")
    moved = []
    for way in (attack, noise):
        logits = detector.evidence(way(detector, IMAGES[:40], LABELS[:40])).class_scores
        moved.append(trades.divergences(benign, logits.log_softmax(dim=1)).mean())
    assert moved[0] > 5 * moved[1]


def test_trades_divergence_by_hand():
    benign, attacked = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    by_hand = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), math.log(2)]
    got = trades.divergences(benign.clamp_min(1e-30).log(), attacked.log())
    assert got.tolist() == pytest.approx(by_hand, abs=1e-6)


def test_the_median_is_that_of_scipy():
    images = torch.rand(3, 2, 7, 9)
    expected = median_filter(images.numpy(), size=(1, 1, 2, 2), mode="reflect")
    assert np.array_equal(fs.median_filter(images).numpy(), expected)


def test_feature_squeezing_by_hand():
    detector = RECIPES["fs"].finish(trained("vanilla"), [])
    images = IMAGES[:5]
    filtered = torch.from_numpy(median_filter(images.numpy(), size=(1, 1, 2, 2), mode="reflect"))
    with torch.no_grad():
        before, after = (trained("vanilla")(part).softmax(dim=1) for part in (images, filtered))
        suspicion = detector.evidence(images).suspicion
    torch.testing.assert_close(suspicion, (before - after).abs().sum(dim=1, keepdim=True).expand(5, 10))


def test_dimensionality_by_brute_force():
    features, references = torch.randn(6, 5).double(), torch.randn(40, 5).double()
    expected = []
    for row in features.numpy():
        distances = np.sort(np.linalg.norm(references.numpy() - row, axis=1))[:20]
        expected.append(-1 / np.mean(np.log(distances / distances[-1])))
    np.testing.assert_allclose(lid.local_dimensionality(features, references).numpy(), expected)


def test_dimensionality_grows_with_the_dimension_that_features_fill():
    torch.manual_seed(0)
    for filled in (2, 4, 8):  # of 16
        cloud = torch.rand(5000, filled) @ torch.eye(16)[:filled]
        dimension = lid.local_dimensionality(torch.eye(16)[:filled].sum(dim=0).expand(1, 16) / 2, cloud)
        assert dimension.item() == pytest.approx(filled, rel=0.4)


def test_dimensionality_of_a_reference_is_a_number_with_a_slope():
    references = torch.randn(30, 5)
    features = torch.cat([references[:2], references.new_zeros(1, 5)]).requires_grad_()
    values = lid.local_dimensionality(features, references)
    (gradient,) = torch.autograd.grad(values.sum(), features)
    assert values.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.any(dim=1).all()
    same = lid.local_dimensionality(torch.zeros(1, 5), torch.zeros(30, 5))
    assert same.isfinite().all()


def test_references_are_the_first_images_of_every_class():
    detector = RECIPES["lid"].finish(trained("vanilla"), DataLoader(TRAINING, batch_size=64))
    images, labels = TRAINING.tensors
    chosen = torch.cat([images[labels == index][:10] for index in range(10)])
    with torch.no_grad():
        torch.testing.assert_close(detector.references, detector.represent(chosen))


@pytest.mark.parametrize("name", ["lid", "maha"])
def test_a_class_without_training_images_is_an_error(name):
    images, labels = TRAINING.tensors
    with pytest.raises(InputError, match="training images of every class"):
        RECIPES[name].finish(trained("vanilla"), [(images[labels != 3], labels[labels != 3])])
    with pytest.raises(InputError, match="training images of every class"):
        RECIPES[name].finish(trained("vanilla"), [])


def test_mahalanobis_distances_are_those_of_scikit_learn():
    torch.manual_seed(0)
    labels = torch.arange(400) % 10
    images = torch.rand(400, 1, 4, 4) * 0.5 + torch.rand(10, 1, 4, 4)[labels] * 0.5
    images[:, :, 0, 0] = 0  # a dead feature
    detector = RECIPES["maha"].build(networks.Features(torch.nn.Flatten(), (1, 4, 4)))
    batches = DataLoader(TensorDataset(images, labels), batch_size=70)
    detector = RECIPES["maha"].finish(detector, batches)
    features = images.flatten(1).double().numpy()
    means = np.stack([features[labels == index].mean(axis=0) for index in range(10)])
    tied = EmpiricalCovariance().fit(features - means[labels])
    with torch.no_grad():
        suspicion = detector.evidence(images[:50]).suspicion.double().numpy()
    for index in range(10):
        squared = tied.mahalanobis(features[:50] - means[index])
        np.testing.assert_allclose(suspicion[:, index] ** 2, squared, rtol=1e-4)


def test_whitening_ignores_directions_without_variance():
    whitening = maha.whiten(torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0]]).double())
    expected = torch.tensor([[0.125, 0.125, 0.0], [0.125, 0.125, 0.0], [0.0, 0.0, 0.0]]).double()
    torch.testing.assert_close(whitening @ whitening.T, expected)


def test_soft_targets_by_hand():
    sizes = torch.tensor([0.0, 0.03, 0.3, 0.4])
    targets = ccat.soft_targets(torch.tensor([0, 1, 2, 3]), sizes, 0.3, 10)
    certain = 0.9**10
    assert targets[0].tolist() == one_hot(torch.tensor(0), 10).tolist()
    assert targets[1].tolist() == pytest.approx([(1 - certain) / 10 + certain * (index == 1) for index in range(10)])
    assert targets[2:].flatten().tolist() == pytest.approx([0.1] * 20)
    assert ccat.soft_targets(torch.tensor([4]), torch.zeros(1), 0.0, 10)[0].tolist() == [*[0] * 4, 1, *[0] * 5]


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.2), ("l2", 2.0), ("l1", 15.0), ("l0", 25.0)])
def test_ccat_starts_at_images_and_all_over_the_ball(norm, eps):
    problem = Problem(
        trained("ccat"),
        IMAGES[:200],
        LABELS[:200],
        None,
        get_norm(norm),
        eps,
        get_objective("suspicion"),
        torch.Generator().manual_seed(0),
    )
    sizes = problem.norm.size(ccat.start_of_any_size(problem) - problem.images) / eps
    assert 0.3 < (sizes == 0).float().mean() < 0.7
    assert sizes.max() <= 1
    assert sizes.max() > 0.5  # the box takes its share, most of all from the dark pixels of a digit
    assert 0.1 < sizes[sizes > 0].median() < 0.7


def test_ccat_loss_by_hand():
    detector = WithThresholds(trained("ccat"), INFINITE)
    images, labels = IMAGES[:11], LABELS[:11]
    log_p = detector.evidence(images).class_scores.log_softmax(dim=1)
    right = log_p.gather(1, labels[:, None]).squeeze(1)
    # A step too small to matter that reaches the radius all the same: six benign images, five of no class.
    attack = PGD(eps=1e-5, step_size=1e-3, steps=1)
    loss = ccat.ccat_loss(detector, images, labels, attack, None).loss
    torch.testing.assert_close(loss, -(right[:6].sum() + log_p[6:].mean(dim=1).sum()) / 11, rtol=1e-3, atol=1e-3)
    unattacked = ccat.ccat_loss(detector, images, labels, dataclasses.replace(attack, eps=0.0), None).loss
    torch.testing.assert_close(unattacked, -right.mean())


def test_ccat_is_less_sure_of_attacked_digits_and_others_are_not():
    areas = {}
    for name in ("ccat", "vanilla", "madry"):
        detector = WithThresholds(trained(name), INFINITE)
        attack = dataclasses.replace(ATTACK, objective="suspicion", keep="last")
        attacked, _ = judge(detector, [(attack(detector, IMAGES[:200], LABELS[:200]), LABELS[:200])])
        areas[name] = roc_auc(judge(detector, [(IMAGES, LABELS)]).detection.distances, attacked.distances)
    assert areas["ccat"] > max(areas["vanilla"], areas["madry"]) + 0.05


def test_rectification_spares_the_confidence_of_right_predictions():
    logits = torch.tensor([[2.0, 0.0, 0.0], [2.0, 0.0, 0.0]], requires_grad=True)
    trust = torch.zeros(2, 1, requires_grad=True)
    loss = rectified_rejection.rectification_loss(logits, trust, torch.tensor([0, 1]))
    by_logits, by_trust = torch.autograd.grad(loss, [logits, trust])
    assert not by_logits[0].any()
    assert by_logits[1, 0] > 0  # descent makes the wrong prediction less confident
    assert by_trust[0] < 0 < by_trust[1]


def test_rectified_confidence_learns_the_true_class_probability():
    logits = torch.tensor([[2.0, 0.0, 0.0]])
    trust = torch.zeros(1, 1, requires_grad=True)
    optimizer = torch.optim.Adam([trust], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        rectified_rejection.rectification_loss(logits, trust, torch.tensor([1])).backward()
        optimizer.step()
    confidence, true = logits.softmax(dim=1)[0, :2].tolist()
    assert confidence * trust.sigmoid().item() == pytest.approx(true, abs=1e-3)


def test_rectified_suspicion_is_a_product_of_probabilities():
    detector = trained("rectified-rejection")
    with torch.no_grad():
        logits, trust = detector.logits_and_trust(IMAGES[:20])
        suspicion = detector.evidence(IMAGES[:20]).suspicion
    assert torch.allclose((-suspicion).exp(), logits.softmax(dim=1) * trust.sigmoid(), atol=1e-6)
    assert trust.sigmoid().std() > 0.01


def test_madry_attacks_from_a_random_start_with_cross_entropy():
    detector = WithThresholds(trained("madry"), INFINITE)
    generators = (torch.Generator().manual_seed(seed) for seed in (0, 0, 1))
    attack = madry.attack_with_cross_entropy
    runs = [attack(detector, IMAGES[:20], LABELS[:20], ATTACK, generator) for generator in generators]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_the_autoencoder_reconstructs_digits_better_than_their_mean_does():
    detector = trained("resisting")
    with torch.no_grad():
        error = detector.reconstruction_error(IMAGES, detector.represent(IMAGES))
        latents, evidence = detector.represent(IMAGES), detector.evidence(IMAGES)
    by_mean = (IMAGES - TRAINING.tensors[0].mean(dim=0)).flatten(1).square().sum(dim=1)
    assert error.mean() < 0.9 * by_mean.mean()
    centres = torch.eye(10) * 10
    distances = (latents[:, None] - centres).norm(dim=2)
    torch.testing.assert_close(evidence.class_scores, -distances, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(evidence.suspicion, distances + error.sqrt()[:, None], rtol=1e-4, atol=1e-4)
