"""Damaged, foreign and missing files: one line that names the file and says what to do, and no other error."""

import hashlib
import json
import random

import pytest
import torch
from clusterguard import (
    FGSM,
    AdversarialClusterTrainer,
    Calibration,
    Calibrator,
    ClusterGuard,
    WorstCaseSuite,
    export_onnx,
    load_onnx,
)
from clusterguard._support import save_progress
from clusterguard.attacks import StageRecord
from clusterguard.attacks._suite import SuiteState
from clusterguard.cli._runs import begin_run
from clusterguard.errors import ClusterGuardError, ConfigurationError, InputError, PersistenceError, in_one_line
from clusterguard.training._checkpoints import read_checkpoint, save_checkpoint
from damaging import assert_refused_or_read
from exporting import flat_guard
from hypothesis import given
from hypothesis import strategies as st
from saving import edit_config, make_guard, network, read_config
from torch import nn


def test_a_checkpoint(tmp_path):
    file = tmp_path / "run.pt"
    save_checkpoint(file, parts={"guard": nn.Linear(4, 3)}, values={"step": 1})
    assert_refused_or_read(file, lambda: read_checkpoint(file).values["step"])


def suite_state():
    torch.manual_seed(0)
    clean = torch.tensor([0.1, 0.2])
    records = [StageRecord("first", 2, 0, 10, 10)]
    return SuiteState("a suite", clean, torch.rand(2, 1, 4, 4), clean.clone(), records, torch.ones(2, dtype=torch.bool))


def test_a_suite_state(tmp_path):
    file, generator = tmp_path / "suite.pt", torch.Generator()
    suite_state().save(file, generator)
    assert_refused_or_read(file, lambda: suite_state().load(file, generator))


GOOD = {
    "suite": "a suite",
    "clean_margins": torch.tensor([0.1, 0.2]),
    "best": torch.rand(2, 1, 4, 4),
    "margins": torch.tensor([0.1, 0.2]),
    "records": [{"name": "first", "attacked": 2, "broken": 0, "forward": 1, "backward": 1}],
    "generator": None,
    "runs": 1,
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"suite": 3},
        {"suite": "another"},
        {"clean_margins": torch.tensor([0.1])},
        {"clean_margins": torch.tensor([0.1, torch.nan])},
        {"clean_margins": "none"},
        {"margins": torch.tensor([0.1, torch.nan])},  # would count as broken by nothing
        {"margins": torch.tensor([1, 2])},
        {"margins": torch.zeros(3)},
        {"best": torch.full((2, 1, 5, 5), 0.5)},
        {"best": torch.full((3, 1, 4, 4), 0.5)},
        {"best": torch.full((2, 1, 4, 4), torch.inf)},
        {"best": [1, 2]},
        {"records": {"name": "first"}},
        {"records": [{"name": "first"}]},
        {"records": [GOOD["records"][0] | {"broken": "many"}]},
        {"records": [3]},
        {"generator": "state"},
        {"generator": torch.zeros(3, dtype=torch.uint8)},
        {"generator": torch.zeros(5056)},
        {"records": [GOOD["records"][0] | {"forward": 1.5}]},
        {"more": 1},
        {"runs": "one"},
    ],
    ids=str,
)
def test_a_suite_state_of_wrong_kinds_changes_nothing(tmp_path, wrong):
    file, state, generator = tmp_path / "suite.pt", suite_state(), torch.Generator().manual_seed(3)
    save_progress(file, "suite", GOOD | wrong)
    before, best, drawn = generator.get_state(), state.best.clone(), list(state.records)
    with pytest.raises((PersistenceError, ConfigurationError), match=r"suite\.pt .*checkpoint") as caught:
        state.load(file, generator)
    assert "\n" not in str(caught.value)
    assert torch.equal(state.best, best)
    assert state.records == drawn
    assert torch.equal(generator.get_state(), before)


def test_a_suite_says_what_to_do_with_a_damaged_state(small_guard, tmp_path):
    images = torch.rand(4, 1, 8, 8)
    (tmp_path / "suite.pt").write_bytes(b"damaged")
    suite = WorstCaseSuite("linf", eps=0.05, budget="quick")
    with pytest.raises(PersistenceError, match=r"suite\.pt is damaged.*; delete .* to begin the suite anew"):
        suite.run(small_guard, images, small_guard(images).argmax(1), checkpoint=tmp_path / "suite.pt")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"processes": [], "steps": 1, "thresholds": torch.zeros(3), "history": []},
        {"processes": [3], "steps": 1, "thresholds": torch.zeros(3), "history": []},
        {"processes": [{"totals": {}}], "steps": "x", "thresholds": torch.zeros(3), "history": []},
        {"processes": [{"totals": {}}], "steps": 1, "thresholds": torch.zeros(7), "history": []},
        {"processes": [{"totals": {}}], "steps": 1, "thresholds": None, "history": []},
        {"processes": [{"totals": {}}], "steps": 1, "thresholds": torch.zeros(3), "history": [{"epoch": 1}]},
        {"processes": [{"totals": {"other": 1}}], "steps": 1, "thresholds": torch.zeros(3), "history": []},
    ],
    ids=lambda values: str(list(values.items())[:4])[:60],
)
def test_a_whole_checkpoint_of_something_else(blobs, tmp_path, values):
    guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU()), num_classes=3)
    trainer = AdversarialClusterTrainer(guard, FGSM(eps=0.1), calibrator=Calibrator(0.2))
    save_checkpoint(tmp_path / "run.pt", parts=trainer.engine.parts, values=values)
    with pytest.raises(PersistenceError, match=r"run\.pt .*; choose another file, or delete it"):
        trainer.fit(list(blobs), list(blobs), epochs=1, checkpoint=tmp_path / "run.pt", progress=False)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_guards_folder(saved, name):
    assert_refused_or_read(saved / name, lambda: ClusterGuard.from_pretrained(saved, backbone=network()))


def test_any_flipped_bit_of_a_config_is_harmless_or_refused(saved):
    file, guard = saved / "config.json", make_guard()
    guard.calibration = Calibration((9.0, 10.0, 11.0), (120, 130, 140), 400, (0.01, 0.02, 0.03), 0.01, "conformal")
    guard.save_pretrained(saved)
    content, refused = file.read_bytes(), 0
    for place in range(0, len(content), 3):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        try:
            read = ClusterGuard.from_pretrained(saved, backbone=network())
        except PersistenceError:
            refused += 1
        else:
            assert (read.calibration, read.class_names) == (guard.calibration, guard.class_names), place
    assert refused > len(content) / 4


def test_weights_that_the_config_vouches_for(saved):
    file = saved / "model.safetensors"

    def read():
        edit_config(saved, weights_sha256=hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "")
        return ClusterGuard.from_pretrained(saved, backbone=network())

    assert_refused_or_read(file, read)


NONSENSE = [None, True, -1, 10**30, 1e308, "text", [], {}, [[]], {"a": {"b": []}}, ["x"] * 3, [float("inf")]]


def entries(config, path=()):
    for key, value in config.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from entries(value, (*path, key))


def test_a_config_with_values_of_any_kind(tmp_path):
    """Each entry in turn is replaced by each kind of value, or left out."""
    guard = make_guard()
    guard.calibration = Calibration(
        tuple(guard.thresholds.tolist()), (9, 9, 9), 30, (0.0, 0.1, 0.0), 0.1, "conformal", (1,)
    )
    guard.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    content, refused = json.dumps(read_config(tmp_path)), []
    chosen = random.Random(0)
    for path in entries(json.loads(content)):
        for value in ["left out", *chosen.sample(NONSENSE, 3)]:
            config = json.loads(content)
            holder = config
            for key in path[:-1]:
                holder = holder[key]
            if value == "left out":
                del holder[path[-1]]
            else:
                holder[path[-1]] = value
            file.write_text(json.dumps(config))
            try:
                read = ClusterGuard.from_pretrained(tmp_path, backbone=network())
            except ClusterGuardError as error:
                refused.append(str(error))
            else:
                assert torch.equal(read.thresholds, guard.thresholds), (path, value)
                assert path[0] not in ("format", "format_version", "weights_sha256"), (path, value)
                if read.calibration is not None:
                    read.save_pretrained(tmp_path / "again")  # what was read can be used
    assert len(refused) > 30
    assert not [message for message in refused if "\n" in message or "config.json" not in message]


def test_a_folder_is_not_a_file(saved):
    with pytest.raises(PersistenceError, match=r"got the file .*config\.json"):
        ClusterGuard.from_pretrained(saved / "config.json", backbone=network())
    (saved / "README.md").unlink()
    (saved / "README.md").mkdir()
    with pytest.raises(PersistenceError, match=r"README\.md is not clusterguard's"):
        make_guard().save_pretrained(saved)


def test_an_exported_graph(tmp_path):
    guard = flat_guard()
    file = export_onnx(guard, tmp_path / "guard.onnx", torch.rand(1, 1, 4, 4))
    images = torch.rand(5, 1, 4, 4)
    assert_refused_or_read(file, lambda: load_onnx(file))
    with pytest.raises(PersistenceError, match=r"no file .*nothing\.onnx"):
        load_onnx(tmp_path / "nothing.onnx")
    assert torch.equal(load_onnx(file).train().detect(images).labels, guard.detect(images).labels)


def test_a_record_of_a_training(tmp_path):
    file = tmp_path / "training.json"
    (tmp_path / "checkpoint.pt").touch()
    options = {"eps": 0.1, "seed": 0}
    file.write_text(json.dumps(options))

    def read():
        begin_run(tmp_path, options, resume=True)
        file.write_text(json.dumps(options))

    assert_refused_or_read(file, read)


RECORD = Calibration((1.0, 2.0), (9, 9), 20, (0.0, 0.1), 0.1, "conformal", pooled=(1,)).to_dict()


def test_the_record_of_a_calibration_comes_back():
    again = Calibration.from_dict(json.loads(json.dumps(RECORD)), torch.tensor([1.0, 2.0]))
    assert again == Calibration((1.0, 2.0), (9, 9), 20, (0.0, 0.1), 0.1, "conformal", pooled=(1,))


@given(st.sampled_from(sorted(RECORD)), st.sampled_from([*NONSENSE, [1, 2, 3], [-1, 5], [0.5, 2.0], "conformal", 0.5]))
def test_a_record_of_wrong_kinds_is_refused_or_can_be_used(key, value):
    try:
        record = Calibration.from_dict(RECORD | {key: value}, torch.tensor([1.0, 2.0]))
    except (InputError, ConfigurationError):
        return
    assert 0 <= record.realised_rate <= 1
    assert record.to_dict().keys() == RECORD.keys()


@given(st.text())
def test_what_others_say_fits_on_one_line(text):
    line = in_one_line(ValueError(text))
    assert line.startswith("ValueError")
    assert line.isprintable()
    assert len(line) < 450
