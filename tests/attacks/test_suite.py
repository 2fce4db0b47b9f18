import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clusterguard import PGD, ClusterGuard, Evidence, WorstCaseSuite, decide, evaluate
from clusterguard._support import read_progress, save_progress
from clusterguard.attacks import EFFORTS, NORMS, Cost, Metered, SparseRS, Towards, _suite, get_norm
from clusterguard.detection import Verdicts, is_broken, is_eligible
from clusterguard.detectors import WithThresholds
from clusterguard.errors import ConfigurationError, InputError, NotCalibratedError, PersistenceError
from clusterguard.samples import load_digits
from torch import nn

GUARDS = Path(__file__).parents[2] / "guards"
EPS = {"linf": 0.05, "l2": 0.25, "l1": 1.2, "l0": 3}


@pytest.fixture
def cases(small_guard):
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return images, small_guard(images).argmax(1)


def broken(guard, attacked, labels):
    return is_broken(Verdicts(decide(guard.evidence(attacked), guard.thresholds), labels))


def cost_of(stages):
    return sum((Cost(stage.forward, stage.backward) for stage in stages), Cost())


@pytest.mark.parametrize("norm", EPS)
def test_no_single_attack_beats_the_suite(small_guard, cases, norm):
    images, labels = cases
    suite = WorstCaseSuite(norm, eps=EPS[norm], budget="quick")
    result = suite.run(small_guard, images, labels, generator=torch.Generator().manual_seed(0))
    hit = broken(small_guard, result.images, labels)
    assert 0 < hit.sum() < len(labels)
    assert (get_norm(norm).size(result.images - images) <= EPS[norm] * (1 + 1e-5) + 1e-6).all()
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    references = Towards.accepted(small_guard, images, labels)
    for name, attack in suite.stages(small_guard, references).items():
        single = attack(small_guard, images, labels, generator=torch.Generator().manual_seed(0))
        assert not (broken(small_guard, single, labels) & ~hit).any(), name


class OnePixel(nn.Module):
    """Accepts a wrong label if the first pixel is white. Gradients are 0 everywhere."""

    thresholds = torch.tensor([1.0, 1.0])

    def evidence(self, images):
        away = 2.0 * (images[:, 0, 0, 0] < 0.99).float() + 0 * images.sum(dim=(1, 2, 3))
        return Evidence(torch.stack([away - 1, torch.zeros_like(away)], dim=1), torch.stack([away, away], dim=1))


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_pixels_that_a_ball_contains_are_searched(norm):
    images, labels = torch.zeros(3, 1, 4, 4), torch.zeros(3, dtype=torch.int64)
    detector = OnePixel()
    result = WorstCaseSuite(norm, eps=1.0, budget="quick").run(detector, images, labels)
    assert broken(detector, result.images, labels).all()
    assert result.stages[-1].name == "Sparse-RS, few pixels"


@pytest.mark.parametrize("name", ["mnist-certified", "mnist-certified-accurate"])
def test_the_quick_suite_breaks_as_much_as_a_search_over_the_pixels_that_its_ball_contains(name):
    guard = ClusterGuard.from_pretrained(GUARDS / name)
    images, labels = (part[:25] for part in load_digits("test").tensors)

    def count_broken(attack):
        attacked = attack(guard, images, labels, generator=torch.Generator().manual_seed(0))
        return int(is_broken(Verdicts(guard.detect(attacked), labels)).sum())

    suite = WorstCaseSuite("l2", eps=2.0, budget="quick")
    assert count_broken(suite) >= count_broken(SparseRS(eps=4, queries=300)) > 15


def test_stages_work_on_survivors_and_count_what_they_broke_and_cost(small_guard, cases, light_suites):
    images, labels = cases
    records = []
    suite = WorstCaseSuite("linf", eps=0.05, budget="quick", batch_size=16)
    result = suite.run(small_guard, images, labels, on_stage=records.append)
    assert tuple(records) == result.stages
    eligible = is_eligible(Verdicts(decide(small_guard.evidence(images), small_guard.thresholds), labels))
    assert 0 < eligible.sum() < len(labels)  # what is refused when clean is attacked and not counted
    survivors = int(eligible.sum())
    for record in result.stages:
        assert record.attacked == survivors
        assert record.forward > 0
        survivors -= record.broken
    assert survivors == int((eligible & ~broken(small_guard, result.images, labels)).sum())
    assert next(record for record in result.stages if record.name == "Square").backward == 0


def test_an_interrupted_run_goes_on_where_it_was(small_guard, cases, tmp_path, light_suites):
    images, labels = cases
    suite = WorstCaseSuite("linf", eps=0.05, budget="quick")
    whole = suite.run(small_guard, images, labels, generator=torch.Generator().manual_seed(0))

    def interrupt(record):
        seen.append(record)
        if len(seen) == 3:
            raise KeyboardInterrupt

    seen = []
    file = tmp_path / "suite.pt"
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        suite.run(small_guard, images, labels, generator=generator, checkpoint=file, on_stage=interrupt)
    rest = []
    resumed = suite.run(small_guard, images, labels, generator=torch.Generator(), checkpoint=file, on_stage=rest.append)
    assert torch.equal(resumed.images, whole.images)
    assert resumed.stages == whole.stages
    assert tuple(seen + rest) == whole.stages
    assert (whole.runs, resumed.runs) == (1, 2)
    finished = suite.run(small_guard, images, labels, checkpoint=file)
    assert (finished.stages, finished.runs) == (whole.stages, 3)
    assert whole.cost == resumed.cost == finished.cost == cost_of(whole.stages) != Cost()


@pytest.mark.parametrize("norm", ["linf", "l0"])
def test_the_budget_that_converges_ends_when_two_rounds_break_nothing(small_guard, cases, norm, monkeypatch, tmp_path):
    monkeypatch.setitem(EFFORTS, "converge", EFFORTS["quick"]._replace(steps=3, restarts=1, targets=1, queries=10))
    images, labels = cases
    suite = WorstCaseSuite(norm, eps={"linf": 0.1, "l0": 3}[norm], budget="converge")
    broke = {"APGD random 1, round 3": 1, "polish, round 4": 2}  # whatever they really break
    run_stage = WorstCaseSuite._run_stage

    def pretend(suite, name, *given):
        record = run_stage(suite, name, *given)
        return replace(record, broken=broke.get(name, 0) if "round" in name else record.broken)

    monkeypatch.setattr(WorstCaseSuite, "_run_stage", pretend)
    whole, interrupted = (torch.Generator().manual_seed(0) for _ in range(2))
    result = suite.run(small_guard, images, labels, generator=whole)
    rounds = [int(record.name.rsplit(" ", 1)[1]) for record in result.stages if "round" in record.name]
    assert rounds == sorted(rounds)
    assert set(rounds) == {2, 3, 4, 5, 6}
    with pytest.raises(KeyboardInterrupt):
        suite.run(
            small_guard,
            images,
            labels,
            generator=interrupted,
            checkpoint=tmp_path / "suite.pt",
            on_stage=lambda record: stop_in_round_4(record.name),
        )
    again = suite.run(small_guard, images, labels, generator=interrupted, checkpoint=tmp_path / "suite.pt")
    assert torch.equal(again.images, result.images)
    assert [record.name for record in again.stages] == [record.name for record in result.stages]


def stop_in_round_4(name):
    if name.endswith("round 4"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("references", [False, True])
def test_a_report_tells_the_effort_of_all_runs(small_guard, cases, tmp_path, light_suites, references):
    suite = WorstCaseSuite("linf", eps=0.05, budget="quick", batch_size=7, references=cases if references else None)
    first, second = (
        evaluate(
            small_guard,
            {"suite": suite},
            [cases],
            sanity_images=0,
            checkpoint=tmp_path,
            generator=torch.Generator(),
        )
        for _ in range(2)
    )
    for report in (first, second):
        (result,) = report.results
        assert result.cost == cost_of(result.stages) != Cost()
    assert second.results[0].cost == first.results[0].cost
    assert "suite took 2 runs" in second.to_markdown()
    assert "runs" not in first.to_markdown()


def test_without_an_image_to_attack_nothing_is_spent(small_guard, cases, light_suites):
    images, labels = cases
    wrong = (labels + 1) % 3
    rows = broken(small_guard, images, wrong)
    assert rows.any()
    result = WorstCaseSuite("linf", eps=0.05, budget="quick").run(small_guard, images[rows], wrong[rows])
    assert (result.stages, result.cost) == ((), Cost())


def test_a_state_that_also_holds_its_cost_is_read(small_guard, cases, tmp_path, light_suites):
    suite, file = WorstCaseSuite("linf", eps=0.01, budget="quick"), tmp_path / "suite.pt"
    whole = suite.run(small_guard, *cases, checkpoint=file)
    state = read_progress(file, "suite", hint="").state
    save_progress(file, "suite", state | {"cost": [10**6, 10**6]})
    assert suite.run(small_guard, *cases, checkpoint=file).cost == whole.cost


def test_a_resumed_suite_keeps_the_precision_that_auto_took(small_guard, cases, tmp_path, light_suites, monkeypatch):
    suite = WorstCaseSuite("linf", eps=0.01, budget="quick", precision="auto")
    for choice in ("bf16", "float32"):
        monkeypatch.setattr(_suite, "choose_precision", lambda *arguments, choice=choice: choice)
        result = suite.run(small_guard, *cases, checkpoint=tmp_path / "suite.pt")
        assert result.precision == "bf16"
    assert result.runs == 2


def test_a_checkpoint_of_something_else_is_refused(small_guard, cases, tmp_path, light_suites):
    images, labels = cases
    file = tmp_path / "suite.pt"
    WorstCaseSuite("linf", eps=0.01, budget="quick").run(small_guard, images[:4], labels[:4], checkpoint=file)
    with pytest.raises(ConfigurationError, match="another checkpoint"):
        WorstCaseSuite("linf", eps=0.02, budget="quick").run(small_guard, images[:4], labels[:4], checkpoint=file)
    suite, moved = WorstCaseSuite("linf", eps=0.01, budget="quick"), images[:4].clone()
    moved[0, 0, 0, 0] = moved[0, 0, 0, 0].nextafter(torch.tensor(0.5))
    with pytest.raises(ConfigurationError, match="a run with other images; use the same"):
        suite.run(small_guard, moved, labels[:4], checkpoint=file)
    with torch.no_grad():
        next(small_guard.parameters()).flatten()[0] += 1e-6
    with pytest.raises(ConfigurationError, match="a run with other weights of the detector; use the same"):
        suite.run(small_guard, images[:4], labels[:4], checkpoint=file)


def test_a_checkpoint_of_other_surrogates_is_refused(small_guard, cases, tmp_path, light_suites):
    images, labels = (part[:4] for part in cases)
    file, surrogate = tmp_path / "suite.pt", deepcopy(small_guard)
    suite = WorstCaseSuite("linf", eps=0.01, budget="quick", surrogates=(surrogate,))
    suite.run(small_guard, images, labels, checkpoint=file)
    suite.run(small_guard, images, labels, checkpoint=file)
    with torch.no_grad():
        next(surrogate.parameters()).flatten()[0] += 1
    with pytest.raises(ConfigurationError, match="a run with other weights of surrogate 1; use the same"):
        suite.run(small_guard, images, labels, checkpoint=file)
    for others in ((), (small_guard, surrogate)):
        with pytest.raises(ConfigurationError, match="surrogate"):
            replace(suite, surrogates=others).run(small_guard, images, labels, checkpoint=file)


def test_a_state_without_digests_of_its_inputs_is_told_apart_by_margins(small_guard, cases, tmp_path, light_suites):
    (images, labels), file = cases, tmp_path / "suite.pt"
    suite = WorstCaseSuite("linf", eps=0.01, budget="quick")
    suite.run(small_guard, images[:4], labels[:4], checkpoint=file)
    state = read_progress(file, "suite", hint="").state
    state.pop("inputs")
    save_progress(file, "suite", state)
    with pytest.raises(ConfigurationError, match="other images"):
        suite.run(small_guard, images[4:8], labels[4:8], checkpoint=file)


def test_a_second_suite_on_the_same_checkpoint_is_told_so(small_guard, cases, tmp_path, light_suites):
    suite, file = WorstCaseSuite("linf", eps=0.01, budget="quick"), tmp_path / "new" / "suite.pt"

    def begin_another(_):
        with pytest.raises(PersistenceError, match=r"suite\.pt is being written by another run"):
            suite.run(small_guard, *cases, checkpoint=file)

    suite.run(small_guard, *cases, checkpoint=file, on_stage=begin_another)
    assert sorted(path.name for path in file.parent.iterdir()) == ["suite.pt", "suite.pt.previous"]


def test_the_whole_box_breaks_everything(small_guard, cases):
    images, labels = cases
    references = torch.rand(60, 1, 8, 8)
    suite = WorstCaseSuite("linf", eps=1.0, budget="quick", references=(references, small_guard(references).argmax(1)))
    assert broken(small_guard, suite(small_guard, images, labels), labels).all()


def test_targets_are_aimed_at(small_guard, cases):
    images, labels = cases
    targets = (labels + 1) % 3
    attacked = WorstCaseSuite("linf", eps=0.3, budget="quick")(small_guard, images, labels, targets=targets)
    detection = decide(small_guard.evidence(attacked), small_guard.thresholds)
    hit = is_broken(Verdicts(detection, labels))
    assert hit.sum() > 30
    assert torch.equal(detection.labels[hit], targets[hit])


def test_detectors_without_representations_get_orthogonal_attacks(linear_detector):
    references = Towards(torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))
    stages = WorstCaseSuite("linf", eps=0.1).stages(linear_detector, references)
    assert "orthogonal PGD" in stages
    assert "match representations" not in stages


@pytest.mark.parametrize("norm", NORMS)
def test_the_page_on_evaluation_names_every_stage(small_guard, linear_detector, norm):
    page = (GUARDS.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for detector, side in ((small_guard, 8), (linear_detector, 4)):
        references = Towards(torch.rand(2, 1, side, side), torch.tensor([0, 1]))
        suite = WorstCaseSuite(norm, eps=EPS.get(norm, 3), budget="thorough", surrogates=(detector,))
        for stage in suite.stages(detector, references):
            first = re.sub(r"[0-9.]+$", "1", stage)  # the page shows one of the numbers
            assert f"`{first}`" in page or f"`{first.removeprefix('multi-target ')}`" in page, stage


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("references", [0, 2])
def test_what_is_thorough_ends_with_decisions_alone_where_they_can_be_attacked(small_guard, norm, references):
    images, labels = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])
    towards = Towards(images[:references], labels[:references])
    thorough, standard = (
        WorstCaseSuite(norm, eps=EPS[norm], budget=budget).stages(small_guard, towards)
        for budget in ("thorough", "standard")
    )
    assert list(thorough)[: len(thorough) - (norm in ("linf", "l2"))][-1] == list(standard)[-1]
    assert ("boundary" in thorough, "boundary" in standard) == (norm in ("linf", "l2"), False)
    if "boundary" in thorough:
        attacked = replace(thorough["boundary"], queries=20)(small_guard, images, labels)
        assert (get_norm(norm).size(attacked - images) <= EPS[norm] * (1 + 1e-5)).all()


def test_wrapped_guards_keep_their_representations(small_guard):
    references = Towards(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
    wrapped = Metered(WithThresholds(small_guard, small_guard.thresholds))
    assert "match representations" in WorstCaseSuite("linf", eps=0.1).stages(wrapped, references)


def test_the_meter_counts_everything(small_guard):
    metered = Metered(small_guard)
    PGD(eps=0.1, step_size=0.1, steps=5)(metered, torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2]))
    assert metered.cost == (18, 15)


def test_bad_input_is_named_before_any_work(small_guard, cases):
    images, labels = cases
    suite = WorstCaseSuite("linf", eps=0.1)
    with pytest.raises(InputError, match="finite"):
        suite(small_guard, images * torch.nan, labels)
    small_guard.reset_calibration()
    with pytest.raises(NotCalibratedError):
        suite(small_guard, images, labels)


@pytest.mark.parametrize("options", [{"norm": "l3"}, {"eps": -1}, {"budget": "huge"}, {"batch_size": 0}])
def test_options_are_checked_at_once(options):
    with pytest.raises(ConfigurationError, match="expected"):
        WorstCaseSuite(**({"norm": "linf", "eps": 0.1} | options))
