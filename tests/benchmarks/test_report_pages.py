import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from clusterguard.cli import digit_network
from clusterguard.cli._demo import HONESTY
from clusterguard.errors import ConfigurationError
from made_up_results import find, load_table, made_up, points, rows

from benchmarks._support import read_toml
from benchmarks.detectors import build_network
from benchmarks.experiments import _cells as cells
from benchmarks.experiments import load_experiment
from benchmarks.reporting import _figures as figures
from benchmarks.reporting import write_report
from benchmarks.reporting._estimates import Results, estimate, measure_success
from benchmarks.reporting._report import read_results, render_page
from benchmarks.running import RESULTS, Store

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "benchmarks" / "experiments"
PAPER = read_toml(ROOT / "benchmarks" / "reporting" / "paper.toml")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def test_other_seeds_and_networks_stand_beside_the_papers_numbers_and_under_their_own_suite(store):
    (attack,) = find("wrn-table2-cifar10", detector="ours", attack="PGD linf 0.03 T")
    (suite,) = find("strict-cifar10", detector="ours", attack="suite linf 0.03")
    for cell in (attack, suite):
        store.write_cell(cell, made_up({"": "11110000"}, rates=("0.01", "0.02", "0.05", "0.1")))
    page = render_page(read_results(store, "full")["cifar10.md"])
    section = page.partition("with the network and the schedule of the paper\n")[2].partition("\n## ")[0]
    shown = rows("\n".join(line for line in section.partition("EROC")[0].splitlines() if line.startswith("|")))
    assert shown["PGD ℓ∞ 0.03 T"]["Ours"][-1] == f"({PAPER['table2-cifar10']['PGD linf 0.03 T']['ASR-1'][0]:.2f})"
    assert "suite" not in section  # that one attacked another network

    seeds = [cell for name in ("table2", "strict") for cell in find(f"seeds-mnist/{name}", detector="ours")]
    for cell in seeds:
        store.write_cell(cell, made_up({"": "11110000"}, rates=("0.01", "0.02", "0.05", "0.1")))
    page = render_page(read_results(store, "full")["mnist.md"])
    section = page.partition("three seeds, MNIST: adaptive")[2].partition("\n## ")[0]
    assert "*suite ℓ∞ 0.3*" in section
    assert "3 of 3 seeds" in section


@pytest.mark.parametrize(
    ("attacked", "by_suite", "verdict"),
    [
        ("00000000", "00000000", "**holds**"),
        ("00000000", "11111111", "**in part**: not against stronger attacks"),
        ("11111111", "11111111", "**does not hold**"),
        ("11111111", "00000000", "**does not hold**"),
        ("00000000", None, "reproduces; the suite is not run"),
    ],
)
def test_a_page_begins_with_what_holds(store, attacked, by_suite, verdict):
    rates = ("0.01", "0.02", "0.05", "0.1")
    (cell,) = find("table2-mnist", detector="ours", attack="PGD linf 0.4 U")
    store.write_cell(cell, made_up({"": attacked}, rates=rates))
    (other,) = find("table2-mnist", detector="l-ben", attack="PGD linf 0.4 U")
    store.write_cell(other, made_up({"": "11111111"}, rates=rates))
    if by_suite is not None:
        (cell,) = find("strict-mnist", detector="ours", attack="suite linf 0.4")
        store.write_cell(cell, made_up({"": by_suite}, rates=rates))
    page = render_page(read_results(store, "full")["mnist.md"])
    answer = page.partition("## In one table")[2].partition("**Bold**")[0]
    table = rows("\n".join(line for line in answer.splitlines() if line.startswith("|")))
    assert table["PGD ℓ∞ 0.4 U breaks few images of Ours"]["verdict"] == [verdict]
    assert table["PGD ℓ2 2.0 U breaks few images of Ours"]["verdict"] == ["not run"]
    compared = table["PGD ℓ∞ 0.4 U breaks fewer images of Ours than of L-Ben"]["verdict"]
    assert compared == ["**does not hold**" if "1" in attacked else "**holds**"]


def test_a_page_says_what_it_rests_on_and_what_is_missing(store):
    first = find("table2-mnist", detector="ours")[0]
    wrong = made_up({"step 0.1": "10000000"}, rates=("0.01", "0.02", "0.05", "0.1"))
    wrong["results"]["step 0.1"]["rates"]["0.01"]["invalid"] = 3
    store.write_cell(first, wrong)
    text = render_page(read_results(store, "full")["mnist.md"])
    assert text.startswith("<!-- Generated from results by `python -m benchmarks report`;")
    assert re.search(r"^1 of \d+ cells are run", text, flags=re.MULTILINE)
    settings = text.partition("\n## Settings\n")[2]
    assert "Computed on a machine." in settings
    assert "    - `abc`: 1 cell\n" in settings
    assert "recipe" not in settings  # what has not been run is nothing to rest on
    assert "**3 attacked images left their budget or [0, 1] and were not counted.**" in text
    assert "1 of 80 cells are run, `python -m benchmarks run table2-mnist` runs the rest." in text
    assert "The first 1,000 test images, seed 0, network `small-cnn` (as in the paper)." in text
    assert "\n## Table 3" not in text
    assert re.search(r"^Not run yet: `python -m benchmarks run table3-mnist .*figure7-mnist`.$", text, re.MULTILINE)
    nothing = read_results(store, "full")["cifar10.md"]
    assert "|" not in render_page(nothing)  # no empty tables
    (missing,) = re.findall("^Not run yet: `python -m benchmarks run (.*)`.$", render_page(nothing), re.MULTILINE)
    assert set(missing.split()) == {results.table.experiment for results in nothing}


def test_the_cpu_profile_has_pages_of_its_own(store):
    pages = read_results(store, "cpu")
    assert "mnist-cpu.md" in pages
    assert not {"mnist.md", "cifar10.md"} & set(pages)
    assert "`python -m benchmarks report --profile cpu`" in render_page(pages["mnist-cpu.md"])


def test_a_page_of_a_reduced_profile_needs_results_unless_it_exists(store, tmp_path):
    assert write_report(store, "short", tmp_path) == []
    store.write_cell(find("strict-mnist", "short", detector="ours")[0], made_up({"": "11000000"}))
    assert [page.name for page in write_report(store, "short", tmp_path)] == ["mnist-short.md"]
    (tmp_path / "cifar10-short.md").write_text("from results that are gone")
    assert [page.name for page in write_report(store, "short", tmp_path)] == ["mnist-short.md", "cifar10-short.md"]
    assert "0 of" in (tmp_path / "cifar10-short.md").read_text()


def test_results_of_the_suite_of_version_0_1_are_said_to_be(store):
    (cell,) = find("strict-mnist", "cpu", detector="ours", attack="suite linf 0.3")
    pages = {}
    for version in ("0.1.0", "0.2.0"):
        made = made_up({"": "11000000"})
        made["provenance"] |= {"versions": {"clusterguard": version}}
        store.write_cell(cell, made)
        pages[version] = render_page(read_results(store, "cpu")["mnist-cpu.md"])
    assert "withdrawn" in pages["0.1.0"]
    assert "which ASR does not count" in pages["0.1.0"]
    assert "withdrawn" not in pages["0.2.0"]
    assert "which ASR does not count" not in pages["0.2.0"]


def test_quick_pages_say_quick_everywhere(store, tmp_path, monkeypatch):
    rates = ("0.01", "0.02", "0.05", "0.1")
    tables = [results.table for results in read_results(store, "quick")["mnist.md"]]
    for cell in {cell.key: cell for table in tables for cell in table.cells}.values():
        steps = [f"step {size:g}" for size in cell.options.get("step_sizes", [])]
        broken = dict.fromkeys(steps or [""], "11000000")
        store.write_cell(cell, made_up(broken, rates=rates, **points(True, False)))
    titles = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: titles.append(figure.get_suptitle()) or [])
    written = write_report(store, "quick", tmp_path)
    assert [path.name for path in written] == ["mnist.md", "cifar10.md"]
    text = (tmp_path / "mnist.md").read_text()
    lines = text.splitlines()
    captions = [lines[at - 2] for at, line in enumerate(lines) if line.startswith("|") and not lines[at - 1]]
    captions += [lines[at + 2] for at, line in enumerate(lines) if line.startswith("[![")]
    assert len(captions) >= 16
    assert all(caption.startswith("**Quick: wiring, not numbers.") for caption in captions)
    assert all(line.endswith("(quick)") for line in lines if line.startswith("## ") and line != "## Settings")
    assert "# MNIST, quick: wiring, not numbers" in lines
    assert '!!! danger "quick: wiring, not numbers"' in text
    assert len(titles) == sum(table.is_figure for table in tables) > 0
    assert all(title.endswith("\nquick: wiring, not numbers") for title in titles)
    assert "not run" not in text.lower()


def test_a_page_is_the_same_whatever_files_and_attacks_are_called(store, tmp_path, monkeypatch):
    chosen = {"strict-mnist": "aardvark", "ablation-mnist": "table2-cifar10", "figure7-mnist": "wrn-zebra"}
    runs = [cell for name in chosen for cell in load_experiment(name).cells]
    for cell in runs:
        store.write_cell(cell, made_up({"": "11000000"}))

    def read(changes):
        """The page of these experiments alone, with other words."""
        folder = tmp_path / str(len(changes))
        folder.mkdir()
        for name in ("_mnist", *chosen):
            text = (EXPERIMENTS / f"{name}.toml").read_text()
            for old, new in changes.items():
                text = text.replace(old, new)
            (folder / f"{changes.get(name, name)}.toml").write_text(text)
        monkeypatch.setattr(cells, "FOLDER", folder)
        return render_page(read_results(store, "full")["mnist.md"])

    other = read(chosen | {'"suite l': '"worst l', '"PGD l': '"descent l', ' steps", kind': ' times", kind'})
    for old, new in [*chosen.items(), ("suite ℓ", "worst ℓ"), ("PGD ℓ", "descent ℓ")]:
        other = other.replace(new, old)
    assert other == read({})


def test_a_table_that_the_paper_does_not_have_is_named(store):
    results = Results(replace(load_table("table2-mnist"), paper="table9-mnist"), lambda key: made_up({"": "1" * 8}))
    with pytest.raises(ConfigurationError, match=r"table2-mnist, .* 'table9-mnist'"):
        render_page([results])


def test_pages_end_in_a_newline_and_have_no_trailing_blanks(store, tmp_path):
    cell = find("strict-mnist", detector="ours")[0]
    store.write_cell(cell, made_up({"": "11000000"}))
    pages = write_report(store, "full", tmp_path)
    assert [page.name for page in pages] == ["mnist.md", "cifar10.md"]
    for page in pages:
        text = page.read_text()
        assert text.endswith("\n")
        assert not text.endswith("\n\n")
        assert not re.search(r"[ \t]$", text, flags=re.MULTILINE)
        assert write_report(store, "full", tmp_path) == pages
        assert page.read_text() == text


@pytest.mark.parametrize("profile", ["full", "short", "cpu"])
def test_the_pages_in_the_repository_are_made_from_the_results_in_it(profile):
    for name, every in read_results(Store(RESULTS), profile).items():
        page = ROOT / "docs" / "results" / name
        if profile == "full" or page.exists():
            assert page.read_text() == render_page(every), f"python -m benchmarks report --profile {profile}"


ROWS = {  # by attack of the tables, as README and findings name it
    "linf 0.3": "ℓ∞ 0.3, as in training",
    "linf 0.4": "ℓ∞ 0.4",
    "l2 2.0": "ℓ2 2.0",
    "l1 15": "ℓ1 15",
    "l0 25": "ℓ0 25",
}


def test_the_readme_and_the_findings_quote_the_papers_network_as_it_was_measured():
    pgds, suites = (
        Results(load_table(name, "short"), Store(RESULTS).read_cell) for name in ("table2-mnist", "strict-mnist")
    )

    def quote(results, attack, detector="ours"):
        (result,) = results.slot(detector, attack)
        rate = measure_success(0.01)(result)
        low, high = (f"{end:.2f}".removeprefix("0") for end in rate.interval)
        return f"{rate.count} of {rate.total}, {rate.value:.2f} [{low}, {high}]"

    readme, findings = ((ROOT / page).read_text() for page in ("README.md", "docs/results/findings.md"))
    for attack, shown in ROWS.items():
        pgd, suite = quote(pgds, f"PGD {attack} U"), quote(suites, f"suite {attack}")
        paper, other = PAPER["table2-mnist"][f"PGD {attack} U"]["ASR-1"][:2]
        ablation = quote(pgds, f"PGD {attack} U", "l-ben")
        assert f"| {shown} | {pgd} | {suite} |" in readme
        assert f"| {shown} | {paper:.2f} | {pgd} | {suite} |" in findings
        assert f"| {shown} | {pgd} | {paper:.2f} | {ablation} | {other:.2f} |" in findings
        assert f"| {shown} | {suite} | {quote(suites, f'suite {attack}', 'l-ben')} |" in findings
    (result,) = pgds.slot("ours", "PGD linf 0.3 U")
    correct, total = result["accuracy"]
    assert f"labels {correct:,} of MNIST's first {total:,} test images correctly" in " ".join(readme.split())


def test_the_findings_quote_the_certificates():
    text = " ".join((ROOT / "docs" / "results" / "findings.md").read_text().split())
    proved = {}
    for experiment, profile in (("certified-mnist", "cpu"), ("certified-deep-mnist", "short")):
        for eps in (0.3, 0.4):
            wanted = "certified", f"certificate linf {eps}", 0
            cell = next(
                cell
                for cell in load_experiment(experiment, profile).cells
                if (cell.detector, cell.attack, cell.seed) == wanted
            )
            record = Store(RESULTS).read_cell(cell.key)
            (result,) = record["results"].values()
            broken, total = result["rates"]["0.01"]["success"]
            assert f"{broken:,} of {total:,}, {broken / total:.3f}" in text
            proved[experiment, eps] = f"{(total - broken) / record['images']:.3f}"
    deep = [proved["certified-deep-mnist", eps] for eps in (0.3, 0.4)]
    assert f"{deep[0]} and {deep[1]} of all test images are labelled correctly, accepted and proved" in text


STARTS = {
    "a random point": "base: random start, one cycle",
    "the image itself": "start at the image",
    "images of other classes": "start towards images of other classes",
    "all three in turn": "three starts",
}
INGREDIENTS = {
    "seven plain steps": "radius ramp",
    "APGD": "ramp, 10 APGD steps",
    "APGD at the margin": "ramp, 10 APGD steps, margin",
    "twenty plain steps of 0.03, in twice the time": "ramp, 20 plain steps",
    "APGD with two targets": "ramp, 10 APGD steps, two targets",
    "none, for comparison": "radius ramp",
    "cross-entropy next to the likelihood": "ramp, cross-entropy",
    "perturbed weights": "ramp, perturbed weights",
    "weight decay": "ramp, weight decay",
    "M of 5": "ramp, M = 5",
    "M of 20": "ramp, M = 20",
    "l of 2": "ramp, l = 2",
    "l of 4": "ramp, l = 4",
    "the full radius at once": "radius 0.4",
    "a growing radius": "ramp, radius 0.4",
    "a growing radius, APGD at the margin": "ramp, 10 APGD steps, margin, radius 0.4",
}
FINALISTS = {
    "a random start at the full radius": "full radius at once",
    "the same with a growing radius": "radius ramp",
    "a growing radius, and ten steps of APGD at the margin": "radius ramp, 10 APGD steps, margin",
}


def test_the_findings_quote_the_recipes_as_they_were_measured():
    findings = (ROOT / "docs" / "results" / "findings.md").read_text()
    for name, rows_ in (("recipe-mnist", STARTS | INGREDIENTS), ("recipe-finalists-mnist", FINALISTS)):
        results = Results(load_table(name, "cpu"), Store(RESULTS).read_cell)
        for shown, variant in rows_.items():
            row = shown
            for detector in ("ours", "l-ben"):
                found = estimate(results.slot(detector, "suite linf 0.3", variant), measure_success(0.01))
                seeds = f" ({min(found.values):.2f} to {max(found.values):.2f})" if len(found.values) > 1 else ""
                row += f" | {found.mean:.2f}{seeds}"
            assert f"| {row} |" in findings


def test_the_findings_quote_cifar10_as_it_was_measured():
    findings = (ROOT / "docs" / "results" / "findings.md").read_text()
    read = Store(RESULTS).read_cell
    pgds, suites = (Results(load_table(f"{name}-cifar10", "cpu"), read) for name in ("table2", "strict"))
    papers = PAPER["table2-cifar10"]

    def row(results, attack):
        for detector in ("ours", "l-ben", "madry"):
            (result,) = results.slot(detector, attack)
            printed = papers[attack]["ASR-1"][results.table.detectors.index(detector)] if attack in papers else None
            paper = "" if printed is None else f" ({printed:.2f})"
            yield f"{measure_success(0.01)(result).value:.2f}{paper}"

    for shown, results, attack in (
        ("PGD ℓ∞ 0.03, as in training", pgds, "PGD linf 0.03 U"),
        ("suite ℓ∞ 0.03", suites, "suite linf 0.03"),
        ("PGD ℓ∞ 0.06", pgds, "PGD linf 0.06 U"),
        ("suite ℓ∞ 0.06", suites, "suite linf 0.06"),
        ("targeted PGD ℓ∞ 0.06", pgds, "PGD linf 0.06 T"),
    ):
        assert f"| {' | '.join((shown, *row(results, attack)))} |" in findings


def test_the_demos_reference_values_are_those_of_the_results():
    def mean(name, attack):
        read = Store(RESULTS).read_cell
        return estimate(Results(load_table(name, "cpu"), read).slot("ours", attack), measure_success(0.01)).mean

    pgd, suite = mean("seeds-mnist/table2", "PGD linf 0.3 U"), mean("seeds-mnist/strict", "suite linf 0.3")
    assert f"PGD-100 breaks {pgd:.2f} at linf 0.3 and the suite {suite:.2f}." in HONESTY
    (cell,) = find("seeds-mnist/table2", "cpu", detector="ours", attack="PGD linf 0.3 U", seed=0)
    assert (cell.images, cell.options["steps"], cell.training.model) == (300, 100, "tiny-cnn")
    assert [str(layer) for layer in digit_network()] == [
        str(layer) for layer in build_network("tiny-cnn", (1, 28, 28)).body
    ]
