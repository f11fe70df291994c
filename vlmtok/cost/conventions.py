"""Conventions in use in papers: each a pure function of counts and widths.

Papers count the same model differently: MACs or FLOPs, with or without text, two or three MLP matrices, tokens before
or after a merge. A convention takes a `ModelShape` (widths) and the profiles of a pass (counts) and nothing else, so
that figures of different papers can be compared on the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..core.model_shape import BlockShape, ModelShape, Tokens
from ..errors import ParameterError, hint
from .flops import Profile

Profiles = Mapping[str, Profile]
"""One profile for each stage that ran: ``vision``, ``text``, ``decoder``."""
Count = Callable[[ModelShape, Profiles], float]


@dataclass(frozen=True)
class Convention:
    """A way of counting.

    Attributes:
        name: what it is called.
        unit: ``MACs`` or ``FLOPs``, as the papers print it.
        stages: what it covers.
        summary: the formula, in a line; n and N are tokens, d and C the width, m that of the MLP.
        source: where it is used.
        gives: how many of the published figures it gives, and which not; `tests/forecast/test_published_conventions.py`
            has them.
        count: of one pass, all rows.
        alike: whether it takes every layer of a language model for attention with keys of its own, and one MLP.
    """

    name: str
    unit: str
    stages: tuple[str, ...]
    summary: str
    source: str
    gives: str
    count: Count
    alike: bool = False

    def check(self, shape: ModelShape) -> None:
        """Checks that its formula holds for a model.

        Raises:
            ParameterError: the language model has layers of another form; the message says of which.
        """
        blocks = () if shape.language is None else shape.language.blocks
        forms = {
            "a state in the place of attention": any(block.mixer is not None for block in blocks),
            "the keys of earlier layers": any(block.shared for block in blocks),
            "weights beside attention and MLP": any(block.beside for block in blocks),
        }
        if self.alike and any(forms.values()):
            raise ParameterError(
                f"convention {self.name!r} takes every layer for attention with keys of its own and one MLP, and "
                f"{shape.name} has layers with {' and '.join(form for form, found in forms.items() if found)}; "
                "'language' counts them as they are"
            )


CONVENTIONS: dict[str, Convention] = {}
"""By name; several papers may share a formula."""


def _register(
    name: str,
    unit: str,
    stages: tuple[str, ...],
    summary: str,
    source: str,
    gives: str,
    alike: bool = False,
    **others: tuple[str, str],
) -> Callable[[Count], Count]:
    """Adds a convention; `others` are names of the same formula, each with its source and what it gives there."""

    def add(count: Count) -> Count:
        for known, (where, figures) in {name: (source, gives), **others}.items():
            CONVENTIONS[known] = Convention(known, unit, stages, summary, where, figures, count, alike)
        return count

    return add


def convention(name: str) -> Convention:
    """The convention of that name.

    Raises:
        ParameterError: there is none; the message names them all.
    """
    if name not in CONVENTIONS:
        raise ParameterError(f"no convention {name!r}{hint(name, CONVENTIONS)} Known: {', '.join(sorted(CONVENTIONS))}")
    return CONVENTIONS[name]


# ---------------------------------------------------------------------- language models
def _layers(shape: ModelShape, profiles: Profiles) -> tuple[int, list[tuple[BlockShape, Tokens]]]:
    assert shape.language is not None
    profile = profiles["decoder"]
    return profile.rows, list(zip(shape.language.blocks, profile.layers))


def _projected(n: float, tokens: Tokens) -> float:
    """Rows that the four projections of an attention see together, of n tokens."""
    return 4 * n - tokens.no_query - tokens.no_output


@_register(
    "transprune",
    "MACs",
    ("decoder",),
    "visual tokens only; 4nd^2 + 2n^2d + 3ndm a layer",
    source="arXiv 2507.20630 (TFLOPs)",
    gives="13 of 18 to the digit; SparseVLM's 1.57 and the rows called low have settings that are not printed",
    pyramiddrop=(
        "arXiv 2410.17247, as 2507.20630 quotes it (TFLOPs)",
        "4 of 5 to the digit; the row called low (1.28) has settings that are not printed",
    ),
    alike=True,
)
def transprune(shape: ModelShape, profiles: Profiles) -> float:
    """What TransPrune prints as TFLOPs, for PyramidDrop too (arXiv 2507.20630, 2410.17247).

    MACs of the visual tokens alone: attention with full-width keys and values, a gated MLP of three matrices. No text,
    vision tower, projector or head.
    """
    rows, layers = _layers(shape, profiles)
    total = 0.0
    for block, tokens in layers:
        n, d, m = tokens.visual, block.width, block.hidden
        total += _projected(n, tokens) * d * d + 2 * n * n * d + 3 * (n - tokens.queries + tokens.mlp) * d * m
    return rows * total


@_register(
    "fastv",
    "FLOPs",
    ("decoder",),
    "all tokens; 4nd^2 + 2n^2d + 2ndm, mean over the layers",
    source="arXiv 2403.06764, table 1",
    gives="9 of 9 with 36 text tokens: bare and per cent to the digit, compressed within 1.3 %",
    alike=True,
)
def fastv(shape: ModelShape, profiles: Profiles) -> float:
    """What FastV prints as FLOPs (arXiv 2403.06764, table 1): a mean layer, text included, an MLP of two matrices.

    With 36 text tokens beside 576 visual ones it is the table's 99.3 B for LLaVA-1.5-7B and 154.6 B for 13B.
    """
    return todre(shape, profiles) / len(profiles["decoder"].layers)


@_register(
    "todre",
    "FLOPs",
    ("decoder",),
    "all tokens; 4nd^2 + 2n^2d + 2ndm a layer",
    source="arXiv 2505.18757 v2, the printed formula",
    gives="0 of 7: the paper's table (31.4 T bare, 6.0 T) is not what its formula gives (17.5 T, 1.9 T); the true "
    "count of model and tower at 2,100 tokens is within 1 % of both",
    divprune=(
        "arXiv 2503.02175 (per cent of bare)",
        "4 of 4, with text of a length that fits: 43 tokens for both of LLaVA-1.5, 80 for 1.6, 68 for video",
    ),
    alike=True,
)
def todre(shape: ModelShape, profiles: Profiles) -> float:
    """The formula that ToDRE prints (arXiv 2505.18757v2), and the form of DivPrune's: text included.

    It counts multiply-adds of the projections and two MLP matrices, where Vicuna has three. ToDRE's own table
    (31.4 T bare) is not what the formula gives at any number of tokens that LLaVA-NeXT makes of a picture; it fits
    the true count at about 2,100 tokens, tower included.
    """
    rows, layers = _layers(shape, profiles)
    total = 0.0
    for block, tokens in layers:
        n, d, m = tokens.queries, block.width, block.hidden
        total += _projected(n, tokens) * d * d + 2 * n * n * d + 2 * tokens.mlp * d * m
    return rows * total


@_register(
    "language",
    "FLOPs",
    ("decoder",),
    "all tokens; 2 x MACs of the layers as they are, full n^2 attention",
    source="no paper; the layers as they are",
    gives="2 of 4 that others print: 8.5 T of LLaVA-1.5 at 576 + 64 (arXiv 2409.01179), AIM's 99.63 T within 0.2 %; "
    "not MACs without text (3.82 T), nor ToDRE's 31.4 T, which has the tower in it",
)
def language(shape: ModelShape, profiles: Profiles) -> float:
    """2 x the MACs of the language model's layers: grouped keys and values, all MLP matrices, no head."""
    rows, layers = _layers(shape, profiles)
    return 2.0 * rows * sum(block.macs(tokens) for block, tokens in layers)


@_register(
    "llm-viewer",
    "FLOPs",
    ("decoder",),
    "as language, and element-wise operations",
    source="the tool LLM-Viewer",
    gives="4 of 5: AIM's, and 8.5 T of LLaVA-1.5 at 576 + 64 (arXiv 2409.01179); its 1.5 T at about a tenth is 1.59",
    aim=("arXiv 2412.03248, by the tool LLM-Viewer", "3 of 3 to the digit, 32 frames and 100 text tokens"),
    alike=True,
)
def llm_viewer(shape: ModelShape, profiles: Profiles) -> float:
    """What the tool LLM-Viewer counts, and AIM prints as TFLOPs (arXiv 2412.03248).

    2 x MACs, and for one token of width C in a layer 5 operations for each of its H x keys softmax entries, 7 C for
    each of two norms, C for each of two residual additions, 2 C for the activation.
    """
    rows, layers = _layers(shape, profiles)
    elements = sum(
        tokens.queries * (5 * block.heads * tokens.keys + (2 * 7 + 2 * 1) * block.width) + 2 * tokens.mlp * block.width
        for block, tokens in layers
    )
    return language(shape, profiles) + rows * elements


# ---------------------------------------------------------------------- towers
def _blocks(
    shape: ModelShape, profiles: Profiles, stage: str = "vision"
) -> tuple[int, list[tuple[BlockShape, Tokens]]]:
    tower = shape.vision if stage == "vision" else shape.text
    assert tower is not None
    return profiles[stage].rows, list(zip(tower.blocks, profiles[stage].layers))


def _block(c: int, m: int, n: float, mlp: float) -> float:
    return 4 * n * c * c + 2 * n * n * c + 2 * mlp * c * m


@_register(
    "pitome",
    "MACs",
    ("vision",),
    "tower blocks; 4NC^2 + 2N^2C + 2NCm, N the tokens that enter",
    source="arXiv 2405.16148, the printed formula",
    gives="8 of 16: BLIP 55.14, DeiT-T 1.2 and 0.79 (ratio 0.92) to the digit, DeiT-S, MAE-L and MAE-H bare and the "
    "latter two compressed within 1.5 %; not DeiT-S 2.9 (3.0), BLIP at 0.95 (38.55; 41.49), the cuts of CLIP and BLIP "
    "at 0.925 (2.10 and 1.57; 2.17 and 1.52), BLIP-2",
)
def pitome(shape: ModelShape, profiles: Profiles) -> float:
    """What PiToMe prints as GFLOPs (arXiv 2405.16148): MACs of the blocks, the MLP charged before the merge.

    The paper writes 8NC^2 for the MLP, which is 2NCm for m = 4C. Matching is not counted.
    """
    rows, layers = _blocks(shape, profiles)
    return rows * sum(_block(b.width, b.hidden, t.queries, t.queries) for b, t in layers)


@_register(
    "pitome-post",
    "MACs",
    ("vision",),
    "tower blocks; as pitome, but the MLP after the merge",
    source="arXiv 2405.16148, as its code runs",
    gives="6 of 16: BLIP 55.14 and DeiT-T 1.2 to the digit, the other bare towers and BLIP's cut of 1.57 within 1.5 %; "
    "no compressed tower: the paper charges the MLP before the merge",
)
def pitome_post(shape: ModelShape, profiles: Profiles) -> float:
    """PiToMe's formula with the tokens that the MLP gets: a merge between attention and MLP as it is."""
    rows, layers = _blocks(shape, profiles)
    return rows * sum(_block(b.width, b.hidden, t.queries, t.mlp) for b, t in layers)


@_register(
    "tome",
    "MACs",
    ("vision",),
    "patch embedding, tower blocks with the MLP after the merge, pool and head",
    source="arXiv 2210.09461",
    gives="7 of 7 to the digit",
)
def tome(shape: ModelShape, profiles: Profiles) -> float:
    """What ToMe prints as FLOPs (arXiv 2210.09461; fvcore counts MACs): the whole classifier, matching left out."""
    tower, profile = shape.vision, profiles["vision"]
    assert tower is not None
    behind = profile.rows * sum(part.macs(1, int(profile.left)) for part in tower.parts)
    return _stem(shape, profiles) + pitome_post(shape, profiles) + behind


def _stem(shape: ModelShape, profiles: Profiles) -> float:
    tower, profile = shape.vision, profiles["vision"]
    assert tower is not None
    return profile.rows * (profile.entered - tower.protected) * tower.stem


@_register(
    "tca",
    "MACs",
    ("vision",),
    "patch embedding and tower blocks, the MLP after condensation",
    source="arXiv 2410.14729",
    gives="6 of 6 within 0.2 %: fvcore counts norms too",
)
def tca(shape: ModelShape, profiles: Profiles) -> float:
    """What TCA prints as GFLOPs (arXiv 2410.14729): the image tower with its patch embedding, no projection."""
    return _stem(shape, profiles) + pitome_post(shape, profiles)


@_register(
    "crossget",
    "MACs",
    ("vision", "text"),
    "both towers with stem; merging layers add N^2C + NC for matching",
    source="arXiv 2305.17455, by fvcore",
    gives="7 of 7: GFLOPs within 0.2 %, per cent of bare to the digit",
)
def crossget(shape: ModelShape, profiles: Profiles) -> float:
    """What CrossGET logs as GFLOPs of a CLIP dual encoder (arXiv 2305.17455; fvcore counts MACs).

    A layer that merges adds N^2C for the similarity of full-width keys and NC for their importance, N the tokens that
    enter, class and cross token included.
    """
    total = _stem(shape, profiles)
    for stage in ("vision", "text"):
        rows, layers = _blocks(shape, profiles, stage)
        for block, tokens in layers:
            n, c = tokens.queries, block.width
            matching = n * n * c + n * c if tokens.mlp < n else 0
            total += rows * (_block(c, block.hidden, n, tokens.mlp) + matching)
    return total
