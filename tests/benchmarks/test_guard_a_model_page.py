import json
from pathlib import Path

from benchmarks.running import RESULTS

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "guard-a-model.md"


def test_the_page_shows_what_the_study_of_a_pretrained_network_measured():
    study = json.loads((RESULTS / "pretrained.json").read_text())
    for step, start in (("aligned", "aligned on 5,000 images"), ("trained", "then trained for 3 epochs on them")):
        accuracy, refused, suite = (show(study[step][name]) for name in ("accuracy", "false_positives", "suite"))
        assert f"| {start} | {accuracy} | {refused} | breaks {suite} |" in PAGE.read_text()


def show(rate):
    low, high = (f"{side:.2f}".removeprefix("0") for side in rate["interval"])
    return f"{rate['count']} of {rate['total']:,} ({low}–{high})"


def test_the_page_counts_the_models_whose_labels_a_guard_keeps():
    libraries = json.loads((RESULTS / "coverage.json").read_text())["libraries"]
    kept, lost = {}, []
    for name, library in libraries.items():
        outcomes = [outcome for outcome in library["labels"].values() if not outcome.startswith("not tried")]
        kept[name] = outcomes.count("kept"), len(outcomes)
        lost += [outcome for outcome in outcomes if outcome != "kept"]
    headless = sum("does not tell its number of classes" in outcome for outcome in lost)
    not_linear = sum("a classifier whose last layer is linear" in outcome for outcome in lost)
    assert headless + not_linear == len(lost)
    (timm, of_timm), (torchvision, of_torchvision) = kept["timm"], kept["torchvision"]
    said = (
        f"{timm} of {of_timm} names in timm and {torchvision} of {of_torchvision} in torchvision keep their labels. "
        f"Of the other {len(lost)}, {headless} have no classifier, and the last layer of {not_linear} is not linear."
    )
    assert said in " ".join(PAGE.read_text().split())
