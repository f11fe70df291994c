"""What `vlmtok show METHOD --model M` says of a family is what happens there: positions, and settings it refuses."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from support.methods import METHODS
from typer.testing import CliRunner
from vlmtok.adapters import adapter_for
from vlmtok.adapters.language.sites import Sites

import vlmtok
from vlmtok import cli
from vlmtok.core.settings import format_value
from vlmtok.errors import VlmtokError
from vlmtok.lab import catalogue

from .build import FAMILIES, TOWER_ONLY, shared
from .harness import batch

SMALL = {
    "aim": "aim:passes=1:first=2:last=4",
    "averagepool": "averagepool:overlap=true",
    "fastv": "fastv:K=3",
    "pyramiddrop": "pyramiddrop:layers=(1;3):ratios=(0.6;0.3)",
    "transprune": "transprune:layers=(2;3):ratios=(0.6;0.3)",
    "sparsevlm": "sparsevlm:layers=(1;2):budgets=(0.5;0.3)",
    "todre": "todre:keep=0.5:tau=none",
    "tca": "tca:reservoir_size=0:layers=(0;1):ratio=0.5",
    "tome": "tome:r=1",
    "crossget": "crossget:rv=1:guidance=none",
}
"""Settings at which a method cuts the few tokens and layers of the tiny models; others cut with their own."""


def made(name):
    return vlmtok.parse_methods(SMALL.get(name, f"{name}:keep=0.5" if "keep" in _settings(name) else name))[0]


def _settings(name):
    return vlmtok.create_method(name).settings()


def fits(layout):
    """Methods that run on a family, as these tests set them."""
    return [one for one in map(made, METHODS) if catalogue.refusal(one, layout) is None]


def outcomes(model, method, inputs, monkeypatch):
    """Site by site where tokens left: whether positions behind the cut are without gaps.

    A cut of the tower, which closes the rows before any method is asked in the language model, is `vision`.
    """
    found, visit, hand_over = {}, Sites.visit, Sites._hand_over

    def closed(rows):
        flat = rows.positions if rows.positions.dim() == 2 else rows.positions[-1]
        return bool((flat[:, 1:] - flat[:, :-1] == 1).all())

    def visited(self, call, entry, x, taps):
        before = call.rows.positions.clone()
        x, moved = visit(self, call, entry, x, taps)
        if moved is not None and call.rows.positions.shape != before.shape:
            found[str(entry.site)] = "renumber" if closed(call.rows) else "keep"
            if found[str(entry.site)] == "keep":  # what stays has the ids it had
                kept = call.rows.positions.movedim(-1, 0).reshape(call.rows.length, -1)
                had = before.movedim(-1, 0).reshape(before.shape[-1], -1)
                assert all((had == one).all(-1).any() for one in kept)
        return x, moved

    def handed(self, call, handover, x):
        length = call.rows.length
        x = hand_over(self, call, handover, x)
        if call.rows.length != length:
            found["vision"] = "renumber" if closed(call.rows) else "keep"
        return x

    monkeypatch.setattr(Sites, "visit", visited)
    monkeypatch.setattr(Sites, "_hand_over", handed)
    with vlmtok.compress(model, method), torch.no_grad():
        model(**inputs)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_positions_are_what_show_says(name, monkeypatch):
    model = shared(name, FAMILIES[name].attentions[0])
    inputs = batch(name).alone(0).inputs(mask=False)
    layout = adapter_for(model).layout()
    left = 0
    for method in fits(layout):
        with monkeypatch.context() as patched:
            found = outcomes(model, method, inputs, patched)
        said = {row["site"]: row["positions"] for row in catalogue.sites(method, layout)[1]}
        inside = {said[site] for site in said if site.startswith(("vision", "features")) and said[site]}
        for site, positions in found.items():
            if site == "vision":
                assert inside == {positions}, (str(method), said)
            else:
                assert said[site] == positions, (str(method), site, said)
        if inside == {"renumber"}:
            assert "vision" in found, (str(method), found)
        left += bool(found)
    assert left >= 3 or name in TOWER_ONLY or (FAMILIES[name].positions == "mrope" and left >= 1)


@pytest.mark.filterwarnings("ignore:the hooks of")
@pytest.mark.parametrize("name", FAMILIES)
def test_settings_that_show_calls_refused_are_and_no_others(name):
    model = shared(name, FAMILIES[name].attentions[0])
    layout = adapter_for(model).layout()
    for method in fits(layout):
        refused = {row["setting"]: row["why"] for row in catalogue.refused_settings(method, layout)}
        assert ("positions=renumber" in refused) == (
            "positions" in method.settings() and FAMILIES[name].positions == "mrope"
        ), str(method)
        for key, value in (("positions", "renumber"), ("positions", "keep"), ("stage", "vision")):
            if key not in method.settings():
                continue
            try:
                vlmtok.compress(model, dataclasses.replace(method, **{key: value})).remove()
            except VlmtokError as problem:
                assert refused[f"{key}={format_value(value)}"] == str(problem)
            else:
                assert f"{key}={value}" not in refused


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_the_command_tells_what_holds_for_a_model(name, tmp_path):
    shared(name).config.save_pretrained(tmp_path)
    words = ["show", "divprune + fastv", "--model", str(tmp_path)]
    result = CliRunner().invoke(cli.app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    first, second = json.loads(result.stdout)["methods"]
    grid = FAMILIES[name].positions == "mrope"
    assert first["sites"][0]["positions"] == ("keep" if grid else "renumber")
    assert second["sites"][0]["positions"] == "keep"
    for one in (first, second):
        assert [row["setting"] for row in one["refused_settings"]] == ["positions=renumber"] * grid
    assert bool(first["notes"]) == grid and not second["notes"]
    text = " ".join(CliRunner().invoke(cli.app, words).stdout.split())
    assert ("places in a" in text) == grid and ("note: divprune keeps position ids" in text) == grid
    refused = CliRunner().invoke(cli.app, ["show", "divprune:positions=renumber", "--model", str(tmp_path)])
    assert refused.exit_code == (2 if grid else 0)
