"""Per-class thresholds from benign images: pure functions, and `Calibrator` that feeds them from a loader."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import torch
from clusterguard.checks import check_labels, check_tensor
from clusterguard.decision import Detector
from clusterguard.detector import DetectorModule, Loader, image_shape_kept_on_failure, judge
from clusterguard.errors import ConfigurationError, InputError, TooFewCalibrationExamplesError
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

Method = Literal["conformal", "quantile"]
Scarce = Literal["error", "pool"]


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
        """
        plain: dict[str, Any] = {key: tuple(own) if isinstance(own, list) else own for key, own in values.items()}
        return cls(thresholds=tuple(thresholds.tolist()), **plain)

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


def fit_threshold(suspicion: Tensor, false_positive_rate: float, *, method: Method = "conformal") -> float:
    """The threshold that a new benign example exceeds with probability at most the rate.

    Args:
        suspicion: (n,) suspicion of benign examples, n at least `minimum_examples(false_positive_rate)`.
        false_positive_rate: α, in (0, 1).
        method: "conformal" takes the ⌈(n+1)(1−α)⌉-th smallest, for which the bound holds at every n if the
            examples and the new one are exchangeable; "quantile" takes the plain (1−α)-quantile of the
            sample, as the paper does, which is a little too low on small samples.

    Returns:
        The threshold, in units of the suspicion.

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
    ordered = suspicion.double().masked_fill(~suspicion.isfinite(), math.inf).sort().values  # those are refused anyway
    alpha = _exact(false_positive_rate)
    if method == "conformal":
        threshold = float(ordered[math.ceil((count + 1) * (1 - alpha)) - 1])
    else:
        position = float((count - 1) * (1 - alpha))
        below, above = ordered[math.floor(position)], ordered[math.ceil(position)]
        threshold = float(torch.lerp(below, above, position - math.floor(position)))
    if not math.isfinite(threshold):
        raise InputError("expected finite suspicion on benign examples, got infinite or NaN values among them")
    return threshold


def fit_thresholds(
    suspicion: Tensor,
    predicted: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    false_positive_rate: float = 0.01,
    method: Method = "conformal",
    scarce: Scarce = "error",
) -> Calibration:
    """A threshold per class, from the benign examples of each class that are classified correctly.

    Args:
        suspicion: (n,) suspicion of the predicted label.
        predicted: (n,) predicted labels.
        labels: (n,) true labels.
        num_classes: K.
        false_positive_rate: α, in (0, 1), within every class.
        method: see `fit_threshold`.
        scarce: what a class with fewer than `minimum_examples` correct examples gets: "error", or "pool", the
            threshold of all classes' correct examples together, for which the rate holds only on average.

    Returns:
        The thresholds and how they came about.

    Raises:
        TooFewCalibrationExamplesError: naming the classes and their counts.
        InputError: tensors of a wrong shape, dtype or device, labels out of range, or too many that are not finite.
        ConfigurationError: a rate outside (0, 1), or an unknown method or way with scarce classes.
    """
    _check_options(false_positive_rate, method, scarce)
    check_tensor(suspicion, "suspicion", "n")
    check_labels(predicted, suspicion, num_classes, name="predicted labels")
    check_labels(labels, suspicion, num_classes)
    correct = predicted == labels
    by_class = [suspicion[correct & (labels == index)] for index in range(num_classes)]
    counts = tuple(len(values) for values in by_class)
    needed = minimum_examples(false_positive_rate)
    short = tuple(index for index, count in enumerate(counts) if count < needed)
    if short and (scarce == "error" or sum(counts) < needed):
        listing = ", ".join(f"class {index}: {counts[index]}" for index in short)
        raise TooFewCalibrationExamplesError(
            f"a false-positive rate of {false_positive_rate} needs at least {needed} correctly classified calibration "
            f"examples of every class, got {listing}; add examples, allow a higher rate, or pass scarce='pool'"
        )
    pooled = fit_threshold(suspicion[correct], false_positive_rate, method=method) if short else math.nan
    thresholds = [
        pooled if index in short else fit_threshold(values, false_positive_rate, method=method)
        for index, values in enumerate(by_class)
    ]
    # Thresholds are compared in float32: rounding one down would push its own example over it.
    thresholds = [_round_up_to_float32(value) for value in thresholds]
    realised = tuple(
        float((values > threshold).double().mean()) if len(values) else 0.0
        for values, threshold in zip(by_class, thresholds, strict=True)
    )
    return Calibration(tuple(thresholds), counts, len(labels), realised, false_positive_rate, method, pooled=short)


@dataclass(frozen=True, kw_only=True)
class Calibrator:
    """Fits a detector's per-class thresholds on benign images it was not trained on.

    With ``method="conformal"`` the chance that a new, correctly classified benign image of class i is refused is
    at most `false_positive_rate`, at any number of examples, if it is exchangeable with the calibration images
    of that class. Images that were trained on, or that later drift, void that.

    Args:
        false_positive_rate: α, in (0, 1), within every class.
        method: "conformal" or "quantile", see `fit_threshold`.
        scarce: "error" or "pool", see `fit_thresholds`.

    Raises:
        ConfigurationError: a rate outside (0, 1), or an unknown method or way with scarce classes.

    Example:
        >>> from clusterguard import ConfidenceDetector
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

    def check_counts(self, loader: Loader, num_classes: int) -> None:
        """Make sure that a set is large enough if every image in it is classified correctly.

        Args:
            loader: batches of images and labels (B,); only labels are read.
            num_classes: K.

        Raises:
            TooFewCalibrationExamplesError: with the counts per class.
        """
        counts = torch.zeros(num_classes, dtype=torch.long)
        for images, labels in loader:
            check_labels(labels, images, num_classes)
            counts += torch.bincount(labels.cpu(), minlength=num_classes)
        needed = minimum_examples(self.false_positive_rate)
        if int(counts.sum() if self.scarce == "pool" else counts.min()) < needed:
            wanted = f"at least {needed} calibration examples of every class, for a rate of {self.false_positive_rate}"
            raise TooFewCalibrationExamplesError(
                f"expected {wanted}, got {counts.tolist()}; add some, or raise the rate"
            )

    def fit(
        self, detector: Detector, loader: Loader, *, accelerator: "Accelerator | None" = None, progress: bool = False
    ) -> Calibration:
        """Fit and set the detector's thresholds; they are left as they were if anything fails.

        A `DetectorModule` whose `image_shape` is not decided takes images of this shape alone from then on.

        Args:
            detector: anything that yields evidence; a `DetectorModule` also keeps the returned record.
            loader: batches of images (B, C, H, W) in [0, 1] and labels (B,). Only suspicion and labels are kept,
                so memory does not grow with the images' size.
            accelerator: whose processes share the work, a batch each in turn; all get the same thresholds.
            progress: show a progress bar.

        Returns:
            The thresholds, the counts they rest on, and the rate they realise on these images.

        Raises:
            InputError: images or labels of a wrong shape, dtype or range, or an empty loader.
            TooFewCalibrationExamplesError: naming classes and counts.
            ConfigurationError: the detector gives the same images different evidence each time.
        """
        with image_shape_kept_on_failure(detector):
            bar = "calibrating" * progress
            detection, labels = judge(detector, loader, accelerator=accelerator, progress=bar, calibrating=True)
            calibration = fit_thresholds(
                detection.distances,
                detection.labels,
                labels,
                len(detector.thresholds),
                false_positive_rate=self.false_positive_rate,
                method=self.method,
                scarce=self.scarce,
            )
        if calibration.pooled:
            warnings.warn(
                f"classes {list(calibration.pooled)} have too few correctly classified calibration examples and share "
                "the pooled threshold; their false-positive rate is not guaranteed",
                stacklevel=2,
            )
        detector.thresholds = detector.thresholds.new_tensor(calibration.thresholds)
        if isinstance(detector, DetectorModule):
            detector.calibration = calibration
        return calibration


def _exact(rate: float) -> Fraction:
    """The rate as the decimal number that was written: 1/0.01 must be 100, not a hair more."""
    return Fraction(str(rate))


def _check_options(false_positive_rate: float, method: str = "conformal", scarce: str = "error") -> None:
    if not 0 < false_positive_rate < 1:
        raise ConfigurationError(f"expected a false-positive rate in (0, 1), such as 0.01, got {false_positive_rate}")
    if method not in ("conformal", "quantile"):
        raise ConfigurationError(f"expected method 'conformal' or 'quantile', got {method!r}")
    if scarce not in ("error", "pool"):
        raise ConfigurationError(f"expected scarce 'error' or 'pool', got {scarce!r}")


def _round_up_to_float32(value: float) -> float:
    rounded = torch.tensor(value, dtype=torch.float32)
    return float(rounded if float(rounded) >= value else torch.nextafter(rounded, torch.tensor(torch.inf)))
