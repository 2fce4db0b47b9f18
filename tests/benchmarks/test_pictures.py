"""The pictures of the documentation show the results, also to people who do not see them."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from clusterguard.errors import ConfigurationError
from typer.testing import CliRunner

import benchmarks.studies.pictures.__main__ as pictures
from benchmarks.studies.pictures.__main__ import MEASURED, PICTURES, draw_pictures
from benchmarks.studies.pictures._templates import measure_templates

ROOT = Path(__file__).parents[2]
DRAWN = draw_pictures()
SVG = "{http://www.w3.org/2000/svg}"


def test_every_committed_picture_is_drawn_from_the_results():
    assert {path.stem: path.read_text(encoding="utf-8") for path in PICTURES.glob("*.svg")} == DRAWN


@pytest.mark.parametrize("name", DRAWN)
def test_pictures_say_what_they_show_and_take_the_colour_of_the_page(name):
    tree = ElementTree.fromstring(DRAWN[name])
    known = {element.get("id"): element for element in tree.iter() if element.get("id")}
    title, text = (known[label] for label in tree.get("aria-labelledby").split())
    assert (title.tag, text.tag, tree.get("role")) == (f"{SVG}title", f"{SVG}desc", "img")
    assert title.text
    assert len(text.text) > 40
    assert tree.get("fill") == "currentColor"
    assert not [part for part in tree.iter(f"{SVG}text") if part.get("fill")], "text in a colour of its own"
    assert not [part for part in tree.iter(f"{SVG}rect") if part.get("width") == "100%"], "a background"


def test_nothing_moves_for_people_who_want_no_motion():
    before, _, after = DRAWN["method"].partition("@media (prefers-reduced-motion:no-preference)")
    assert "animation" not in before
    assert "animation" in after
    assert not [name for name in DRAWN if name != "method" and "animation" in DRAWN[name]]


def test_colours_read_on_both_backgrounds_of_the_site():
    from benchmarks.studies.pictures._svg import COLOURS

    def luminance(colour):
        parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in COLOURS:
        for background in ("#ffffff", "#1e2129"):
            dark, light = sorted((luminance(colour), luminance(background)))
            assert (light + 0.05) / (dark + 0.05) >= 3, (colour, background)


def test_the_site_takes_pictures_into_its_pages(monkeypatch):
    """As an image of its own, a picture would not know which scheme the reader has chosen."""
    pytest.importorskip("latex2mathml")
    monkeypatch.syspath_prepend(ROOT / "docs")
    monkeypatch.delitem(sys.modules, "hooks", raising=False)
    import hooks

    page = hooks.on_page_content('<p><img alt="x" src="../pictures/cost.svg" /> <img alt="y" src="other.svg" /></p>')
    assert 'viewBox="0 0 480' in page
    assert "pictures/cost.svg" not in page
    assert '<img alt="y" src="other.svg" />' in page


def test_a_part_is_measured_alone_and_the_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MEASUREMENTS", {"radii": lambda images: [images], "service": pytest.fail})
    file = tmp_path / "pictures.json"
    file.write_text(json.dumps({"service": {"figures": 5}}))
    outcome = CliRunner().invoke(pictures.app, ["measure", "radii", "--images", "7", "--output", str(file)])
    assert (outcome.exit_code, outcome.exception) == (0, None)
    content = json.loads(file.read_text())
    assert content["service"] == {"figures": 5}
    assert content["radii"]["figures"] == [7]
    assert content["radii"]["provenance"]["versions"]["torch"] == torch.__version__
    with pytest.raises(ConfigurationError, match="a part among radii, service, got 'colour'"):
        CliRunner().invoke(pictures.app, ["measure", "colour", "--output", str(file)], catch_exceptions=False)


def test_what_captions_say_is_what_was_measured():
    measured = json.loads(MEASURED.read_text())["service"]["figures"]
    page = " ".join((ROOT / "docs" / "how-to" / "monitor.md").read_text().split())
    drift = measured["drift"]
    assert f"rises from {drift['rate_before']:.3f} to {drift['rate_after']:.3f}" in page
    alarm = 50 * (1 + next(i for i, value in enumerate(drift["drifting"]) if value >= drift["run_length"]))
    assert f"at most {alarm - drift['begins']} further images" in page
    assert max(drift["unchanged"]) < drift["run_length"]
    page = " ".join((ROOT / "docs" / "thresholds.md").read_text().split())
    at_one_percent = measured["thresholds"][0]
    mean, low, high = (f"{100 * at_one_percent[key]:.2f} %" for key in ("mean", "low", "high"))
    assert f"realised rates is {mean}" in page
    assert f"between {low} and {high}" in page


@pytest.mark.slow
def test_the_picture_of_templates_is_measured_as_it_was():
    (first, *_), (kept, *_) = measure_templates(), json.loads(MEASURED.read_text())["templates"]["figures"]
    assert (first["proved"], first["pixels"]) == (kept["proved"], kept["pixels"])
    for side, old in zip(first["sides"], kept["sides"], strict=True):
        assert side["class"] == old["class"]
        assert side["distance"] == pytest.approx(old["distance"], rel=1e-4)
