import math

import numpy as np
import pytest
import torch
from clusterguard import Calibrator
from clusterguard.detection import fit_shared_threshold, fit_thresholds, minimum_examples
from clusterguard.detectors import ConfidenceDetector
from clusterguard.errors import ConfigurationError, InputError, TooFewCalibrationExamplesError
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

RATES = st.sampled_from([0.01, 0.02, 0.05, 0.1, 0.3, 1 / 3, 0.999])


@given(RATES, st.integers(0, 300), st.integers(0, 9))
def test_on_its_own_data_the_rate_is_never_exceeded(rate, extra, seed):
    count = minimum_examples(rate) + extra
    suspicion = torch.rand(count, generator=torch.Generator().manual_seed(seed)).mul(20).round()  # ties
    threshold = fit_shared_threshold(suspicion, rate)
    assert (suspicion > threshold).double().mean() <= rate + 1e-12
    assert (suspicion == threshold).any()


@given(RATES, st.integers(1, 300), st.integers(0, 9))
def test_quantile_is_numpys(rate, extra, seed):
    suspicion = torch.rand(minimum_examples(rate) + extra, generator=torch.Generator().manual_seed(seed))
    expected = np.quantile(suspicion.double().numpy(), 1 - rate)
    assert fit_shared_threshold(suspicion, rate, method="quantile") == pytest.approx(expected, abs=1e-9)


def test_the_bound_holds_on_new_data():
    # 4,000 calibrations of 120 examples each, one new example each: the mean rate is at most 5 %, and not far below.
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4000, 121, generator=generator).exp()
    thresholds = torch.tensor([fit_shared_threshold(row[:-1], 0.05) for row in samples])
    rate = (samples[:, -1] > thresholds).double().mean().item()
    exact = 1 - math.ceil(121 * 0.95) / 121  # what exchangeability gives without ties
    assert exact <= 0.05
    assert abs(rate - exact) < 4 * math.sqrt(0.05 * 0.95 / 4000)


@pytest.mark.parametrize(("rate", "needed"), [(0.01, 99), (0.05, 19), (0.1, 9), (0.3, 3), (0.001, 999)])
def test_the_smallest_sample_that_works(rate, needed):
    assert minimum_examples(rate) == needed
    fit_shared_threshold(torch.rand(needed), rate)
    with pytest.raises(TooFewCalibrationExamplesError, match=f"at least {needed} examples"):
        fit_shared_threshold(torch.rand(needed - 1), rate)


def test_only_correct_examples_of_a_class_count_towards_its_threshold():
    suspicion = torch.arange(40.0)
    labels = torch.arange(40) % 2
    predicted = labels.clone()
    predicted[-2:] = 1 - labels[-2:]  # the two most suspicious are misclassified
    calibration = fit_thresholds(suspicion, predicted, labels, 2, false_positive_rate=0.1)
    assert calibration.counts == (19, 19)
    assert calibration.thresholds == pytest.approx((34.0, 35.0), rel=1e-5)
    assert calibration.realised_rates == pytest.approx((1 / 19, 1 / 19))


def test_scarce_classes_are_named_or_pooled():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 50)
    suspicion = torch.rand(103)
    with pytest.raises(TooFewCalibrationExamplesError, match="class 1: 3"):
        fit_thresholds(suspicion, labels, labels, 3, false_positive_rate=0.1)
    pooled = fit_thresholds(suspicion, labels, labels, 3, false_positive_rate=0.1, scarce="pool")
    assert pooled.pooled == (1,)
    expected = max(fit_shared_threshold(suspicion, 0.1), float(suspicion[labels == 1].max()))
    assert pooled.thresholds[1] == pytest.approx(expected, rel=1e-5)


def test_pooling_too_does_not_help_a_set_that_is_too_small():
    labels = torch.tensor([0, 1, 0])
    with pytest.raises(TooFewCalibrationExamplesError, match="class 0: 2, class 1: 1"):
        fit_thresholds(torch.rand(3), labels, labels, 2, false_positive_rate=0.1, scarce="pool")


def test_no_threshold_is_made_of_infinite_suspicion():
    with pytest.raises(InputError, match="finite"):
        fit_shared_threshold(torch.full((99,), torch.inf), 0.01)


@pytest.mark.parametrize(
    "options", [{"false_positive_rate": 1.0}, {"false_positive_rate": 0.0}, {"method": "x"}, {"scarce": "x"}]
)
def test_options_are_checked_at_once(options):
    with pytest.raises(ConfigurationError, match="expected"):
        Calibrator(**options)


def detector_and_loader(count: int) -> tuple[ConfidenceDetector, DataLoader]:
    """Labels by whether the first pixel is bright, half of each; all are classified correctly."""
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    classifier[1].weight.data = torch.tensor([[-4.0, 0, 0, 0], [4.0, 0, 0, 0]])
    classifier[1].bias.data = torch.tensor([2.0, -2.0])
    labels = torch.arange(count) % 2
    images = torch.rand(count, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 0.5
    images[:, 0, 0, 0] += 0.5 * labels
    return ConfidenceDetector(classifier, num_classes=2), DataLoader(TensorDataset(images, labels), batch_size=37)


def test_fit_sets_thresholds_and_keeps_the_record():
    detector, loader = detector_and_loader(200)
    calibration = Calibrator(false_positive_rate=0.1).fit(detector, loader)
    assert detector.calibration is calibration
    assert torch.equal(detector.thresholds, torch.tensor(calibration.thresholds))
    assert calibration.images == 200 == sum(calibration.counts)
    refused = torch.cat([detector.detect(images).is_adversarial for images, _ in loader])
    assert refused.double().mean().item() == pytest.approx(calibration.realised_rate)


def test_a_failed_fit_changes_nothing():
    detector, loader = detector_and_loader(50)
    detector.thresholds = torch.tensor([1.0, 2.0])
    with pytest.raises(TooFewCalibrationExamplesError):
        Calibrator(false_positive_rate=0.001).fit(detector, loader)
    assert detector.thresholds.tolist() == [1.0, 2.0]


def test_an_empty_loader_is_refused():
    detector, _ = detector_and_loader(10)
    with pytest.raises(InputError, match="at least one batch"):
        Calibrator().fit(detector, [])


def test_pooling_warns():
    detector, loader = detector_and_loader(17)
    with pytest.warns(UserWarning, match=r"classes \[1\].*not guaranteed"):
        Calibrator(false_positive_rate=0.1, scarce="pool").fit(detector, loader)


@pytest.mark.parametrize("rate", [torch.tensor(0.1), "0.1", None, complex(0.1), math.nan])
def test_a_rate_is_a_number(rate):
    with pytest.raises(ConfigurationError, match="expected a false-positive rate"):
        Calibrator(rate)


def test_many_scarce_classes_are_listed_in_short():
    labels = torch.arange(5000) % 2500
    with pytest.raises(TooFewCalibrationExamplesError, match=r"class 9: 2 and 2490 more classes; add") as caught:
        fit_thresholds(torch.rand(5000), labels, labels, 2500, false_positive_rate=0.1)
    assert len(str(caught.value)) < 600
