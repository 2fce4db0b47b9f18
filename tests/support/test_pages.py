from html.parser import HTMLParser

from clusterguard._support import Markup, html_page, html_table


class Tags(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def test_cells_are_shown_as_they_are_unless_they_are_html():
    name = "<script>alert('1')</script> & \""
    page = Tags(html_page(name, [html_table([name, name], [[name, name], [Markup("<i>a</i>"), "2"]])]))
    assert "script" not in page.tags
    assert page.text.count(name) == 5  # title, head, and cells
    assert page.tags.count("i") == 1


def test_a_name_cannot_control_or_reorder_the_text_around_it():
    page = html_page("a\x1b[31m\x00", [html_table([], [["\u202etxt.exe\u2028", "two\nlines", "e\u0301 \u200d 名"]])])
    assert "<title>a\\x1b[31m\\x00</title>" in page
    assert "<td>\\u202etxt.exe\\u2028</td><td>two\nlines</td><td>e\u0301 \u200d 名</td>" in page


def test_only_numbers_are_set_to_the_right():
    table = html_table(["a", "b"], [["1", "2"], ["1", "1e-3"], ["1", "none"], ["1", "3 classes"], ["1"]])
    assert table.count("class=n") == 2
    assert "class=n" not in html_table([], [["1", "2"]])


def test_a_page_loads_nothing():
    page = html_page("a", [])
    assert not {"link", "script", "img"} & {*Tags(page).tags}
    assert "url(" not in page
    assert "@import" not in page
