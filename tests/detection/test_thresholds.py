"""What thresholds promise: exact ranks, bounds for pooled classes, and no decision by rounding."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from clusterguard import Calibrator, ClusterGuard, DetectorModule, Evidence, decide
from clusterguard.deployment import plausible_rate
from clusterguard.detection import allowed_refusals, fit_shared_threshold, fit_thresholds, minimum_examples
from clusterguard.detectors import ConfidenceDetector
from clusterguard.errors import ConfigurationError, InputError, TooFewCalibrationExamplesError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

DECIMALS = st.integers(1, 9999).map(lambda parts: parts / 10_000)


@given(DECIMALS, st.integers(0, 5000))
def test_ranks_are_those_of_exact_arithmetic(rate, count):
    exact = Fraction(round(rate * 10_000), 10_000)
    assert allowed_refusals(count, rate) == math.floor((count + 1) * exact)
    assert (allowed_refusals(count, rate) >= 1) == (count >= minimum_examples(rate))


@given(DECIMALS, st.integers(0, 60), st.sampled_from(["conformal", "quantile"]))
def test_a_threshold_lies_exactly_at_its_rank(rate, extra, method):
    count = minimum_examples(rate) + extra
    exact = Fraction(round(rate * 10_000), 10_000)
    rank = math.ceil((count + 1) * (1 - exact)) if method == "conformal" else 1 + (count - 1) * (1 - exact)
    threshold = fit_shared_threshold(torch.arange(1.0, count + 1)[torch.randperm(count)], rate, method=method)
    assert threshold == pytest.approx(float(rank), rel=1e-12)


def by_definition(suspicion, labels, classes, rate, method):
    """A threshold per class as the definitions say, class by class, in numpy."""
    thresholds = []
    for index in range(classes):
        values = np.sort(suspicion[labels == index].double().numpy())
        rank = len(values) - math.floor((len(values) + 1) * Fraction(str(rate)))
        thresholds.append(values[rank] if method == "conformal" else np.quantile(values, 1 - rate))
    return thresholds


@given(
    st.sampled_from([0.05, 0.1, 0.34]), st.integers(1, 6), st.integers(0, 9), st.sampled_from(["conformal", "quantile"])
)
def test_every_class_gets_what_it_would_get_alone(rate, classes, seed, method):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(minimum_examples(rate), 60, (classes,), generator=generator)
    labels = torch.arange(classes).repeat_interleave(counts)
    order = torch.randperm(len(labels), generator=generator)
    labels, suspicion = labels[order], torch.randn(len(labels), generator=generator)
    predicted = torch.where(torch.rand(len(labels), generator=generator) < 0.1, (labels + 1) % classes, labels)
    try:
        calibration = fit_thresholds(suspicion, predicted, labels, classes, false_positive_rate=rate, method=method)
    except TooFewCalibrationExamplesError:
        assert classes > 1
        return
    right = predicted == labels
    expected = by_definition(suspicion[right], labels[right], classes, rate, method)
    assert calibration.thresholds == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert all(threshold >= wanted for threshold, wanted in zip(calibration.thresholds, expected, strict=True))
    over = suspicion.double() > torch.tensor(calibration.thresholds, dtype=torch.float64)[labels]
    for index in range(classes):
        of_class = right & (labels == index)
        assert calibration.counts[index] == int(of_class.sum())
        assert calibration.realised_rates[index] == pytest.approx(float(over[of_class].double().mean()))


SIZES = st.lists(st.integers(0, 14), min_size=1, max_size=5).filter(any)


@settings(max_examples=100)
@given(st.sampled_from([0.5, 0.34, 1 / 3, 0.3, 0.2, 0.12]), SIZES, st.sampled_from(["ties", "all differ"]), st.data())
def test_pooling_refuses_no_more_than_the_rate_whichever_example_is_the_new_one(rate, sizes, kind, data):
    """Exchangeable examples are as likely to be the new one as any other, so counting over all of them is a proof."""
    shifts = st.lists(st.sampled_from([0.0, 1.0, 50.0]), min_size=len(sizes), max_size=len(sizes))
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    suspicion = torch.rand(len(labels), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 5))))
    suspicion = (suspicion.mul(3).round() if kind == "ties" else suspicion) + torch.tensor(data.draw(shifts))[labels]
    refused = torch.zeros(len(labels), dtype=torch.bool)
    for new in range(len(labels)):
        rest = torch.arange(len(labels)) != new
        arguments = suspicion[rest], labels[rest], labels[rest], len(sizes)
        try:
            calibration = fit_thresholds(*arguments, false_positive_rate=rate, scarce="pool")
        except TooFewCalibrationExamplesError:
            assert len(labels) - 1 < minimum_examples(rate)
            continue
        refused[new] = suspicion[new].double() > calibration.thresholds[labels[new]]
    alpha = Fraction(str(rate))
    assert int(refused.sum()) <= alpha * len(labels)
    for index, size in enumerate(sizes):
        if size > minimum_examples(rate):
            assert int(refused[labels == index].sum()) <= alpha * size


def draw(count, shares, shifts, generator):
    labels = torch.multinomial(torch.tensor(shares), count, True, generator=generator)
    return torch.randn(count, generator=generator) + torch.tensor(shifts)[labels], labels


@pytest.mark.parametrize(
    ("shares", "shifts"),
    [
        ([0.11] * 9 + [0.01], [0.0] * 9 + [50.0]),  # one odd class
        ([0.16] * 6 + [0.01] * 4, [0.0] * 6 + [50.0, 5.0, 0.0, -50.0]),  # four, enough together
        ([0.5, 0.49, 0.01], [0.0, 30.0, 60.0]),
    ],
)
def test_on_average_over_all_images_the_pooled_rate_holds(shares, shifts):
    generator, rate, rates, by_class = torch.Generator().manual_seed(0), 0.05, [], []
    for _ in range(200):
        suspicion, labels = draw(900, shares, shifts, generator)
        arguments = suspicion, labels, labels, len(shares)
        calibration = fit_thresholds(*arguments, false_positive_rate=rate, scarce="pool")
        assert calibration.pooled
        suspicion, labels = draw(2000, shares, shifts, generator)
        refused = suspicion > torch.tensor(calibration.thresholds)[labels]
        rates.append(refused.double().mean())
        by_class.append([refused[labels == index].double().mean() for index in range(2)])  # of many examples
    means, error = torch.stack(rates).mean(), torch.stack(rates).std() / math.sqrt(200)
    assert 0.6 * rate < means < rate + 3 * error
    assert torch.tensor(by_class).mean(dim=0).max() < rate * 1.05


def test_a_scarce_class_of_its_own_kind_widens_no_other_threshold_much():
    generator = torch.Generator().manual_seed(0)
    suspicion, labels = draw(5000, [0.11] * 9 + [0.01], [0.0] * 9 + [50.0], generator)
    calibration = fit_thresholds(suspicion, labels, labels, 10, scarce="pool")
    assert calibration.pooled == (9,)
    assert max(calibration.thresholds[:9]) < 4
    assert calibration.thresholds[9] == pytest.approx(float(suspicion[labels == 9].max()), rel=1e-5)


def test_pooled_classes_without_a_single_example_take_everybodys_threshold():
    labels = torch.arange(300) % 3
    suspicion = torch.rand(300)
    calibration = fit_thresholds(suspicion, labels, labels, 5, false_positive_rate=0.05, scarce="pool")
    assert calibration.pooled == (3, 4)
    assert (
        calibration.thresholds[3]
        == calibration.thresholds[4]
        == pytest.approx(fit_shared_threshold(suspicion, 0.05), rel=1e-5)
    )


def test_where_nobody_can_give_up_a_refusal_it_is_shared():
    labels = torch.tensor([0] * 10 + [1] * 3)
    suspicion = torch.cat([torch.rand(10), torch.tensor([3.0, 5.0, 4.0])])
    calibration = fit_thresholds(suspicion, labels, labels, 2, false_positive_rate=0.1, scarce="pool")
    assert calibration.thresholds == pytest.approx((5.0, 5.0), rel=1e-5)


def test_a_network_that_knows_one_class_alone_can_be_calibrated():
    labels = torch.zeros(148, dtype=torch.long)
    suspicion = torch.rand(148)
    calibration = fit_thresholds(suspicion, labels, labels, 10, scarce="pool")
    assert calibration.thresholds == pytest.approx([float(suspicion.max())] * 10, rel=1e-5)


@pytest.mark.parametrize("scarce", [True, False])
def test_the_true_average_is_plausible_as_often_as_stated_with_pooled_classes(scarce):
    """On uniform suspicion, shifted for the last class, the true rates follow from the thresholds."""
    generator, shares = torch.Generator().manual_seed(0), torch.tensor([0.5, 0.47, 0.03] if scarce else [0.4, 0.4, 0.2])
    covered = []
    for _ in range(100):
        labels = torch.multinomial(shares, 400, True, generator=generator)
        suspicion = torch.rand(400, generator=generator) + 5.0 * (labels == 2)
        calibration = fit_thresholds(suspicion, labels, labels, 3, false_positive_rate=0.05, scarce="pool")
        within = torch.tensor(calibration.thresholds) - torch.tensor([0.0, 0.0, 5.0])
        true = float((shares * (1 - within.clamp(0, 1))).sum())
        covered.append(true <= plausible_rate(calibration, confidence=0.9))
    assert sum(covered) / len(covered) >= 0.9 - 0.05


def test_for_any_mix_nothing_is_plausible_of_pooled_classes():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 50)
    calibration = fit_thresholds(torch.rand(103), labels, labels, 3, false_positive_rate=0.1, scarce="pool")
    assert 0 < plausible_rate(calibration) < 1
    with pytest.raises(InputError, match="any_mix"):
        plausible_rate(calibration, any_mix=True)


@pytest.mark.parametrize("rounding", [-1.0, math.nan, math.inf])
def test_rounding_is_a_size(rounding):
    labels = torch.zeros(9, dtype=torch.long)
    with pytest.raises(ConfigurationError, match="rounding"):
        fit_thresholds(torch.rand(9), labels, labels, 1, false_positive_rate=0.1, rounding=rounding)


@given(st.floats(-1e6, 1e6), st.floats(0, 1e3))
def test_the_slack_is_small_and_covers_rounding(value, rounding):
    labels = torch.zeros(9, dtype=torch.long)
    suspicion = torch.full((9,), value)
    threshold = fit_thresholds(suspicion, labels, labels, 1, false_positive_rate=0.1, rounding=rounding).thresholds[0]
    exact = float(suspicion[0])
    assert threshold >= exact + rounding
    assert threshold <= exact + 1e-5 * abs(exact) + rounding * (1 + 1e-6) + 2e-7 * abs(exact) + 1e-44


@pytest.mark.parametrize("value", [math.inf, math.nan, 3e38, 1e300])
def test_no_threshold_is_infinite_or_too_large_for_float32(value):
    labels = torch.zeros(9, dtype=torch.long)
    with pytest.raises(InputError, match="finite"):
        fit_thresholds(torch.full((9,), value, dtype=torch.float64), labels, labels, 1, false_positive_rate=0.1)


def deep_network() -> nn.Module:
    """Whose features differ in the last places with the batch size."""
    layers = [nn.Conv2d(1, 24, 3, padding=1), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(24, 24, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 64, 40), nn.ReLU())


def tight_guard() -> tuple[ClusterGuard, torch.Tensor]:
    """A guard, and images that lie much closer to their centres than these lie to the origin."""
    guard = ClusterGuard(deep_network(), num_classes=2, example=torch.rand(1, 1, 8, 8)).eval()
    images = torch.rand(120, 1, 8, 8) * 0.01
    images[60:, :, 4:] += 0.9
    with torch.no_grad():
        last = guard.encoder[-1]
        features = nn.Sequential(*list(guard.encoder)[:-1])(guard.normalize(images)).flatten(1)
        centers = 10.0 * nn.functional.one_hot(torch.arange(120) // 60, 2)
        design = torch.cat([features, torch.ones(120, 1)], dim=1)
        solution = torch.linalg.lstsq(design, centers, rcond=1e-4, driver="gelsd").solution
        last.weight.copy_(solution[:-1].T)
        last.bias.copy_(solution[-1])
    return guard, images


def undefended() -> tuple[ConfidenceDetector, torch.Tensor]:
    network = nn.Sequential(deep_network(), nn.Linear(40, 2))
    detector = ConfidenceDetector(network, num_classes=2)
    images = torch.rand(120, 1, 8, 8)
    with torch.no_grad():  # confident: -log p is close to 0, where a float32 is much finer than a logit is exact
        first, second = network(images).T
        network[1].weight.mul_(30 / (first - second).std())
        network[1].bias.sub_((first - second).median() * torch.tensor([0.5, -0.5])).mul_(30 / (first - second).std())
    return detector.eval(), images


@pytest.mark.parametrize("make", [tight_guard, undefended])
@pytest.mark.parametrize("copies", [3, 20])
@pytest.mark.parametrize("calibrated_at", [1, 7, 64])
def test_a_repeated_image_is_judged_alike_in_batches_of_any_size(make, copies, calibrated_at):
    """The most suspicious image of a class makes up more of it than may be refused, so it is accepted, always."""
    detector, images = make()
    verdict = decide(detector.evidence(images), detector.thresholds)
    images = images[verdict.distances < 0.5]  # those on the border of two classes change their labels with the batch
    verdict = decide(detector.evidence(images), detector.thresholds)
    worst = [int(verdict.distances.masked_fill(verdict.labels != index, -math.inf).argmax()) for index in (0, 1)]
    everything = [*range(len(images)), *worst * copies]
    order = torch.tensor(everything)[torch.randperm(len(everything))]
    loader = list(zip(images[order].split(calibrated_at), verdict.labels[order].split(calibrated_at), strict=True))
    Calibrator(0.05).fit(detector, loader)
    for size in (1, 2, 3, 5, 8, 16, 33, 64, 120):
        for index in worst:
            assert not detector.detect(images[[index] * size]).is_adversarial.any(), (size, index)


class Brightness(DetectorModule):
    """Suspects bright images, and coarsely rounds an image alone, by a share of its suspicion."""

    def __init__(self, rounding: float = 0.0) -> None:
        super().__init__(num_classes=2)
        self.rounding = rounding
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

    def evidence(self, images):
        level = images.flatten(1).mean(dim=1) + 100
        level = level * (1 + self.rounding * (len(images) == 1))
        return Evidence(torch.stack([level, -level], dim=1), level[:, None].expand(-1, 2).contiguous())


def test_slack_for_coarse_rounding_is_limited():
    images, detector = torch.rand(64, 1, 2, 2), Brightness(rounding=0.1)
    with pytest.warns(UserWarning, match="pooled"):
        calibration = Calibrator(0.1, scarce="pool").fit(detector, [(images, torch.zeros(64, dtype=torch.long))])
    assert 101 < calibration.thresholds[0] < 102.1


def test_a_loader_may_be_passed_through_only_once():
    images, detector = torch.rand(64, 1, 2, 2), Brightness()
    batches = iter([(images[:32], torch.zeros(32, dtype=torch.long)), (images[32:], torch.zeros(32, dtype=torch.long))])
    with pytest.warns(UserWarning, match="pooled"):
        assert Calibrator(0.1, scarce="pool").fit(detector, batches).images == 64


def test_thousands_of_classes_are_sorted_once(monkeypatch):
    """Work grows with the images, not with the classes times the images: no operation per class."""
    calls = []
    original = torch.Tensor.__getitem__
    monkeypatch.setattr(torch.Tensor, "__getitem__", lambda *arguments: (calls.append(1), original(*arguments))[1])
    for classes in (10, 3000):
        calls.clear()
        labels = torch.arange(10 * classes) % classes
        fit_thresholds(torch.rand(len(labels)), labels, labels, classes, false_positive_rate=0.2)
        assert len(calls) < 60
    few = torch.randint(0, 3000, (400,))
    calls.clear()
    calibration = fit_thresholds(torch.rand(400), few, few, 3000, method="quantile", scarce="pool")
    assert len(calls) < 60
    assert len(set(calibration.thresholds)) == 1


@pytest.mark.parametrize("images", [[1, 2], torch.rand(3, 2), torch.full((3, 1, 2, 2), 7.0), None])
def test_images_that_are_none_are_named_first(images):
    with pytest.raises(InputError, match="images"):
        Calibrator(0.1).fit(Brightness(), [(images, torch.zeros(3, dtype=torch.long))])


def test_batches_without_an_image_are_too_few_examples():
    batches = [(torch.rand(0, 1, 2, 2), torch.zeros(0, dtype=torch.long))]
    with pytest.raises(TooFewCalibrationExamplesError, match="class 0: 0, class 1: 0"):
        Calibrator(0.1).fit(Brightness(), batches)


def test_images_of_several_sizes_calibrate_a_detector_that_takes_them():
    sizes = [2, 2, 3, 4] * 4
    batches = [(torch.rand(5, 1, size, size), torch.zeros(5, dtype=torch.long)) for size in sizes]
    detector = Brightness()
    detector.image_shape = "any"
    with pytest.warns(UserWarning, match="pooled"):
        assert Calibrator(0.1, scarce="pool").fit(detector, batches).images == 80
