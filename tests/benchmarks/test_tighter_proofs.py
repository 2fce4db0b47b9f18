"""The study of proofs beyond intervals: its counts, and its table."""

import json

import pytest
from clusterguard import ClusterGuard
from clusterguard.samples import load_digits

from benchmarks.studies import tighter_proofs


@pytest.mark.slow
def test_each_method_leaves_fewer_and_nothing_that_is_proved_is_broken():
    guard = ClusterGuard.from_pretrained("guards/mnist-certified-accurate")
    counts = tighter_proofs.count_broken_and_unproved(guard, *load_digits("test")[:12], 0.4)
    assert counts["suite"] <= counts["branching"] <= counts["linear"] <= counts["intervals"] <= counts["of"]
    assert counts["found"] == 0
    both = tighter_proofs.add_counts({"a/0.4": counts}, {"a/0.4": counts})["a/0.4"]
    assert both["of"] == 2 * counts["of"]


def test_the_committed_table_is_that_of_the_committed_counts():
    content = json.loads((tighter_proofs.TIGHTER_PROOFS / "counts.json").read_text())
    table = (tighter_proofs.TIGHTER_PROOFS / "table.md").read_text()
    assert table == "\n".join(tighter_proofs.tighter_lines(content["cases"])) + "\n"
    assert content["images"] >= 100
    for counts in content["cases"].values():
        assert counts["suite"] <= counts["branching"] <= counts["linear"] <= counts["intervals"]
        assert counts["found"] == 0
