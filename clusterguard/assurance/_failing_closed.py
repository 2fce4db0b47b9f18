"""Whether a guard fails closed: it is given what cannot be judged, and must refuse it or raise an error."""

import copy
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from clusterguard._support import check_images
from clusterguard.detectors import ClusterGuard
from clusterguard.detectors._internal import CONFIG, WEIGHTS, read_config, read_guard
from clusterguard.errors import ClusterGuardError, InputError, NotCalibratedError, PersistenceError
from torch import Tensor, nn

_PIXELS = {
    "a pixel that is not a number": torch.nan,
    "a pixel that is infinite": torch.inf,
    "a pixel above 1": 1.1,
    "a pixel below 0": -0.1,
}
_REFUSED = "the image is refused, and its neighbour is judged as ever"


class FailureCheck(NamedTuple):
    """What a guard was given that it cannot judge, and what it did.

    Attributes:
        given: what the guard was given.
        expected: what it has to do.
        holds: whether it did so.
        tests: file of clusterguard's own tests that holds the same for every guard.
    """

    given: str
    expected: str
    holds: bool
    tests: str


def check_failing_closed(guard: ClusterGuard, images: Tensor, folder: str | Path) -> tuple[FailureCheck, ...]:
    """Give a guard what cannot be judged, and see whether it refuses that. The guard stays as it is.

    Args:
        guard: calibrated guard.
        images: (B, C, H, W) benign images in [0, 1], at least two.
        folder: folder that the guard was saved in. Its files are copied, and the copies are damaged.

    Returns:
        One record for each check.

    Raises:
        InputError: there are fewer than two images, or they are no images.

    Example:
        >>> guard = ClusterGuard(torch.nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 1, 2))
        >>> guard.thresholds = torch.tensor([30.0, 30.0])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     guard.save_pretrained(folder)
        ...     checks = check_failing_closed(guard, torch.rand(2, 1, 1, 2), folder)
        >>> all(check.holds for check in checks)
        True
    """
    check_images(images)
    if len(images) < 2:
        raise InputError(f"expected at least two images, got {len(images)}")
    pair = images[:2]
    return (*_bad_pixels(guard, pair), *_bad_batches(guard, pair), *_bad_guards(guard, pair), *_bad_files(Path(folder)))


def _bad_pixels(guard: ClusterGuard, images: Tensor) -> list[FailureCheck]:
    checks = []
    for given, value in _PIXELS.items():
        spoilt = images.clone()
        spoilt[0, 0, 0, 0] = value
        verdict, usual = guard.detect(spoilt, check=False), guard.detect(images)
        is_unmoved = verdict.labels[1] == usual.labels[1] and verdict.is_adversarial[1] == usual.is_adversarial[1]
        holds, expected = bool(verdict.is_adversarial[0] & is_unmoved), _REFUSED
        if math.isfinite(value):
            expected = f"detect raises an error; with check=False {_REFUSED}"
            holds &= _raises(InputError, partial(guard.detect, spoilt))
        else:
            holds &= bool(guard.detect(spoilt).is_adversarial[0])
        checks.append(FailureCheck(given, expected, holds, "tests/detectors/test_refusals.py"))
    return checks


def _bad_batches(guard: ClusterGuard, images: Tensor) -> list[FailureCheck]:
    whole = (images * 255).to(torch.uint8)
    given = {"pixels as integers from 0 to 255": (whole, "tests/detectors/test_guard.py")}
    if isinstance(guard.image_shape, tuple):
        larger = nn.functional.pad(images, (0, 1, 0, 1))
        given["images of another size"] = (larger, "tests/detectors/test_image_shape.py")
    return [
        FailureCheck(name, "detect raises an error", _raises(InputError, partial(guard.detect, batch)), tests)
        for name, (batch, tests) in given.items()
    ]


def _bad_guards(guard: ClusterGuard, images: Tensor) -> list[FailureCheck]:
    uncalibrated, broken = copy.deepcopy(guard), copy.deepcopy(guard)
    uncalibrated.reset_calibration()
    with torch.no_grad():
        for weight in broken.parameters():
            weight.fill_(torch.nan)
    return [
        FailureCheck(
            "no thresholds",
            "detect raises an error; with check=False every image is refused",
            bool(uncalibrated.detect(images, check=False).is_adversarial.all())
            and _raises(NotCalibratedError, partial(uncalibrated.detect, images)),
            "tests/detectors/test_guard.py",
        ),
        FailureCheck(
            "weights that are not numbers",
            "every image is refused",
            bool(broken.detect(images).is_adversarial.all()),
            "tests/detection/test_decision.py",
        ),
    ]


def _bad_files(folder: Path) -> list[FailureCheck]:
    with tempfile.TemporaryDirectory() as name:
        copied = Path(name)
        for file in (CONFIG, WEIGHTS):
            shutil.copyfile(folder / file, copied / file)
        with (copied / WEIGHTS).open("r+b") as weights:
            weights.seek(-1, 2)
            last = weights.read(1)[0]
            weights.seek(-1, 2)
            weights.write(bytes([last ^ 1]))
        is_seen = _raises(PersistenceError, lambda: read_guard(copied, lambda _, weights: weights.check_digest()))
        config = json.loads((copied / CONFIG).read_text(encoding="utf-8"))
        config["guard"]["num_classes"] += 1
        (copied / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        is_seen_too = _raises(PersistenceError, lambda: read_config(copied / CONFIG))
    tests = "tests/detectors/test_damaged_folders.py"
    return [
        FailureCheck("a file of weights with one bit flipped", "loading raises an error", is_seen, tests),
        FailureCheck("a configuration with another number of classes", "loading raises an error", is_seen_too, tests),
    ]


def _raises(error: type[ClusterGuardError], call: Callable[[], object]) -> bool:
    try:
        call()
    except error:
        return True
    return False
