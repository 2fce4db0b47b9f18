"""The precision of an evaluation: one for all attacks, told in every report."""

import json

import pytest
import torch
from clusterguard import FGSM, PGD, WorstCaseSuite, evaluate
from clusterguard.attacks import MixedAttack, MultiTarget, in_precision
from clusterguard.errors import ConfigurationError
from clusterguard.evaluation import _evaluate, to_html
from torch.utils.data import DataLoader, TensorDataset

STEPS = {"eps": 0.2, "step_size": 0.05, "steps": 5}
NOTE = "Attacks searched in bfloat16; every verdict is in the detector's own precision."


@pytest.fixture
def loader(small_guard):
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images, small_guard(images).argmax(1)), batch_size=20)


@pytest.fixture
def attacks():
    return {
        "pgd": PGD(**STEPS),
        "all targets": MultiTarget(attack=PGD(**STEPS, precision="bf16")),
        "fgsm": FGSM(eps=0.2),
    }


def precisions(evaluation):
    return [result.precision for result in evaluation.results]


def test_attacks_keep_their_precision_unless_one_is_asked_for(small_guard, loader, attacks):
    def run(**options):
        return precisions(evaluate(small_guard, attacks, loader, sanity_images=0, **options))

    assert run() == ["float32", "bf16", None]
    assert run(precision="float32") == ["float32", "float32", None]
    assert run(precision="bf16") == ["bf16", "bf16", None]


def test_auto_decides_once_for_all_batches_and_attacks(small_guard, loader, attacks, monkeypatch):
    asked = []
    monkeypatch.setattr(_evaluate, "choose_precision", lambda *arguments: asked.append(arguments) or "bf16")
    assert precisions(evaluate(small_guard, attacks, loader, sanity_images=0, precision="auto")) == ["bf16"] * 2 + [
        None
    ]
    assert len(asked) == 1
    suite = WorstCaseSuite("linf", eps=0.05, budget="quick", precision="auto")
    (result,) = evaluate(small_guard, suite, loader, sanity_images=0).results
    assert (result.precision, len(asked)) == ("bf16", 2)
    assert "precision='bf16'" in result.attack


class Coarse(torch.nn.Module):
    """A guard whose evidence is lost in bfloat16."""

    def __init__(self, guard):
        super().__init__()
        self.guard, self.thresholds = guard, guard.thresholds

    def evidence(self, images):
        if torch.is_autocast_enabled("cpu"):
            raise NotImplementedError("no kernel for bfloat16")
        return self.guard.evidence(images)


def test_a_search_that_bfloat16_cannot_do_is_recorded_as_what_it_was(small_guard, loader, attacks):
    with pytest.warns(UserWarning, match="of no use in bfloat16, so all attacks search in float32"):
        evaluation = evaluate(Coarse(small_guard), attacks, loader, sanity_images=0, precision="bf16")
    assert precisions(evaluation) == ["float32", "float32", None]
    assert NOTE not in evaluation.to_markdown()
    plain = evaluate(Coarse(small_guard), attacks, loader, sanity_images=0, precision="float32")
    assert evaluation.asr == plain.asr


def test_a_resumed_evaluation_keeps_the_precision_that_auto_took(
    small_guard, loader, tmp_path, monkeypatch, light_suites
):
    """Timings differ from run to run, and a suite refuses a checkpoint of another precision."""
    suite = WorstCaseSuite("linf", eps=0.05, budget="quick")
    reports = []
    for choice in ("bf16", "float32"):
        monkeypatch.setattr(_evaluate, "choose_precision", lambda *arguments, choice=choice: choice)
        options = {"checkpoint": tmp_path, "precision": "auto", "sanity_images": 0}
        reports.append(evaluate(small_guard, suite, loader, generator=torch.Generator().manual_seed(0), **options))
    assert precisions(reports[1]) == ["bf16"]
    assert reports[1].results[0].runs == 2
    assert torch.equal(reports[0].results[0].verdict.distances, reports[1].results[0].verdict.distances)


def test_attacks_inside_others_are_decided_and_told_too(small_guard, loader, monkeypatch):
    monkeypatch.setattr(_evaluate, "choose_precision", lambda *arguments: "float32")
    mixed = MixedAttack(attacks=[PGD(**STEPS, precision="auto"), PGD(**STEPS, precision="bf16"), FGSM(eps=0.2)])
    report = evaluate(small_guard, {"mixed": mixed, "nested": MultiTarget(attack=mixed)}, loader, sanity_images=0)
    assert precisions(report) == ["bf16 and float32"] * 2
    assert "auto" not in report.results[1].attack
    assert NOTE in report.to_markdown()


def test_successes_in_bfloat16_are_judged_like_all_others(small_guard, loader):
    exact, rough = (
        evaluate(small_guard, PGD(**STEPS), loader, sanity_images=0, precision=name) for name in ("float32", "bf16")
    )
    assert abs(exact.worst_case.count - rough.worst_case.count) <= 1
    assert rough.results[0].invalid == 0


def test_reports_say_it(small_guard, loader, tmp_path):
    rough = evaluate(small_guard, PGD(**STEPS), loader, sanity_images=0, precision="bf16")
    assert NOTE in rough.to_markdown()
    assert json.loads(rough.to_json(tmp_path / "report.json").read_text())["results"][0]["precision"] == "bf16"
    to_html(rough, tmp_path / "report.html")
    assert "Attacks searched in bfloat16" in (tmp_path / "report.html").read_text()
    assert NOTE not in evaluate(small_guard, PGD(**STEPS), loader, sanity_images=0).to_markdown()


def test_an_unknown_precision_is_refused(small_guard, loader, attacks):
    with pytest.raises(ConfigurationError, match="'float32', 'bf16' or 'auto', got 'fp8'"):
        evaluate(small_guard, attacks, loader, precision="fp8")


def test_attacks_inside_others_get_it_and_functions_stay_as_they_are():
    mixed = in_precision(MixedAttack(attacks=[PGD(**STEPS), FGSM(eps=0.1)]), "bf16")
    assert mixed.attacks[0].precision == "bf16"

    def attack(detector, images, labels, *, targets=None, generator=None):
        return images

    assert in_precision(attack, "bf16") is attack


def test_autocast_around_an_evaluation_changes_no_verdict_and_no_stage(small_guard, loader):
    attacked = []

    def note(detector, images, labels, **options):
        attacked.append(PGD(**STEPS)(detector, images, labels, **options))
        return attacked[-1]

    suite = WorstCaseSuite("linf", eps=0.05, budget="quick")
    with torch.autocast("cpu", torch.bfloat16):
        report = evaluate(small_guard, {"noted": note, "suite": suite}, loader, sanity_images=0)
    expected = small_guard.detect(torch.cat(attacked))
    assert torch.equal(report.results[0].verdict.distances, expected.distances)
    assert sum(stage.broken for stage in report.results[1].stages) == report.results[1].success.count
