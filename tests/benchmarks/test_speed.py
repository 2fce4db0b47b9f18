from itertools import pairwise

import pytest
import torch
from clusterguard import PGD, ClusterGuard
from clusterguard.detection import Verdicts, is_broken
from torch import nn
from typer.testing import CliRunner

from benchmarks.studies.speed import _harm as harm
from benchmarks.studies.speed import _head as head
from benchmarks.studies.speed import _race as race
from benchmarks.studies.speed import _tables as tables
from benchmarks.studies.speed.__main__ import app
from benchmarks.studies.speed._measure import count_operators, median_ratio, time_in_pairs
from benchmarks.studies.speed._operators import count_step
from benchmarks.studies.speed._race import BARE, OUR_SIDES, Race, ratio_of, run_races, time_in_rounds
from benchmarks.studies.speed._roofline import CONVOLUTIONS, count_gflop, record_convolutions


def test_the_faster_side_wins_whichever_it_is():
    def work(size):
        return lambda: sum(range(size))

    assert time_in_pairs(work(1000), work(50_000), repeats=7).low > 2
    assert time_in_pairs(work(50_000), work(1000), repeats=7).high < 0.5


@pytest.mark.parametrize(
    ("pairs", "skipped"), [(5, 0), (6, 0), (8, 0), (9, 1), (12, 2), (21, 5)]
)  # of sign-test tables
def test_intervals_are_those_of_the_sign_test(pairs, skipped):
    span = median_ratio([float(value) for value in range(pairs)])
    assert (span.low, span.high) == (skipped, pairs - 1 - skipped)
    assert span.median == (pairs - 1) / 2


def test_more_pairs_make_narrower_intervals():
    widths = [(span := median_ratio(torch.linspace(0, 1, n).tolist())).high - span.low for n in (7, 21, 101)]
    assert all(wide > narrow for wide, narrow in pairwise(widths))


def test_counts_do_not_drift():
    image = torch.rand(1, 1, 64, 64)
    first, second = (count_operators(lambda: (image * 2).relu()) for _ in range(2))
    assert first == second
    assert first["operators"] >= 2
    assert first["megabytes"] >= 2 * 64 * 64 * 4 / 2**20 - 0.01


def test_both_sides_of_a_row_compute_the_same():
    (row,) = head.compare_heads(torch.device("cpu"), sizes=((1000, 64),))
    row.check(row.ours(), row.theirs())


def test_sides_of_a_race_run_once_in_each_round_and_are_compared_round_by_round():
    calls = []
    seconds = time_in_rounds({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4)
    assert "".join(calls) == "cbaabccbaabc"
    assert {len(taken) for taken in seconds.values()} == {4}
    ratio = ratio_of({"theirs": [2.0, 6.0, 4.0], "ours": [1.0, 2.0, 4.0]}, "theirs", "ours")
    assert (ratio.median, ratio.pairs) == (2.0, 3)


def test_a_race_is_written_with_its_machine_and_becomes_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.studies.speed._race.SPEED_RESULTS", tmp_path)
    monkeypatch.setattr(tables, "SPEED_RESULTS", tmp_path)
    sides = {OUR_SIDES[0]: lambda: 0.5, OUR_SIDES[1]: lambda: 0.25, BARE[1]: lambda: None, "ART": lambda: 0.75}
    races = iter([Race("PGD-40 linf, SmallCNN, batch 1", sides, gradients=40, success=lambda result: result)])
    run_races("attack", races, torch.device("cpu"))
    lines = "\n".join(tables.table_lines())
    assert "| ART |" in lines
    assert "| 0.750 |" in lines
    assert "| PGD-40 linf, SmallCNN, batch 1 | clusterguard, float32 | ART (best peer) |" in lines
    assert "### Training steps\n\n*Not run: cpu and cuda.*" in lines
    assert lines.count("attack-cpu.json") == 1


def test_a_processor_without_instructions_for_bfloat16_races_in_float32_only(tmp_path, monkeypatch):
    monkeypatch.setattr(race, "SPEED_RESULTS", tmp_path)
    monkeypatch.setattr(tables, "SPEED_RESULTS", tmp_path)
    monkeypatch.setattr(race, "processor_name", lambda: "Some CPU, no instructions for bfloat16")
    sides = {OUR_SIDES[0]: lambda: None, OUR_SIDES[1]: pytest.fail, BARE[0]: lambda: None, BARE[1]: pytest.fail}
    alone = dict.fromkeys(CONVOLUTIONS, lambda: None) | {CONVOLUTIONS[1]: pytest.fail}
    facts = {"GFLOP of a gradient": 1.0}
    for group, name in (("batches", "PGD-4, SmallCNN, batch 1"), ("roofline", "PGD-4, SmallCNN, batch 64")):
        run_races(group, iter([Race(name, sides | alone, gradients=1, facts=facts)]), torch.device("cpu"))
    lines = list(tables.table_lines())
    assert any(line.startswith("| PGD-4, SmallCNN, batch 1 |") and line.endswith("| – |  |") for line in lines)
    assert [line.split(" | ")[1] for line in lines if line.startswith("| PGD-4, SmallCNN, batch 64 |")] == ["float32"]
    assert "| PGD-4, SmallCNN | clusterguard, bfloat16 | bare loop, bfloat16 | not run | ≥ 0.9 |" in lines


@pytest.mark.parametrize("command", [["run", "compiled"], ["profile"], ["harm"]])
def test_groups_about_bfloat16_are_skipped_with_a_word_where_a_processor_has_no_instructions_for_it(
    command, monkeypatch
):
    monkeypatch.setattr(race, "processor_name", lambda: "Some CPU, no instructions for bfloat16")
    outcome = CliRunner().invoke(app, [*command, "--device", "cpu"])
    assert (outcome.exit_code, outcome.exception) == (0, None)
    assert outcome.output.startswith(f"{command[-1]}: skipped")


def test_the_operations_of_convolutions_are_counted_forward_and_back():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2))
    calls = record_convolutions(network, torch.rand(2, 3, 6, 6), torch.bfloat16, torch.channels_last)
    assert [call.images.dtype for call in calls] == [torch.bfloat16] * 2
    products = 2 * 16 * (8 * 27 + 4 * 4)  # images and places, then the products of each layer at a place
    assert count_gflop(calls) == pytest.approx(4 * products / 1e9)


def test_a_step_is_counted_without_what_an_attack_does_once():
    image = torch.rand(1, 1, 8, 8)

    def work(steps):
        return lambda: [image.exp() for _ in range(steps + 5)]

    assert count_step({"stage": (work(10), work(2))})["stage"]["operators"] == 1


def test_the_harm_of_an_attack_is_counted_in_each_precision():
    guard = ClusterGuard.from_pretrained("guards/mnist")
    images, labels = harm.accepted_digits(guard, torch.device("cpu"))
    broken = harm.count_broken_by_precision(guard, images[:4], labels[:4], eps=0.5, steps=20)
    assert list(broken) == ["float32", "autocast alone", "working copy"]
    attacked = guard.detect(PGD(eps=0.5, step_size=0.05, steps=20)(guard, images[:4], labels[:4]))
    assert broken["float32"] == int(is_broken(Verdicts(attacked, labels[:4])).sum()) > 0


def test_the_committed_tables_are_those_of_the_committed_measurements():
    assert tables.TABLE.read_text() == "\n".join(tables.table_lines()) + "\n"
