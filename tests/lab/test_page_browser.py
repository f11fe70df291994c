"""The page in a real browser: the slider, the pointer and the keyboard show what the trace says.

Where VLMTOK_ARTEFACTS names a folder, screenshots are left there, for people to look at.
"""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.checkpoints import picture
from support.comparing import QUESTION, compare
from support.page import browser, driven, open_page

import vlmtok
from vlmtok import loading
from vlmtok.lab.pieces import pieces_of, worth_showing

pytestmark = pytest.mark.skipif(browser() is None, reason="no Chromium on this machine (chromium, google-chrome)")

TOOLS = """
const by = (id) => document.getElementById(id), box = by("board").getBoundingClientRect();
const slide = (to) => { by("step").value = to; by("step").dispatchEvent(new Event("input")); };
const over = (across, down) => by("board").dispatchEvent(new PointerEvent("pointermove",
  { clientX: box.left + box.width * across, clientY: box.top + box.height * down, bubbles: true }));
const press = (key) => by("board").dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
"""


def fate(trace, patch, step):
    """What the page must say of a patch, by the trace alone; places are those of a trace whose cuts all change it."""
    rows, columns = trace.grid
    row, column = divmod(patch, columns)
    where = f"Row {row + 1} of {rows}, column {column + 1} of {columns}: "
    moments = [torch.arange(trace.patches), *(owner for _, owner in trace.steps)]
    gone = next((i for i, owner in enumerate(moments) if int(owner[patch]) < 0), None)

    def at(i):
        site = trace.steps[i - 1][0]
        if site.layer is None:
            words = "in front of the language model"
        else:
            stage = "language model" if site.stage == "decoder" else "vision tower"
            point = {"start": "in front of", "mid": "inside", "end": "behind"}[site.point]
            words = f"in the {stage}, {point} layer {site.layer}"
        return f"{words} by {trace.methods[i - 1]}"

    if gone is not None and gone <= step:
        before = moments[gone - 1]
        many = int((before == before[patch]).sum())
        return f"{where}dropped {at(gone)}" + (f", with its group of {many} patches." if many > 1 else ".")
    owner = moments[step]
    many = int((owner == owner[patch]).sum())
    sizes = {slot: int((owner == slot).sum()) for slot in owner[owner >= 0].unique().tolist()}
    merged = sorted(slot for slot, size in sizes.items() if size > 1)
    is_ = f"merged into group {merged.index(int(owner[patch])) + 1} of {many} patches" if many > 1 else "kept, alone"
    later = "" if gone is None else f"; dropped later, {at(gone)}"
    return f"{where}{is_}{later}."


def test_the_slider_the_pointer_and_the_keyboard_show_the_trace(speaker, tmp_path):
    found = compare(speaker, picture(), QUESTION, "tome:r=4+fastv:K=2:keep=0.3")
    trace = found.trace
    columns, steps = trace.grid[1], len(trace.steps)
    assert steps > 2 and all(not torch.equal(a, b) for (_, a), (_, b) in zip(trace.steps, trace.steps[1:]))
    (piece,) = pieces_of(trace, found.image.size, speaker.processor, None)
    left, top, right, bottom = worth_showing(found.image.size, [piece])
    spots = []
    for patch in range(trace.patches):
        row, column = divmod(patch, columns)
        x, y = piece.box[0] + (column + 0.5) * piece.side[0], piece.box[1] + (row + 0.5) * piece.side[1]
        spots.append(((x - left) / (right - left), (y - top) / (bottom - top)))
    script = f"""{TOOLS}
    const said = [], spots = {[list(spot) for spot in spots]};
    for (let step = 0; step <= {steps}; step++) {{
      slide(step);
      const fates = [];
      for (const spot of spots) {{ over(...spot); fates.push(by("fate").textContent); }}
      said.push({{ moment: by("moment").textContent, spoken: by("step").getAttribute("aria-valuetext"), fates,
        groups: document.querySelectorAll(".group").length }});
    }}
    slide(0);
    const keys = [], pressed = "Home ArrowRight ArrowDown ArrowDown ArrowLeft ArrowLeft ArrowUp Escape".split(" ");
    for (const key of pressed) {{ press(key); keys.push(by("fate").textContent); }}
    return {{ said, keys, max: by("step").max, wide: document.documentElement.scrollWidth, window: innerWidth,
      scripts: document.scripts.length }};"""
    result = driven(found.to_html(), script, tmp_path)
    assert result["max"] == str(steps) and result["wide"] <= result["window"]
    moments = [torch.arange(trace.patches), *(owner for _, owner in trace.steps)]
    for step, (said, owner) in enumerate(zip(result["said"], moments)):
        left = owner[owner >= 0].unique(return_counts=True)[1]
        assert said["moment"].endswith(f": {len(left)} of {trace.patches} tokens") and said["spoken"] == said["moment"]
        assert said["groups"] == int((left > 1).sum())
        assert said["fates"] == [fate(trace, patch, step) for patch in range(trace.patches)]
    first = [fate(trace, patch, 0) for patch in range(trace.patches)]
    walk = [0, 1, 1 + columns, 1 + 2 * columns, 2 * columns, 2 * columns, columns]  # the border stops it
    assert result["keys"] == [
        *(first[patch] for patch in walk),
        "Point at a patch, or focus the picture and press an arrow key.",
    ]


def test_pixels_are_clear_or_dim_as_the_trace_says(speaker, tmp_path):
    """A screenshot of a white picture: what was dropped is dark, what stayed is white."""
    found = compare(speaker, Image.new("RGB", (96, 96), (255, 255, 255)), QUESTION, "random:keep=0.3")
    script = f"{TOOLS} return [box.left, box.top, box.width, box.height];"
    left, top, width, height = driven(found.to_html(), script, tmp_path)
    (tmp_path / "page.html").write_text(found.to_html(), "utf-8")
    open_page(tmp_path / "page.html", f"--screenshot={tmp_path / 'shot.png'}")
    shot = Image.open(tmp_path / "shot.png").convert("L")
    rows, columns = found.trace.grid
    for patch in range(found.trace.patches):
        row, column = divmod(patch, columns)
        at = shot.getpixel((round(left + width * (column + 0.5) / columns), round(top + height * (row + 0.5) / rows)))
        assert (at > 240) == (int(found.trace.owner[patch]) >= 0) and (at > 240 or 60 < at < 120), (patch, at)


def test_methods_are_chosen_by_button_and_by_point(speaker, tmp_path):
    methods = ["todre:keep=0.1,0.5", "fastv"]
    rows = vlmtok.sweep(speaker, picture(), methods, QUESTION, rounds=0, max_new_tokens=2)
    script = f"""{TOOLS}
    const seen = () => ({{ moment: by("moment").textContent,
      shown: [...document.querySelectorAll("section.method")].map((one) => !one.hidden),
      checked: [...document.querySelectorAll("input[name=method]")].map((one) => one.checked) }});
    const all = [seen()];
    document.querySelectorAll("input[name=method]")[1].click(); all.push(seen());
    document.querySelector('.plot [data-method="2"]').dispatchEvent(new MouseEvent("click")); all.push(seen());
    const first = document.querySelector('.plot [data-method="0"]');
    first.dispatchEvent(new KeyboardEvent("keydown", {{ key: "Enter" }})); all.push(seen());
    return all;"""
    for chosen, seen in zip((0, 1, 2, 0), driven(rows.to_html(), script, tmp_path)):
        only = [i == chosen for i in range(3)]
        assert seen["shown"] == only and seen["checked"] == only
        assert seen["moment"].endswith(f": {rows.comparisons[chosen].trace.kept} of 144 tokens")


@pytest.mark.parametrize("width", [420, 1200])
def test_nothing_jumps_and_nothing_overflows(speaker, tmp_path, width):
    """What is below the picture stays where it is while the pointer and the slider move."""
    found = compare(speaker, picture(200, 100), QUESTION, "tome:r=4+fastv:K=2:keep=0.3")
    script = f"""{TOOLS}
    const places = () => by("method-0").getBoundingClientRect().top, all = [places()];
    for (let step = 0; step <= by("step").max; step++) {{
      slide(step); over(0.3, 0.4); all.push(places()); over(0.9, 0.9); all.push(places());
    }}
    return {{ all, wide: document.documentElement.scrollWidth, window: innerWidth }};"""
    result = driven(found.to_html(), script, tmp_path, width=width)
    assert len(set(result["all"])) == 1 and result["wide"] <= result["window"]


def test_where_there_is_no_trace_the_page_says_why(speaker, tmp_path):
    found = compare(speaker, picture(), QUESTION, "todre:keep=0.1")
    without = dataclasses.replace(found, trace=None, overlay=None, overlay_problem="no grid <here>")
    script = f'{TOOLS} return [by("missing").textContent, by("board").hidden, by("step").disabled];'
    assert driven(without.to_html(), script, tmp_path) == ["No picture of the patches: no grid <here>", True, True]


def test_pages_of_the_shipped_model_are_small_and_can_be_looked_at(tmp_path):
    model, sample = loading.load(), loading.samples()[0]
    rows = vlmtok.sweep(
        model,
        sample.path,
        ["todre:keep=0.1", "pitome:ratio=0.9+fastv:K=2"],
        sample.question,
        rounds=0,
        max_new_tokens=4,
    )
    folder = Path(os.environ.get("VLMTOK_ARTEFACTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"page-one": next(iter(rows)).to_html(), "page-sweep": rows.to_html()}
    for name, html in pages.items():
        assert len(html.encode()) < 1_000_000
        page = tmp_path / f"{name}.html"
        page.write_text(html, "utf-8")
        for look, options in {"light": (), "dark": ("--blink-settings=preferredColorScheme=0",)}.items():
            shot = tmp_path / f"{name}-{look}.png"
            open_page(page, f"--screenshot={shot}", *options)
            drawn = Image.open(shot).convert("L")
            assert (drawn.getpixel((3, 3)) < 60) == (look == "dark") and len(drawn.getcolors()) > 50
            if folder != tmp_path:
                shutil.copy(shot, folder / shot.name)
        if folder != tmp_path:
            shutil.copy(page, folder / page.name)
