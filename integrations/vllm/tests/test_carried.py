"""What travels beside embeddings comes back as it was, in every dtype, whatever piece of a prompt a step holds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vlmtok_vllm.carried import BASE, Carried
from vlmtok_vllm.positions import whole_prompt
from vlmtok_vllm.settings import as_bytes, as_text, foreign, spec_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("levels", "moves"), [(0, False), (2, False), (0, True), (3, True)])
def test_rows_are_taken_apart_as_they_were_joined(dtype, levels, moves):
    carried = Carried(8, levels, moves, 32, dtype, CPU)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(10, 8, generator=generator).to(dtype)
    stacked = torch.randn(levels, 10, 8, generator=generator).to(dtype) if levels else None
    positions = torch.randint(BASE**2, (3, 10), generator=generator) if moves else None
    wide = carried.join(rows, stacked, positions)
    assert wide.shape == (10, carried.wide) and wide.dtype == dtype
    columns = torch.zeros(16, dtype=torch.bool)
    columns[3:10] = True
    given = torch.arange(16).expand(3, -1).clone()
    assert torch.equal(carried.take(wide[2:9], columns), rows[2:9])  # a step that holds a piece of the picture
    if moves:
        assert torch.equal(carried.positions(given)[:, 3:10], given[:, 3:10] + positions[:, 2:9])
        assert torch.equal(carried.positions(given)[:, [0, 2, 10]], given[:, [0, 2, 10]])
    hidden = torch.zeros(1, 16, 8, dtype=dtype)
    for level in range(levels):
        added = carried.behind(level)(torch.nn.Identity(), (), hidden)
        assert torch.equal(added[0, 3:10], stacked[level, 2:9])
        assert not added[0, :3].any() and not added[0, 10:].any()
    carried.forget()
    assert torch.equal(carried.positions(given), given) and not carried.stacked.any()


def test_the_next_step_forgets_the_last_one():
    carried = Carried(4, 1, True, 8, torch.float32, CPU)
    wide = carried.join(torch.ones(2, 4), torch.ones(1, 2, 4), torch.ones(3, 2, dtype=torch.long))
    carried.take(wide, torch.tensor([True, True, False, False]))
    carried.take(wide[:1], torch.tensor([False, False, False, True]))
    assert carried.moved.nonzero()[:, 1].unique().tolist() == [3]
    assert carried.stacked[0].any(-1).nonzero()[:, 0].tolist() == [3]


def test_a_position_that_two_digits_cannot_hold_is_refused():
    carried = Carried(4, 0, True, 8, torch.bfloat16, CPU)
    for wrong in (BASE**2, -1):
        with pytest.raises(ValueError, match="must lie in"):
            carried.join(torch.ones(1, 4), None, torch.full((3, 1), wrong))


def feature(offset, length, ids, stays, placeholders, modality="image"):
    values = {"ids": ids, "types": placeholders, "stays": stays, "placeholders": placeholders}
    data = {f"{modality}/{name}": SimpleNamespace(data=torch.tensor(value)) for name, value in values.items()}
    return SimpleNamespace(modality=modality, data=data, mm_position=SimpleNamespace(offset=offset, length=length))


def test_a_prompt_is_made_whole_and_shortened_again():
    # Text 1 2, a picture of four tokens between marks of which two stay, text 3, a whole picture of one token.
    first = feature(2, 4, [8, 9, 9, 9, 9, 7], [1, 1, 1, 0, 0, 1], [0, 1, 1, 1, 1, 0])
    second = feature(7, 1, [9], [1], [1])
    found = whole_prompt([1, 2, 8, 9, 9, 7, 3, 9, 4], [second, first])
    assert found.ids == [1, 2, 8, 9, 9, 9, 9, 7, 3, 9, 4]
    assert found.types == [0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 0]
    short = found.shortened(torch.arange(11).expand(3, -1))
    assert short[0].tolist() == [0, 1, 2, 2, 2, 7, 8, 9, 10]


def test_settings_by_their_order():
    config = SimpleNamespace(vlmtok="divprune")
    assert spec_of({}, config) == "divprune"
    assert spec_of({"vlmtok": "scope"}, config) == "scope"
    for none in ("none", "None", "", " "):
        assert spec_of({"vlmtok": none}, config) is None
    assert spec_of({}, SimpleNamespace()) is None
    for wrong in (16, ["divprune"], {"keep": 4}, True):
        with pytest.raises(ValueError, match="must be a spec"):
            spec_of({"vlmtok": wrong}, config)
    assert foreign({"vlmtok": "x", "vlmtok_text": {}, "num_crops": 4}) == {"num_crops": 4}
    assert as_text(as_bytes("divprune:keep=4")) == "divprune:keep=4"
