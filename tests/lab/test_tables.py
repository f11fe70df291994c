"""Tables of the README: current, complete, and rewritten where they stand and nowhere else."""

import re
from fnmatch import fnmatch

import pytest
from support.places import ROOT

import vlmtok
from vlmtok.lab import catalogue, family_table, tables

GOLDEN = sorted(path.name for path in (ROOT / "tests" / "golden").iterdir() if path.suffix in (".npz", ".json"))


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def rows(table):
    return [cells(line) for line in table.splitlines()[2:]]


def test_tables_of_the_readme_are_current():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- table: ([\w-]+) -->\n(.*?)<!-- end: \1 -->", text, re.S)
    assert sorted(name for name, _ in blocks) == sorted(tables.TABLES)
    for name, table in blocks:
        assert table.strip() == tables.TABLES[name](), "run: python -m vlmtok.lab.tables README.md"
    assert tables.rewritten(text) == text


def test_every_method_has_paper_training_parity_and_deviations():
    papers, places, *_ = tables.method_table().split("\n\n")
    assert [row[0].strip("`") for row in rows(papers)] == vlmtok.list_methods()
    assert [row[0].strip("`") for row in rows(places)] == vlmtok.list_methods()
    for (name, paper, free, parity, differs), place in zip(rows(papers), rows(places)):
        cls = vlmtok.method_class(name.strip("`"))
        assert cls.paper in paper and (not cls.arxiv or f"arxiv.org/abs/{cls.arxiv}" in paper)
        assert free == ("yes" if cls.training_free else "no") and parity
        assert differs == (f"[{len(cls.deviations)}](#{cls.spec_name()}-differs)" if cls.deviations else "-")
        assert any(cell != "-" for cell in place[1:]), "it runs somewhere"


def test_deviations_stand_behind_the_table_word_for_word():
    text = tables.method_table()
    for name in vlmtok.list_methods():
        cls = vlmtok.method_class(name)
        assert all(f"\n- {one}\n" in text for one in cls.deviations)
        assert (f'<a id="{name}-differs"></a>' in text) == bool(cls.deviations)
    assert text.count("\n- ") == sum(len(vlmtok.method_class(name).deviations) for name in vlmtok.list_methods())


def test_places_are_those_where_methods_run():
    _, places, *_ = tables.method_table().split("\n\n")
    heads = [head.split("<br>") for head in cells(places.splitlines()[0])[1:]]
    assert sorted(adapter for head in heads for adapter in head) == sorted(family_table.ADAPTERS)
    for name, *found in rows(places):
        fit = catalogue.adapters_of(name.strip("`"))
        for adapters, cell in zip(heads, found):
            assert all((adapter in fit) == (cell != "-") for adapter in adapters), (name, adapters)
    by_name = {row[0].strip("`"): row[1:] for row in rows(places)}
    towers, dual, language = (
        heads.index(next(h for h in heads if a in h)) for a in ("timm-vit", "open_clip", "transformers-vlm")
    )
    assert by_name["tome"][towers] == "vision" and by_name["tca"][towers] == "vision (CLS)"
    assert by_name["crossget"][dual] == "vision, text" and by_name["crossget"][language] == "vision, features"
    assert by_name["todre"][language] == "projected, decoder" and by_name["todre"][towers] == "-"


def test_parity_names_reference_vectors_that_are_here():
    named = {}
    for name in vlmtok.list_methods():
        given = re.search(r"\(([\w*., ]+)\)$", vlmtok.method_class(name).parity)
        named[name] = given[1].split(", ") if given else []
        for pattern in named[name]:
            assert any(fnmatch(file, pattern) for file in GOLDEN), f"{name}: no file {pattern}"
    assert [name for name, given in named.items() if not given] == ["averagepool", "random"]
    patterns = [pattern for given in named.values() for pattern in given]
    assert [file for file in GOLDEN if not any(fnmatch(file, pattern) for pattern in patterns)] == []


OUT_OF_DATE = "a\n<!-- table: methods -->\nold\n<!-- end: methods -->\nb | c\n"


def test_a_file_is_written_anew_and_only_its_blocks_change(tmp_path, capsys):
    file = tmp_path / "page.md"
    file.write_text(OUT_OF_DATE)
    assert tables.main([str(file), "--check"]) == 1 and "out of date" in capsys.readouterr().out
    assert file.read_text() == OUT_OF_DATE
    assert tables.main([str(file)]) == 0
    text = file.read_text()
    assert text.startswith("a\n<!-- table: methods -->\n\n| method |") and text.endswith(
        "\n\n<!-- end: methods -->\nb | c\n"
    )
    assert "old" not in text.split("\n") and tables.method_table() in text
    assert tables.main([str(file), "--check"]) == 0 and tables.rewritten(text) == text
    assert tables.rewritten("no table") == "no table"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (OUT_OF_DATE.replace("methods", "method"), "no table 'method'; tables: methods, families"),
        (OUT_OF_DATE.replace("end: methods", "end: families"), "in turn, found"),
        (OUT_OF_DATE.replace("<!-- end: methods -->", ""), "in turn, found"),
    ],
)
def test_broken_blocks_are_refused(text, says):
    with pytest.raises(tables.TableError, match=says):
        tables.rewritten(text)


def test_bars_in_cells_do_not_end_them():
    assert tables._table(["a"], [["x | y"]]).splitlines()[-1] == "| x \\| y |"
