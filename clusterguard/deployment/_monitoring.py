"""Watch a guard in service: an alarm when it refuses more than it was calibrated to, with a stated false-alarm rate."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from clusterguard._support import check_tensor, check_verdicts
from clusterguard.detection import Calibration, Detection, allowed_refusals
from clusterguard.errors import ConfigurationError, InputError
from torch import Tensor

FACTORS = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
"""By how much the rate may have risen: the test bets on all of these at once."""


@dataclass(frozen=True)
class MonitorReport:
    """What a monitor has seen.

    Attributes:
        alarm: whether the evidence has reached the level for which a false alarm is as rare as was asked for.
        evidence: of a rate above the limit; under the limit it grows like the number of images at most.
        level: of an alarm.
        seen: images that counted.
        refused: of those.
        limit: the refusal rate that must not be exceeded, a fraction.
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
    """Tells when a detector refuses more often than its calibration allows, after a drift or under attack.

    A sequential test that may be looked at after every image: for each possible rise of the rate it keeps a
    Shiryaev-Roberts statistic of likelihood ratios, and sounds the alarm when their mean reaches `run_length`. While
    the chance of a refusal, given all that came before, stays at or below `limit`, the mean number of images until a
    false alarm is at least `run_length`. A rise to r is noticed after about ``log(run_length) / KL(r ‖ limit)`` images.
    Memory does not grow.

    Without true labels a flood of adversarial images raises the alarm too, as it should; with them only benign images
    that are labelled correctly count, to which the calibration's promise applies.

    Args:
        limit: refusal rate that must not be exceeded, in (0, 1); `plausible_rate` gives that of a calibration.
        run_length: images until a false alarm, on average, at least 2.

    Raises:
        ConfigurationError: a limit or run length out of its range.

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
        if not 0 < limit < 1:
            raise ConfigurationError(f"expected a limit in (0, 1), such as 0.01 for 1 %, got {limit}")
        if not 2 <= run_length < math.inf:
            raise ConfigurationError(f"expected a run_length of at least 2 images, got {run_length}")
        self.limit = limit
        self.run_length = run_length
        self.reset()

    def reset(self) -> None:
        """Forget everything, as after a recalibration."""
        rates = [min(factor * self.limit, (1 + self.limit) / 2) for factor in FACTORS]
        self._refused_ratios = [rate / self.limit for rate in rates]
        self._accepted_ratios = [(1 - rate) / (1 - self.limit) for rate in rates]
        self._statistics = [0.0] * len(rates)
        self._seen = self._refused = 0
        self._alarm = False

    def update(self, refused: Detection | Tensor | Iterable[bool], labels: Tensor | None = None) -> MonitorReport:
        """Look at further images, in the order they came.

        Args:
            refused: a detector's verdict on B images, or (B,) bools, True where refused.
            labels: (B,) true labels where known, negative where not known or not benign; then only images whose
                predicted label is right count, and `refused` must be a `Detection`.

        Returns:
            What has been seen so far; an alarm stays until `reset`.

        Raises:
            InputError: flags that are not bools, or labels that do not fit.
        """
        for flag in _flags(refused, labels):
            ratios = self._refused_ratios if flag else self._accepted_ratios
            self._statistics = [
                min((value + 1) * ratio, 1e300) for value, ratio in zip(self._statistics, ratios, strict=True)
            ]
            self._seen, self._refused = self._seen + 1, self._refused + flag
            self._alarm = self._alarm or self._evidence >= self.run_length
        return self.report

    @property
    def report(self) -> MonitorReport:
        """What has been seen so far."""
        return MonitorReport(self._alarm, self._evidence, self.run_length, self._seen, self._refused, self.limit)

    @property
    def _evidence(self) -> float:
        return sum(self._statistics) / len(self._statistics)

    def state_dict(self) -> dict[str, float | int | bool | list[float]]:
        """All that it remembers, in JSON's types, for a service that restarts."""
        return {
            "limit": self.limit,
            "run_length": self.run_length,
            "statistics": list(self._statistics),
            "seen": self._seen,
            "refused": self._refused,
            "alarm": self._alarm,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, float | int | bool | list[float]]) -> "FalsePositiveMonitor":
        """A monitor that goes on where another one's `state_dict` was taken.

        Raises:
            InputError: it is not such a state.
        """
        try:
            monitor = cls(float(state["limit"]), run_length=float(state["run_length"]))  # type: ignore[arg-type]
            statistics = [float(value) for value in state["statistics"]]  # type: ignore[union-attr]
            monitor._seen, monitor._refused = int(state["seen"]), int(state["refused"])  # type: ignore[arg-type]
            monitor._alarm = bool(state["alarm"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"expected the state_dict of a FalsePositiveMonitor, got {state!r}") from error
        if len(statistics) != len(FACTORS) or not all(value >= 0 for value in statistics):
            raise InputError(f"expected {len(FACTORS)} statistics of at least 0, got {statistics}")
        if not 0 <= monitor._refused <= monitor._seen:
            raise InputError(f"expected counts of at least 0, no more refused than seen, got {state!r}")
        monitor._statistics = statistics
        return monitor


def plausible_rate(calibration: Calibration, *, confidence: float = 0.99, any_mix: bool = False) -> float:
    """The largest refusal rate of benign, correctly labelled images that a calibration makes plausible.

    The conformal bound holds on average over calibration sets. With the set at hand, the rate of class i is distributed
    as Beta(l, n + 1 − l), n examples and l = ⌊(n + 1)α⌋ (at most so, where suspicions tie). Classes that share a
    threshold count as one, with l at least one more than the number of their examples that it refuses. The rate of a
    mix of classes is their weighted mean, for which Chernoff's bound gives this limit.

    Args:
        calibration: what `Calibrator.fit` returned; a "quantile" one is read as if it were conformal.
        confidence: that the true rate is at most what is returned, over calibration sets, in (0, 1).
        any_mix: hold for whatever mix of classes comes, instead of the calibration set's. Not possible where classes
            share a threshold, for nothing is promised of one of these alone.

    Returns:
        A fraction, larger than the rate asked for.

    Raises:
        ConfigurationError: a confidence outside (0, 1).
        InputError: a calibration that rests on too few examples to make anything plausible, or `any_mix` where classes
            share a threshold.

    Reference:
        Vovk, "Conditional validity of inductive conformal predictors" (2012).

    Example:
        >>> ten_classes = Calibration((1.0,) * 10, (500,) * 10, 5000, (0.01,) * 10, 0.01, "conformal")
        >>> round(plausible_rate(ten_classes), 3), round(plausible_rate(ten_classes, any_mix=True), 3)
        (0.015, 0.036)
    """
    if not 0 < confidence < 1:
        raise ConfigurationError(f"expected a confidence in (0, 1), got {confidence}")
    total, rate = sum(calibration.counts), calibration.false_positive_rate
    if not total > 0:
        raise InputError(f"expected a calibration that rests on examples, got counts {calibration.counts}")
    if any_mix and calibration.pooled:
        raise InputError(
            f"expected a threshold for each class with any_mix=True, got {len(calibration.pooled)} classes that share "
            "one, of which nothing is promised one by one; add calibration examples, or leave any_mix out"
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
        count, above = sum(own for own, _ in shared), round(sum(own * share for own, share in shared))
        refused = max(1 + above, allowed_refusals(count, rate))
        parts[refused, count + 1 - refused, count / total] += 1
    return _mean_bound(parts, 1 - confidence)


def _flags(refused: Detection | Tensor | Iterable[bool], labels: Tensor | None) -> list[bool]:
    if isinstance(refused, Detection):
        flags = refused.is_adversarial
    else:
        flags = refused if isinstance(refused, Tensor) else torch.tensor(_bools(refused), dtype=torch.bool)
    check_tensor(flags, "flags", "B", kind="bool")
    if labels is not None:
        if not isinstance(refused, Detection):
            raise InputError("expected a Detection where labels are given, got flags without predicted labels")
        check_verdicts(labels, refused)
        flags = flags[(labels == refused.labels) & (labels >= 0)]
    found: list[bool] = flags.tolist()
    return found


def _bools(flags: object) -> list[bool]:
    found = list(flags) if isinstance(flags, Iterable) else [flags]
    if not all(isinstance(flag, bool | np.bool_) for flag in found):
        raise InputError(f"expected bools, True where refused, got {flags!r}")
    return [bool(flag) for flag in found]


def _mean_bound(parts: Counter[tuple[int, int, float]], miss: float) -> float:
    """What Σ share · Beta(a, b) exceeds with a chance of at most `miss`, by Chernoff: parts (a, b, share), how often.

    For each t > 0, P(S ≥ r) ≤ E exp(t S) / exp(t r); the smallest r over a fixed grid of t is a bound, too.
    """
    bounds = []
    for step in range(120):
        t = 10 ** (step / 20)
        moments = sum(times * _log_moment(t * share, a, b) for (a, b, share), times in parts.items())
        bounds.append((moments - math.log(miss)) / t)
    return min(1.0, *bounds)


def _log_moment(t: float, a: int, b: int) -> float:
    """Log E exp(t X) of X ~ Beta(a, b), by Kummer's series; t, its largest value, where that would overflow."""
    if t > 600:
        return t
    total = term = 1.0
    for k in range(1, 5000):
        term *= (a + k - 1) / (a + b + k - 1) * t / k
        total += term
        if term < 1e-15 * total:
            break
    return math.log(total)
