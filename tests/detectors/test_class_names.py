"""Names of classes go where a guard goes."""

import json

import pytest
import torch
from clusterguard import ClusterGuard, export_onnx, load_onnx
from clusterguard.errors import ConfigurationError, PersistenceError
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from saving import make_guard, network, read_config

NAMES = ("cat", "Hund | *", "```\n<b>猫</b>")
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(str.strip)


def named_guard(names=NAMES):
    guard = ClusterGuard(network(), len(names), class_names=names)
    guard.thresholds = torch.full((len(names),), 9.0)
    return guard.eval()


@pytest.mark.parametrize(
    "names",
    [
        ("a", "b"),
        ("a", "b", "b"),
        ("a", "b", ""),
        ("a", "b", " "),
        ("a", "b", 3),
        "abc",
        3,
        ("a", "b", "\ud800"),
        {"a"},
    ],
)
def test_names_are_k_different_strings(names):
    guard = named_guard()
    with pytest.raises(ConfigurationError, match="expected 3 class names"):
        guard.class_names = names
    assert guard.class_names == NAMES
    guard.class_names = ["x", "y", "z"]
    assert guard.class_names == ("x", "y", "z")
    guard.class_names = None
    assert guard.class_names is None


@settings(max_examples=examples(100))
@given(names=st.lists(texts, min_size=2, max_size=4, unique=True))
def test_names_come_back_from_a_folder(names, tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    named_guard(names).save_pretrained(folder)
    assert ClusterGuard.from_pretrained(folder, backbone=network()).class_names == tuple(names)


def test_a_folder_of_an_older_version_has_none_and_an_edited_one_is_refused(tmp_path):
    named_guard().save_pretrained(tmp_path)
    config = read_config(tmp_path)
    del config["guard"]["class_names"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ClusterGuard.from_pretrained(tmp_path, backbone=network()).class_names is None
    config["guard"]["class_names"] = ["cat"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PersistenceError, match="expected 3 class names"):
        ClusterGuard.from_pretrained(tmp_path, backbone=network())


def test_the_card_lists_names_that_cannot_leave_their_block(tmp_path):
    named_guard().save_pretrained(tmp_path)
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert json.dumps(NAMES, ensure_ascii=False) in lines
    assert not any(line.startswith("<b>") for line in lines)
    make_guard().save_pretrained(tmp_path)
    assert "## Classes" not in (tmp_path / "README.md").read_text()


def test_names_and_card_go_with_a_graph_and_the_card_leaves_with_its_thresholds(tmp_path):
    path = export_onnx(named_guard(), tmp_path / "guard.onnx", torch.rand(1, 3, 2, 2), card="# 猫")
    detector = load_onnx(path)
    assert (detector.class_names, detector.card) == (NAMES, "# 猫")
    again = load_onnx(detector.save(tmp_path / "again.onnx"))
    assert (again.class_names, again.card) == (NAMES, "# 猫")
    again.thresholds = torch.full((3,), 8.0)
    other = load_onnx(again.save(tmp_path / "other.onnx"))
    assert (other.class_names, other.card) == (NAMES, None)
    for card in (3, "\ud800"):
        with pytest.raises(ConfigurationError, match="expected a card"):
            export_onnx(named_guard(), tmp_path / "no.onnx", torch.rand(1, 3, 2, 2), card=card)
    assert not (tmp_path / "no.onnx").exists()
