"""The study of capture–recapture: that its counts become the table, and that it goes on where it was stopped."""

import json

import pytest

from benchmarks.studies import recapture


def test_the_estimate_knows_only_its_pair():
    runs = {str(seed): [0, 1, 2, seed] for seed in range(6)} | {"standard": [7, 8]}
    for estimate, quick, both in recapture.compare_pairs(runs, images=20):
        assert estimate.either <= quick == 6
        assert both == 8
    changed = runs | {"4": [*range(10, 19)]}
    first, *_ = recapture.compare_pairs(changed, images=20)
    assert first[0] == next(recapture.compare_pairs(runs, images=20))[0]


def test_a_stopped_study_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    calls = []

    def run(guard, norm, eps, images, labels, name):
        calls.append((norm, name))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return [0] if name != "standard" else [0, 1]

    monkeypatch.setattr(recapture, "rows_broken_by", run)
    monkeypatch.setattr(recapture, "GUARDS", ("mnist-certified",))
    monkeypatch.setattr(recapture, "THREATS", (("linf", 0.4),))
    with pytest.raises(KeyboardInterrupt):
        recapture.main(images=3, output=tmp_path)
    recapture.main(images=3, output=tmp_path)
    assert [name for _, name in calls] == ["0", "1", "2", "3", "3", "4", "5", "standard"]
    table = (tmp_path / "table.md").read_text()
    assert table.count("| mnist-certified | ℓ∞ 0.4 |") == 3
    assert table.strip() in capsys.readouterr().out


def test_a_run_breaks_only_digits_that_were_accepted():
    guard = recapture.ClusterGuard.from_pretrained("guards/mnist-certified")
    images, labels = recapture.digits_to_attack(guard, 3)
    broken = recapture.rows_broken_by(guard, "l0", 30.0, images, labels, "0")
    assert set(broken) == {0, 1, 2}


def test_the_committed_table_is_that_of_the_committed_counts():
    file = recapture.RECAPTURE / "counts.json"
    if not file.exists():
        pytest.skip("the study has not run")
    assert (recapture.RECAPTURE / "table.md").read_text() == "\n".join(
        recapture.recapture_lines(json.loads(file.read_text()))
    ) + "\n"
