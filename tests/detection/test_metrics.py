import math

import clusterguard as cg
import pytest
import torch
from clusterguard import Detection
from clusterguard.detection import (
    Rate,
    Verdicts,
    accuracy,
    accuracy_after_rejection,
    attack_success_rate,
    expected_roc_auc,
    false_positive_rate,
    roc_auc,
    wilson_interval,
)
from clusterguard.detection._internal import guessing_advice
from clusterguard.errors import TooFewCalibrationExamplesError
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score


def verdicts(labels, distances, refused):
    return Detection(torch.tensor(labels), torch.tensor(distances), torch.tensor(refused))


def test_rates_by_hand():
    labels = torch.tensor([0, 0, 1, 1, 1])
    clean = verdicts([0, 0, 1, 1, 0], [1.0, 9.0, 1.0, 1.0, 1.0], [False, True, False, False, False])
    attacked = verdicts([1, 1, 0, 1, 0], [1.0, 1.0, 9.0, 1.0, 1.0], [False, False, True, False, False])
    assert accuracy(Verdicts(clean, labels)) == Rate(4, 5)
    assert accuracy_after_rejection(Verdicts(clean, labels)) == Rate(3, 4)
    assert false_positive_rate(Verdicts(clean, labels)) == Rate(1, 4)
    # Eligible: images 0, 2, 3. Image 0 gets through, 2 is refused, 3 is still right; 1 and 4 do not count.
    assert attack_success_rate(Verdicts(clean, labels), Verdicts(attacked, labels)) == Rate(1, 3)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.lists(st.integers(0, 6), min_size=1, max_size=30))
def test_roc_auc_is_scikit_learns_ties_included(benign, adversarial):
    expected = roc_auc_score([0] * len(benign) + [1] * len(adversarial), benign + adversarial)
    assert roc_auc(torch.tensor(benign).float(), torch.tensor(adversarial).float()) == pytest.approx(expected)


def test_roc_auc_tells_large_distances_apart():
    assert roc_auc(torch.tensor([1000.0, 1001.0]), torch.tensor([1002.0])) == 1.0


def test_expected_roc_auc_by_hand():
    # Class 0: benign at 1, 2 (and a misclassified one at 0, which does not count); class 1: benign at 5.
    benign = verdicts([0, 0, 0, 1], [1.0, 2.0, 0.0, 5.0], [False] * 4)
    benign_labels = torch.tensor([0, 0, 1, 1])
    # Attacked and labelled 0: at 1.5 (AUC ½) and one that is still correct (AUC 1); labelled 1: at 4 (AUC 0).
    attacked = verdicts([0, 0, 1], [1.5, 0.1, 4.0], [False] * 3)
    labels = torch.tensor([1, 0, 0])
    expected = (2 * (0.5 + 1) / 2 + 1 * 0.0) / 3
    assert expected_roc_auc(Verdicts(benign, benign_labels), Verdicts(attacked, labels), 3) == pytest.approx(expected)


def test_expected_roc_auc_is_one_if_every_attacked_image_is_still_right():
    benign = verdicts([0, 1], [1.0, 1.0], [False] * 2)
    attacked = verdicts([0, 1], [0.0, 0.0], [False] * 2)
    labels = torch.tensor([0, 1])
    assert expected_roc_auc(Verdicts(benign, labels), Verdicts(attacked, labels), 2) == 1.0


@pytest.mark.parametrize(
    ("count", "total", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)]
)
def test_wilson_intervals_from_the_literature(count, total, low, high):
    assert wilson_interval(count, total) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(0, 50), st.integers(0, 50))
def test_wilson_intervals_hold_the_share(count, more):
    low, high = wilson_interval(count, count + more)
    assert 0 <= low <= high <= 1
    if count + more:
        assert low <= count / (count + more) <= high


def test_nothing_counted_is_nan_not_zero():
    assert math.isnan(Rate(0, 0).value)
    assert Rate(0, 0).interval == (0.0, 1.0)


@pytest.mark.parametrize(
    ("right", "total", "num_classes", "is_doubted"),
    [(0, 300, 10, True), (30, 300, 10, True), (60, 300, 10, False), (0, 9, 10, False), (150, 300, 2, False),
     (700, 1000, 2, False), (480, 1000, 2, True), (0, 0, 2, False), (1, 10_000, 1000, True)],
)  # fmt: skip
def test_an_accuracy_that_guessing_reaches_is_doubted(right, total, num_classes, is_doubted):
    assert bool(guessing_advice(right, total, num_classes)) == is_doubted


def test_classes_in_another_order_are_said_at_calibration_and_evaluation():
    class Nearest(cg.DetectorModule):
        def evidence(self, images):
            distances = (images.flatten(1).mean(dim=1, keepdim=True) - torch.tensor([0.2, 0.5, 0.8])).abs()
            return cg.Evidence(-distances, distances)

    labels = torch.arange(300) % 3
    images = (0.2 + 0.3 * labels[:, None, None, None] + 0.05 * torch.rand(300, 1, 2, 2)).clamp(0, 1)
    shifted = [(images, (labels + 1) % 3)]
    detector = Nearest(3)
    with pytest.raises(TooFewCalibrationExamplesError, match=r"are their classes numbered as they were in training"):
        cg.Calibrator(0.1).fit(detector, shifted)
    detector.thresholds = torch.ones(3)
    with pytest.warns(UserWarning, match="only 0 of 300 images are labelled correctly"):
        cg.evaluate(detector, cg.FGSM(eps=0.01), shifted, sanity_images=0)
