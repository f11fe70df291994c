"""VisionZip with all pictures of a prompt in one pool, as ports released for Qwen2.5-VL rank them: by their formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vlmtok
from vlmtok import VisionZip
from vlmtok.errors import ParameterError, SiteError

from .build import shared
from .methods import Look
from .packed_by_hand import PACKED, encode, members_of, seen
from .test_packed_signals import large

SHARE, MERGED = 0.25, 0.05


def released(name: str, arrays: dict[str, Tensor], tokens: Tensor) -> tuple[dict[int, Tensor], int, int]:
    """What stays of the tokens of a call: place of each, its embedding, and how many are dominant and contextual.

    Attention of the last block over the rows of all pictures, summed over the rows; keys as attention compares them.
    Both are means over heads and over the patches of a token, the latter put back in order.
    """
    made, mine = seen(name, arrays, -1), members_of(name, arrays)
    patches = torch.stack([one.nonzero()[:, 0] for one in mine])
    score = made["weights"].mean(0).sum(0)[patches].mean(1)
    keys = F.normalize(made["k"][:, patches].mean((0, 2)), dim=-1)
    n = len(tokens)
    dominant, contextual = int((SHARE - MERGED) * n), max(int(MERGED * n), 1)
    kept = score.topk(dominant).indices
    rest = torch.ones(n, dtype=torch.bool).index_fill(0, kept, False).nonzero()[:, 0]
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    others = rest[~torch.isin(rest, targets)]
    owner = (keys[others] @ keys[targets].T).argmax(1)
    slots = {int(i): tokens[i] for i in kept}
    for i, target in enumerate(targets.tolist()):
        joined = tokens[others[owner == i]]
        slots[target] = tokens[target] + (joined.mean(0) if len(joined) else 0)
    return slots, dominant, contextual


@pytest.mark.parametrize("pattern", ["2I3J2", "2V1"])
@pytest.mark.parametrize("name", PACKED)
def test_choice_is_that_of_released_ports(name: str, pattern: str) -> None:
    """Which tokens of two pictures of very different sizes stay, and what each is; frames of a clip as well."""
    family, model = large(name), shared(name)
    if "V" not in family.shots:
        pattern = pattern.replace("V", "I")
    prompt = family.prompt(pattern, 4)
    arrays = {key: torch.cat(value) for key, value in prompt.arrays().items()}
    with torch.no_grad():
        tokens = encode(model, arrays)
    slots, dominant, contextual = released(name, arrays, tokens)
    look = Look("sample")
    made = VisionZip(keep=dominant + contextual, contextual=contextual, scope="sample")
    with vlmtok.compress(model, [made, look]), torch.no_grad():
        model(**family.collect(prompt).inputs())
    (after,) = look.seen
    wanted = torch.stack([slots[place] for place in sorted(slots)])
    assert after.tokens.shape == wanted.shape
    assert (after.tokens - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    ends = torch.tensor([len(picture.columns) for picture in prompt.pictures]).cumsum(0).tolist()
    shares = [sum(place < end for place in slots) for end in ends]
    assert shares[0] > 0 and shares[-1] == len(slots)


def test_pictures_share_a_pool_by_their_sums() -> None:
    """A picture alone gets what `scope="part"` gives it; beside a larger one it gets about its share of the tokens."""
    family, model = large("qwen2_5_vl"), shared("qwen2_5_vl")
    kept = {}
    for scope in ("part", "sample"):
        for pattern in ("2J1", "2I3J2"):
            look = Look("picture")
            made = VisionZip(keep=0.2, contextual=0, scope=scope)
            with vlmtok.compress(model, [made, look]), torch.no_grad():
                model(**family.collect(family.prompt(pattern, 4)).inputs())
            kept[scope, pattern] = [len(one.tokens) for one in look.seen]
    assert kept["part", "2J1"] == kept["sample", "2J1"] == [3]
    assert kept["part", "2I3J2"] == [20, 3]
    assert sum(kept["sample", "2I3J2"]) == 23
    assert 1 <= kept["sample", "2I3J2"][1] <= 8


def test_scope_is_checked() -> None:
    with pytest.raises(ParameterError, match="scope"):
        VisionZip(scope="picture")
    with pytest.raises(SiteError, match="scope='part'"), vlmtok.compress(shared("llava"), "visionzip:scope=sample"):
        pass
