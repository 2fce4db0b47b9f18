import json
import re

import pytest
import torch
from clusterguard import FGSM, PGD, WorstCaseSuite, evaluate
from clusterguard._support import _checks
from clusterguard.attacks import MultiTarget
from clusterguard.detection import Rate
from clusterguard.errors import ConfigurationError, InputError, NotCalibratedError
from torch.utils.data import DataLoader, Subset, TensorDataset


@pytest.fixture
def loader(small_guard):
    images = torch.rand(90, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = small_guard(images).argmax(1)
    labels[:5] = (labels[:5] + 1) % 3
    return DataLoader(TensorDataset(images, labels), batch_size=40)


def test_figures_are_counted_from_the_images(small_guard, loader):
    images, labels = loader.dataset.tensors
    attack = PGD(eps=0.3, step_size=0.1, steps=10)
    report = evaluate(small_guard, {"pgd": attack}, loader)
    clean = small_guard.detect(images)
    after = small_guard.detect(attack(small_guard, images, labels))
    eligible = (clean.labels == labels) & ~clean.is_adversarial
    broken = (after.labels != labels) & ~after.is_adversarial & eligible
    assert report.images == 90
    assert report.accuracy == Rate(85, 90)
    assert report.results[0].success == Rate(int(broken.sum()), int(eligible.sum()))
    assert sum(rate.total for rate in report.false_positives_by_class) == 85
    assert sum(rate.count for rate in report.false_positives_by_class) == report.false_positives.count


def test_each_image_is_checked_once(small_guard, loader, monkeypatch, light_suites):
    checked, in_range = [], _checks.in_range
    monkeypatch.setattr(_checks, "in_range", lambda images: (checked.append(len(images)), in_range(images))[1])
    pgd = PGD(eps=0.1, step_size=0.1, steps=1)
    suite = WorstCaseSuite("linf", eps=0.1, budget="quick")
    few = DataLoader(Subset(loader.dataset, range(5, 11)), batch_size=4)
    evaluate(small_guard, {"pgd": pgd, "aimed": MultiTarget(attack=pgd), "suite": suite}, few, sanity_images=3)
    assert checked == [4, 2]


def test_the_worst_case_counts_an_image_that_any_attack_breaks(small_guard, loader):
    attacks = {f"pgd {eps}": PGD(eps=eps, step_size=eps, steps=3) for eps in (0.05, 0.2)}
    report = evaluate(small_guard, attacks, loader)
    counts = [result.success.count for result in report.results]
    assert max(counts) <= report.worst_case.count <= sum(counts)
    assert report.asr == report.worst_case.value
    assert report.eroc == min(result.expected_roc_auc for result in report.results)


def test_images_outside_box_or_budget_do_not_count(small_guard, loader):
    strong = PGD(eps=1.0, step_size=0.2, steps=20, objective="margin")

    class Cheat:
        norm, eps = "linf", 0.01

        def __call__(self, *arguments, **options):
            return strong(*arguments, **options)

    def leave_the_box(detector, images, labels, **options):
        return strong(detector, images, labels) + 2

    report = evaluate(small_guard, {"honest": strong, "cheat": Cheat(), "outside": leave_the_box}, loader)
    assert report.results[0].success.count > 0
    assert report.results[0].invalid == 0
    assert report.results[1].success.count == report.results[2].success.count == 0
    assert report.results[1].invalid == report.results[2].invalid == 90


def test_an_attack_that_writes_into_its_images_cheats_nobody(small_guard, loader):
    images, labels = (part.clone() for part in loader.dataset.tensors)
    other = images[small_guard.detect(images).labels != labels][:1]

    def overwrite(detector, images, labels, *, targets=None, generator=None):
        labels.zero_()
        return images.copy_(other.expand_as(images))

    overwrite.norm, overwrite.eps = "linf", 0.01
    small = FGSM(eps=0.01)
    report = evaluate(small_guard, {"overwrite": overwrite, "small": small}, [(images, labels)], sanity_images=0)
    assert report.results[0].invalid > 0
    assert report.results[0].success.count == 0
    assert report.results[1].success == evaluate(small_guard, small, loader).results[0].success
    assert torch.equal(images, loader.dataset.tensors[0])
    assert torch.equal(labels, loader.dataset.tensors[1])


def test_a_function_is_reported_by_its_name(small_guard, loader):
    def brighter(detector, images, labels, *, targets=None, generator=None):
        return (images + 0.1).clamp(0, 1)

    assert [result.name for result in evaluate(small_guard, brighter, loader).results] == ["brighter"]


def test_stages_of_a_suite_and_its_success_count_the_same_images(small_guard, loader, light_suites):
    suite = WorstCaseSuite("linf", eps=0.1, budget="quick")
    report = evaluate(small_guard, suite, loader, sanity_images=0)
    (result,) = report.results
    assert result.success.total < 85  # some are refused or labelled wrongly when clean
    assert result.stages[0].attacked == result.success.total
    assert sum(stage.broken for stage in result.stages) == result.success.count
    first = result.stages[0]
    assert first.broken_per_thousand == 1000 * first.broken / (first.forward + first.backward)
    row = next(line for line in report.to_markdown().splitlines() if line.startswith(f"| {first.name} |"))
    assert row.endswith(f"| {first.broken_per_thousand:.3g} |")


def test_an_attack_of_another_signature_is_named_before_anything_runs(small_guard, loader):
    ran = []

    def first(detector, images, labels, **options):
        ran.append(images)
        return images

    with pytest.raises(ConfigurationError, match=r"expected attack second to take .*generator=None"):
        evaluate(small_guard, {"first": first, "second": lambda detector, images, labels: images}, loader)
    assert not ran


def test_success_is_monotone_in_eps_and_complete_for_the_whole_box(small_guard, loader):
    attacks = {
        str(eps): PGD(eps=eps, step_size=max(eps, 0.01) / 5, steps=30, objective="margin")
        for eps in (0.0, 0.1, 0.3, 1.0)
    }
    counts = [result.success.count for result in evaluate(small_guard, attacks, loader).results]
    assert counts[0] == 0
    assert counts == sorted(counts)


def test_a_plain_function_and_a_single_attack_will_do(small_guard, loader):
    report = evaluate(small_guard, lambda detector, images, labels, **_: images, loader)
    assert report.results[0].success.count == 0
    assert evaluate(small_guard, FGSM(eps=0.1), loader).results[0].name == "FGSM"


def test_the_report_is_plain_json_and_markdown(small_guard, loader, tmp_path):
    report = evaluate(small_guard, {"none": FGSM(eps=0.0)}, loader)
    data = json.loads(report.to_json(tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert data["accuracy"] == {
        "count": 85,
        "total": 90,
        "value": 85 / 90,
        "interval": list(report.accuracy.interval),
    }
    assert data["results"][0]["attack"] == repr(FGSM(eps=0.0))
    assert data["versions"]["torch"] == torch.__version__
    assert "| none | 0.000 [" in report.to_markdown()


def test_no_name_of_an_attack_leads_out_of_the_folder_of_checkpoints(small_guard, loader, tmp_path, light_suites):
    long = ["ε" * 200, "ε" * 201]
    names = ["../../esc", "a/b", "a%2Fb", "..", "C:\\x", "new\nline", "l2, ε = 0.1 (quick)", *long]
    attacks = {name: WorstCaseSuite("linf", eps=0.1, budget="quick") for name in names}
    folder = tmp_path / "one" / "two" / "three"
    images, labels = next(iter(loader))
    report = evaluate(small_guard, attacks, [(images[:6], labels[:6])], checkpoint=folder, sanity_images=0)
    assert [result.name for result in report.results] == names
    with pytest.raises(ConfigurationError, match=r"evaluation in .*three was begun, None, got 3; use that seed"):
        evaluate(
            small_guard, attacks, [(images, labels)], checkpoint=folder, generator=torch.Generator().manual_seed(3)
        )
    kept = {path.name for path in folder.iterdir() if path.suffix == ".pt"}
    shortened = {name for name in kept if name.startswith("ε")}
    assert len(shortened) == 2
    assert all(re.fullmatch(r"ε{67}-[0-9a-f]{64}\.pt", name) for name in shortened)
    assert kept - shortened == {
        "..%2F..%2Fesc.pt",
        "a%2Fb.pt",
        "a%252Fb.pt",
        "...pt",
        "C%3A%5Cx.pt",
        "new%0Aline.pt",
        "l2, ε = 0.1 (quick).pt",
    }
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != folder]


@pytest.mark.parametrize("name", ["", " ", "\ud800", 3])
def test_an_attack_without_a_name_that_can_be_written_is_refused(small_guard, loader, name):
    with pytest.raises(ConfigurationError, match="expected a name for each attack"):
        evaluate(small_guard, {name: FGSM(eps=0.1)}, loader)


def test_everything_is_checked_before_the_first_attack(small_guard, loader):
    def attack(*_, **__):
        pytest.fail("attacked")

    good = next(iter(loader))
    with pytest.raises(InputError, match="finite images"):
        evaluate(small_guard, attack, [good, (torch.full((1, 1, 8, 8), torch.nan), torch.tensor([0]))])
    with pytest.raises(InputError, match="at least one batch"):
        evaluate(small_guard, attack, [])
    with pytest.raises(ConfigurationError, match="at least one attack"):
        evaluate(small_guard, {}, loader)
    with pytest.raises(ConfigurationError, match="a dict of attacks by name, got \\["):
        evaluate(small_guard, [attack], loader)
    small_guard.reset_calibration()
    with pytest.raises(NotCalibratedError):
        evaluate(small_guard, attack, loader)


def test_an_attack_that_returns_another_shape_is_named(small_guard, loader):
    with pytest.raises(InputError, match="attacked images of shape"):
        evaluate(small_guard, lambda detector, images, labels, **_: images[:1], loader)
