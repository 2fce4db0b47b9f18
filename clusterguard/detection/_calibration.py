"""Per-class thresholds from benign images: pure functions, and a `Calibrator` that feeds them from a loader."""

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch
from clusterguard._support import check_labels, check_tensor, gather
from clusterguard.detection._calibration_batches import (
    CalibrationBatches,
    KeepsCalibration,
    check_finite,
    image_shape_kept_on_failure,
    measure_rounding,
)
from clusterguard.detection._class_names import HasClassNames, list_classes, list_counts
from clusterguard.detection._decision import Detector
from clusterguard.detection._judging import judge
from clusterguard.detection._loaders import Loader, Pairs, Unpack
from clusterguard.detection._metrics import guessing_advice
from clusterguard.detection._thresholds import (
    Method,
    Scarce,
    check_calibration_options,
    class_thresholds,
    minimum_examples,
    refused_last,
    round_up_to_float32,
)
from clusterguard.errors import ConfigurationError, InputError, TooFewCalibrationExamplesError, in_one_line
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

_SLACK = 2.0**-17
"""Slack as a share of the threshold: 64 units in the last place of float32. When the batch size changed, distances of
small networks on a CPU moved by up to 20 units in the last place of a threshold at 1 %."""


@final
@dataclass(frozen=True)
class Calibration:
    """Record of how thresholds were fitted, kept together with them.

    Attributes:
        thresholds: K floats, one per class.
        counts: K ints, the number of correctly classified calibration images per class. The thresholds rest on these
            images.
        images: number of all calibration images.
        realised_rates: K floats, the share of the counted images of each class above its threshold; 0.0 for a class
            without images.
        false_positive_rate: rate that was asked for, a fraction.
        method: "conformal" or "quantile".
        pooled: classes that share the pooled threshold because they have too few examples.
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
        """The record as plain values for JSON, with a digest of the thresholds, which the detector stores exactly."""
        values = {name: value for name, value in asdict(self).items() if name != "thresholds"}
        return {**values, "thresholds_sha256": _digest(self.thresholds)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], thresholds: Tensor) -> "Calibration":
        """The record that `to_dict` wrote, together with its thresholds.

        Args:
            values: dict that `to_dict` returned, possibly saved as JSON since then.
            thresholds: (K,) thresholds of the detector.

        Raises:
            InputError: the values are not such a record, or belong to other classes or thresholds.
        """
        classes, kinds = len(thresholds), {"counts": int, "realised_rates": float, "pooled": int}
        try:
            plain = {**values, **{key: tuple(values.get(key, ())) for key in kinds}}
            digest = plain.pop("thresholds_sha256", _digest(thresholds.tolist()))
            record = cls(thresholds=tuple(thresholds.tolist()), **plain)
            needed = minimum_examples(record.false_positive_rate)
            check_calibration_options(record.false_positive_rate, record.method)
            fits = (
                type(record.images) is int
                and all(type(value) is kind for key, kind in kinds.items() for value in plain[key])
                and len(record.counts) == len(record.realised_rates) == classes
                and all(count >= 0 for count in record.counts)
                and sum(record.counts) <= record.images
                and all(math.isfinite(threshold) for threshold in record.thresholds)
                and all(0 <= rate <= 1 for rate in record.realised_rates)
                and all(0 <= index < classes for index in record.pooled)
                and all(record.counts[i] >= needed for i in {*range(classes)}.difference(record.pooled))
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"expected the record of a calibration, got something else ({in_one_line(error)})"
            ) from error
        if not fits:
            raise InputError(f"expected the record of a calibration of {classes} classes, got values that do not fit")
        if digest != _digest(record.thresholds):
            raise InputError("expected the thresholds that were calibrated, got others; calibrate again")
        return record

    def describes(self, thresholds: Tensor) -> bool:
        """Whether these (K,) thresholds are still the ones that were fitted."""
        return self.thresholds == tuple(thresholds.tolist())


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
    class_names: Sequence[str] | None = None,
) -> Calibration:
    """A threshold per class, fitted to the benign examples of each class that are classified correctly.

    A class is scarce if it has fewer than `minimum_examples` correctly classified examples. With ``scarce="pool"`` and
    the conformal method, two bounds hold for any distribution of the classes:

    - A class with enough examples keeps its own bound. A new, correctly classified image of this class is refused with
      probability at most α.
    - Over all classes together, in the mix that the calibration images were drawn from, this probability is at most α
      too. There is no bound for a single scarce class. In the worst case all of its images are refused.

    Scarce classes share one threshold. It is fitted to the examples of all classes that have `minimum_examples` or
    fewer, if these examples are enough together. If they are not, the shared threshold is the largest suspicion among
    them, or the threshold that fits the examples of all classes together, whichever is larger. Then at most one of n
    examples and a new one is refused because it is the most suspicious of the scarce classes. If the bound over all
    classes has no room for this refusal, the class with most examples gives up one of its own, and its threshold moves
    up to its next larger suspicion. If this class has only one refusal, it shares it with the scarce classes. Both
    thresholds are then at least the largest suspicion in this class and the scarce ones.

    Args:
        suspicion: (n,) suspicion of the predicted label.
        predicted: (n,) predicted labels.
        labels: (n,) true labels.
        num_classes: number K of classes.
        false_positive_rate: rate α in (0, 1), which holds within every class.
        method: rule as in `fit_shared_threshold`. "quantile" gives no guarantee, with or without pooled classes.
        scarce: treatment of scarce classes. "error" raises an error, and "pool" gives them a threshold that they share.
        rounding: largest change of an image's suspicion that arithmetic alone may cause, at least 0, in units of the
            suspicion.
        class_names: K names for messages.

    Returns:
        The thresholds and how they were fitted. Each threshold is a little larger than the suspicion that it rests on,
        by `rounding` or by 64 units in the last place of float32 (a share of 8e-6), whichever is more. The reason is
        that the suspicion of an image may differ in its last places between batches. Such a difference must not decide
        whether the image is refused.

    Raises:
        TooFewCalibrationExamplesError: too few examples. The message names the classes and their counts.
        InputError: tensors have a wrong shape, dtype or device, labels are out of range, or too many suspicions are not
            finite.
        ConfigurationError: the rate is outside (0, 1), `method` or `scarce` is unknown, or `rounding` is negative.

    Example:
        >>> suspicion, labels = torch.arange(200.0), torch.arange(200) % 2
        >>> calibration = fit_thresholds(suspicion, labels, labels, num_classes=2, false_positive_rate=0.1)
        >>> [round(threshold, 2) for threshold in calibration.thresholds], calibration.realised_rates
        ([180.0, 181.0], (0.09, 0.09))
    """
    check_calibration_options(false_positive_rate, method, scarce)
    if not 0 <= rounding < math.inf:
        raise ConfigurationError(f"expected rounding of at least 0, got {rounding}")
    check_tensor(suspicion, "suspicion", "n")
    check_labels(predicted, suspicion, num_classes, name="predicted labels")
    check_labels(labels, suspicion, num_classes)
    correct = predicted == labels
    values, order = refused_last(suspicion[correct]).sort()
    classes, by_class = labels[correct].long()[order].sort(stable=True)
    values_by_class, counts = values[by_class], torch.bincount(classes, minlength=num_classes)
    needed = minimum_examples(false_positive_rate)
    is_scarce = counts < needed
    if is_scarce.any() and (scarce == "error" or len(values) < needed):
        doubt = guessing_advice(len(values), len(labels), num_classes)
        advice = doubt or "add examples, allow a higher rate, or pass scarce='pool'"
        raise TooFewCalibrationExamplesError(
            f"a false-positive rate of {false_positive_rate} needs at least {needed} correctly classified calibration "
            f"examples of every class, got {list_counts(counts, is_scarce, class_names)}; {advice}"
        )
    thresholds = class_thresholds(values_by_class, classes, counts, false_positive_rate, method, scarce)
    check_finite(thresholds)
    thresholds = round_up_to_float32(thresholds + (thresholds.abs() * _SLACK).clamp_min(rounding))
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


@final
@dataclass(frozen=True, kw_only=True)
class Calibrator:
    """Fits a detector's per-class thresholds on benign images that it was not trained on.

    With ``method="conformal"``, a new, correctly classified benign image of class i is refused with a probability of at
    most `false_positive_rate`. This holds for any number of examples, if the new image is exchangeable with the
    calibration images of its class. The guarantee is lost if the detector was trained on the calibration images, or if
    the images in service drift. With ``scarce="pool"`` it holds for classes with enough examples, and for all classes
    together.

    Each threshold gets a slack for rounding. The first 16 images are judged together and one by one, and the slack is
    four times the largest change of a suspicion between the two, but at least 64 units in the last place of float32.

    Args:
        false_positive_rate: rate α in (0, 1), which holds within every class.
        method: rule "conformal" or "quantile", see `fit_shared_threshold`.
        scarce: treatment of classes with too few examples, "error" or "pool", see `fit_thresholds`.

    Raises:
        ConfigurationError: the rate is outside (0, 1), or `method` or `scarce` is unknown.

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
        check_calibration_options(self.false_positive_rate, self.method, self.scarce)

    def check_counts(
        self,
        loader: Loader,
        num_classes: int,
        *,
        unpack: Unpack | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """Check that a set is large enough if the detector classifies every image in it correctly.

        Args:
            loader: batches of images and labels (B,); only the labels are used.
            num_classes: number K of classes.
            unpack: function that finds images and labels in batches of another form.
            class_names: K names for the message.

        Raises:
            TooFewCalibrationExamplesError: too few examples. The message names the classes and their counts.
        """
        counts = torch.zeros(num_classes, dtype=torch.long)
        for images, labels in Pairs(loader, unpack):
            check_labels(labels, images, num_classes)
            counts += torch.bincount(labels.cpu(), minlength=num_classes)
        needed = minimum_examples(self.false_positive_rate)
        if int(counts.sum() if self.scarce == "pool" else counts.min()) < needed:
            raise TooFewCalibrationExamplesError(
                f"expected at least {needed} calibration examples of every class, for a rate of "
                f"{self.false_positive_rate}, got {list_counts(counts, counts < needed, class_names)}; add examples, "
                f"raise the rate{', or pass scarce=' + repr('pool') if self.scarce == 'error' else ''}"
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
        """Fit and set the detector's thresholds. If anything fails, the old thresholds stay.

        If a `DetectorModule` has no `image_shape` yet, it learns the shape of these images and takes no other shape
        from then on.

        Args:
            detector: any detector that yields evidence; a `DetectorModule` also keeps the returned record.
            loader: batches of images (B, C, H, W) in [0, 1] and labels (B,). Only suspicion and labels are kept,
                so memory does not grow with the size of the images.
            accelerator: accelerator whose processes take the batches in turn; all of them get the same thresholds.
            unpack: function that finds images and labels in batches of another form.
            progress: whether to show a progress bar.

        Returns:
            The thresholds, the counts that they rest on, and the rate that they realise on these images.

        Raises:
            InputError: images or labels have a wrong shape, dtype or range, or the loader is empty.
            TooFewCalibrationExamplesError: too few examples. The message names the classes and their counts.
            ConfigurationError: the detector's evidence for an image differs between calls or with its batch.
        """
        batches = CalibrationBatches(loader, detector, unpack)
        with image_shape_kept_on_failure(detector):
            bar = "calibrating" * progress
            detection, labels = judge(detector, batches, accelerator=accelerator, progress=bar)
            names = detector.class_names if isinstance(detector, HasClassNames) else None
            index = 0 if accelerator is None else accelerator.process_index
            rounding = max(gather({index: measure_rounding(detector, batches.images)}, accelerator))
            calibration = fit_thresholds(
                detection.distances,
                detection.labels,
                labels,
                len(detector.thresholds),
                false_positive_rate=self.false_positive_rate,
                method=self.method,
                scarce=self.scarce,
                rounding=rounding,
                class_names=names,
            )
        if calibration.pooled:
            warnings.warn(
                f"classes {list_classes(calibration.pooled, names)} have too few correctly classified calibration "
                "examples and share the pooled threshold; the false-positive rate of each alone is not guaranteed",
                stacklevel=2,
            )
        with torch.inference_mode(False):  # autograd could not use an inference tensor later
            dtype = torch.promote_types(detector.thresholds.dtype, torch.float32)  # rounding would change the rate
            detector.thresholds = detector.thresholds.new_tensor(calibration.thresholds, dtype=dtype)
        if isinstance(detector, KeepsCalibration):
            detector.calibration = calibration
        return calibration


def _digest(thresholds: Sequence[float]) -> str:
    return hashlib.sha256(str([*thresholds]).encode()).hexdigest()
