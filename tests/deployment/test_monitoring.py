import json
import math

import numpy as np
import pytest
import torch
from clusterguard import Calibration, Detection, FalsePositiveMonitor
from clusterguard.deployment import expected_delay, plausible_rate
from clusterguard.errors import ConfigurationError, InputError
from hypothesis import given
from hypothesis import strategies as st


def flags(rate, count, seed):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) < rate


def time_to_alarm(monitor, stream):
    for index, flag in enumerate(stream.tolist(), start=1):
        if monitor.update([flag]).alarm:
            return index
    return math.inf


@pytest.mark.parametrize("limit", [0.01, 0.2])
def test_false_alarms_are_as_rare_as_stated(limit):
    runs = [time_to_alarm(FalsePositiveMonitor(limit, run_length=300), flags(limit, 3000, s)) for s in range(60)]
    assert sum(min(run, 3000) for run in runs) / len(runs) >= 300  # cut short, so the mean is larger still


@pytest.mark.parametrize(("limit", "rate"), [(0.01, 0.01), (0.01, 0.005), (0.01, 1.0), (0.0, 0.5), (0.01, math.nan)])
def test_there_is_no_delay_without_a_rise(limit, rate):
    with pytest.raises(ConfigurationError, match="expected a"):
        expected_delay(limit, rate)


def test_lower_rates_hardly_ever_raise_an_alarm():
    runs = [time_to_alarm(FalsePositiveMonitor(0.02, run_length=1000), flags(0.01, 3000, s)) for s in range(30)]
    assert sum(run < math.inf for run in runs) <= 5


@pytest.mark.parametrize("factor", [3, 10])
@pytest.mark.parametrize("quiet", [0, 5000])
def test_a_rise_is_noticed_in_time_also_after_a_long_calm(factor, quiet):
    limit, level = 0.01, 1e5
    rate = factor * limit
    delays = []
    for seed in range(10):
        monitor = FalsePositiveMonitor(limit, run_length=level)
        assert not monitor.update(flags(limit / 2, quiet, seed)).alarm
        delays.append(time_to_alarm(monitor, flags(rate, 20_000, 100 + seed)))
    assert 0.5 < sum(delays) / len(delays) / expected_delay(limit, rate, run_length=level) < 1.6


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 7), st.floats(0.001, 0.9))
def test_batches_do_not_matter_and_the_state_survives_json(stream, size, limit):
    whole, parts = (FalsePositiveMonitor(np.float64(limit), run_length=np.int64(50)) for _ in range(2))
    whole.update(stream)
    for start in range(0, len(stream), size):
        parts.update(torch.tensor(stream[start : start + size], dtype=torch.bool))
        parts = FalsePositiveMonitor.from_state_dict(json.loads(json.dumps(parts.state_dict())))
    assert parts.report == whole.report


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.floats(0.01, 0.5))
def test_the_evidence_never_outgrows_the_images_on_average(stream, limit):
    """One more image changes the evidence by a factor of mean 1 at most, if it is refused with the limit's rate."""
    monitor = FalsePositiveMonitor(limit, run_length=1e9)
    before = monitor.update(stream).evidence
    after = []
    for flag in (False, True):
        branch = FalsePositiveMonitor.from_state_dict(monitor.state_dict())
        after.append(branch.update([flag]).evidence)
    assert (1 - limit) * after[0] + limit * after[1] <= (before + 1) * (1 + 1e-9)


def test_an_alarm_stays_until_it_is_reset():
    monitor = FalsePositiveMonitor(0.01, run_length=100)
    assert monitor.update([True] * 5).alarm
    assert monitor.update([False] * 1000).alarm
    assert "ALARM" in str(monitor.report)
    monitor.reset()
    assert monitor.report == FalsePositiveMonitor(0.01, run_length=100).report
    assert "no alarm" in str(monitor.report)


def test_it_can_run_for_ever():
    monitor = FalsePositiveMonitor(0.5, run_length=10)
    report = monitor.update([True] * 5000)
    assert math.isfinite(report.evidence)
    assert len(json.dumps(monitor.state_dict())) < 500


def test_with_labels_only_benign_images_that_are_labelled_rightly_count():
    detection = Detection(torch.tensor([1, 1, 2, 0]), torch.ones(4), torch.tensor([True, False, True, True]))
    report = FalsePositiveMonitor(0.1).update(detection, labels=torch.tensor([1, 1, 0, -1]))
    assert (report.seen, report.refused) == (2, 1)
    assert FalsePositiveMonitor(0.1).update(detection).refused == 3


@pytest.mark.parametrize(
    ("refused", "labels", "message"),
    [
        (torch.ones(3), None, "bool flags"),
        (torch.ones(3, 1, dtype=torch.bool), None, "shape"),
        (torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.long), "Detection"),
        (Detection(torch.ones(2).long(), torch.ones(2), torch.ones(2).bool()), torch.ones(3).long(), "labels"),
    ],
)
def test_input_that_does_not_fit_is_named(refused, labels, message):
    with pytest.raises(InputError, match=message):
        FalsePositiveMonitor(0.1).update(refused, labels)


@pytest.mark.parametrize("run_length", [2, 1e6, 1e300])
@pytest.mark.parametrize("limit", [1e-320, 0.01, 0.5])
def test_a_flood_of_refusals_raises_an_alarm_at_every_run_length(limit, run_length):
    monitor = FalsePositiveMonitor(limit, run_length=run_length)
    report = monitor.update([True] * 4000)
    assert report.alarm
    assert report.evidence >= run_length
    assert FalsePositiveMonitor.from_state_dict(json.loads(json.dumps(monitor.state_dict()))).report == report


@pytest.mark.parametrize(
    "wrong",
    [
        *({"limit": 0}, {"limit": 1.0}, {"limit": math.nan}, {"run_length": 1}, {"run_length": 1e301}),
        *({"limit": "0.1"}, {"limit": torch.tensor(0.1)}, {"run_length": True}),
    ],
)
def test_options_are_checked_at_once(wrong):
    with pytest.raises(ConfigurationError, match="expected"):
        FalsePositiveMonitor(**({"limit": 0.1} | wrong))


@pytest.mark.parametrize(
    "state", [{}, {"limit": 0.1}, {"later": 1}, {"limit": "x", "run_length": 5}, None, [], "state", 3]
)
def test_a_state_of_something_else_is_named(state):
    with pytest.raises(InputError, match="state_dict"):
        FalsePositiveMonitor.from_state_dict(state)


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "limit": [0, 1, 2.0, -0.1, math.nan, math.inf, "0.1", True, None, [0.1]],
        "run_length": [1, 1e301, math.inf, math.nan, -5, 10**400, "1000", True, None],
        "statistics": [
            *([value, *[0.0] * 6] for value in (math.inf, math.nan, -1.0, 1e302, 10**400, "1", True, None, [1.0])),
            [0.0] * 6,
            [0.0] * 8,
            "0000000",
            7,
            None,
            dict.fromkeys(range(7), 0.0),
        ],
        "seen": [-1, 1, 3.0, "3", True, None, math.inf],  # the good state has refused 2
        "refused": [-1, 4, 2.0, "2", True, None],
        "alarm": ["false", "true", 0, 1, None, []],
    }.items(),
)
def test_a_state_with_a_value_of_another_kind_or_range_is_refused(key, values):
    monitor = FalsePositiveMonitor(0.1)
    monitor.update([True, True, False])
    good = monitor.state_dict()
    assert FalsePositiveMonitor.from_state_dict(good).report == monitor.report
    for value in values:
        with pytest.raises(InputError, match=key) as caught:
            FalsePositiveMonitor.from_state_dict(good | {key: value})
        assert len(str(caught.value)) < 300


def test_a_state_whose_evidence_contradicts_its_missing_alarm_is_refused():
    monitor = FalsePositiveMonitor(0.01, run_length=100)
    assert monitor.update([True] * 5).alarm
    with pytest.raises(InputError, match="alarm"):
        FalsePositiveMonitor.from_state_dict(monitor.state_dict() | {"alarm": False})


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("examples", [99, 150, 1000])
@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_the_true_rate_is_plausible_as_often_as_stated(classes, examples, confidence):
    """Calibrate on uniform suspicion again and again: then the true refusal rate of a class is 1 − its threshold."""
    generator = torch.Generator().manual_seed(0)
    rank = math.ceil((examples + 1) * 0.99) - 1
    rates = 1 - torch.rand(2000, classes, examples, generator=generator).sort(dim=2).values[:, :, rank]
    calibration = Calibration((1.0,) * classes, (examples,) * classes, 0, (0.0,) * classes, 0.01, "conformal")
    for true, any_mix in ((rates.mean(dim=1), False), (rates.amax(dim=1), True)):
        bound = plausible_rate(calibration, confidence=confidence, any_mix=any_mix)
        assert (true <= bound).double().mean() >= confidence - 0.02
        assert bound < 5 * true.quantile(confidence)  # of use, too


def test_fewer_examples_and_any_mix_make_more_plausible():
    def rate(*counts, pooled=(), any_mix=False):
        sizes = (1.0,) * len(counts), counts, sum(counts), (0.0,) * len(counts)
        return plausible_rate(Calibration(*sizes, 0.01, "conformal", pooled), any_mix=any_mix)

    assert 0.01 < rate(5000) < rate(500, 500) < rate(500) < rate(100) < 1
    assert rate(500, 3, pooled=(1,)) < rate(100, 3, pooled=(1,))
    assert rate(500, 500) < rate(500, 500, any_mix=True)
    assert rate(*[200] * 1000) < 0.0107
    with pytest.raises(ConfigurationError, match="confidence"):
        plausible_rate(Calibration((1.0,), (500,), 500, (0.0,), 0.01, "conformal"), confidence=1)
