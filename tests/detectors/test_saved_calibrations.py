"""The record of a calibration in a guard's folder: what it says must be what a calibration can make."""

import copy
import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from clusterguard import Calibration, Calibrator, ClusterGuard
from clusterguard.cli._guard_folders import describe_guard
from clusterguard.deployment import plausible_rate
from clusterguard.errors import ConfigurationError
from saving import assert_refused, edit_config, make_guard, network, put_weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def calibrated(folder: Path) -> None:
    guard = make_guard()
    thresholds = tuple(guard.thresholds.tolist())
    guard.calibration = Calibration(thresholds, (120,) * 3, 400, (0.0,) * 3, 0.01, "conformal")
    guard.save_pretrained(folder)


def step_by_hand(guard: ClusterGuard) -> ClusterGuard:
    optimizer = torch.optim.SGD(guard.parameters(), lr=0.1)
    guard(torch.rand(4, 1, 3, 4)).sum().backward()
    optimizer.step()
    return guard


def load_others(guard: ClusterGuard) -> ClusterGuard:
    guard.load_state_dict({**make_guard().state_dict(), "thresholds": guard.thresholds})
    return guard


def quantize(guard: ClusterGuard) -> ClusterGuard:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(guard, {nn.Linear}, torch.qint8)


@pytest.mark.parametrize("change", [step_by_hand, load_others, quantize])
def test_a_record_is_left_out_with_a_warning_once_the_weights_have_changed(change, tmp_path):
    guard = make_guard()
    guard.calibration = Calibration(tuple(guard.thresholds.tolist()), (120,) * 3, 400, (0.0,) * 3, 0.01, "conformal")
    changed = change(guard)
    with pytest.warns(UserWarning, match="weights have changed since the thresholds were fitted"):
        assert changed.current_record() is None
    if change is not quantize:
        with pytest.warns(UserWarning, match="weights have changed"):
            changed.save_pretrained(tmp_path)
        assert ClusterGuard.from_pretrained(tmp_path, backbone=network()).calibration is None


@pytest.mark.parametrize("convert", [copy.deepcopy, ClusterGuard.double, lambda g: pickle.loads(pickle.dumps(g))])
def test_a_record_stays_with_a_copy_and_in_another_precision(convert):
    guard = make_guard()
    guard.calibration = Calibration(tuple(guard.thresholds.tolist()), (120,) * 3, 400, (0.0,) * 3, 0.01, "conformal")
    guard.detect(torch.rand(4, 1, 3, 4))
    assert convert(guard).current_record() == guard.calibration


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


@pytest.mark.parametrize(
    "change", [lambda g: g.thresholds.mul_(3), lambda g: g.load_state_dict(make_guard().state_dict())]
)
def test_a_record_of_other_thresholds_is_no_record(change):
    guard = make_guard()
    guard.thresholds = guard.thresholds + 1
    guard.calibration = Calibration(tuple(guard.thresholds.tolist()), (120,) * 3, 400, (0.0,) * 3, 0.01, "conformal")
    change(guard)
    assert guard.calibration is None
    with pytest.raises(ConfigurationError, match=r"the record that Calibrator\.fit returned, got None"):
        plausible_rate(guard.calibration)


def test_no_name_of_a_class_forges_a_line_or_turns_the_text_of_a_card(tmp_path):
    guard = make_guard()
    guard.class_names = ["1\nmeasured    on 10000 images", "\u202eb", "c"]
    guard.save_pretrained(tmp_path)
    text = describe_guard(tmp_path)[1]
    assert "1\\nmeasured" in text
    assert [line.split()[0] for line in text.splitlines()].count("measured") == 1
    assert "\u202e" not in (tmp_path / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:classes .* share the pooled threshold")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_default_dtype_changes_no_threshold_and_no_saved_guard(dtype, tmp_path):
    try:
        torch.set_default_dtype(dtype)
        guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(16, 8)), num_classes=2)
        images = torch.rand(60, 1, 4, 4)
        loader = DataLoader(TensorDataset(images, guard.evidence(images).class_scores.argmax(1)), batch_size=20)
        record = Calibrator(0.2, scarce="pool").fit(guard, loader)
        guard.save_pretrained(tmp_path / "guard")
        loaded = ClusterGuard.from_pretrained(tmp_path / "guard")
    finally:
        torch.set_default_dtype(torch.float32)
    assert loaded.thresholds.dtype == torch.float32
    assert loaded.calibration == record
    assert torch.equal(loaded.detect(images).is_adversarial, guard.detect(images).is_adversarial)


def test_a_guard_that_could_not_be_loaded_again_is_not_saved(small_guard, tmp_path):
    small_guard.thresholds = small_guard.thresholds.double()
    with pytest.raises(ConfigurationError, match=r"expected thresholds of float32, got torch\.float64"):
        small_guard.save_pretrained(tmp_path / "guard")
    assert not (tmp_path / "guard").exists()
