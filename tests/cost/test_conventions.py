"""Every convention of counting against a formula of its own, at random counts and widths."""

from __future__ import annotations

import random

import pytest

from vlmtok.core.model_shape import BlockShape, LanguageShape, ModelShape, Part, Tokens, TowerShape
from vlmtok.core.site import Layout
from vlmtok.cost.conventions import CONVENTIONS, convention
from vlmtok.cost.flops import Profile
from vlmtok.errors import ParameterError

NOWHERE = Layout("nowhere", {})
PARTS = (Part("pool", 7, 3), Part("head", 11))


def _transprune(b, t):
    d, m, n = b.width, b.hidden, t.visual
    return n * d * (4 * d + 2 * n) + 3 * (n - t.queries + t.mlp) * d * m


def _todre(b, t):
    d, m, n = b.width, b.hidden, t.queries
    return n * d * (4 * d + 2 * n) + 2 * t.mlp * d * m


def _language(b, t):
    inner, outer = b.heads * b.head_width, b.kv_heads * b.head_width
    n, d = t.queries, b.width
    return 2 * (n * d * (2 * inner + 2 * outer) + 2 * n * t.keys * inner + 3 * t.mlp * d * b.hidden)


def _llm_viewer(b, t):
    n, d = t.queries, b.width
    return _language(b, t) + 5 * n * t.keys * b.heads + 14 * n * d + 2 * n * d + 2 * t.mlp * d


def _pitome(b, t):
    c, m, n = b.width, b.hidden, t.queries
    return n * c * (4 * c + 2 * n + 2 * m)


def _tome(b, t):
    c, m, n = b.width, b.hidden, t.queries
    return n * c * (4 * c + 2 * n) + 2 * t.mlp * c * m


def _crossget(b, t):
    n, c = t.queries, b.width
    return _tome(b, t) + (n * (n + 1) * c if t.mlp < n else 0)


BLOCK_FORMULAS = {
    "transprune": _transprune,
    "pyramiddrop": _transprune,
    "fastv": _todre,
    "todre": _todre,
    "divprune": _todre,
    "language": _language,
    "llm-viewer": _llm_viewer,
    "aim": _llm_viewer,
    "pitome": _pitome,
    "tome": _tome,
    "pitome-post": _tome,
    "tca": _tome,
    "crossget": _crossget,
}
WITH_STEM = ("tca", "crossget", "tome")


class _Drawn:
    """A model and a pass with drawn widths and counts."""

    def __init__(self, seed):
        self.draw = random.Random(seed)
        number = self.draw.randint
        self.rows = number(1, 4)
        heads, kv = number(1, 4), number(1, 3)
        self.blocks = {
            "vision": BlockShape.of(number(3, 40), number(3, 90), number(1, 5), head_width=number(2, 9)),
            "text": BlockShape.of(number(3, 40), number(3, 90), number(1, 5), head_width=number(2, 9)),
            "decoder": BlockShape.of(number(3, 40), number(3, 90), heads * kv, kv, number(2, 9), gated=True),
        }
        self.depths = {stage: number(1, 5) for stage in self.blocks}
        self.stem, self.protected = number(1, 500), number(0, 3)
        self.profiles = {stage: self._profile(depth) for stage, depth in self.depths.items()}

    def _profile(self, depth):
        entered = n = self.draw.randint(20, 60)
        layers = []
        for _ in range(depth):
            left = n - self.draw.randint(0, 2)
            layers.append(Tokens(n, n + self.draw.randint(0, 9), left, n - self.draw.randint(1, 5)))
            n = left
        return Profile(self.rows, tuple(layers), entered, n)

    @property
    def shape(self):
        towers = {
            stage: TowerShape((self.blocks[stage],) * self.depths[stage], 50, self.protected, self.stem, PARTS)
            for stage in ("vision", "text")
        }
        language = LanguageShape((self.blocks["decoder"],) * self.depths["decoder"])
        return ModelShape("drawn", NOWHERE, towers["vision"], towers["text"], language=language)

    def expected(self, name):
        stages = CONVENTIONS[name].stages
        total = sum(
            self.rows * BLOCK_FORMULAS[name](self.blocks[stage], tokens)
            for stage in stages
            for tokens in self.profiles[stage].layers
        )
        if name == "fastv":
            total /= len(self.profiles["decoder"].layers)
        if name == "tome":
            total += self.rows * sum(part.row + part.token * self.profiles["vision"].left for part in PARTS)
        if name in WITH_STEM:
            total += self.rows * (self.profiles["vision"].entered - self.protected) * self.stem
        return total


def test_every_convention_has_a_formula_of_its_own_here():
    assert set(BLOCK_FORMULAS) == set(CONVENTIONS)


@pytest.mark.parametrize("name", sorted(CONVENTIONS))
def test_conventions_are_functions_of_counts_and_widths(name):
    found = set()
    for seed in range(12):
        drawn = _Drawn(seed)
        value = convention(name).count(drawn.shape, drawn.profiles)
        assert value == pytest.approx(drawn.expected(name), rel=1e-12)
        found.add(value)
        before = value
        stage = CONVENTIONS[name].stages[0]
        # One count more, then one width more: the result follows, as the formula says.
        first = drawn.profiles[stage].layers[0]
        more = Tokens(first.queries + 3, first.keys + 3, first.mlp + 3, first.visual + 3)
        layers = (more, *drawn.profiles[stage].layers[1:])
        drawn.profiles[stage] = Profile(drawn.rows, layers, drawn.profiles[stage].entered, drawn.profiles[stage].left)
        value = convention(name).count(drawn.shape, drawn.profiles)
        assert value == pytest.approx(drawn.expected(name), rel=1e-12) and value > before
        before, block = value, drawn.blocks[stage]
        gated = stage == "decoder"
        wide = BlockShape.of(block.width + 5, block.hidden + 7, block.heads, block.kv_heads, block.head_width, gated)
        drawn.blocks[stage] = wide
        value = convention(name).count(drawn.shape, drawn.profiles)
        assert value == pytest.approx(drawn.expected(name), rel=1e-12) and value > before
    assert len(found) == 12


def test_conventions_say_what_they_count():
    for name, row in CONVENTIONS.items():
        assert row.name == name and row.unit in ("MACs", "FLOPs") and row.summary and row.count.__doc__
    with pytest.raises(ParameterError, match=r"no convention 'transprun'; did you mean 'transprune'\? Known: aim"):
        convention("transprun")
