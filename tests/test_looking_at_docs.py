"""The look at the site through a browser finds what it is made for. It needs playwright and a Chromium."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def look(monkeypatch):
    pytest.importorskip("playwright", reason="only machines that look at the site have it")
    monkeypatch.syspath_prepend(ROOT / "docs")
    monkeypatch.delitem(sys.modules, "look", raising=False)
    import look

    if look.find_chromium() is None:
        pytest.skip("there is no Chromium")
    return look.look


def test_faults_are_named_by_page(look, tmp_path):
    pages = {
        "good": "<p>short</p>",
        "wide": "<main style='width:1500px'>wide</main>",
        "phone": "<main style='width:600px'>too wide for a phone</main>",
        "cut": "<div style='overflow:hidden'><p style='width:2000px'>hidden</p></div>",
        "loud": "<script>console.error('oh no')</script>",
        "broken": "<script>nothing()</script>",
    }
    for name, body in {**pages, "": "<p>home</p>"}.items():
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "index.html").write_text(f"<!doctype html><link rel=icon href=data:,><body>{body}")
    faults = look(tmp_path)
    assert {fault.split("/")[0] for fault in faults} == {"wide", "phone", "loud", "broken", "there is no search"}
    assert sum(fault.startswith("phone/index.html, 390") for fault in faults) == 4  # both schemes, page and element
    assert not [fault for fault in faults if fault.startswith("phone/index.html, 1280")]
    assert any("oh no" in fault for fault in faults)
