"""`vlmtok.tabular` and `vlmtok.sheet`: what is pasted elsewhere reads back as what it was."""

import csv
import io
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.tables import Reader

from vlmtok import sheet, tabular
from vlmtok.sheet import Sheet, Shown
from vlmtok.tabular import Table, Tabular

WORDS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
NUMBERS = st.integers(-(10**15), 10**15) | st.floats(allow_nan=False, allow_infinity=False)
RECORDS = st.lists(st.dictionaries(st.sampled_from(["a", "b,", 'c"', "d"]), WORDS | NUMBERS | st.none()), max_size=4)
CELLS = st.integers(1, 4).flatmap(
    lambda n: st.tuples(st.lists(WORDS, min_size=n, max_size=n), st.lists(st.lists(WORDS, min_size=n, max_size=n)))
)


def squeezed(text):
    return " ".join(text.split())


# ---------------------------------------------------------------------- CSV
@given(RECORDS)
def test_csv_reads_back(records):
    text = tabular.csv_of(records)
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    columns = tabular.columns_of(records)
    if not columns:
        assert not rows
        return
    assert len(rows) == len(records)
    for row, record in zip(rows, records):
        assert list(row) == columns
        for name in columns:
            value = record.get(name)
            if isinstance(value, float):
                assert float(row[name]) == value and not row[name].endswith(".0")
            else:
                assert row[name] == ("" if value is None else str(value))


def test_csv_has_the_columns_of_all_records_and_whole_numbers():
    text = tabular.csv_of([{"a": 1.0}, {"a": 2.5, "b": "x,y"}, {"b": True}])
    assert text == 'a,b\n1,\n2.5,"x,y"\n,True\n'
    assert tabular.csv_of([]) == ""


def test_to_pandas_keeps_whole_numbers_whole():
    import pandas

    frame = tabular.frame_of([{"n": 5.0, "layer": None, "x": 1.5, "w": "a"}, {"n": 6, "layer": 3.0, "x": 2.0}])
    assert frame["n"].dtype == "int64" and frame["n"].tolist() == [5, 6]
    assert str(frame["layer"].dtype) == "Int64" and frame["layer"][1] == 3 and frame["layer"].isna()[0]
    assert frame["x"].dtype == "float64" and frame["w"][0] == "a" and pandas.isna(frame["w"][1])
    assert tabular.frame_of([]).empty


def test_a_missing_pandas_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'vlmtok\[notebooks\]'"):
        tabular.frame_of([{"a": 1}])


# ---------------------------------------------------------------------- Markdown, HTML, LaTeX
def cells_of(line):
    """The cells of a row of GitHub's tables, escapes undone: a bar behind an odd number of backslashes is none."""
    assert line.startswith("| ") and line.endswith(" |")
    found, cell, letters = [], "", iter(line[2:-1])
    for letter in letters:
        if letter == "\\":
            cell += next(letters)
        elif letter == "|":
            found.append(cell)
            cell = ""
        else:
            cell += letter
    return [squeezed(one) for one in (*found, cell)]


@given(CELLS)
def test_markdown_reads_back(drawn):
    head, rows = drawn
    lines = Table(head, rows).markdown().split("\n")
    assert len(lines) == 2 + len(rows)
    assert [cells_of(line) for line in (lines[0], *lines[2:])] == [[squeezed(c) for c in row] for row in (head, *rows)]
    assert all(re.fullmatch(r"-{3}:?", cell) for cell in cells_of(lines[1]))


def test_markdown_takes_bars_and_tags_for_words():
    assert Table(["a|b"], [["x\\|<b>\ny"]]).markdown() == "| a\\|b |\n| --- |\n| x\\\\\\|\\<b> y |"


@given(CELLS)
def test_html_reads_back(drawn):
    head, rows = drawn
    found = Reader(Table(head, rows).html())
    plain = [re.sub("\r\n?", "\n", cell) for row in (head, *rows) for cell in row]
    assert [re.sub("\r\n?", "\n", cell) for cell in found.cells] == plain
    assert {tag for tag, _ in found.tags} <= {"table", "thead", "tbody", "tr", "th", "td"}


@given(CELLS)
def test_latex_has_no_bare_special_character(drawn):
    head, rows = drawn
    lines = Table(head, rows).latex().split("\n")
    body = [line for line in lines[2:-2] if line != r"\midrule"]
    assert len(body) == 1 + len(rows)
    for line in body:
        assert line.endswith(r" \\")
        words = re.sub(r"\\text[a-z]+\{\}|\\[&%$#_{}]|\{[\[*]\}", "", line.removesuffix(r" \\"))
        assert words.count(" & ") >= len(head) - 1 and not re.search(r"[\\%$#_{}~^<>|*\[]", words)
        assert words.replace(" & ", "", len(head) - 1).count("&") == 0


def test_latex_of_a_row_that_begins_like_an_argument():
    assert Table(["a"], [["[8;8]"], ["*"], ["50 %_x\\y"]]).latex() == "\n".join(
        (r"\begin{tabular}{l}", r"\toprule", r"a \\", r"\midrule", r"{[}8;8] \\", r"{*} \\")
        + (r"50 \%\_x\textbackslash{}y \\", r"\bottomrule", r"\end{tabular}")
    )


def test_numbers_stand_to_the_right():
    table = Table(["name", "n", "words"], [["1", "5", "5"], ["2", "-1.5 M", "x"]])
    assert [table.numeric(i) for i in range(3)] == [False, True, False]
    assert table.markdown().split("\n")[1] == "| --- | ---: | --- |"
    assert table.latex().startswith(r"\begin{tabular}{lrl}")
    sides = [attrs["style"] for tag, attrs in Reader(table.html()).tags if tag == "td"]
    assert sides[:3] == ["text-align:left", "text-align:right", "text-align:left"]


class Rows(Tabular):
    def to_records(self):
        return [{"a": 1}]

    def table(self):
        return Table(["a"], [["<1>"]])

    def notes(self):
        return ["mind <this>"]


def test_notes_follow_the_table_in_every_form():
    assert Rows().to_markdown().endswith("\n\n- mind <this>\n")
    assert "<li>mind &lt;this&gt;</li>" in Rows()._repr_html_() and "<td" in Rows()._repr_html_()
    assert str(Rows()).splitlines()[-1] == "mind <this>" and "<1>" in str(Rows())
    assert Rows().to_latex().startswith("% mind <this>\n\\begin")


# ---------------------------------------------------------------------- sheets
def test_a_sheet_is_text_and_html():
    found = Sheet(
        "a <title>", ["x & y"], [Table(["<h>"], [["<c>"]])], ["<n>"], Image.new("RGB", (4, 2)), 'the "legend"'
    )
    text = found.text()
    assert [word in text for word in ("a <title>", "x & y", "<h>", "<c>", "<n>")] == [True] * 5 and "\x1b" not in text
    page = found.html()
    tags = Reader(page).tags
    assert {tag for tag, _ in tags} == {
        *("p", "b", "figure", "figcaption", "img", "ul", "li"),
        *("table", "thead", "tbody", "tr", "th", "td"),
    }
    (img,) = [attrs for tag, attrs in tags if tag == "img"]
    assert img["src"].startswith("data:image/png;base64,iVBOR") and img["alt"] == 'the "legend"'
    assert "color" not in page and "background" not in page  # the page's own, light or dark


def test_pictures_are_shrunk_or_shown_larger():
    with Image.open(io.BytesIO(sheet.png(Image.new("RGB", (4000, 1000))))) as shown:
        assert shown.size == (1200, 300)
    with Image.open(io.BytesIO(sheet.png(Image.new("RGB", (96, 90))))) as shown:
        assert shown.size == (96, 90)
    assert sheet.enlarged(Image.new("RGB", (96, 48))) == 288 and sheet.enlarged(Image.new("RGB", (640, 480))) == 640
    assert sheet.enlarged(Image.new("RGB", (4000, 1000))) == 1200
    large = Image.new("RGB", (4000, 1000))
    sheet.png(large)
    assert large.size == (4000, 1000)


def test_what_is_shown_says_the_same_everywhere():
    class Thing(Shown):
        def sheet(self):
            return Sheet("title", notes=["note"])

    assert str(Thing()) == "title\nnote" == tabular.plain(Thing())
    assert Thing()._repr_html_() == "<p><b>title</b></p>\n<ul><li>note</li></ul>"


def test_a_narrow_terminal_folds_cells_and_loses_none():
    from rich.console import Console

    spec = "pitome:ratio=0.95+divprune:keep=0.25"
    console = Console(width=40, record=True, file=io.StringIO())
    console.print(tabular.Table(["method", "answer", "MACs, total"], [[spec, "top left", "536.142 M"]]).rich())
    shown = console.export_text()
    cells = "".join(line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│"))
    assert cells == spec
