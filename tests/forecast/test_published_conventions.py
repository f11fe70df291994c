"""Every convention against the figures of the paper it is named after, those too that it does not give.

What a convention says of itself (`Convention.gives`, `vlmtok list --conventions`) is counted here, row by row.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from typer.testing import CliRunner

from vlmtok import (
    AIM,
    TCA,
    CrossGET,
    DivPrune,
    FastV,
    Method,
    PiToMe,
    PyramidDrop,
    ToDRE,
    ToMe,
    TransPrune,
    VisionZip,
    cli,
    estimate,
)
from vlmtok.cost.conventions import CONVENTIONS

UNITS = {"T": 1e12, "G": 1e9}
NOT, UNKNOWN = "not", "unknown"


@dataclass(frozen=True)
class Row:
    """A figure as it is printed.

    Attributes:
        convention: that should give it.
        model: preset.
        method: None for the bare model.
        printed: digits as printed.
        unit: ``T``, ``G``, ``%`` of bare, or ``x``, bare over compressed.
        how: None for every digit, the share by which it may be off, `NOT` for a figure that the convention does not
            give, `UNKNOWN` for one whose settings are not printed.
        prompt: what else is known.
    """

    convention: str
    model: str
    method: Method | None
    printed: str
    unit: str
    how: float | str | None = None
    prompt: dict[str, Any] = field(default_factory=dict)

    def value(self) -> float:
        """What the convention gives."""
        more = {**self.prompt, "convention": self.convention, "deciding": False}
        figure = estimate(self.model, self.method or _ANY[self.convention], **more).figure
        assert figure.after.fixed
        left = figure.before if self.method is None else figure.after.low
        if self.unit in UNITS:
            return left / UNITS[self.unit]
        return 100 * left / figure.before if self.unit == "%" else figure.before / left

    def __str__(self) -> str:
        return f"{self.convention}, {self.model}, {self.method or 'bare'}, {self.printed} {self.unit}"


A, B13, NEXT, ONE = "llava-1.5-7b", "llava-1.5-13b", "llava-next-7b", "llava-onevision-7b"
B16, BLIP = "clip-vit-b-16", "vit-b-16-384"
FRAMES = {"visual_tokens": 32 * 196, "crops": 32, "text_tokens": 100}
TEXT = {"text_tokens": 36}
CLIP = {"crops": 8, "visual_tokens": 8 * 144, "parts": (144,) * 8}
_ANY = {
    **dict.fromkeys(["transprune", "pyramiddrop", "fastv", "todre", "divprune", "language"], FastV()),
    **dict.fromkeys(["aim", "llm-viewer"], AIM()),
    **dict.fromkeys(["pitome", "pitome-post", "tome", "tca", "crossget"], ToMe(r=1)),
}
"""Some method, where the bare figure is asked for."""


def _pitome(name: str, fit: dict[str, float | str | None]) -> list[Row]:
    """PiToMe's tables: table 5 (its ratios are not printed, these fit), 1 and 2."""
    rows = [
        ("deit-t", None, "1.2", "G"),
        ("deit-t", 0.92, "0.79", "G"),
        ("deit-s", None, "4.6", "G"),
        ("deit-s", 0.92, "2.9", "G"),
        ("mae-l", None, "61.6", "G"),
        ("mae-l", 0.93, "31.0", "G"),
        ("mae-h", None, "167.4", "G"),
        ("mae-h", 0.955, "92.8", "G"),
        (BLIP, None, "55.14", "G"),
        (BLIP, 0.95, "38.55", "G"),
        (BLIP, 0.95, "38.85", "G"),
        (BLIP, 0.925, "1.57", "x"),
        ("clip-vit-l-14-336", 0.925, "2.10", "x"),
    ]
    made = [
        Row(name, model, None if ratio is None else PiToMe(ratio=ratio), printed, unit, fit.get(printed, NOT))
        for model, ratio, printed, unit in rows
    ]
    return made + [Row(name, "BLIP-2", None, printed, "G", UNKNOWN) for printed in ("678.45", "296.93", "434.50")]


ROWS = [
    # TransPrune: LLaVA-1.5, the layers of its ablation, LLaVA-NeXT.
    Row("transprune", A, None, "3.82", "T"),
    Row("transprune", A, FastV(K=2, keep=0.5), "2.01", "T"),
    Row("transprune", A, PyramidDrop(), "1.78", "T"),
    Row("transprune", A, TransPrune(), "1.56", "T"),
    Row("transprune", A, FastV(K=2, keep=0.25), "1.12", "T"),
    Row("transprune", "SparseVLM", None, "1.57", "T", UNKNOWN),
    Row("transprune", "SparseVLM, low", None, "1.28", "T", UNKNOWN),
    Row("transprune", "PyramidDrop, low", None, "1.28", "T", UNKNOWN),
    Row("transprune", "TransPrune, low", None, "1.19", "T", UNKNOWN),
    Row("transprune", A, TransPrune(layers=(5, 7, 10)), "1.348", "T"),
    Row("transprune", A, TransPrune(layers=(6, 8, 11)), "1.453", "T"),
    Row("transprune", A, TransPrune(layers=(8, 10, 13)), "1.662", "T"),
    Row("transprune", A, TransPrune(layers=(9, 11, 14)), "1.767", "T"),
    Row("transprune", NEXT, None, "20.83", "T"),
    Row("transprune", NEXT, FastV(K=2, keep=0.5), "10.55", "T"),
    Row("transprune", NEXT, PyramidDrop(), "9.46", "T"),
    Row("transprune", NEXT, TransPrune(), "8.33", "T"),
    Row("transprune", "TransPrune, low, NeXT", None, "6.41", "T", UNKNOWN),
    # PyramidDrop, as quoted there.
    Row("pyramiddrop", A, None, "3.82", "T"),
    Row("pyramiddrop", A, PyramidDrop(), "1.78", "T"),
    Row("pyramiddrop", NEXT, None, "20.83", "T"),
    Row("pyramiddrop", NEXT, PyramidDrop(), "9.46", "T"),
    Row("pyramiddrop", "PyramidDrop, low", None, "1.28", "T", UNKNOWN),
    # FastV, table 1: a mean layer; the last one is of the README.
    Row("fastv", A, None, "99.3", "G", None, TEXT),
    Row("fastv", A, FastV(K=2, keep=0.1), "19.9", "G", 0.013, TEXT),
    Row("fastv", A, FastV(K=2, keep=0.25), "32.8", "G", 0.013, TEXT),
    Row("fastv", A, FastV(K=2, keep=0.5), "54.6", "G", 0.013, TEXT),
    Row("fastv", B13, None, "154.6", "G", None, TEXT),
    Row("fastv", B13, FastV(K=2, keep=0.1), "29.7", "G", 0.013, TEXT),
    Row("fastv", B13, FastV(K=2, keep=0.25), "50.2", "G", None, TEXT),
    Row("fastv", B13, FastV(K=2, keep=0.5), "84.6", "G", None, TEXT),
    Row("fastv", A, FastV(K=3, keep=0.5), "57", "%", None, TEXT),
    # ToDRE, at a tenth: the formula that it prints does not give its table.
    Row("todre", NEXT, None, "31.4", "T", NOT, {"text_tokens": 120}),
    Row("todre", NEXT, ToDRE(keep=0.1, tau=None), "6.0", "T", NOT, {"text_tokens": 120}),
    Row("todre", NEXT, DivPrune(keep=0.1), "6.0", "T", NOT, {"text_tokens": 120}),
    Row("todre", NEXT, FastV(K=2, keep=0.1), "8.2", "T", NOT, {"text_tokens": 120}),
    Row("todre", "SparseVLM", None, "6.9", "T", UNKNOWN),
    Row("todre", "FasterVLM", None, "6.1", "T", UNKNOWN),
    Row("todre", "GlobalCom2", None, "6.1", "T", UNKNOWN),
    # DivPrune: per cent of bare; the text is not printed.
    Row("divprune", A, DivPrune(), "15.6", "%", None, {"text_tokens": 43}),
    Row("divprune", B13, DivPrune(), "15.7", "%", None, {"text_tokens": 43}),
    Row("divprune", NEXT, DivPrune(), "10.8", "%", None, {"text_tokens": 80}),
    Row("divprune", NEXT, DivPrune(), "14.1", "%", None, {"text_tokens": 68, **CLIP}),
    # The layers as they are, beside what others print.
    Row("language", A, None, "8.5", "T", None, {"text_tokens": 64}),
    Row("language", ONE, None, "99.63", "T", 0.002, FRAMES),
    Row("language", A, None, "3.82", "T", NOT, TEXT),
    Row("language", NEXT, None, "31.4", "T", NOT, {"text_tokens": 120}),
    # AIM and its tool.
    *(
        row
        for name in ("llm-viewer", "aim")
        for row in (
            Row(name, ONE, None, "99.63", "T", None, FRAMES),
            Row(name, ONE, AIM(), "14.76", "T", None, FRAMES),
            Row(name, ONE, AIM(), "6.8", "x", None, FRAMES),
        )
    ),
    Row("llm-viewer", A, None, "8.5", "T", None, {"text_tokens": 64}),
    Row("llm-viewer", A, DivPrune(keep=0.1), "1.5", "T", NOT, {"text_tokens": 64}),
    *_pitome(
        "pitome",
        {
            **{"1.2": None, "0.79": None, "55.14": None},
            **dict.fromkeys(("4.6", "61.6", "31.0", "167.4", "92.8"), 0.015),
        },
    ),
    *_pitome("pitome-post", {"1.2": None, "55.14": None, **dict.fromkeys(("4.6", "61.6", "167.4", "1.57"), 0.015)}),
    # ToMe.
    Row("tome", "deit-s", None, "4.6", "G"),
    Row("tome", "deit-s", ToMe(r=13), "2.7", "G"),
    Row("tome", "deit-s", ToMe(r=16), "2.3", "G"),
    Row("tome", "deit-t", None, "1.3", "G"),
    Row("tome", "deit-t", ToMe(r=12), "0.8", "G"),
    Row("tome", "vit-l-16", None, "61.6", "G"),
    Row("tome", "vit-l-16", ToMe(r=8), "31.0", "G"),
    # TCA: the paper, and a measurement by fvcore.
    Row("tca", B16, None, "17.59", "G", 0.002),
    Row("tca", B16, TCA(ratio=0.9, reservoir_size=0), "15.45", "G", 0.002),
    Row("tca", B16, TCA(ratio=0.7, reservoir_size=0), "11.69", "G", 0.002),
    Row("tca", B16, TCA(drop_rate=0.035, reservoir_size=0), "15.710", "G", 0.002),
    Row("tca", B16, TCA(drop_rate=0.105, reservoir_size=0), "11.683", "G", 0.002),
    Row("tca", B16, TCA(drop_rate=0.175, reservoir_size=0), "8.826", "G", 0.002),
    # CrossGET: logs of the release, and shares of CoOp.
    Row("crossget", B16, None, "20.567", "G", 0.002),
    Row("crossget", B16, CrossGET.preset("clip", rv=16), "12.036", "G", 0.002),
    Row("crossget", B16, CrossGET(rv=0, rl=6, guidance="cross"), "19.275", "G", 0.002),
    Row("crossget", B16, CrossGET.preset("clip", rv=16, rl=6), "10.612", "G", 0.002),
    Row("crossget", B16, CrossGET.preset("clip", rv=16), "58.5", "%"),
    Row("crossget", B16, CrossGET.preset("clip", rv=12), "69", "%"),
    Row("crossget", B16, CrossGET.preset("clip", rv=8), "80", "%"),
]


@pytest.mark.parametrize("row", [row for row in ROWS if row.how != UNKNOWN], ids=str)
def test_a_published_figure(row):
    value, decimals = row.value(), len(row.printed.partition(".")[2])
    if row.how is None:
        assert f"{value:.{decimals}f}" == row.printed
    elif row.how == NOT:
        assert value != pytest.approx(float(row.printed), rel=0.015) and f"{value:.{decimals}f}" != row.printed
    else:
        assert value == pytest.approx(float(row.printed), rel=row.how)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_conventions_say_how_many_figures_they_give(name):
    rows = [row for row in ROWS if row.convention == name]
    given = [row for row in rows if row.how not in (NOT, UNKNOWN)]
    said = CONVENTIONS[name].gives
    assert said.startswith(f"{len(given)} of {len(rows)}") and len(rows) >= 3
    assert len(given) >= 3 or CONVENTIONS[name].source.startswith("no paper") or "is not what its formula gives" in said
    loose = {row.how for row in given} - {None}
    assert not loose or f"{100 * max(loose):g} %" in said  # type: ignore[type-var]
    missing = [row for row in rows if row.how in (NOT, UNKNOWN)]
    assert not missing or len(said) > 40


def test_a_figure_stands_once():
    counted = Counter(map(str, ROWS))
    assert max(counted.values()) == 1, counted.most_common(1)


def test_the_list_shows_what_conventions_give():
    rows = json.loads(CliRunner().invoke(cli.app, ["list", "--conventions", "--json"]).stdout)["conventions"]
    assert {row["convention"]: row["published figures that it gives"] for row in rows} == {
        name: one.gives for name, one in CONVENTIONS.items()
    }
    text = CliRunner().invoke(cli.app, ["list", "--conventions"]).stdout
    assert re.search(r"0 of\s", text) and "as they are" in text


def test_todres_table_needs_more_tokens_than_its_host_makes():
    """By the printed formula 31.4 T are some 4,950 tokens; LLaVA-NeXT makes 2,880 of a picture."""
    row = {"crops": 5, "parts": 1, "text_tokens": 120}
    bare = [
        estimate(NEXT, ToDRE(), **row, visual_tokens=n, convention="todre", deciding=False).figure
        for n in (2880, 4800, 4860)
    ]
    assert bare[0].before < bare[1].before < 31.4e12 < bare[2].before


def test_visionzip_in_transprunes_table():
    figure = estimate(A, VisionZip(keep=288), convention="transprune", deciding=False).figure
    assert f"{figure.after.low / 1e12:.2f}" == "1.89"
