"""The guards that ship with the benchmarks' results, and how they come to be."""

import json
import re
from dataclasses import replace

import pytest
import torch
from clusterguard import PGD, ClusterGuard, certified_success_rate, certify
from clusterguard.attacks import SparseRS
from clusterguard.detection import Verdicts, accuracy, false_positive_rate, is_broken
from clusterguard.errors import ConfigurationError
from clusterguard.samples import load_digits

from benchmarks.experiments import load_experiment
from benchmarks.running import RESULTS, Store, Trainings, measure_again, publish_guard

FOLDERS = sorted((RESULTS.parents[1] / "guards").glob("*/"))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def shipped_folder(request):
    return request.param


@pytest.fixture
def shipped(shipped_folder):
    training = json.loads((shipped_folder / "config.json").read_text())["training"]
    return ClusterGuard.from_pretrained(shipped_folder), training


def test_a_guard_that_ships_does_what_its_card_says(shipped):
    guard, training = shipped
    images, labels = load_digits("test").tensors  # of MNIST's test set, which its training never saw
    verdict = guard.detect(images)
    assert accuracy(Verdicts(verdict, labels)).value > 0.92
    assert false_positive_rate(Verdicts(verdict, labels)).value < 2 * guard.calibration.false_positive_rate + 0.01
    said = {name: float(rate.split()[0]) for name, rate in training.get("on the test set", {}).items()}
    for name, rate in said.items():
        if match := re.fullmatch("any attack of linf (.*) breaks at most", name):
            bound = certified_success_rate(guard, [(images[:300], labels[:300])], eps=float(match[1]))
            assert bound.interval[0] <= rate <= bound.interval[1]


def test_the_guard_against_changed_pixels_proves_what_its_card_says():
    folder = RESULTS.parents[1] / "guards" / "mnist-pixels"
    guard, config = ClusterGuard.from_pretrained(folder), json.loads((folder / "config.json").read_text())
    proved = config["evaluation"]["certified"]
    images, labels = (part[:60] for part in load_digits("test").tensors)
    bound = certified_success_rate(guard, [(images, labels)], eps=proved["eps"], norm=proved["norm"])
    low, high = bound.interval
    assert low <= proved["success"]["value"] <= high
    row = f"proved upper bound, l0 {proved['eps']:g} | {proved['success']['value']:.3f}"
    assert row in (folder / "README.md").read_text()
    search = SparseRS(eps=proved["eps"], queries=200)
    attacked = search(guard, images, labels, generator=torch.Generator().manual_seed(0))
    found = is_broken(Verdicts(guard.detect(attacked), labels))
    secure = certify(guard, images, labels, eps=proved["eps"], norm="l0").is_secure
    assert not (found & secure).any()


@pytest.mark.parametrize("eps", [0.3, 0.45])
def test_in_bfloat16_an_attack_finds_about_as_much(shipped, eps):
    guard, _ = shipped
    images, labels = (part[:100] for part in load_digits("test").tensors)
    attack = PGD(norm="linf", eps=eps, step_size=eps / 10)
    attacked = attack(guard, images, labels)
    with torch.autocast("cpu", torch.bfloat16):
        halved = attack(guard, images, labels)
    broken, also = (int(is_broken(Verdicts(guard.detect(x), labels)).sum()) for x in (attacked, halved))
    assert broken > 0
    assert also >= 0.8 * broken
    assert ((halved - images).abs() <= eps + 1e-6).all()


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    return Trainings(Store(tmp_path_factory.mktemp("results")), device=torch.device("cpu"))


def test_publishing_saves_a_calibrated_guard_with_its_figures(trainings, tmp_path):
    cell = load_experiment("certified-mnist", "quick").cells[0]
    cell = replace(cell, training=replace(cell.training, epochs=3, warmup_epochs=3))
    publish_guard(cell, trainings, tmp_path / "guard", images=50, attacked=5)
    guard = ClusterGuard.from_pretrained(tmp_path / "guard")
    assert guard.is_calibrated
    images, labels = (part[:5] for part in load_digits("test").tensors)
    assert certify(guard, images, labels, eps=0.0).is_secure.any()
    card = (tmp_path / "guard" / "README.md").read_text()
    bound = certified_success_rate(guard, [(images, labels)], eps=0.3)
    assert ("any attack of linf 0.4 breaks at most" in card) == (bound.value < 1)
    assert "suite linf 0.4" in card
    assert "\nlicense: mit\n" in card


def test_measuring_again_changes_figures_only(trainings, tmp_path):
    cell = load_experiment("certified-mnist", "quick").cells[0]
    cell = replace(cell, training=replace(cell.training, epochs=3, warmup_epochs=3))
    publish_guard(cell, trainings, tmp_path / "guard", images=50, attacked=5)
    first = json.loads((tmp_path / "guard" / "config.json").read_text())
    measure_again(tmp_path / "guard", images=40, attacked=4, device=torch.device("cpu"))
    second = json.loads((tmp_path / "guard" / "config.json").read_text())
    for key in ("backbone", "guard", "calibration", "weights_sha256"):
        assert first[key] == second[key]
    assert first["training"]["definition"] == second["training"]["definition"]
    assert (first["evaluation"]["images"], second["evaluation"]["images"]) == (5, 4)
    ClusterGuard.from_pretrained(tmp_path / "guard").save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigurationError, match="publish"):
        measure_again(tmp_path / "other", device=torch.device("cpu"))


def test_cards_that_ship_say_how_to_load_their_guards(shipped_folder):
    card = (shipped_folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names = {"images": torch.rand(2, 1, 28, 28)}
    exec(code.replace("this folder or id", str(shipped_folder)), names)
    assert names["guard"].is_calibrated
    assert names["labels"].shape == (2,)


def test_only_guards_can_be_published(trainings, tmp_path, monkeypatch):
    monkeypatch.setattr(trainings, "detector", lambda cell: (torch.nn.Identity(), {}))
    with pytest.raises(ConfigurationError, match="guard"):
        publish_guard(load_experiment("certified-mnist", "quick").cells[0], trainings, tmp_path)
    assert not list(tmp_path.iterdir())
