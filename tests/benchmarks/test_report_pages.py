import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from clusterguard.demo import HONESTY, digit_network
from clusterguard.metrics import wilson_interval

from benchmarks import figures, report
from benchmarks.cells import load_experiment, tomllib
from benchmarks.detectors import RECIPES
from benchmarks.estimates import Results, estimate, success, worst_per_image, worst_row, worst_within
from benchmarks.judging import to_hex
from benchmarks.models import build
from benchmarks.report import read_results, render, write_report
from benchmarks.store import RESULTS, Store
from benchmarks.tables import area_table, attack_table, compare, show, stages_table, union_table

ROOT = Path(__file__).parents[2]
PAPER = tomllib.loads((ROOT / "benchmarks" / "paper.toml").read_text())
TABLES = [name for name in PAPER if name.startswith("table")]


def bits(text):
    return torch.tensor([bit == "1" for bit in text])


def made_up(broken, *, eligible="11111111", eroc=0.5, rates=("0.01",), **more):
    """A result as the runner writes it; `broken` by variant, an image a digit."""
    at = {
        name: {
            "success": [int((bits(own) & bits(eligible)).sum()), int(bits(eligible).sum())],
            "false_positives": [1, 8],
            "invalid": 0,
            "eligible": to_hex(bits(eligible)),
            "broken": to_hex(bits(own) & bits(eligible)),
        }
        for name, own in broken.items()
    }
    areas = eroc if isinstance(eroc, dict) else dict.fromkeys(broken, eroc)
    variants = {name: {"eroc": areas[name], "rates": dict.fromkeys(rates, at[name])} for name in broken}
    made = {"commit": "abc", "device": "a machine"}
    return {"images": 8, "accuracy": [7, 8], "results": variants, "stages": [], "provenance": made, **more}


def points(*accepted):
    """Two benign images and their attacked versions, both of which change their labels."""
    places = {"benign": [[0.0, 0.0], [1.0, 1.0]], "attacked": [[1.0, 0.9], [0.1, 0.0]]}
    return {
        "points": {
            **places,
            "labels": [0, 1],
            "benign_labels": [0, 1],
            "attacked_labels": [1, 0],
            "accepted": list(accepted),
        }
    }


def find(name, profile="full", **wanted):
    cells = load_experiment(name, profile).cells
    return [cell for cell in cells if all(getattr(cell, key) == value for key, value in wanted.items())]


def read(name, found, profile="full"):
    """An experiment of which `found` is all that has been run: (detector, attack) -> result."""
    experiment = load_experiment(name, profile)
    keys = {cell.key: found.get((cell.detector, cell.attack)) for cell in experiment.cells}
    return Results(experiment, keys.get)


def rows(table):
    """A Markdown table as row name -> column -> lines of the cell."""
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {
        name: {column: cell.split("<br>") for column, cell in zip(head[1:], cells, strict=True)}
        for name, *cells in body
    }


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def test_a_cell_shows_the_worst_step_size_its_interval_and_the_paper():
    made = made_up({"step 0.1": "10000000", "step 0.2": "01110000", "step 0.3": "00000011"}, rates=("0.01", "0.02"))
    results = read("table2-mnist", {("ours", "PGD linf 0.4 T"): made})
    cell = rows(compare(results, PAPER["table2-mnist"], "ASR-1"))["PGD ℓ∞ 0.4 T"]["Ours"]
    # Wilson, by hand: (3/8 + z²/16 ± z·√(15/512 + z²/256)) / (1 + z²/8) with z = 1.96
    assert cell == ["**0.38**", "<small>.14–.69</small>", "(0.21)"]


def test_a_detector_that_has_not_learned_is_said_to_mean_nothing():
    found = {("madry", "PGD linf 0.3 U"): made_up({"": "00000000"}) | {"accuracy": [3, 8]}}
    assert "Madry has not learned" in compare(read("table2-mnist", found), PAPER["table2-mnist"], "ASR-1")
    found["madry", "PGD linf 0.3 U"]["accuracy"] = [5, 8]
    assert "not learned" not in compare(read("table2-mnist", found), PAPER["table2-mnist"], "ASR-1")


def test_an_area_is_the_smallest_of_the_step_sizes_and_may_be_undefined():
    made = made_up({"a": "1" * 8, "b": "1" * 8}, eroc={"a": 0.9, "b": 0.7})
    undefined = made_up({"a": "1" * 8}, eroc=None)
    results = read("table2-mnist", {("ours", "PGD l1 15 U"): made, ("fs", "PGD l1 15 U"): undefined})
    found = rows(compare(results, PAPER["table2-mnist"], "EROC"))
    assert found["PGD ℓ1 15 U"]["Ours"] == ["**0.70**", "(0.99)"]
    assert found["PGD ℓ1 15 U"]["FS"] == ["–", "(0.72)"]
    assert found["**worst row**"]["Ours"] == ["**≤ 0.70**", "(0.97)"]


@pytest.mark.parametrize("name", TABLES)
def test_every_number_of_the_paper_stands_in_its_place_and_the_rest_is_said_not_to_be_run(name):
    paper, results = PAPER[name], read(name, {})
    for metric in {metric for row in paper.values() if isinstance(row, dict) for metric in row}:
        found = rows(compare(results, paper, metric))
        printed = {attack: row[metric] for attack, row in paper.items() if isinstance(row, dict) and metric in row}
        for attack, values in printed.items():
            place = (
                "**worst row**" if attack == "worst case" else re.sub("linf", "ℓ∞", re.sub(r"l(\d)", r"ℓ\1", attack))
            )
            for detector, value in zip(paper["detectors"], values, strict=True):
                assert found[place][RECIPES[detector].title] == ["not run", f"({value:.2f})"]


def test_numbers_of_the_paper_as_they_are_printed_there():
    white = rows(compare(read("table2-cifar10", {}), PAPER["table2-cifar10"], "ASR-1"))
    assert white["PGD ℓ1 50 T"]["MAHA"][-1] == "(0.99)"
    assert white["accuracy"]["Resisting"] == ["not run", "(0.61)"]
    assert white["**worst row**"]["Ours"] == ["not run", "(0.72)"]
    others = rows(compare(read("table4-cifar10", {}), PAPER["table4-cifar10"], "ASR-2"))
    assert others["CW ℓ2 1.0 U"]["L-Ben"][-1] == "(0.69)"
    assert "MIM ℓ∞ 0.06 U" not in others  # printed at 5 and 10 % only
    paper = {"detectors": ["fs", "ours"], "PGD l1 15 T": {"EROC": [0.25, 0.75]}}  # in another order than ours
    turned = rows(compare(read("table2-mnist", {}), paper, "EROC"))["PGD ℓ1 15 T"]
    assert [turned[title][1:] for title in ("Ours", "L-Ben", "FS")] == [["(0.75)"], [], ["(0.25)"]]


def test_worst_rows_are_those_of_the_paper_and_image_by_image():
    every = {
        ("ours", attack): made_up({"a": "00000000", "b": "00000000"}, eligible="11111110")
        for attack in load_experiment("table2-mnist").attacks
    }
    every["ours", "PGD l2 2.0 T"] = made_up({"a": "11000000", "b": "00100000"}, eligible="11111110")
    every["ours", "PGD l0 25 U"] = made_up({"a": "10010000", "b": "00000001"}, eligible="11111110")
    found = rows(compare(read("table2-mnist", every), PAPER["table2-mnist"], "ASR-1"))
    assert found["images counted"]["Ours"] == ["7"]
    assert found["**worst row**"]["Ours"][0] == "**0.29**"  # 2 of 7
    assert found["**worst per image**"]["Ours"][0] == "**0.57**"  # images 1 to 4
    del every["ours", "PGD l1 15 T"]
    found = rows(compare(read("table2-mnist", every), PAPER["table2-mnist"], "ASR-1"))
    assert found["**worst row**"]["Ours"][0] == "**≥ 0.29**"
    assert found["**worst per image**"]["Ours"][0] == "**≥ 0.57**"


def test_the_suite_stands_below_the_rows_of_its_norm_and_radius_and_only_at_its_rate():
    suite = read("strict-mnist", {("ours", "suite linf 0.4"): made_up({"": "11110000"})})
    names = list(rows(compare(read("table2-mnist", {}), PAPER["table2-mnist"], "ASR-1", suite)))
    assert names[names.index("PGD ℓ∞ 0.4 U") + 1] == "*suite ℓ∞ 0.4*"
    assert names.count("*suite ℓ∞ 0.4*") == 1
    other = compare(read("table4-mnist", {}), PAPER["table4-mnist"], "ASR-2", suite)
    assert "suite" not in other
    assert "suite" not in compare(read("table2-mnist", {}), PAPER["table2-mnist"], "EROC", suite)


def test_other_seeds_and_networks_stand_beside_the_papers_numbers_and_under_their_own_suite(store):
    (attack,) = find("wrn-table2-cifar10", detector="ours", attack="PGD linf 0.03 T")
    (suite,) = find("strict-cifar10", detector="ours", attack="suite linf 0.03")
    for cell in (attack, suite):
        store.write_cell(cell.key, made_up({"": "11110000"}, rates=("0.01", "0.02", "0.05", "0.1")))
    page = render(read_results(store, "full")["cifar10.md"])
    own = page.partition("with the network and the schedule of the paper\n")[2].partition("\n## ")[0]
    found = rows("\n".join(line for line in own.partition("EROC")[0].splitlines() if line.startswith("|")))
    assert found["PGD ℓ∞ 0.03 T"]["Ours"][-1] == f"({PAPER['table2-cifar10']['PGD linf 0.03 T']['ASR-1'][0]:.2f})"
    assert "suite" not in own  # that one attacked another network

    seeds = [*find("seeds-table2-mnist", detector="ours"), *find("seeds-strict-mnist", detector="ours")]
    for cell in seeds:
        store.write_cell(cell.key, made_up({"": "11110000"}, rates=("0.01", "0.02", "0.05", "0.1")))
    page = render(read_results(store, "full")["mnist.md"])
    own = page.partition("three seeds, MNIST: adaptive")[2].partition("\n## ")[0]
    assert "*suite ℓ∞ 0.3*" in own
    assert "3 of 3 seeds" in own


def test_several_seeds_are_averaged_and_their_range_is_shown():
    slot = [made_up({"": "10000000"}), made_up({"": "11100000"}), None]
    found = estimate(slot, success(0.01))
    assert found.mean == pytest.approx(2 / 8)
    assert found.interval == (wilson_interval(1, 8)[0], wilson_interval(3, 8)[1])
    assert show(found, 0.5) == "**0.25**<br><small>.02–.69</small><br><small>2 of 3 seeds: .12–.38</small><br>(0.50)"
    assert worst_row([found]).bound == "≥ "
    experiment = load_experiment("table2-mnist")
    seeds = tuple(replace(cell, seed=seed) for seed in (0, 1) for cell in experiment.cells)
    both = Results(replace(experiment, cells=seeds), lambda key: None)
    assert len(both.slot("ours", "PGD l1 15 T")) == 2
    assert "seeds 0, 1," in report._caption(both, "")


def test_unions_are_of_images_and_not_of_rates():
    slots = [[made_up({"": "11000000"})], [made_up({"": "01100000"})], [None]]
    found = worst_per_image(slots, 0.01)
    assert found.values == (3 / 8,)
    assert found.intervals == (wilson_interval(3, 8),)
    assert found.bound == "≥ "


def test_what_others_broke_within_the_suites_radius_is_counted_beside_it():
    suite = read("strict-mnist", {("ours", f"suite linf {eps}"): made_up({"": "11000000"}) for eps in (0.3, 0.4)})
    white = {("ours", "PGD linf 0.4 U"): made_up({"a": "10100000", "b": "10010000"}), ("fs", "PGD linf 0.4 U"): None}
    table = read("table2-mnist", white)
    cells = [pair for pair in suite.cells if pair[0].detector == "ours"]
    small, large = ([pair for pair in cells if pair[0].attack == f"suite linf {eps}"] for eps in (0.3, 0.4))
    assert worst_within(small, [table, suite])[0].values == (2 / 8,)
    found, left = worst_within(large, [table, suite])
    assert (found.values, left) == ((4 / 8,), 2)
    shown = rows(union_table(suite, [table, suite]))
    assert shown["Ours"]["ℓ∞ 0.4"][0] == "**0.50**"
    assert shown["Ours"]["ℓ∞ 0.4"][-1] == "+2"
    assert shown["Ours"]["any of these"][0] == "**≥ 0.50**"  # three norms have not been run
    assert shown["FS"]["ℓ∞ 0.4"] == ["not run"]


def test_stages_of_the_suite_are_shown_in_the_order_they_ran():
    def stages(**broken):
        return {"stages": [{"name": name, "attacked": 8, "broken": count} for name, count in broken.items()]}

    made = {
        ("ours", "suite linf 0.3"): made_up({"": "1" * 8}, **stages(APGD=5, Square=1)),
        ("ours", "suite l2 2.0"): made_up({"": "1" * 8}, **stages(APGD=3, CW=2, Square=0)),
    }
    found = rows(stages_table(read("strict-mnist", made), "ours"))
    assert list(found) == ["images attacked", "APGD", "CW", "Square"]
    assert [found[name]["ℓ2 2.0"] for name in found] == [["8"], ["3"], ["2"], ["0"]]
    assert found["CW"]["ℓ∞ 0.3"] == [""]
    assert found["CW"]["ℓ1 15"] == ["not run"]


def test_ablations_have_a_row_a_variant():
    cell = find("ablation-mnist", variant="M = 5", attack="suite l2 2.0")[0]
    results = Results(load_experiment("ablation-mnist"), {cell.key: made_up({"": "11000000"})}.get)
    found = rows(attack_table(results))
    assert found["M = 5"]["suite ℓ2 2.0"] == ["**0.25**", "<small>.07–.59</small>"]
    assert found["M = 5"]["accuracy"][0] == "**0.88**"
    assert found["M = 20"]["suite ℓ2 2.0"] == ["not run"]
    assert not [attack for attack in rows(area_table(results))["M = 5"] if "suite" in attack]


def test_a_page_says_what_it_rests_on_and_what_is_missing(store):
    first = find("table2-mnist", detector="ours")[0]
    wrong = made_up({"step 0.1": "10000000"}, rates=("0.01", "0.02", "0.05", "0.1"))
    wrong["results"]["step 0.1"]["rates"]["0.01"]["invalid"] = 3
    store.write_cell(first.key, wrong)
    text = render(read_results(store, "full")["mnist.md"])
    assert text.startswith("<!-- Generated from results by `python -m benchmarks report`;")
    assert re.search(r"^1 of \d+ cells are run", text, flags=re.MULTILINE)
    assert "Computed on a machine, at `abc`." in text
    assert "**3 attacked images left their budget or [0, 1] and were not counted.**" in text
    assert "1 of 80 cells are run, `python -m benchmarks run table2-mnist` runs the rest." in text
    assert "The first 1,000 test images, seed 0, network `small-cnn` (as in the paper)." in text
    assert "Not run yet: `python -m benchmarks run table3-mnist`." in text
    nothing = read_results(store, "full")["cifar10.md"]
    assert "|" not in render(nothing)  # no empty tables
    assert render(nothing).count("Not run yet: `python -m benchmarks run ") == len(nothing)


def test_the_cpu_profile_has_pages_of_its_own(store):
    pages = read_results(store, "cpu")
    assert "mnist-cpu.md" in pages
    assert not {"mnist.md", "cifar10.md"} & set(pages)
    assert "`python -m benchmarks report --profile cpu`" in render(pages["mnist-cpu.md"])


def test_quick_pages_say_quick_everywhere(store, tmp_path, monkeypatch):
    rates = ("0.01", "0.02", "0.05", "0.1")
    for results in read_results(store, "quick")["mnist.md"]:
        for cell in results.experiment.cells:
            steps = [f"step {size:g}" for size in cell.options.get("step_sizes", [])]
            broken = dict.fromkeys(steps or [""], "11000000")
            store.write_cell(cell.key, made_up(broken, rates=rates, **points(True, False)))
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
    assert all(line.endswith("(quick)") for line in lines if line.startswith("## "))
    assert "# MNIST, quick: wiring, not numbers" in lines
    assert '!!! danger "quick: wiring, not numbers"' in text
    assert len(titles) == 4
    assert all(title.endswith("\nquick: wiring, not numbers") for title in titles)
    assert "not run" not in text.lower()


def test_pages_end_in_a_newline_and_have_no_trailing_blanks(store, tmp_path):
    cell = find("strict-mnist", detector="ours")[0]
    store.write_cell(cell.key, made_up({"": "11000000"}))
    pages = write_report(store, "full", tmp_path)
    assert [page.name for page in pages] == ["mnist.md", "cifar10.md"]
    for page in pages:
        text = page.read_text()
        assert text.endswith("\n")
        assert not text.endswith("\n\n")
        assert not re.search(r"[ \t]$", text, flags=re.MULTILINE)
        assert write_report(store, "full", tmp_path) == pages
        assert page.read_text() == text


@pytest.mark.parametrize("profile", ["full", "cpu"])
def test_the_pages_in_the_repository_are_made_from_the_results_in_it(profile):
    for name, every in read_results(Store(RESULTS), profile).items():
        page = ROOT / "docs" / "results" / name
        if profile == "full" or page.exists():
            assert page.read_text() == render(every), f"python -m benchmarks report --profile {profile}"


def test_the_readme_says_what_the_results_say():
    def success(experiment, attack):
        cells = load_experiment(experiment, "cpu").cells
        cell = next(
            own for own in cells if (own.attack, own.seed) == (attack, 0) and own.detector in ("ours", "certified")
        )
        (found,) = Store(RESULTS).read_cell(cell.key)["results"].values()
        return found["rates"]["0.01"]["success"]

    text = " ".join((ROOT / "README.md").read_text().split())
    broken, total = success("strict-mnist", "suite linf 0.3")
    assert f"of {total} digits our worst-case suite breaks {broken / total:.2f} at its quick budget" in text
    broken, total = success("certified-mnist", "certificate linf 0.3")
    assert f"to lose at most {broken / total:.3f} of {total:,} there" in text


def test_the_demos_reference_values_are_those_of_the_results():
    def mean(experiment, attack):
        read = Store(RESULTS).read_cell
        return estimate(Results(load_experiment(experiment, "cpu"), read).slot("ours", attack), success(0.01)).mean

    pgd, suite = mean("seeds-table2-mnist", "PGD linf 0.3 U"), mean("seeds-strict-mnist", "suite linf 0.3")
    assert f"PGD-100 breaks {pgd:.2f} at linf 0.3 and the suite {suite:.2f}." in HONESTY
    (cell,) = find("seeds-table2-mnist", "cpu", detector="ours", attack="PGD linf 0.3 U", seed=0)
    assert (cell.images, cell.options["steps"], cell.training.model) == (300, 100, "tiny-cnn")
    assert [str(layer) for layer in digit_network()] == [str(layer) for layer in build("tiny-cnn", (1, 28, 28)).body]


def lines_of(name, run):
    """A figure of lines, of which the attacks that `run` accepts have been run."""
    experiment = load_experiment(name)
    found = {}
    for cell in experiment.cells:
        variants = dict.fromkeys((f"step {size:g}" for size in cell.options["step_sizes"]), "11100000")
        found[cell.detector, cell.attack] = made_up(variants) if run(cell.attack) else None
    return read(name, found)


FIGURES = {
    "full lines": lambda: lines_of("figure6-mnist", lambda attack: True),
    "partial lines": lambda: lines_of("figure7-mnist", lambda attack: "l2" in attack and "300 steps" not in attack),
    "empty lines": lambda: lines_of("figure6-mnist", lambda attack: False),
    "full points": lambda: read(
        "figure1-mnist",
        {(d, "PGD linf 0.3 T"): made_up({"": "1" * 8}, **points(True, False)) for d in ("ours", "vanilla")},
    ),
    "partial points": lambda: read(
        "figure2-mnist", {("ours", "PGD linf 0.3 T"): made_up({"": "1" * 8}, **points(False, False))}
    ),
    "empty points": lambda: read("figure1-mnist", {}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_drawn_whatever_has_been_run(name, tmp_path, monkeypatch):
    drawn = []
    save = figures._save
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure) or save(figure, path))
    png, svg = figures.draw(FIGURES[name](), tmp_path / "figure")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    texts = {text.get_text() for axis in drawn[0].axes for text in axis.texts}
    labels = [text.get_text() for legend in drawn[0].legends for text in legend.get_texts()]
    assert ("not run" in texts) == (name not in ("full lines", "partial lines", "full points"))
    if name == "partial lines":
        assert labels[:2] == ["PGD ℓ∞ 0.4 U, not run", "PGD ℓ2 2.0 U, 7 of 8 run"]
    if name == "partial points":
        assert drawn[0].axes[0].get_title() == "Ours, benign training only"
        assert drawn[0].axes[0].get_xlabel() == "0 of 2 accepted under a wrong label"


def test_a_figure_is_the_same_file_every_time(tmp_path):
    results = FIGURES["full lines"]()
    first = [path.read_bytes() for path in figures.draw(results, tmp_path / "a")]
    assert first == [path.read_bytes() for path in figures.draw(results, tmp_path / "b")]


def test_points_of_figures_are_where_the_attack_was():
    sizes = figures.step_sizes(FIGURES["full lines"]())
    assert [point.x for point in sizes["PGD ℓ1 15 U"]] == [0.5, 1, 2, 4, 8, 16]
    assert {point.rate.mean for point in sizes["PGD ℓ1 15 U"]} == {3 / 8}
    steps = figures.iterations(FIGURES["partial lines"]())
    assert [point.x for point in steps["PGD ℓ2 2.0 U"]] == [1, 3, 10, 30, 100, 300, 1000, 2000]
    assert [len(point.rate.values) for point in steps["PGD ℓ2 2.0 U"]] == [1, 1, 1, 1, 1, 0, 1, 1]
