"""The study of what refusal adds to certificates: its counts, and its table."""

import json

from clusterguard import ClusterGuard
from clusterguard.samples import load_digits

from benchmarks.data import Images
from benchmarks.studies import refused_proofs


def test_tighter_thresholds_accept_less_and_refusal_only_adds_proofs():
    guard = ClusterGuard.from_pretrained("guards/mnist-certified-accurate")
    pixels, labels = load_digits("calibration").tensors
    calibration = Images((255 * pixels).round().byte(), labels)
    images, truth = load_digits("test")[:40]
    few, many = (refused_proofs.count_with_and_without(guard, calibration, images, truth, rate) for rate in (0.05, 0.4))
    assert many["threshold"] < few["threshold"]
    assert many["accepted"] < few["accepted"]
    for row in (few, many):
        for radius, without in row["without_refusal"].items():
            assert without <= row["with_refusal"][radius] <= row["accepted"]


def test_the_committed_table_is_that_of_the_committed_counts():
    counts = json.loads((refused_proofs.REFUSED_PROOFS / "counts.json").read_text())["guards"]
    table = (refused_proofs.REFUSED_PROOFS / "table.md").read_text()
    assert table == "\n".join(refused_proofs.refusal_lines(counts)) + "\n"
