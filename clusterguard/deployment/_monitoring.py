"""Watches a guard in service and raises an alarm, at a stated rate of false alarms, when it refuses too many images."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from clusterguard._support import check_kind, check_numbers, check_tensor, check_verdicts
from clusterguard.detection import Calibration, Detection, allowed_refusals
from clusterguard.errors import ConfigurationError, InputError
from torch import Tensor

FACTORS = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
"""Factors by which the rate may have risen. The test covers all of them at once."""
_MAX_RUN_LENGTH = 1e300
_MAX_STATISTIC = 1e301  # a single one at its cap makes the mean of all exceed every run length


@final
@dataclass(frozen=True)
class MonitorReport:
    """What a monitor has seen.

    Attributes:
        alarm: whether the evidence has reached `level`, so that the alarm is raised.
        evidence: evidence that the rate is above the limit. While the rate is below the limit, its mean grows at most
            like the number of images.
        level: evidence at which the alarm is raised.
        seen: number of images that counted.
        refused: number of these images that were refused.
        limit: refusal rate that must not be exceeded, a fraction.
    """

    alarm: bool
    evidence: float
    level: float
    seen: int
    refused: int
    limit: float

    def __str__(self) -> str:
        rate = self.refused / self.seen if self.seen else math.nan
        text = f"{self.refused} of {self.seen} images refused ({rate:.4f}), limit {self.limit:.4f}; "
        if not self.alarm:
            return text + f"evidence {self.evidence:.3g} of {self.level:.3g}: no alarm"
        return text + f"evidence {self.evidence:.3g} of {self.level:.3g}: ALARM, the traffic has drifted or is attacked"


@final
class FalsePositiveMonitor:
    """Detects when a detector refuses more often than its calibration allows, after a drift or under attack.

    This is a sequential test, so its result is valid after every image. For each factor by which the rate may have
    risen, it keeps a Shiryaev-Roberts statistic of likelihood ratios. It raises the alarm when the mean of these
    statistics reaches `run_length`. As long as the probability of a refusal, given all images before, is at most
    `limit`, the mean number of images until a false alarm is at least `run_length`. A rise of the rate to r is detected
    after about ``log(run_length) / KL(r ‖ limit)`` images. Memory does not grow.

    Without true labels, many adversarial images raise the alarm too, which is intended. With true labels, only benign
    images that are labelled correctly count. The guarantee of the calibration holds for these images.

    Args:
        limit: refusal rate that must not be exceeded, in (0, 1). `plausible_rate` computes it for a calibration.
        run_length: mean number of images until a false alarm, from 2 to 1e300.

    Raises:
        ConfigurationError: limit or run_length is out of its range.

    Reference:
        Shin, Ramdas & Rinaldo, "E-detectors: a nonparametric framework for sequential change detection" (2024).

    Example:
        >>> monitor = FalsePositiveMonitor(limit=0.01, run_length=10_000)
        >>> monitor.update(torch.zeros(500, dtype=torch.bool)).alarm
        False
        >>> monitor.update(torch.ones(10, dtype=torch.bool)).alarm  # ten refusals in a row
        True
    """

    def __init__(self, limit: float, *, run_length: float = 1_000_000) -> None:
        check_numbers(limit=limit, run_length=run_length)
        if not 0 < limit < 1:
            raise ConfigurationError(f"expected a limit in (0, 1), such as 0.01 for 1 %, got {limit}")
        if not 2 <= run_length <= _MAX_RUN_LENGTH:
            raise ConfigurationError(f"expected a run_length of 2 to {_MAX_RUN_LENGTH:g} images, got {run_length}")
        self.limit, self.run_length = float(limit), float(run_length)  # those of NumPy are nothing that JSON has
        self.reset()

    def reset(self) -> None:
        """Forget all images, for instance after a recalibration."""
        rates = [min(factor * self.limit, (1 + self.limit) / 2) for factor in FACTORS]
        self._refused_ratios = [rate / self.limit for rate in rates]
        self._accepted_ratios = [(1 - rate) / (1 - self.limit) for rate in rates]
        self._statistics = [0.0] * len(rates)
        self._seen = self._refused = 0
        self._alarm = False

    def update(self, refused: Detection | Tensor | Iterable[bool], labels: Tensor | None = None) -> MonitorReport:
        """Add further images in the order in which they came.

        Args:
            refused: verdict of a detector on B images, or (B,) booleans that are True for refused images.
            labels: (B,) true labels, negative for images that are not benign or whose label is not known. With labels,
                only images whose predicted label is correct count, and `refused` must be a `Detection`.

        Returns:
            A report on all images so far. An alarm stays until `reset`.

        Raises:
            InputError: the flags are not booleans, or the labels do not fit.
        """
        for flag in _flags(refused, labels):
            ratios = self._refused_ratios if flag else self._accepted_ratios
            self._statistics = [
                min((value + 1) * ratio, _MAX_STATISTIC) for value, ratio in zip(self._statistics, ratios, strict=True)
            ]
            self._seen, self._refused = self._seen + 1, self._refused + flag
            self._alarm = self._alarm or self._evidence >= self.run_length
        return self.report

    @property
    def report(self) -> MonitorReport:
        """The report on all images so far."""
        return MonitorReport(self._alarm, self._evidence, self.run_length, self._seen, self._refused, self.limit)

    @property
    def _evidence(self) -> float:
        return sum(self._statistics) / len(self._statistics)

    def state_dict(self) -> dict[str, float | int | bool | list[float]]:
        """The whole state in types that JSON has, for a service that restarts."""
        return {
            "limit": self.limit,
            "run_length": self.run_length,
            "statistics": list(self._statistics),
            "seen": self._seen,
            "refused": self._refused,
            "alarm": self._alarm,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "FalsePositiveMonitor":
        """A monitor that continues from the `state_dict` of another one.

        Args:
            state: dict that `state_dict` returned.

        Raises:
            InputError: the dict is not such a state, or a value in it has another type, is out of its range, or
                contradicts another one.
        """
        if isinstance(state, Mapping) and (unknown := state.keys() - _STATE):
            raise InputError(
                f"expected the state_dict of a FalsePositiveMonitor, got other keys: {sorted(map(repr, unknown))}"
            )
        for key, (fits, wanted) in _STATE.items():
            value = state.get(key) if isinstance(state, Mapping) else None
            if not fits(value):
                raise InputError(
                    f"expected the state_dict of a FalsePositiveMonitor, {key} {wanted}, got {repr(value)[:100]}"
                )
        monitor = cls(state["limit"], run_length=state["run_length"])
        monitor._statistics = [float(value) for value in state["statistics"]]
        monitor._seen, monitor._refused, monitor._alarm = state["seen"], state["refused"], state["alarm"]
        if monitor._refused > monitor._seen:
            raise InputError(f"expected no more refused than seen, got {monitor._refused} of {monitor._seen}")
        if monitor._evidence >= monitor.run_length and not monitor._alarm:
            raise InputError(f"expected an alarm at evidence {monitor._evidence:g}, got a state without one")
        return monitor


def _is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_statistics(values: Any) -> bool:
    is_list = isinstance(values, list) and len(values) == len(FACTORS)
    return is_list and all(_is_number(value, 0, _MAX_STATISTIC) for value in values)


_STATE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "limit": (lambda value: _is_number(value, 0, 1) and value not in (0, 1), "a number in (0, 1)"),
    "run_length": (lambda value: _is_number(value, 2, _MAX_RUN_LENGTH), f"a number from 2 to {_MAX_RUN_LENGTH:g}"),
    "statistics": (_are_statistics, f"{len(FACTORS)} numbers from 0 to {_MAX_STATISTIC:g}"),
    "seen": (_is_count, "a whole number of at least 0"),
    "refused": (_is_count, "a whole number of at least 0"),
    "alarm": (lambda value: isinstance(value, bool), "true or false"),
}
"""Keys of a state, a test of each value, and what is expected of it."""


def plausible_rate(calibration: Calibration, *, confidence: float = 0.99, any_mix: bool = False) -> float:
    """The largest refusal rate of benign, correctly labelled images that is plausible after a calibration.

    The conformal bound holds on average over calibration sets, so the rate for one calibration set may be larger. For
    one set, the rate of class i has the distribution Beta(l, n + 1 − l), where n is the number of examples and
    l = ⌊(n + 1)α⌋. If suspicions tie, the rate is at most that. Classes that share a threshold count as one class, in
    which l is at least one more than the number of their examples that the threshold refuses. The rate of a mix of
    classes is the weighted mean of their rates, and Chernoff's bound for it gives this limit.

    Args:
        calibration: record that `Calibrator.fit` returned. A "quantile" calibration is treated as conformal.
        confidence: probability, over calibration sets, that the true rate is at most the returned one, in (0, 1).
        any_mix: whether the limit must hold for every mix of classes, not only for that of the calibration set. This is
            not possible if classes share a threshold, because there is no bound for each of them alone.

    Returns:
        A fraction that is larger than the rate the calibration was fitted for.

    Raises:
        ConfigurationError: the confidence is outside (0, 1), or the calibration is no record.
        InputError: the calibration has too few examples for a bound, or `any_mix` is set and classes share a threshold.

    Reference:
        Vovk, "Conditional validity of inductive conformal predictors" (2012).

    Example:
        >>> ten_classes = Calibration((1.0,) * 10, (500,) * 10, 5000, (0.01,) * 10, 0.01, "conformal")
        >>> round(plausible_rate(ten_classes), 3), round(plausible_rate(ten_classes, any_mix=True), 3)
        (0.015, 0.036)
    """
    check_kind(calibration, Calibration, "calibration", "the record that Calibrator.fit returned")
    if not 0 < confidence < 1:
        raise ConfigurationError(f"expected a confidence in (0, 1), got {confidence}")
    total, rate = sum(calibration.counts), calibration.false_positive_rate
    if not total > 0:
        raise InputError(f"expected a calibration that rests on examples, got counts {calibration.counts}")
    if any_mix and calibration.pooled:
        raise InputError(
            f"expected a threshold for each class with any_mix=True, got {len(calibration.pooled)} classes that share "
            "one, so that there is no bound for each of them; add calibration examples, or leave any_mix out"
        )
    parts: Counter[tuple[int, int, float]] = Counter()
    alone = set(range(len(calibration.counts))).difference(calibration.pooled)
    for index in alone:
        count = calibration.counts[index]
        refused = allowed_refusals(count, rate)
        if refused < 1:
            raise InputError(f"expected enough calibration examples of class {index}, got {count} of {total}")
        parts[refused, count + 1 - refused, count / total] += 1
    if any_mix:
        miss = (1 - confidence) / len(alone)
        return max(_mean_bound(Counter([(a, b, 1.0)]), miss) for a, b, _ in parts)
    if calibration.pooled:
        shared = [(calibration.counts[index], calibration.realised_rates[index]) for index in calibration.pooled]
        count, above = sum(size for size, _ in shared), round(sum(size * share for size, share in shared))
        refused = max(1 + above, allowed_refusals(count, rate))
        parts[refused, count + 1 - refused, count / total] += 1
    return _mean_bound(parts, 1 - confidence)


def expected_delay(limit: float, rate: float, *, run_length: float = 1_000_000) -> float:
    """The approximate number of images from a rise of the refusal rate to the alarm of a `FalsePositiveMonitor`.

    This is ``log(run_length) / KL(rate ‖ limit)``, the delay of the best test that knows the new rate. A monitor that
    has to cover all of its factors at once needs somewhat more.

    Args:
        limit: refusal rate that must not be exceeded, in (0, 1).
        rate: refusal rate after the rise, above the limit and below 1.
        run_length: mean number of images until a false alarm, as in `FalsePositiveMonitor`.

    Raises:
        ConfigurationError: the rate is not between the limit and 1, or limit or run_length is out of its range.

    Reference:
        Lorden, "Procedures for reacting to a change in distribution" (1971).

    Example:
        >>> round(expected_delay(0.01, 0.05))
        335
    """
    monitor = FalsePositiveMonitor(limit, run_length=run_length)  # checks both
    if not limit < rate < 1:
        raise ConfigurationError(f"expected a rate between the limit {limit} and 1, got {rate}")
    divergence = rate * math.log(rate / limit) + (1 - rate) * math.log((1 - rate) / (1 - limit))
    return math.log(monitor.run_length) / divergence


def _flags(refused: Detection | Tensor | Iterable[bool], labels: Tensor | None) -> list[bool]:
    if isinstance(refused, Detection):
        flags = refused.is_adversarial
    else:
        flags = refused if isinstance(refused, Tensor) else torch.tensor(_bools(refused), dtype=torch.bool)
    check_tensor(flags, "flags", "B", kind="bool")
    if labels is not None:
        if not isinstance(refused, Detection):
            raise InputError("expected a Detection together with labels, got flags without predicted labels")
        check_verdicts(labels, refused)
        flags = flags[(labels == refused.labels) & (labels >= 0)]
    counted: list[bool] = flags.tolist()
    return counted


def _bools(flags: object) -> list[bool]:
    values = list(flags) if isinstance(flags, Iterable) else [flags]
    if not all(isinstance(flag, bool | np.bool_) for flag in values):
        raise InputError(f"expected bools that are True for refused images, got {flags!r}")
    return [bool(flag) for flag in values]


def _mean_bound(parts: Counter[tuple[int, int, float]], miss: float) -> float:
    """A number that S = Σ share · Beta(a, b) exceeds with probability at most `miss`, by Chernoff's bound.

    `parts` holds how often each (a, b, share) occurs in the sum. For each t > 0, P(S ≥ r) ≤ E exp(t S) / exp(t r), so
    the smallest r over a fixed grid of t is a bound too.
    """
    bounds = []
    for step in range(120):
        t = 10 ** (step / 20)
        moments = sum(times * _log_moment(t * share, a, b) for (a, b, share), times in parts.items())
        bounds.append((moments - math.log(miss)) / t)
    return min(1.0, *bounds)


def _log_moment(t: float, a: int, b: int) -> float:
    """Log E exp(t X) for X ~ Beta(a, b), by Kummer's series. If that would overflow, the upper bound t is returned."""
    if t > 600:
        return t
    total = term = 1.0
    for k in range(1, 5000):
        term *= (a + k - 1) / (a + b + k - 1) * t / k
        total += term
        if term < 1e-15 * total:
            break
    return math.log(total)
