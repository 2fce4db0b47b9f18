"""The record of a calibration in a guard's folder: what it says must be what a calibration can make."""

import json
from pathlib import Path

import pytest
import torch
from clusterguard import Calibration, ClusterGuard
from saving import assert_refused, edit_config, make_guard, network, put_weights


def calibrated(folder: Path) -> None:
    guard = make_guard()
    thresholds = tuple(guard.thresholds.tolist())
    guard.calibration = Calibration(thresholds, (120,) * 3, 400, (0.0,) * 3, 0.01, "conformal")
    guard.save_pretrained(folder)


@pytest.mark.parametrize("thresholds", [[9.0, 10.0, 12.0], [9.0, 10.0, torch.inf]])
def test_a_record_of_other_thresholds_is_refused(saved, thresholds):
    calibrated(saved)
    put_weights(saved, thresholds=torch.tensor(thresholds))
    assert_refused(
        saved, "does not fit .*InputError: expected the (thresholds that were|record of a) calibrat", network()
    )


def test_a_record_of_version_0_1_tells_no_thresholds(saved):
    calibrated(saved)
    record = json.loads((saved / "config.json").read_text())["calibration"]
    del record["thresholds_sha256"]
    edit_config(saved, calibration=record)
    assert ClusterGuard.from_pretrained(saved, backbone=network()).calibration is not None


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("counts", [120, 120, 98]),  # too few for its rate
        ("counts", [120, 120, 161]),  # more than there were images
        ("counts", [-1, 200, 200]),
        ("realised_rates", [0.0, 0.0, float("nan")]),
        ("false_positive_rate", float("inf")),
        ("false_positive_rate", True),
        ("method", "guess"),
        ("method", []),
        ("images", 400.0),
        ("pooled", [3]),
    ],
)
def test_a_record_that_no_calibration_makes_is_refused(saved, entry, value):
    calibrated(saved)
    record = json.loads((saved / "config.json").read_text())["calibration"]
    edit_config(saved, calibration=record | {entry: value})
    assert_refused(saved, "does not fit .*expected", network())
