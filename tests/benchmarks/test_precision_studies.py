"""Studies of precision: that their tables show their counts, and that bfloat16 loses nothing in them."""

import json

from benchmarks.studies import certified_precision, suite_runs


def test_the_suite_breaks_as_many_images_in_bfloat16_and_as_in_0_1():
    runs = json.loads((suite_runs.SUITE_RUNS / "counts.json").read_text())["runs"]
    assert {run.key for run in suite_runs.planned_runs()} == {*runs}
    for run in suite_runs.planned_runs():
        exact = runs[run._replace(side="float32").key]
        fewer, more = sorted((run.side, "float32"), key=lambda side: ("0.1", "float32", "bf16").index(side))
        counts = {run.side: len(runs[run.key]["broken"]), "float32": len(exact["broken"])}
        assert counts[fewer] <= counts[more]
        assert runs[run.key]["images"] == run.images
    assert (suite_runs.SUITE_RUNS / "table.md").read_text() == "\n".join(suite_runs.run_lines(runs)) + "\n"


def test_training_for_certificates_in_bfloat16_proves_as_much():
    folder = certified_precision.CERTIFIED_PRECISION
    runs = json.loads((folder / "counts.json").read_text())["runs"]
    sums = {
        precision: sum(run["proved"] for run in runs if run["precision"] == precision)
        for precision in ("float32", "bf16")
    }
    assert sums["bf16"] >= 0.99 * sums["float32"]
    assert (folder / "table.md").read_text() == "\n".join(certified_precision.certified_lines(runs)) + "\n"
