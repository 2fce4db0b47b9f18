from itertools import pairwise

import pytest
import torch

from benchmarks.studies.speed import _head as head
from benchmarks.studies.speed.__main__ import TABLE, table_lines
from benchmarks.studies.speed._measure import count_operators, median_ratio, time_in_pairs


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


def test_the_committed_tables_are_those_of_the_committed_measurements():
    assert TABLE.read_text() == "\n".join(table_lines()) + "\n"
