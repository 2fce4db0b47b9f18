import xml.etree.ElementTree as ElementTree

import pytest

pytest.importorskip("matplotlib")

from made_up_results import load_table, made_up, points, read

from benchmarks.reporting import _figures as figures


def lines_of(name, run):
    """A figure of lines, of which the attacks that `run` accepts have been run."""
    table = load_table(name)
    made = {}
    for cell in table.cells:
        variants = dict.fromkeys((f"step {size:g}" for size in cell.options["step_sizes"]), "11100000")
        made[cell.detector, cell.attack] = made_up(variants) if run(cell.attack) else None
    return read(name, made)


FIGURES = {
    "full lines": lambda: lines_of("figure6-mnist", lambda attack: True),
    "partial lines": lambda: lines_of("figure7-mnist", lambda attack: "l2" in attack and "300 steps" not in attack),
    "empty lines": lambda: lines_of("figure6-mnist", lambda attack: False),
    "full points": lambda: read(
        "figure1-mnist",
        {(d, "PGD linf 0.3 T"): made_up({"": "1" * 8}, **points(True, False)) for d in ("ours", "vanilla")},
    ),
    "partial points": lambda: read(
        "figure2-mnist", {("ours", "PGD linf 0.3 T"): made_up({"": "1" * 8}, **points(False, False))}
    ),
    "empty points": lambda: read("figure1-mnist", {}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_drawn_whatever_has_been_run(name, tmp_path, monkeypatch):
    drawn = []
    save = figures._save
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure) or save(figure, path))
    png, svg = figures.draw_figure(FIGURES[name](), tmp_path / "figure")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    texts = {text.get_text() for axis in drawn[0].axes for text in axis.texts}
    labels = [text.get_text() for legend in drawn[0].legends for text in legend.get_texts()]
    assert ("not run" in texts) == (name not in ("full lines", "partial lines", "full points"))
    if name == "partial lines":
        assert labels[:2] == ["PGD ℓ∞ 0.4 U, not run", "PGD ℓ2 2.0 U, 7 of 8 run"]
    if name == "partial points":
        assert drawn[0].axes[0].get_title() == "Ours, benign training only"
        assert drawn[0].axes[0].get_xlabel() == "0 of 2 accepted under a wrong label"


def test_a_figure_is_the_same_file_every_time(tmp_path):
    results = FIGURES["full lines"]()
    first = [path.read_bytes() for path in figures.draw_figure(results, tmp_path / "a")]
    assert first == [path.read_bytes() for path in figures.draw_figure(results, tmp_path / "b")]


def test_points_of_figures_are_where_the_attack_was():
    sizes = figures.lines_by_step_size(FIGURES["full lines"]())
    assert [point.x for point in sizes["PGD ℓ1 15 U"]] == [0.5, 1, 2, 4, 8, 16]
    assert {point.rate.mean for point in sizes["PGD ℓ1 15 U"]} == {3 / 8}
    steps = figures.lines_by_iterations(FIGURES["partial lines"]())
    assert [point.x for point in steps["PGD ℓ2 2.0 U"]] == [1, 3, 10, 30, 100, 300, 1000, 2000]
    assert [len(point.rate.values) for point in steps["PGD ℓ2 2.0 U"]] == [1, 1, 1, 1, 1, 0, 1, 1]
