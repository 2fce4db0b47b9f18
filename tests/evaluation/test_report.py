import html
import json
import re
import warnings
from dataclasses import replace

import pytest
import torch
from clusterguard import PGD, WorstCaseSuite, __version__, evaluate
from clusterguard.attacks import EFFORTS
from clusterguard.detection import Rate
from clusterguard.evaluation import CertifiedBound, evaluation_figures, to_html
from effort import FEW_STEPS
from markdown_it import MarkdownIt
from torch.utils.data import DataLoader, TensorDataset


@pytest.fixture(scope="module")
def report():
    from clusterguard import ClusterGuard
    from torch import nn

    torch.manual_seed(0)
    guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU()), num_classes=3, representation_dim=6)
    guard.thresholds = torch.full((3,), 14.0)
    images = torch.rand(40, 1, 8, 8)
    loader = DataLoader(TensorDataset(images, guard.eval()(images).argmax(1)), batch_size=20)
    attacks = {
        "PGD <linf>": PGD(eps=0.2, step_size=0.05, steps=10),
        "PGD l2": PGD(norm="l2", eps=1.0, step_size=0.2, steps=10),
        "suite": WorstCaseSuite("linf", eps=0.2, budget="quick"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EFFORTS, "quick", FEW_STEPS)
        return evaluate(guard, attacks, loader, generator=torch.Generator().manual_seed(3))


def test_the_json_says_what_was_done(report, tmp_path):
    data = json.loads(report.to_json(tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert data["versions"]["clusterguard"] == __version__
    assert data["seed"] == 3
    assert [result["name"] for result in data["results"]] == ["PGD <linf>", "PGD l2", "suite"]
    assert data["results"][0]["cost"] == {"forward": 40 * 11, "backward": 40 * 10}
    assert data["results"][2]["stages"][0]["name"] == "APGD"
    assert set(data["worst_by_norm"]) == {"linf", "l2"}
    assert data["sanity"]["warnings"] == list(report.sanity.warnings)
    assert "verdict" not in data["results"][0]


def test_unions_are_over_images(report):
    by_norm = [rate.count for rate in report.worst_by_norm.values()]
    assert max(by_norm) <= report.worst_case.count <= sum(by_norm)
    assert report.worst_by_norm["linf"].count >= max(report.results[0].success.count, report.results[2].success.count)
    assert report.largest_mean_asr == max(result.success.value for result in report.results)


def test_the_markdown_has_every_attack_stage_and_warning(report):
    text = report.to_markdown()
    for piece in ("PGD l2", "worst of linf, per image", "Stages of suite", "| APGD |", "Sanity, a probe of"):
        assert piece in text


def test_what_is_proved_stands_beside_what_was_found(report, tmp_path):
    assert "proved" not in report.to_markdown() + to_html(report, tmp_path / "report.html").read_text()
    proved = replace(report, certified=CertifiedBound(0.2, Rate(30, 40)))
    row = "proved upper bound, linf 0.2"
    assert f"| {row} | {Rate(30, 40)} |" in proved.to_markdown()
    assert f"<td>{row}</td>" in to_html(proved, tmp_path / "report.html").read_text()


def test_the_page_needs_nothing_else_and_fits_a_phone(report, tmp_path):
    page = to_html(report, tmp_path / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=['\"](?!data:|#)", page)
    assert page.count("<svg") == page.count("<figure>") == 5
    assert "PGD &lt;linf&gt;" in page
    assert "PGD <linf>" not in page
    assert "Worst-broken images" in page
    assert "<meta name=viewport content='width=device-width,initial-scale=1'>" in page
    assert "@media(prefers-color-scheme:dark)" in page
    assert '<td class=n data-head="forward">' in page  # on a phone, where rows are blocks without a head
    assert page.count("<div class=wide><table>") == page.count("<table>")  # each scrolls, not the page


def test_pictures_take_the_colours_of_the_page(report):
    for picture, _ in evaluation_figures(report).values():
        assert "currentColor" in picture
        assert "#000000" not in picture
        assert "#ffffff" not in picture


def test_pictures_are_the_same_every_time_and_share_no_identifiers(report):
    first, second = (evaluation_figures(report) for _ in range(2))
    assert first == second
    identifiers = [{*re.findall(r' id="([^"]+)"', picture)} for picture, _ in first.values()]
    assert len(set().union(*identifiers)) == sum(map(len, identifiers))


def test_each_set_of_images_has_a_histogram_of_its_own(report):
    """Five on top of each other cannot be told apart."""
    picture, _ = evaluation_figures(report)["Suspicion"]
    for name in ("benign", "PGD &lt;linf&gt;", "PGD l2", "suite"):
        assert f">{name}</text>" in picture


def test_pictures_and_tables_name_classes_that_have_names(report, tmp_path):
    named = replace(report, class_names=("cat", "dog", "eel"))
    picture, _ = evaluation_figures(named)["Worst-broken images"]
    labels = [*report.gallery.labels, *report.gallery.predicted]
    assert labels
    for index in labels:
        assert f">{named.class_names[index]}</text>" in picture
    assert "<td>cat</td>" in to_html(named, tmp_path / "report.html").read_text()


NAMES = ["a | b", "two\nlines", "`x` $y_{$ <b>bold</b>", "_hidden [a](b) **c** \\", "# 1. heading", "$\\frac{"]


def test_names_of_attacks_are_shown_as_they_are_and_mean_nothing(report, tmp_path):
    results = [report.results[0], report.results[1]] * 3
    renamed = [replace(result, name=name, runs=2) for result, name in zip(results, NAMES, strict=True)]
    norms = {f"<{norm}> |": rate for norm, rate in report.worst_by_norm.items()}
    hostile = replace(report, results=tuple(renamed), worst_by_norm=norms)
    page = MarkdownIt("commonmark").enable("table").render(hostile.to_markdown())
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)]
    assert {len(row) for row in rows if row} == {5}
    worst = [f"worst of {norm}, per image" for norm in norms]
    shown = [html.unescape(row[0]) for row in rows if row]
    assert shown[:8] == [*(" ".join(name.split()) for name in NAMES), *worst]
    for name in NAMES:
        assert f"<p>{' '.join(name.split())} took 2 runs" in html.unescape(page)
    assert {*re.findall(r"<([a-z0-9]+)", page)} == {"table", "thead", "tbody", "tr", "th", "td", "p"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = to_html(hostile, tmp_path / "report.html").read_text()
    assert all(html.escape(name) in written for name in NAMES)
    assert "<b>" not in written


def test_without_matplotlib_the_page_says_what_to_install(report, tmp_path, monkeypatch):
    import sys

    from clusterguard.errors import MissingDependencyError

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match="pip install matplotlib"):
        to_html(report, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())
