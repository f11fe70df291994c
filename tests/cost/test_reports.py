"""Records of reports, and several reports as one table: numbers by hand, of LLaVA-1.5-7B without weights."""

import csv
import io

import pytest
from support.tables import cells

import vlmtok
from vlmtok import Reports
from vlmtok.cost.units import binary, si

PROMPT = {"text_tokens": 64}
"""576 visual tokens and 64 of text: rows of 640."""
TOKEN = 32 * 2 * 4096 * 2
"""Bytes of a token's keys and values in 32 layers of 4096 channels, in 16 bits."""


@pytest.fixture(scope="module")
def reports():
    specs = ("fastv:K=2:keep=0.5", "divprune:keep=0.25", "divprune:keep=0.25+fastv:K=2:keep=0.5")
    return Reports(tuple(vlmtok.estimate("llava-1.5-7b", spec, **PROMPT) for spec in specs))


# ---------------------------------------------------------------------- one report
def read(report):
    return list(csv.DictReader(io.StringIO(report.to_csv(), newline="")))


def test_each_quantity_has_its_own_before(reports):
    rows = {(row["name"], row["layer"]): row for row in read(reports.reports[0])}
    visual, attention = rows["decoder visual", "0"], rows["decoder attention", "0"]
    assert (visual["before"], visual["after_low"], visual["after_high"]) == ("576", "576", "576")
    assert (attention["before"], attention["after_high"]) == ("640", "640")
    late = rows["decoder visual", "2"]
    assert (late["before"], late["after_high"]) == ("576", "288")
    assert rows["decoder mlp", "31"]["after_high"] == "352"


def test_every_row_says_what_was_run_with_which_settings(reports):
    for report, method, settings in zip(
        reports,
        ("fastv", "divprune:keep=0.25", "divprune:keep=0.25+fastv"),
        ("K=2:keep=0.5:positions=keep", "keep=0.25:", "keep=0.25:"),
    ):
        found = read(report)
        assert {row["model"] for row in found} == {"llava-1.5-7b"} and {row["source"] for row in found} == {"estimate"}
        assert {row["method"] for row in found} == {method}
        (said,) = {row["settings"] for row in found}
        assert said.startswith(settings)
        if "+" in method:
            assert said.endswith("+K=2:keep=0.5:positions=keep:forget=false:min_tokens=0")


def test_whole_numbers_are_whole_in_every_form(reports):
    for row in read(reports.reports[0]):
        for name in ("layer", "before", "after_low", "after_high"):
            assert row[name] == "" or row[name].isdigit(), row
    records = reports.reports[0].to_records()
    total = next(r for r in records if r["name"] == "total" and r["unit"] == "MACs")
    assert total["before"] == reports.reports[0].macs.before


def test_to_pandas_of_a_report_has_whole_numbers(reports):
    frame = reports.reports[0].to_pandas()
    assert str(frame["layer"].dtype) == "Int64" and str(frame["before"].dtype) in ("int64", "Int64")
    at = frame[(frame["name"] == "decoder visual") & (frame["layer"] == 5)]
    assert at["before"].tolist() == [576] and at["after_high"].tolist() == [288]


def test_a_report_shows_itself():
    found = vlmtok.estimate("llava-1.5-7b", "fastv", **PROMPT)
    assert "\n" not in repr(found) and repr(found).startswith("<Report of fastv on llava-1.5-7b: ")
    assert "decoder" in cells(found._repr_html_()) and "decoder" in str(found)
    found.problem = "never <fired>"
    assert "never &lt;fired&gt;" in found._repr_html_() and "#b00020" not in found._repr_html_()


# ---------------------------------------------------------------------- several
def test_a_row_for_each_method_below_the_bare_model(reports):
    table = reports.table()
    assert [row[0] for row in table.rows] == ["bare", "fastv", "divprune:keep=0.25", "divprune:keep=0.25+fastv"]
    by_name = {row[0]: dict(zip(table.head, row)) for row in table.rows}
    assert by_name["bare"]["visual tokens a layer"] == "576" and by_name["bare"]["after / before"] == ""
    assert by_name["fastv"]["visual tokens a layer"] == str((2 * 576 + 30 * 288) // 32)  # 306
    assert by_name["divprune:keep=0.25"]["visual tokens a layer"] == "144"
    assert by_name["bare"]["key-value cache"] == binary(640 * TOKEN)
    assert by_name["divprune:keep=0.25"]["key-value cache"] == binary(208 * TOKEN)
    one = vlmtok.estimate("llava-1.5-7b", "divprune:keep=0.25", **PROMPT)
    assert by_name["divprune:keep=0.25"]["MACs, total"] == si(one.macs.after.high)
    assert len(reports) == 3 and [report.methods for report in reports][1] == ["divprune:keep=0.25"]


def test_records_of_several(reports):
    first, second, _ = reports.to_records()
    assert (first["model"], first["method"]) == ("llava-1.5-7b", "fastv")
    assert (first["visual_tokens_before"], first["visual_tokens_after"]) == (576, 306)
    assert (second["cache_bytes_before"], second["cache_bytes_high"]) == (640 * TOKEN, 208 * TOKEN)
    assert first["total_macs_before"] == second["total_macs_before"] == reports.reports[0].macs.before
    header, *rows = reports.to_csv().splitlines()
    assert header.split(",") == list(first) and len(rows) == 3 and ".0" not in "".join(rows).replace("keep=0.", "")


def test_forms_of_several(reports):
    assert repr(reports) == "<Reports of fastv, divprune:keep=0.25, divprune:keep=0.25+fastv>"
    assert "fastv" in str(reports) and "306" in str(reports)
    assert "306" in cells(reports._repr_html_()) and "| fastv | 306 |" in reports.to_markdown()
    assert r"divprune:keep=0.25 & 144 &" in reports.to_latex()


def test_what_depends_on_content_is_a_range_and_a_convention_a_column():
    specs = ("todre", "divprune")
    found = Reports(tuple(vlmtok.estimate("llava-1.5-7b", s, convention="fastv", **PROMPT) for s in specs))
    head = found.table().head
    assert any(name.startswith("fastv convention, ") for name in head)
    todre = found.to_records()[0]
    assert todre["total_macs_low"] < todre["total_macs_high"]
    assert " .. " in found.table().rows[1][head.index("MACs, total")]
