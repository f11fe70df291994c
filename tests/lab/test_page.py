"""The page of a comparison: it holds what ran, fetches nothing, and escapes everything."""

import dataclasses
import math
import re

import pytest
import torch
from PIL import Image
from support.checkpoints import llava_next, picture
from support.comparing import QUESTION, compare
from support.page import read

import vlmtok
from vlmtok import loading
from vlmtok.lab.page import script_safe
from vlmtok.lab.plot_svg import Point, front, pareto_svg, points_of
from vlmtok.loading import LoadError

METHOD = "tome:r=4+fastv:K=2"
EVIL = "</script><script>alert('x')</script> \"quoted\" & <b>{{data}}</b> <!-- "


def alone(found):
    """Whether a page, read, fetches nothing and runs no script but its own two."""
    assert all(re.match(r"data:|#", load) for load in found.loads), found.loads
    assert not re.search(r"url\(|@import|@font-face", found.styles)
    assert [given.get("type") for given, _ in found.scripts] == ["application/json", None]
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|WebSocket|innerHTML", found.scripts[1][1])
    assert not {"iframe", "object", "embed", "base"} & set(found.tags) and not found.handlers
    return True


def holds(data, trace):
    """Whether the data of a method are the trace."""
    expected = [torch.arange(trace.patches)]
    for _, owner in trace.steps:
        if not torch.equal(owner, expected[-1]):
            expected.append(owner)
    assert [state["owner"] for state in data["states"]] == [owner.tolist() for owner in expected]
    return True


def test_it_holds_what_ran_and_fetches_nothing(speaker):
    found = compare(speaker, picture(), QUESTION, METHOD)
    page = read(found.to_html())
    assert alone(page) and len(found.to_html()) < 300_000
    (data,) = page.json()["methods"]
    assert holds(data, found.trace) and len(data["states"]) > 3
    assert [state["stage"] for state in data["states"]] == [None, *["vision"] * (len(data["states"]) - 2), "decoder"]
    assert [state["method"] for state in data["states"]][1 :: len(data["states"]) - 2] == ["tome", "fastv"]
    (view,) = data["views"]
    (piece,) = view["pieces"]
    assert piece["grid"] == list(found.trace.grid) and piece["patches"] == list(range(found.trace.patches))
    for words in (QUESTION, METHOD, found.bare.text, found.compressed.text, "visual tokens", "key-value cache"):
        assert words in page.text
    for line in (found.report.lines[0].name, *found.report.notes, *map(str, found.environment.values())):
        assert line in page.text or line in ("None", "vision", "prefill")
    assert "alt" in page.ids["original"] and page.ids["step"]["aria-label"] and page.ids["board"]["tabindex"] == "0"
    assert page.ids["fate"]["aria-live"] == "polite"


def test_everything_is_escaped(speaker):
    found = compare(speaker, picture(), QUESTION, "todre:keep=0.1")
    bad = dataclasses.replace(
        found,
        method=EVIL,
        prompt=EVIL,
        bare=dataclasses.replace(found.bare, text=EVIL),
        compressed=dataclasses.replace(found.compressed, text=EVIL, classes=((EVIL, 0.5),)),
        model=dataclasses.replace(speaker, name=EVIL),
        environment={EVIL: EVIL},
        report=dataclasses.replace(found.report, notes=[EVIL], model=EVIL),
    )
    html = bad.to_html()
    page = read(html)
    assert alone(page) and "<b>{{" not in html and "alert('x')</script>" not in html
    assert page.text.count(EVIL) >= 8  # as it was typed, and the marks in it are not filled in
    assert page.json()["methods"][0]["name"] == EVIL
    assert "{{" not in html.replace(EVIL, "").replace("{{data}}", "")


def test_data_are_escaped_and_what_json_cannot_say_is_refused():
    made = script_safe({"a": "</script><!--"})
    assert "<" not in made and ">" not in made and made.startswith("{")
    with pytest.raises(ValueError, match="JSON"):
        script_safe({"a": math.inf})


def test_crops_and_the_thumbnail_can_both_be_shown(tmp_path):
    model = loading.load(str(llava_next(tmp_path)))
    found = compare(model, Image.effect_noise((128, 96), 80).convert("RGB"), QUESTION, "random:keep=0.3")
    (data,) = read(found.to_html()).json()["methods"]
    grids = found.trace.grids()
    assert [view["name"] for view in data["views"]] == ["crops", "thumbnail"]
    crops, thumbnail = (view["pieces"] for view in data["views"])
    assert [piece["patches"] for piece in crops] == [found.trace.canvas[1].tolist()]
    assert [piece["patches"] for piece in thumbnail] == [grids[0][1].tolist()]
    assert thumbnail[0]["box"] == [0, 0, 128, 96]


def test_where_there_is_no_overlay_the_rest_stays(speaker):
    found = compare(speaker, picture(), QUESTION, "todre:keep=0.1")
    without = dataclasses.replace(found, trace=None, overlay=None, overlay_problem="the patches form no grid")
    page = read(without.to_html())
    (data,) = page.json()["methods"]
    assert data["states"] == [] and data["problem"] == "the patches form no grid"
    assert alone(page) and QUESTION in page.text and "MACs, total" in page.text


def test_a_sweep_has_each_method_to_choose_and_their_front(speaker):
    rows = vlmtok.sweep(speaker, picture(), ["todre:keep=0.1,0.5", "fastv"], QUESTION, rounds=0, max_new_tokens=2)
    html = rows.to_html()
    page = read(html)
    assert alone(page) and len(page.json()["methods"]) == 3
    for data, found in zip(page.json()["methods"], rows):
        assert data["name"] == found.method and holds(data, found.trace) and found.method in page.text
    assert html.count('type="radio"') == 3 and [f"method-{i}" in page.ids for i in range(4)] == [True] * 3 + [False]
    assert len(re.findall(r'class="point"', html)) == 3 and len(re.findall(r'class="point bare"', html)) == 1
    assert sorted(re.findall(r'data-method="(\d)"', html)) == ["0", "1", "2"]


def test_pages_are_written_where_they_can_be(speaker, tmp_path):
    found = compare(speaker, picture(), QUESTION, "todre:keep=0.1")
    found.save_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text("utf-8") == found.to_html()
    with pytest.raises(LoadError, match="no folder"):
        found.save_html(tmp_path / "nowhere" / "page.html")


# ---------------------------------------------------------------------- the plot
def row(name, macs, divergence, cosine=None, problem=None):
    return {"method": name, "total_macs": macs, "divergence": divergence, "cosine": cosine, "problem": problem}


def test_the_front_is_what_nothing_beats():
    points = [Point(name, cost, far, None) for name, cost, far in zip("abcde", (5, 3, 3, 1, 4), (0, 2, 1, 9, 1))]
    assert [point.name for point in front(points, higher=False)] == ["d", "c", "a"]
    assert [point.name for point in front(points, higher=True)] == ["d"]


def test_rows_without_figures_are_no_points_and_numbers_stay_those_of_the_page():
    rows = [row("bare", 10, 0.0), row("a", 5, math.inf), row("failed", None, None, problem="why"), row("b", 4, 0.1)]
    assert [(point.name, point.number) for point in points_of(rows, "divergence")] == [("bare", None), ("b", 1)]
    assert pareto_svg(rows[:2]) == ""


@pytest.mark.parametrize("cosine", [False, True])
def test_closer_is_higher_and_cheaper_is_further_left(cosine):
    values = [(1.0, 0.5), (0.999, 0.9)] if cosine else [(0.0, 1e-3), (1e-7, 1e-2)]
    rows = [row("bare", 10, 0.0, 1.0 if cosine else None)]
    rows += [
        row(f"<{i}>", macs, None if cosine else value, value if cosine else None)
        for i, (macs, value) in enumerate([(2.0, values[0][1]), (6.0, values[1][0])])
    ]
    svg = pareto_svg(rows)
    assert "<0>" not in svg and "&lt;0&gt;" in svg
    at = [tuple(map(float, pair)) for pair in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    (bare_x, bare_y), (cheap_x, cheap_y), (close_x, close_y) = at
    assert cheap_x < close_x < bare_x and bare_y < close_y < cheap_y
    assert all(0 < x < 720 and 0 < y < 360 for x, y in at)
