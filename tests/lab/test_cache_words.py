"""The stage `cache` in words: tables of models and methods, moments of a picture, the self-test's places."""

from __future__ import annotations

import torch
from support.cached import Held

from vlmtok.core.site import STAGES, Site
from vlmtok.core.trace import PictureTrace
from vlmtok.forecast.presets import preset
from vlmtok.lab.catalogue import KINDS
from vlmtok.lab.comparison import _left
from vlmtok.lab.doctor.probes import Nothing, middle
from vlmtok.lab.family_table import families
from vlmtok.lab.matrix import LEGEND, LETTERS, matrix
from vlmtok.lab.pages.families import family_page
from vlmtok.lab.states import PLACES, place_of
from vlmtok.lab.tiny import released


def test_every_stage_has_a_letter_and_a_place():
    assert set(LETTERS) == set(STAGES) and len(set(LETTERS.values())) == len(STAGES)
    assert all(f"{LETTERS[stage]} " in LEGEND and f"({stage})" in LEGEND for stage in STAGES if stage != "text")
    assert set(PLACES) == set(STAGES) - {"text"}
    assert place_of(Site("cache", 3)) == "key-value cache of layer 3"


def test_tables_of_models_tell_of_caches():
    assert "cache" in KINDS["VLM"].layout().stages and "cache" not in KINDS["VLM, tower"].layout().stages
    without = [row["family"] for row in families() if "decoder" in row["stages"] and "cache" not in row["stages"]]
    assert without == ["kimi_k25"]  # its caches hold latents
    (line,) = (line for line in family_page("gemma4").splitlines() if line.startswith("| `cache` |"))
    assert "from the caches of 5 of 30 layers" in line and "window" in line
    assert [one.stages for one in matrix(released.shared("gemma3"), [Held()])] == [("cache",)]


def test_the_self_test_looks_at_a_layer_whose_entries_can_leave():
    layout = preset("llava-1.5-7b").layout
    assert middle(layout, "cache") == 16 and Site("cache", 16) in Nothing().sites(layout)


def test_entries_that_left_are_no_tokens_that_left_the_row():
    whole, half = torch.arange(4), torch.tensor([0, -1, 2, -1])
    trace = PictureTrace(owner=whole, grid=None, steps=((Site("cache", 0), half), (Site("decoder", 1, "start"), whole)))
    assert [_left(trace, layer) for layer in (0, 1, 2)] == [4, 4, 4]
