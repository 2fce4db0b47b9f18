from pathlib import Path

import pytest
import torch
from clusterguard import Detection
from clusterguard.assurance import check_failing_closed
from clusterguard.errors import InputError

ROOT = Path(__file__).parents[2]
IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_guard_of_ours_fails_closed_and_stays_as_it_is(small_guard, tmp_path):
    small_guard.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    weights = {name: value.clone() for name, value in small_guard.state_dict().items()}
    checks = check_failing_closed(small_guard, IMAGES, tmp_path)
    assert [check.given for check in checks if not check.holds] == []
    assert len(checks) == 9 + (small_guard.image_shape is not None)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert all(torch.equal(value, small_guard.state_dict()[name]) for name, value in weights.items())


def test_the_tests_that_are_named_are_there(small_guard, tmp_path):
    small_guard.save_pretrained(tmp_path)
    assert all((ROOT / check.tests).is_file() for check in check_failing_closed(small_guard, IMAGES, tmp_path))


def test_a_guard_that_accepts_everything_does_not(small_guard, tmp_path, monkeypatch):
    def accept(images, check=True):
        return Detection(torch.zeros(len(images)).long(), torch.zeros(len(images)), torch.zeros(len(images)).bool())

    small_guard.save_pretrained(tmp_path)
    monkeypatch.setattr(type(small_guard), "detect", lambda _, images, check=True: accept(images))
    checks = check_failing_closed(small_guard, IMAGES, tmp_path)
    held = [check.given for check in checks if check.holds]
    assert held == ["a file of weights with one bit flipped", "a configuration with another number of classes"]


def test_one_image_has_no_neighbour(small_guard, tmp_path):
    with pytest.raises(InputError, match="at least two images, got 1"):
        check_failing_closed(small_guard, IMAGES[:1], tmp_path)
