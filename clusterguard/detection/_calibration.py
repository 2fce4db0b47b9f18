"""Per-class thresholds from benign images: pure functions, and `Calibrator` that feeds them from a loader."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import torch
from clusterguard._support import check_labels, check_tensor, collect
from clusterguard.detection._calibration_batches import (
    CalibrationBatches,
    KeepsCalibration,
    image_shape_kept_on_failure,
    measure_rounding,
)
from clusterguard.detection._decision import Detector
from clusterguard.detection._judging import judge
from clusterguard.detection._loaders import Loader, Pairs, Unpack
from clusterguard.errors import ConfigurationError, InputError, TooFewCalibrationExamplesError, in_one_line
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

Method = Literal["conformal", "quantile"]
Scarce = Literal["error", "pool"]
_SLACK = 2.0**-17
"""Slack as a share of the threshold: 64 units in the last place of float32. Distances of small
networks on a CPU moved by up to 20 units in the last place of a threshold at 1 % from one batch size to another."""
_LARGEST = 1e38


@dataclass(frozen=True)
class Calibration:
    """How thresholds were fitted, kept beside them.

    Attributes:
        thresholds: K floats, one per class.
        counts: K ints, correctly classified calibration images per class: those the thresholds rest on.
        images: how many calibration images there were in all.
        realised_rates: K floats, the share of `counts` above the threshold (0.0 where there are none).
        false_positive_rate: the rate asked for.
        method: "conformal" or "quantile".
        pooled: the classes that took the pooled threshold for want of examples.
    """

    thresholds: tuple[float, ...]
    counts: tuple[int, ...]
    images: int
    realised_rates: tuple[float, ...]
    false_positive_rate: float
    method: Method
    pooled: tuple[int, ...] = ()

    @property
    def realised_rate(self) -> float:
        """The share of all correctly classified calibration images that the thresholds refuse."""
        refused = sum(count * rate for count, rate in zip(self.counts, self.realised_rates, strict=True))
        return refused / max(1, sum(self.counts))

    def to_dict(self) -> dict[str, Any]:
        """All but the thresholds as plain values for JSON; the thresholds are the detector's, exact in its own file."""
        return {name: value for name, value in asdict(self).items() if name != "thresholds"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], thresholds: Tensor) -> "Calibration":
        """The record that `to_dict` wrote, beside these thresholds.

        Args:
            values: what `to_dict` returned, also by way of JSON.
            thresholds: (K,).

        Raises:
            InputError: it is no such record, or one of other classes.
        """
        classes, kinds = len(thresholds), {"counts": int, "realised_rates": float, "pooled": int}
        try:
            plain = {**values, **{key: tuple(values.get(key, ())) for key in kinds}}
            record = cls(thresholds=tuple(thresholds.tolist()), **plain)
            _check_options(record.false_positive_rate, record.method)
            fits = (
                type(record.images) is int
                and all(type(own) is kind for key, kind in kinds.items() for own in plain[key])
                and len(record.counts) == len(record.realised_rates) == classes
                and all(0 <= count <= record.images for count in record.counts)
                and all(0 <= rate <= 1 for rate in record.realised_rates)
                and all(0 <= index < classes for index in record.pooled)
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"expected the record of a calibration, got something else ({in_one_line(error)})"
            ) from error
        if not fits:
            raise InputError(f"expected the record of a calibration of {classes} classes, got values that do not fit")
        return record

    def describes(self, thresholds: Tensor) -> bool:
        """Whether these (K,) thresholds are still the ones that were fitted."""
        return self.thresholds == tuple(thresholds.tolist())


def minimum_examples(false_positive_rate: float) -> int:
    """The smallest number of examples for which a threshold with a `false_positive_rate` of α exists: ⌈1/α⌉ − 1.

    Example:
        >>> minimum_examples(0.01)
        99
    """
    _check_options(false_positive_rate)
    return math.ceil(1 / _exact(false_positive_rate)) - 1


def allowed_refusals(count: int, false_positive_rate: float) -> int:
    """How many of n examples and a new one may be refused: ⌊(n + 1)α⌋, in exact arithmetic.

    Args:
        count: n, at least 0.
        false_positive_rate: α, in (0, 1), taken for the decimal number that it prints as.

    Example:
        >>> allowed_refusals(99, 0.07), int((99 + 1) * 0.07), allowed_refusals(99, 0.29), int((99 + 1) * 0.29)
        (7, 7, 29, 28)
    """
    return math.floor((count + 1) * _exact(false_positive_rate))


def fit_threshold(suspicion: Tensor, false_positive_rate: float, *, method: Method = "conformal") -> float:
    """The threshold that a new benign example exceeds with probability at most the rate.

    Args:
        suspicion: (n,) suspicion of benign examples, n at least `minimum_examples(false_positive_rate)`.
        false_positive_rate: α, in (0, 1).
        method: "conformal" takes the ⌈(n+1)(1−α)⌉-th smallest, for which the bound holds at every n if the
            examples and the new one are exchangeable; "quantile" takes the plain (1−α)-quantile of the
            sample, as the paper does, which is a little too low on small samples.

    Returns:
        The threshold, in units of the suspicion, without the slack for rounding that `fit_thresholds` adds.

    Raises:
        TooFewCalibrationExamplesError: n too small.
        InputError: so many suspicions are not finite that the threshold would not be either.
        ConfigurationError: a rate outside (0, 1), or an unknown method.

    Reference:
        arXiv 2012.03483, section 3.2; Vovk, Gammerman & Shafer, "Algorithmic Learning in a Random World" (2005).

    Example:
        >>> fit_threshold(torch.arange(1.0, 100.0), false_positive_rate=0.1)
        90.0
    """
    _check_options(false_positive_rate, method)
    check_tensor(suspicion, "suspicion", "n")
    count, needed = len(suspicion), minimum_examples(false_positive_rate)
    if count < needed:
        raise TooFewCalibrationExamplesError(
            f"expected at least {needed} examples for a false-positive rate of {false_positive_rate}, got {count}"
        )
    threshold = _threshold_of(_refused_last(suspicion).sort().values, false_positive_rate, method)
    _check_finite(threshold)
    return float(threshold)


def fit_thresholds(
    suspicion: Tensor,
    predicted: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    false_positive_rate: float = 0.01,
    method: Method = "conformal",
    scarce: Scarce = "error",
    rounding: float = 0.0,
) -> Calibration:
    """A threshold per class, from the benign examples of each class that are classified correctly.

    With ``scarce="pool"`` and the conformal method two bounds hold, whatever the classes look like. A class with enough
    examples keeps its own bound: a new, correctly classified image of it is refused with probability at most α. Over
    all classes together, in the mix that the calibration images were drawn from, that probability is at most α too. Of
    a single scarce class nothing is promised: in the worst case all of its images are refused.

    Scarce classes share one threshold. It is fitted to the examples of all classes that have `minimum_examples` or
    fewer, if these are enough together. If they are not, it is their largest suspicion, or the threshold that all
    classes' examples have together, whichever is larger. Of n examples and a new one at most one is then refused for
    being the most suspicious of the scarce classes. Where the average has no room for it, the class with most examples
    gives up one refusal: its threshold is the next larger one of its suspicions. If that class has only one to give, it
    shares the refusal: both thresholds are at least the largest suspicion of that class and the scarce ones.

    Args:
        suspicion: (n,) suspicion of the predicted label.
        predicted: (n,) predicted labels.
        labels: (n,) true labels.
        num_classes: K.
        false_positive_rate: α, in (0, 1), within every class.
        method: see `fit_threshold`; "quantile" makes no promise, for pooled classes either.
        scarce: what a class with fewer than `minimum_examples` correct examples gets: "error", or "pool", a threshold
            that it shares with other scarce classes.
        rounding: by how much arithmetic alone may change an image's suspicion, at least 0, in units of the suspicion.

    Returns:
        The thresholds and how they came about. Each is a little larger than the suspicion that it rests on, by
        `rounding` or by 64 units in the last place of float32 (a share of 8e-6), whichever is more. An image that is
        judged in another batch gets a suspicion that differs in its last places, which must not decide on the image.

    Raises:
        TooFewCalibrationExamplesError: naming the classes and their counts.
        InputError: tensors of a wrong shape, dtype or device, labels out of range, or too many that are not finite.
        ConfigurationError: a rate outside (0, 1), an unknown method or way with scarce classes, or negative rounding.

    Example:
        >>> suspicion, labels = torch.arange(200.0), torch.arange(200) % 2
        >>> calibration = fit_thresholds(suspicion, labels, labels, num_classes=2, false_positive_rate=0.1)
        >>> [round(threshold, 2) for threshold in calibration.thresholds], calibration.realised_rates
        ([180.0, 181.0], (0.09, 0.09))
    """
    _check_options(false_positive_rate, method, scarce)
    if not 0 <= rounding < math.inf:
        raise ConfigurationError(f"expected rounding of at least 0, got {rounding}")
    check_tensor(suspicion, "suspicion", "n")
    check_labels(predicted, suspicion, num_classes, name="predicted labels")
    check_labels(labels, suspicion, num_classes)
    correct = predicted == labels
    values, order = _refused_last(suspicion[correct]).sort()
    classes, by_class = labels[correct].long()[order].sort(stable=True)
    values_by_class, counts = values[by_class], torch.bincount(classes, minlength=num_classes)
    needed = minimum_examples(false_positive_rate)
    is_scarce = counts < needed
    if is_scarce.any() and (scarce == "error" or len(values) < needed):
        raise TooFewCalibrationExamplesError(
            f"a false-positive rate of {false_positive_rate} needs at least {needed} correctly classified calibration "
            f"examples of every class, got {_listing(counts, is_scarce)}; add examples, allow a higher rate, or pass "
            "scarce='pool'"
        )
    thresholds = _class_thresholds(values_by_class, classes, counts, false_positive_rate, method, scarce)
    _check_finite(thresholds)
    thresholds = _round_up_to_float32(thresholds + (thresholds.abs() * _SLACK).clamp_min(rounding))
    refused = torch.bincount(classes[values_by_class > thresholds[classes]], minlength=num_classes)
    realised = refused.double() / counts.clamp_min(1)
    return Calibration(
        tuple(thresholds.tolist()),
        tuple(counts.tolist()),
        len(labels),
        tuple(realised.tolist()),
        false_positive_rate,
        method,
        pooled=tuple(is_scarce.nonzero().flatten().tolist()),
    )


@dataclass(frozen=True, kw_only=True)
class Calibrator:
    """Fits a detector's per-class thresholds on benign images it was not trained on.

    With ``method="conformal"`` the chance that a new, correctly classified benign image of class i is refused is
    at most `false_positive_rate`, at any number of examples, if it is exchangeable with the calibration images
    of that class. Images that were trained on, or that later drift, void that. With ``scarce="pool"`` it holds for
    classes with enough examples, and for all classes together.

    Thresholds get a slack for rounding: four times the largest change of a suspicion that is seen when the first 16
    images are judged together and one by one, and 64 units in the last place of float32 at least.

    Args:
        false_positive_rate: α, in (0, 1), within every class.
        method: "conformal" or "quantile", see `fit_threshold`.
        scarce: "error" or "pool", see `fit_thresholds`.

    Raises:
        ConfigurationError: a rate outside (0, 1), or an unknown method or way with scarce classes.

    Example:
        >>> from clusterguard.detectors import ConfidenceDetector
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> detector = ConfidenceDetector(torch.nn.Flatten(), num_classes=2)  # the brighter of two pixels
        >>> images = torch.rand(99, 1, 1, 2)
        >>> loader = DataLoader(TensorDataset(images, images.flatten(1).argmax(dim=1)), batch_size=32)
        >>> calibration = Calibrator(false_positive_rate=0.1).fit(detector, loader)
        >>> detector.is_calibrated
        True
    """

    false_positive_rate: float = field(default=0.01, kw_only=False)
    method: Method = "conformal"
    scarce: Scarce = "error"

    def __post_init__(self) -> None:
        _check_options(self.false_positive_rate, self.method, self.scarce)

    def check_counts(self, loader: Loader, num_classes: int, *, unpack: Unpack | None = None) -> None:
        """Make sure that a set is large enough if every image in it is classified correctly.

        Args:
            loader: batches of images and labels (B,); only labels are read.
            num_classes: K.
            unpack: finds images and labels in batches of another form.

        Raises:
            TooFewCalibrationExamplesError: with the counts per class.
        """
        counts = torch.zeros(num_classes, dtype=torch.long)
        for images, labels in Pairs(loader, unpack):
            check_labels(labels, images, num_classes)
            counts += torch.bincount(labels.cpu(), minlength=num_classes)
        needed = minimum_examples(self.false_positive_rate)
        if int(counts.sum() if self.scarce == "pool" else counts.min()) < needed:
            wanted = f"at least {needed} calibration examples of every class, for a rate of {self.false_positive_rate}"
            raise TooFewCalibrationExamplesError(
                f"expected {wanted}, got {counts.tolist()}; add some, or raise the rate"
            )

    def fit(
        self,
        detector: Detector,
        loader: Loader,
        *,
        accelerator: "Accelerator | None" = None,
        unpack: Unpack | None = None,
        progress: bool = False,
    ) -> Calibration:
        """Fit and set the detector's thresholds; they are left as they were if anything fails.

        A `DetectorModule` whose `image_shape` is not decided takes images of this shape alone from then on.

        Args:
            detector: anything that yields evidence; a `DetectorModule` also keeps the returned record.
            loader: batches of images (B, C, H, W) in [0, 1] and labels (B,). Only suspicion and labels are kept,
                so memory does not grow with the images' size.
            accelerator: whose processes share the work, a batch each in turn; all get the same thresholds.
            unpack: finds images and labels in batches of another form.
            progress: show a progress bar.

        Returns:
            The thresholds, the counts they rest on, and the rate they realise on these images.

        Raises:
            InputError: images or labels of a wrong shape, dtype or range, or an empty loader.
            TooFewCalibrationExamplesError: naming classes and counts.
            ConfigurationError: the detector gives the same images different evidence each time.
        """
        batches = CalibrationBatches(loader, detector, unpack)
        with image_shape_kept_on_failure(detector):
            bar = "calibrating" * progress
            detection, labels = judge(detector, batches, accelerator=accelerator, progress=bar)
            index = 0 if accelerator is None else accelerator.process_index
            rounding = max(collect({index: measure_rounding(detector, batches.images)}, accelerator))
            calibration = fit_thresholds(
                detection.distances,
                detection.labels,
                labels,
                len(detector.thresholds),
                false_positive_rate=self.false_positive_rate,
                method=self.method,
                scarce=self.scarce,
                rounding=rounding,
            )
        if calibration.pooled:
            warnings.warn(
                f"classes {_shortened(calibration.pooled)} have too few correctly classified calibration examples and "
                "share the pooled threshold; the false-positive rate of each alone is not guaranteed",
                stacklevel=2,
            )
        with torch.inference_mode(False):  # a threshold made in it could take no part in training or attacks later
            detector.thresholds = detector.thresholds.new_tensor(calibration.thresholds)
        if isinstance(detector, KeepsCalibration):
            detector.calibration = calibration
        return calibration


def _exact(rate: float) -> Fraction:
    """The rate as the decimal number that was written: 1/0.01 must be exactly 100."""
    return Fraction(str(rate))


def _check_options(false_positive_rate: object, method: str = "conformal", scarce: str = "error") -> None:
    if not isinstance(false_positive_rate, Real) or not 0 < float(false_positive_rate) < 1:
        raise ConfigurationError(f"expected a false-positive rate in (0, 1), such as 0.01, got {false_positive_rate!r}")
    if method not in ("conformal", "quantile"):
        raise ConfigurationError(f"expected method 'conformal' or 'quantile', got {method!r}")
    if scarce not in ("error", "pool"):
        raise ConfigurationError(f"expected scarce 'error' or 'pool', got {scarce!r}")


def _refused_last(suspicion: Tensor) -> Tensor:
    """Suspicion (n,) in float64, +inf where it is not finite: those are refused at every threshold."""
    return suspicion.double().masked_fill(~suspicion.isfinite(), math.inf)


def _positions(counts: Tensor, false_positive_rate: float, method: str) -> tuple[Tensor, Tensor]:
    """Where thresholds lie among so many ordered examples (K,): after how many, and how far from there to the next."""
    alpha = _exact(false_positive_rate)
    sizes, index = counts.unique(return_inverse=True)
    exact = [
        Fraction(size - allowed_refusals(size, false_positive_rate))
        if method == "conformal"
        else (size - 1) * (1 - alpha)
        for size in sizes.tolist()
    ]
    whole = torch.tensor([math.floor(own) for own in exact], device=counts.device)
    fractions = torch.tensor([float(own % 1) for own in exact], dtype=torch.float64, device=counts.device)
    return whole[index], fractions[index]


def _read(ordered: Tensor, positions: Tensor, fractions: Tensor) -> Tensor:
    """The values at these positions, or between them and the next."""
    between = fractions > 0
    return torch.where(
        between, torch.lerp(ordered[positions], ordered[positions + between], fractions), ordered[positions]
    )


def _threshold_of(ordered: Tensor, false_positive_rate: float, method: str) -> Tensor:
    count = torch.tensor([len(ordered)], device=ordered.device)
    return _read(ordered, *_positions(count, false_positive_rate, method)).squeeze()


def _class_thresholds(
    ordered: Tensor, classes: Tensor, counts: Tensor, false_positive_rate: float, method: str, scarce: str
) -> Tensor:
    """Thresholds (K,) from suspicion (n,), one class after the other, and its classes; see `fit_thresholds`.

    The bounds rest on a count: calibration images and the new one are treated alike. So a class with enough examples is
    looked at as if the new image were of it, and a scarce class as if the new image were of that one.
    """
    needed, is_scarce = minimum_examples(false_positive_rate), counts < minimum_examples(false_positive_rate)
    positions, fractions = _positions(counts, false_positive_rate, method)
    last = counts.cumsum(0) - 1
    first = last + 1 - counts
    in_pool = (counts <= needed) & (scarce == "pool")  # what is scarce, besides the class that is looked at
    pool, thresholds = ordered[in_pool[classes]].sort().values, ordered.new_empty(len(counts))
    pays = joins = lends = torch.zeros_like(in_pool)
    if method == "conformal" and in_pool.any():
        allowed = counts - positions
        used = 1 + allowed[~in_pool].sum() + allowed * in_pool
        lacks_room = (used > allowed_refusals(len(ordered), false_positive_rate)) & (counts + 1 >= counts.max())
        rest = len(pool) - counts * in_pool
        gives = lacks_room & (rest > 0) & (rest <= needed)
        pays, joins = gives & (allowed >= 2), gives & (allowed < 2)
        lends = lacks_room & ~in_pool & (counts - 1 - _positions(counts - 1, false_positive_rate, method)[0] < 2)
    thresholds[~is_scarce] = _read(ordered, (first + positions + pays)[~is_scarce], fractions[~is_scarce])
    thresholds[joins & ~is_scarce] = torch.maximum(thresholds[joins & ~is_scarce], pool[-1:])
    if is_scarce.any() and len(pool) >= needed:
        thresholds[is_scarce] = _threshold_of(pool, false_positive_rate, method)
    elif is_scarce.any():
        everybody = _threshold_of(ordered.sort().values, false_positive_rate, method)
        thresholds[is_scarce] = torch.cat([everybody[None], pool, ordered[last[lends]]]).amax()
    return thresholds


def _listing(counts: Tensor, chosen: Tensor) -> str:
    """Classes and their counts, the first ten."""
    indices = chosen.nonzero().flatten().tolist()
    listing = ", ".join(f"class {index}: {int(counts[index])}" for index in indices[:10])
    return listing + (f" and {len(indices) - 10} more classes" if len(indices) > 10 else "")


def _shortened(indices: Sequence[int]) -> str:
    return str([*indices]) if len(indices) <= 10 else f"{[*indices[:10]]} and {len(indices) - 10} more"


def _check_finite(thresholds: Tensor) -> None:
    if not bool((thresholds.abs() <= _LARGEST).all()):
        raise InputError(
            f"expected suspicion of benign examples to be finite and at most {_LARGEST:.0e}, got infinite, NaN or "
            "larger values where a threshold would lie; look at the images that have them"
        )


def _round_up_to_float32(values: Tensor) -> Tensor:
    """Thresholds are compared in float32: rounding one down would push its own example over it."""
    rounded = values.float()
    up = torch.nextafter(rounded, torch.full_like(rounded, math.inf))
    return torch.where(rounded.double() < values, up, rounded).double()
