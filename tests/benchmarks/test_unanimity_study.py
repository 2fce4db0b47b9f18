"""The study of two guards that must agree: its counts, and its table."""

import pytest
import torch
from clusterguard.samples import load_digits

from benchmarks.running import count_accepted, count_broken, count_without_proof, read_study
from benchmarks.studies import unanimity


@pytest.mark.slow
def test_both_together_prove_what_either_proves_and_accept_what_both_accept():
    images, labels = load_digits("test")[:20]
    judges = unanimity.load_judges()
    accepted = [count_accepted(judge, images, labels)["accepted"] for judge in judges.values()]
    assert accepted[2] <= min(accepted[:2])
    proofs = count_without_proof(judges["both"], images, labels, "l0", 5)
    broken = count_broken(judges["both"], images[:3], labels[:3], "l0", 5, "standard")
    assert broken["count"] <= proofs["count"] <= proofs["of"]
    for judge in judges.values():
        assert not torch.isnan(judge.thresholds).any()


def test_the_committed_table_is_that_of_the_committed_counts():
    content = read_study(unanimity.UNANIMITY, {})
    counts = content["counts"]
    table = (unanimity.UNANIMITY / "table.md").read_text()
    assert table == "\n".join(unanimity.unanimity_lines(counts)) + "\n"
    assert {name.partition("/")[0] for name in counts} == set(unanimity.load_judges())
    for name, found in counts.items():
        judge, kind, *threat = name.split("/")
        proof = counts.get("/".join((judge, "proof", *threat)))
        if kind == "suite" and proof:
            assert found["count"] <= proof["count"]
