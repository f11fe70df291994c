"""Overlays and pages of caches: the more layers hold a patch, the brighter it is."""

import dataclasses

import pytest
import torch
from PIL import Image
from support.checkpoints import picture
from support.comparing import QUESTION, compare
from support.page import browser, driven, open_page, read

import vlmtok
from vlmtok import Site
from vlmtok.core.trace import PictureTrace
from vlmtok.lab import comparing, panels, states
from vlmtok.lab.legend import legend
from vlmtok.lab.overlay import overlay

CLEAR = 200
LAYERS = 4
NAN = float("nan")


def trace(cached, owner=(0, 1, 2, 3), steps=(), by=("snapkv",)):
    return PictureTrace(
        torch.tensor(owner), tuple(steps), (2, 2), cached=torch.tensor(cached, dtype=torch.float32), cached_by=by
    )


def levels(drawn):
    """Brightness of the four patches."""
    return [max(drawn.getpixel(at)) for at in ((20, 20), (60, 20), (20, 60), (60, 60))]


def drawn(found, step=None):
    return levels(overlay(Image.new("RGB", (80, 80), (CLEAR,) * 3), found, plain=True, step=step))


def test_brightness_is_the_share_of_layers():
    """A loop over the mask: between what was never dropped, and what was dropped before the language model."""
    mask = [[1, 1, 0.5, 0], [1, 0, 0, 0], [1, 0, 0.5, 0], [1, 1, 1, 0]]
    dark = round(CLEAR * 0.35)
    for place, level in enumerate(drawn(trace(mask))):
        share = sum(layer[place] for layer in mask) / LAYERS
        assert level == pytest.approx(dark + share * (CLEAR - dark), abs=1.5)
    assert drawn(trace(mask), step=0) == [CLEAR] * 4


def test_layers_without_entries_do_not_count():
    found = trace([[1, 0, 1, 0], [NAN] * 4, [1, 1, 0, 0], [NAN] * 4])
    assert drawn(found)[0] == CLEAR
    assert drawn(found)[1:] == drawn(trace([[1, 0, 1, 0], [1, 1, 0, 0]]))[1:]
    assert states.states_of(found)[-1].title == "key-value caches (snapkv): patches held in 1.0 of 2 layers on average"


def test_a_patch_that_left_inside_is_as_bright_as_its_caches_are_many():
    """It is dim where its token left, and here shown by the layers in front of the cut, which hold it."""
    owner = torch.tensor([0, 1, 2, -1])
    steps = [(Site("decoder", 2, "end"), owner)]
    found = trace([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 0]], owner.tolist(), steps)
    before, behind = drawn(found, step=1), drawn(found)
    assert before[:3] == [CLEAR] * 3 and before[3] == round(CLEAR * 0.55)
    assert behind[0] == behind[1] == behind[3] < behind[2] == CLEAR and behind[3] > before[3]


def test_merged_patches_keep_their_colour():
    steps = [(Site("vision", 1, "mid"), torch.tensor([0, 0, 2, 3]))]
    found = trace([[1, 1, 0, 1]] * LAYERS, (0, 0, 2, 3), steps)
    image = Image.new("RGB", (80, 80), (CLEAR,) * 3)
    one, two = (overlay(image, found, plain=True, step=step) for step in (1, 2))
    assert one.getpixel((20, 20)) == two.getpixel((20, 20)) != (CLEAR,) * 3
    assert max(two.getpixel((20, 60))) < max(one.getpixel((20, 60)))


def test_borders_are_around_what_no_cache_holds():
    fates = panels.Fates.of(states.states_of(trace([[1, 1, 1, 0], [1, 0, 1, 0]])), 1)
    assert not fates.line_between(0, 1) and not fates.line_between(0, 2)
    assert fates.line_between(1, 3) and fates.line_between(2, 3)


def test_caches_that_hold_everything_are_no_moment():
    found = trace([[1] * 4] * LAYERS)
    assert len(states.states_of(found)) == 1 and legend(found) == "every patch stayed"


def test_what_is_said_below(monkeypatch):
    shown = {}
    monkeypatch.setattr(
        panels, "_sheet", lambda pictures, head, swatches, caption: shown.update(locals()) or pictures[0][0]
    )
    owner = torch.tensor([0, 1, 2, -1])
    steps = [(Site("decoder", 2, "end"), owner)]
    found = trace([[1, 1, 1, 1], [1, 0, 0.5, 1], [1, 1, 0, 0]], owner.tolist(), steps, ("fastv", "ems_style"))
    found = dataclasses.replace(found, methods=("fastv",))
    overlay(Image.new("RGB", (80, 80), (CLEAR,) * 3), found)
    assert [title for _, title in shown["pictures"]][1:] == [
        "language model, behind layer 2 (fastv): 3 of 4 tokens",
        "key-value caches (fastv + ems_style): patches held in 2.1 of 3 layers on average",
    ]
    assert [words for _, words in shown["swatches"]] == [
        "kept",
        "dropped inside the language model",
        "held in the caches of all layers",
        "of half of them",
        "of none",
    ]
    assert shown["caption"] == (
        "clear patches stayed; dim ones left in the language model, at layer 2; "
        "at the end, the more key-value caches hold a patch, the brighter it is: 1 to 3 of 3 layers do"
    )
    alone = trace([[1, 1, 0, 0]] * 3)
    assert legend(alone) == "the more key-value caches hold a patch, the brighter it is: 0 to 3 of 3 layers do"
    even = trace([[1, 1, 1, 1], [0, 0, 0, 0]])
    assert legend(even).endswith("the brighter it is: 1 of 2 layers do")


def test_what_ran_is_drawn_and_told(speaker):
    found = compare(speaker, picture(), QUESTION, "fastv:K=2:keep=0.5+kv_random:keep=0.5:scope=picture")
    held = found.trace.held_in()
    assert found.trace.cached_by == ("kv_random",) and 0 < float(held.sum()) < found.trace.cached.numel()
    assert "the more key-value caches hold a patch" in found.overlay_legend and found.overlay is not None
    (data,) = read(found.to_html()).json()["methods"]
    *before, last = data["states"]
    assert all(state["held"] is None for state in before) and last["label"] == "key-value caches"
    assert last["held"] == pytest.approx(held.tolist(), abs=1e-3) and last["layers"] == len(found.trace.cached)


def test_a_method_that_costs_more_than_it_saves_is_told_so(speaker):
    """Attention is summed for the choice, and the prefill is as long as before."""
    found = compare(speaker, picture(), QUESTION, "prefixkv:keep=0.5")
    line = found.report.total
    assert line.after.high > line.before
    assert f"{line.after.high / line.before:.2f} x as many" in found.sheet().text()
    assert "x fewer" not in found.sheet().text()


def test_crops_that_are_pictures_of_their_own_are_joined():
    one, two = trace([[1, 0, 1, 0]] * 2), trace([[0, 0, 0, 1]] * 2)
    found = comparing.joined(vlmtok.core.trace.Trace([one, two]), (80, 40), halves)
    assert torch.equal(found.cached, torch.tensor([[1.0, 0, 1, 0, 0, 0, 0, 1]] * 2)) and found.cached_by == ("snapkv",)
    bare = dataclasses.replace(one, cached=None, cached_by=())
    assert comparing.joined(vlmtok.core.trace.Trace([bare, bare]), (80, 40), halves).cached is None


def halves(image):
    """Two square crops of a wide picture, as pixels."""
    torchvision = pytest.importorskip("torchvision.transforms")
    whole = torchvision.ToTensor()(image.resize((64, 32)))
    return torch.stack([whole[:, :, :32], whole[:, :, 32:]])


@pytest.mark.skipif(browser() is None, reason="no Chromium on this machine (chromium, google-chrome)")
def test_a_page_shades_patches_as_the_trace_says(speaker, tmp_path):
    """A screenshot of a white picture, and what is said of each patch."""
    white = Image.new("RGB", (96, 96), (255, 255, 255))
    found = compare(speaker, white, QUESTION, "kv_random:keep=0.5:scope=picture")
    held, layers = found.trace.held_in(), len(found.trace.cached)
    rows, columns = found.trace.grid
    script = f"""
    const by = (id) => document.getElementById(id), box = by("board").getBoundingClientRect(), said = [];
    for (let row = 0; row < {rows}; row++) for (let column = 0; column < {columns}; column++) {{
      by("board").dispatchEvent(new PointerEvent("pointermove", {{ bubbles: true,
        clientX: box.left + box.width * (column + 0.5) / {columns},
        clientY: box.top + box.height * (row + 0.5) / {rows} }}));
      said.push(by("fate").textContent);
    }}
    return {{ box: [box.left, box.top, box.width, box.height], said, told: !by("caches").hidden }};"""
    result = driven(found.to_html(), script, tmp_path)
    assert result["told"] and len(set(held.tolist())) > 2
    (tmp_path / "page.html").write_text(found.to_html(), "utf-8")
    open_page(tmp_path / "page.html", f"--screenshot={tmp_path / 'shot.png'}")
    shot = Image.open(tmp_path / "shot.png").convert("L")
    left, top, width, height = result["box"]
    for patch, said in enumerate(result["said"]):
        row, column = divmod(patch, columns)
        assert said.endswith(f"held in {held[patch]:.0f} of {layers} layers by kv_random.")
        at = shot.getpixel((round(left + width * (column + 0.5) / columns), round(top + height * (row + 0.5) / rows)))
        share = float(held[patch]) / layers
        assert at == pytest.approx(255 * (0.35 + 0.65 * share), abs=6), (patch, at)
