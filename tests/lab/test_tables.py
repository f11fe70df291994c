"""Tables of methods: complete, and true to the registry."""

import re
from fnmatch import fnmatch

from support.places import ROOT

import vlmtok
from vlmtok.lab import catalogue, family_table, tables

GOLDEN = sorted(path.name for path in (ROOT / "tests" / "golden").iterdir() if path.suffix in (".npz", ".json"))


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def rows(table):
    return [cells(line) for line in table.splitlines()[2:]]


def named(cell):
    """The method of a cell, which links to its page."""
    name, page = re.fullmatch(r"\[`(\w+)`\]\((\w+)\.md\)", cell).groups()
    assert name == page
    return name


def test_every_method_has_paper_training_parity_and_deviations():
    papers, places, *_ = tables.method_table().split("\n\n")
    assert [named(row[0]) for row in rows(papers)] == vlmtok.list_methods()
    assert [named(row[0]) for row in rows(places)] == vlmtok.list_methods()
    for (name, paper, free, parity, differs), place in zip(rows(papers), rows(places)):
        cls = vlmtok.method_class(named(name))
        assert cls.paper in paper and (not cls.arxiv or f"arxiv.org/abs/{cls.arxiv}" in paper)
        assert free == ("yes" if cls.training_free else "no") and parity.replace("\\*", "*") == cls.parity
        page = f"{cls.spec_name()}.md#differs"
        assert differs == (f"[{len(cls.deviations)}]({page})" if cls.deviations else "-")
        assert any(cell != "-" for cell in place[1:]), "it runs somewhere"


def test_places_are_those_where_methods_run():
    _, places, *_ = tables.method_table().split("\n\n")
    heads = [head.split("<br>") for head in cells(places.splitlines()[0])[1:]]
    assert sorted(adapter for head in heads for adapter in head) == sorted(family_table.ADAPTERS)
    for name, *found in rows(places):
        fit = catalogue.adapters_of(named(name))
        for adapters, cell in zip(heads, found):
            assert all((adapter in fit) == (cell != "-") for adapter in adapters), (name, adapters)
    by_name = {named(row[0]): row[1:] for row in rows(places)}
    towers, dual, language = (
        heads.index(next(h for h in heads if a in h)) for a in ("timm-vit", "open_clip", "transformers-vlm")
    )
    assert by_name["tome"][towers] == "vision" and by_name["tca"][towers] == "vision"
    assert by_name["crossget"][dual] == "vision, text" and by_name["crossget"][language] == "vision, features"
    assert by_name["todre"][language] == "projected, decoder" and by_name["todre"][towers] == "-"


def test_parity_names_reference_vectors_that_are_here():
    named = {}
    for name in vlmtok.list_methods():
        given = re.search(r"\(([\w*., ]+)\)$", vlmtok.method_class(name).parity)
        named[name] = given[1].split(", ") if given else []
        for pattern in named[name]:
            assert any(fnmatch(file, pattern) for file in GOLDEN), f"{name}: no file {pattern}"
    assert [name for name, given in named.items() if not given] == [
        "averagepool",
        "ems_style",
        "grid",
        "kv_norm",
        "kv_random",
        "learned",
        "random",
        "snapkv",
        "streaming",
        "tokencorr",
    ]
    patterns = [pattern for given in named.values() for pattern in given]
    assert [file for file in GOLDEN if not any(fnmatch(file, pattern) for pattern in patterns)] == []


def test_bars_in_cells_do_not_end_them():
    assert tables.table(["a"], [["x | y"]]).splitlines()[-1] == "| x \\| y |"


def test_patterns_of_files_are_no_emphasis():
    assert tables.parity(catalogue.entry("pitome")).endswith("(pitome_\\*, e2e_micro_vit\\*)")
