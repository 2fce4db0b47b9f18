import re
from dataclasses import replace
from pathlib import Path

import pytest
from clusterguard.detection import wilson_interval
from made_up_results import find, load_table, made_up, read, rows

from benchmarks._support import read_toml
from benchmarks.detectors import RECIPES
from benchmarks.reporting import _report as report
from benchmarks.reporting._estimates import Results, estimate, measure_success, worst_per_image, worst_row, worst_within
from benchmarks.reporting._tables import (
    area_table,
    attack_table,
    comparison_table,
    show_estimate,
    stages_table,
    union_table,
)

ROOT = Path(__file__).parents[2]
PAPER = read_toml(ROOT / "benchmarks" / "reporting" / "paper.toml")
TABLES = [name for name in PAPER if name.startswith("table")]


def test_a_cell_shows_the_worst_step_size_its_interval_and_the_paper():
    made = made_up({"step 0.1": "10000000", "step 0.2": "01110000", "step 0.3": "00000011"}, rates=("0.01", "0.02"))
    results = read("table2-mnist", {("ours", "PGD linf 0.4 T"): made})
    cell = rows(comparison_table(results, PAPER["table2-mnist"], "ASR-1"))["PGD ℓ∞ 0.4 T"]["Ours"]
    # Wilson, by hand: (3/8 + z²/16 ± z·√(15/512 + z²/256)) / (1 + z²/8) with z = 1.96
    assert cell == ["**0.38**", "<small>.14–.69</small>", "(0.21)"]


def test_a_detector_that_has_not_learned_is_said_to_mean_nothing():
    made = {("madry", "PGD linf 0.3 U"): made_up({"": "00000000"}) | {"accuracy": [3, 8]}}
    assert "Madry has not learned" in comparison_table(read("table2-mnist", made), PAPER["table2-mnist"], "ASR-1")
    made["madry", "PGD linf 0.3 U"]["accuracy"] = [5, 8]
    assert "not learned" not in comparison_table(read("table2-mnist", made), PAPER["table2-mnist"], "ASR-1")


def test_an_area_is_the_smallest_of_the_step_sizes_and_may_be_undefined():
    made = made_up({"a": "1" * 8, "b": "1" * 8}, eroc={"a": 0.9, "b": 0.7})
    undefined = made_up({"a": "1" * 8}, eroc=None)
    results = read("table2-mnist", {("ours", "PGD l1 15 U"): made, ("fs", "PGD l1 15 U"): undefined})
    shown = rows(comparison_table(results, PAPER["table2-mnist"], "EROC"))
    assert shown["PGD ℓ1 15 U"]["Ours"] == ["**0.70**", "(0.99)"]
    assert shown["PGD ℓ1 15 U"]["FS"] == ["–", "(0.72)"]
    assert shown["**worst row**"]["Ours"] == ["**≤ 0.70**", "(0.97)"]


@pytest.mark.parametrize("name", TABLES)
def test_every_number_of_the_paper_stands_in_its_place_and_the_rest_is_said_not_to_be_run(name):
    paper, results = PAPER[name], read(name, {})
    for metric in {metric for row in paper.values() if isinstance(row, dict) for metric in row}:
        shown = rows(comparison_table(results, paper, metric))
        printed = {attack: row[metric] for attack, row in paper.items() if isinstance(row, dict) and metric in row}
        for attack, values in printed.items():
            place = (
                "**worst row**" if attack == "worst case" else re.sub("linf", "ℓ∞", re.sub(r"l(\d)", r"ℓ\1", attack))
            )
            for detector, value in zip(paper["detectors"], values, strict=True):
                assert shown[place][RECIPES[detector].title] == ["not run", f"({value:.2f})"]


def test_numbers_of_the_paper_as_they_are_printed_there():
    white = rows(comparison_table(read("table2-cifar10", {}), PAPER["table2-cifar10"], "ASR-1"))
    assert white["PGD ℓ1 50 T"]["MAHA"][-1] == "(0.99)"
    assert white["accuracy"]["Resisting"] == ["not run", "(0.61)"]
    assert white["**worst row**"]["Ours"] == ["not run", "(0.72)"]
    others = rows(comparison_table(read("table4-cifar10", {}), PAPER["table4-cifar10"], "ASR-2"))
    assert others["CW ℓ2 1.0 U"]["L-Ben"][-1] == "(0.69)"
    assert "MIM ℓ∞ 0.06 U" not in others  # printed at 5 and 10 % only
    paper = {"detectors": ["fs", "ours"], "PGD l1 15 T": {"EROC": [0.25, 0.75]}}  # in another order than ours
    turned = rows(comparison_table(read("table2-mnist", {}), paper, "EROC"))["PGD ℓ1 15 T"]
    assert [turned[title][1:] for title in ("Ours", "L-Ben", "FS")] == [["(0.75)"], [], ["(0.25)"]]


def test_worst_rows_are_those_of_the_paper_and_image_by_image():
    every = {
        ("ours", attack): made_up({"a": "00000000", "b": "00000000"}, eligible="11111110")
        for attack in load_table("table2-mnist").attacks
    }
    every["ours", "PGD l2 2.0 T"] = made_up({"a": "11000000", "b": "00100000"}, eligible="11111110")
    every["ours", "PGD l0 25 U"] = made_up({"a": "10010000", "b": "00000001"}, eligible="11111110")
    shown = rows(comparison_table(read("table2-mnist", every), PAPER["table2-mnist"], "ASR-1"))
    assert shown["images counted"]["Ours"] == ["7"]
    assert shown["**worst row**"]["Ours"][0] == "**0.29**"  # 2 of 7
    assert shown["**worst per image**"]["Ours"][0] == "**0.57**"  # images 1 to 4
    del every["ours", "PGD l1 15 T"]
    shown = rows(comparison_table(read("table2-mnist", every), PAPER["table2-mnist"], "ASR-1"))
    assert shown["**worst row**"]["Ours"][0] == "**≥ 0.29**"
    assert shown["**worst per image**"]["Ours"][0] == "**≥ 0.57**"


def test_the_suite_stands_below_the_rows_of_its_norm_and_radius_and_only_at_its_rate():
    suite = read("strict-mnist", {("ours", "suite linf 0.4"): made_up({"": "11110000"})})
    names = list(rows(comparison_table(read("table2-mnist", {}), PAPER["table2-mnist"], "ASR-1", suite)))
    assert names[names.index("PGD ℓ∞ 0.4 U") + 1] == "*suite ℓ∞ 0.4*"
    assert names.count("*suite ℓ∞ 0.4*") == 1
    other = comparison_table(read("table4-mnist", {}), PAPER["table4-mnist"], "ASR-2", suite)
    assert "suite" not in other
    assert "suite" not in comparison_table(read("table2-mnist", {}), PAPER["table2-mnist"], "EROC", suite)


def test_several_seeds_are_averaged_and_their_range_is_shown():
    slot = [made_up({"": "10000000"}), made_up({"": "11100000"}), None]
    measured = estimate(slot, measure_success(0.01))
    assert measured.mean == pytest.approx(2 / 8)
    assert measured.interval == (wilson_interval(1, 8)[0], wilson_interval(3, 8)[1])
    assert (
        show_estimate(measured, 0.5)
        == "**0.25**<br><small>.02–.69</small><br><small>2 of 3 seeds: .12–.38</small><br>(0.50)"
    )
    assert worst_row([measured]).bound == "≥ "
    table2 = load_table("table2-mnist")
    seeds = tuple(replace(cell, seed=seed) for seed in (0, 1) for cell in table2.cells)
    both = Results(replace(table2, cells=seeds), lambda key: None)
    assert len(both.slot("ours", "PGD l1 15 T")) == 2
    assert "seeds 0, 1," in report._caption(both, "")


def test_unions_are_of_images_and_not_of_rates():
    slots = [[made_up({"": "11000000"})], [made_up({"": "01100000"})], [None]]
    measured = worst_per_image(slots, 0.01)
    assert measured.values == (3 / 8,)
    assert measured.intervals == (wilson_interval(3, 8),)
    assert measured.bound == "≥ "


def test_what_others_broke_within_the_suites_radius_is_counted_beside_it():
    suite = read("strict-mnist", {("ours", f"suite linf {eps}"): made_up({"": "11000000"}) for eps in (0.3, 0.4)})
    white = {("ours", "PGD linf 0.4 U"): made_up({"a": "10100000", "b": "10010000"}), ("fs", "PGD linf 0.4 U"): None}
    table = read("table2-mnist", white)
    cells = [pair for pair in suite.cells if pair[0].detector == "ours"]
    small, large = ([pair for pair in cells if pair[0].attack == f"suite linf {eps}"] for eps in (0.3, 0.4))
    assert worst_within(small, [table, suite])[0].values == (2 / 8,)
    measured, left = worst_within(large, [table, suite])
    assert (measured.values, left) == ((4 / 8,), 2)
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
    shown = rows(stages_table(read("strict-mnist", made), "ours"))
    assert list(shown) == ["images attacked", "APGD", "CW", "Square"]
    assert [shown[name]["ℓ2 2.0"] for name in shown] == [["8"], ["3"], ["2"], ["0"]]
    assert shown["CW"]["ℓ∞ 0.3"] == [""]
    assert shown["CW"]["ℓ1 15"] == ["not run"]


def test_ablations_have_a_row_a_variant():
    cell = find("ablation-mnist", variant="M = 5", attack="suite l2 2.0")[0]
    results = Results(load_table("ablation-mnist"), {cell.key: made_up({"": "11000000"})}.get)
    shown = rows(attack_table(results))
    assert shown["M = 5"]["suite ℓ2 2.0"] == ["**0.25**", "<small>.07–.59</small>"]
    assert shown["M = 5"]["accuracy"][0] == "**0.88**"
    assert shown["M = 20"]["suite ℓ2 2.0"] == ["not run"]
    assert not [attack for attack in rows(area_table(results))["M = 5"] if "suite" in attack]
