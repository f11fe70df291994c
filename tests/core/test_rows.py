"""`PromptRows`: what a cut does to every table, against plain loops over one row at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checks import assert_equal
from support.player import written_out

from vlmtok import Reduction
from vlmtok.core.pictures import HELD, PAD, TEXT, Picture
from vlmtok.core.row_state import RowNotes, TokenState
from vlmtok.core.rows import PromptRows

WIDTH = 3
FIELDS = ("keep", "src", "dst", "keep_weight", "src_weight", "valid")
KINDS = ("prune", "merge", "mean", "weighted", "weights alone", "ragged", "ragged merge", "nothing")


# ---------------------------------------------------------------------- a prompt and a cut, drawn
def drawn_rows(generator: torch.Generator, parts: bool, padded: bool, hold: bool = False) -> PromptRows:
    """Three rows of text, pictures and padding on either side; part -1 is a separator."""

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    lines = []
    for _ in range(3):
        line: list[tuple[int, int]] = [(TEXT, 0)] * number(0, 2)
        for index in range(number(1, 3)):
            line += [(index, i // 2 % 3 - 1 if parts else 0) for i in range(number(3, 8))]
            line += [(TEXT, 0)] * number(0, 3)
        lines.append(line)
    length = max(map(len, lines)) + (1 if padded else 0)
    if not padded:
        lines = [line + [(TEXT, 0)] * (length - len(line)) for line in lines]
    label, part = torch.full((3, length), PAD), torch.zeros(3, length, dtype=torch.int64)
    pictures, lengths = [], []
    for row, line in enumerate(lines):
        first = number(0, length - len(line) + 1)
        for column, (code, piece) in enumerate(line, first):
            label[row, column], part[row, column] = code, piece
        for index in sorted({code for code, _ in line if code >= 0}):
            columns = [first + i for i, (code, _) in enumerate(line) if code == index]
            after = [sum(code == TEXT for code, _ in line[c - first :]) for c in (columns[0], columns[-1])]
            picture = Picture(row, index, columns, text_after=after[0], text_after_last=after[1], n=len(columns))
            pictures.append(replace(picture, entered=len(columns)))
        lengths.append(len(line))
    positions = (torch.rand(3, length, generator=generator) < 0.3).to(torch.int64).cumsum(1) + torch.arange(length) + 2
    place = torch.arange(length).expand(3, length)
    valid = label != PAD if padded else None
    rows = PromptRows(3, length, lengths, pictures, label, part if parts else None, valid, place, positions)
    rows.owner = place.clone()
    rows.states[0, "own"] = torch.randn(3, length, 2, generator=generator)
    rows.carried["signal"] = (torch.randn(3, length, generator=generator), 1)
    return rows


def drawn_cut(generator: torch.Generator, kind: str, batch: int, n: int) -> Reduction:
    """Slots in any order; a token joins at most one."""
    k = max(1, (n + 1) // 2)
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(batch)])
    keep, src = order[:, :k], order[:, k : max(k, n - 1)]  # one token is dropped
    dst = torch.randint(-1, k, src.shape, generator=generator)
    valid = torch.rand(batch, k, generator=generator) < 0.6
    weights = torch.randn(batch, k, generator=generator), torch.randn(src.shape, generator=generator)
    none = src[:, :0]
    return {
        "prune": lambda: Reduction(keep),
        "merge": lambda: Reduction(keep, src, dst),
        "mean": lambda: Reduction.mean(keep, src, dst),
        "weighted": lambda: Reduction(keep, src, dst, *weights),
        "weights alone": lambda: Reduction(keep, none, none, weights[0], weights[1][:, :0]),
        "ragged": lambda: Reduction(keep, valid=valid),
        "ragged merge": lambda: Reduction(keep, src, dst, valid=valid),
        "nothing": lambda: Reduction(torch.arange(n).expand(batch, n)),
    }[kind]()


# ---------------------------------------------------------------------- the same by loops
@dataclass
class Token:
    """One column of a row."""

    x: torch.Tensor
    label: int
    part: int
    place: int
    position: int
    size: float
    state: torch.Tensor
    signal: float
    owns: set[int]


def tokens_of(rows: PromptRows, x: torch.Tensor) -> list[list[Token]]:
    """The rows without padding."""
    found = []
    for row in range(rows.batch):
        columns = range(rows.length) if rows.valid is None else rows.valid[row].nonzero()[:, 0].tolist()
        found.append(
            [
                Token(
                    x[row, c],
                    int(rows.label[row, c]),
                    0 if rows.part is None else int(rows.part[row, c]),
                    int(rows.place[row, c]),
                    int(rows.positions[row, c]),
                    1.0 if rows.size is None else float(rows.size[row, c]),
                    rows.states[0, "own"][row, c],
                    float(rows.carried["signal"][0][row, c]),
                    set((rows.owner[row] == c).nonzero()[:, 0].tolist()),
                )
                for c in columns
            ]
        )
    return found


def cut_by_loops(line: list[Token], views: list[tuple[list[int], Reduction]]) -> list[Token]:
    """One row behind a cut of some of its views, each given by places in the row without padding."""
    made: dict[int, Token] = {}
    gone = {place for places, _ in views for place in places}
    for places, reduction in views:
        view = [line[place] for place in places]
        cut = written_out(reduction, torch.tensor([token.size for token in view]))
        weighted = reduction.src is not None or reduction.keep_weight is not None
        values = cut.tokens(torch.stack([token.x for token in view])) if weighted else None
        for slot, (seat, token) in enumerate(zip(sorted(places[i] for i in cut.keep.tolist()), cut.keep.tolist())):
            own = [view[i] for i in cut.own[slot].nonzero()[:, 0].tolist()]
            made[seat] = replace(
                view[token],
                x=view[token].x if values is None else values[slot],
                place=line[seat].place,
                size=sum(member.size for member in own),
                owns=set().union(*(member.owns for member in own)),
            )
    return [made.get(place, token) for place, token in enumerate(line) if place in made or place not in gone]


def assert_rows_are(rows: PromptRows, x: torch.Tensor, wanted: list[list[Token]]) -> None:
    found = tokens_of(rows, x)
    assert rows.lengths == [len(line) for line in wanted] == [len(line) for line in found]
    assert rows.length == max(rows.lengths) == x.shape[1]
    for row, (line, other) in enumerate(zip(found, wanted)):
        if line:
            assert_equal(torch.stack([t.x for t in line]), torch.stack([t.x for t in other]), what=f"row {row}")
        for one, two in zip(line, other):
            assert (one.label, one.place, one.position, one.owns) == (two.label, two.place, two.position, two.owns)
            assert rows.part is None or one.part == two.part
            assert one.size == pytest.approx(two.size) and one.signal == two.signal
            assert torch.equal(one.state, two.state)
    for picture in rows.pictures:
        assert rows.count(picture) == sum(token.label == picture.index for token in wanted[picture.row])


@given(
    seed=st.integers(0, 10**6),
    cuts=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
    scopes=st.lists(st.sampled_from(["picture", "sample", "part"]), min_size=3, max_size=3),
    padded=st.booleans(),
    parts=st.booleans(),
    renumber=st.booleans(),
)
def test_rows_follow_every_cut(seed, cuts, scopes, padded, parts, renumber):
    """Up to three cuts of any kind and scope: values, sizes, labels, parts, places, states, signals, owners, counts."""
    generator = torch.Generator().manual_seed(seed)
    rows = drawn_rows(generator, parts, padded)
    x = torch.randn(rows.batch, rows.length, WIDTH, generator=generator)
    for kind, scope in zip(cuts, scopes):
        before = tokens_of(rows, x)
        pieces, views = [], [[] for _ in before]
        for group in rows.groups(scope):
            if len(rows.groups(scope)) > 1 and torch.rand((), generator=generator) < 0.2:
                continue  # its method answers None
            reduction = drawn_cut(generator, kind, len(group.units), group.n)
            pieces.append((group, reduction))
            places = rows.relative(group, group.columns)
            for i, (row, _, _) in enumerate(group.units):
                fields = {name: getattr(reduction, name) for name in FIELDS}
                picked = {name: None if table is None else table[i : i + 1] for name, table in fields.items()}
                views[row].append((places[i].tolist(), Reduction(**picked)))
        if not pieces:
            continue
        wanted = [cut_by_loops(line, mine) for line, mine in zip(before, views)]
        if renumber:
            for line, old in zip(wanted, before):
                if len(line) < len(old):
                    base = min(token.position for token in old)
                    line[:] = [replace(token, position=base + rank) for rank, token in enumerate(line)]
        x, moved = rows.cut(x, pieces, renumber)
        assert moved.dropped.tolist() == [len(old) - len(line) for old, line in zip(before, wanted)]
        assert_rows_are(rows, x, wanted)


@given(
    seed=st.integers(0, 10**6),
    padded=st.booleans(),
    parts=st.booleans(),
    scope=st.sampled_from(["picture", "sample", "part"]),
)
def test_groups_tell_what_their_views_are(seed, padded, parts, scope):
    """Counts, text behind the first token, text between, and what entered: of each view row, not of a neighbour."""
    generator = torch.Generator().manual_seed(seed)
    rows = drawn_rows(generator, parts, padded)
    x = torch.randn(rows.batch, rows.length, WIDTH, generator=generator)
    rows.enter()
    entered = {(p.row, p.index): p.n for p in rows.pictures}
    first = rows.groups("picture")
    rows.cut(x, [(g, drawn_cut(generator, "prune", len(g.units), g.n)) for g in first[:1]], False)
    for group in rows.groups(scope, by_text=True, by_length=True):
        for i, (row, index, part) in enumerate(group.units):
            mine = [
                c
                for c in range(rows.length)
                if (rows.label[row, c] >= 0 if index < 0 else rows.label[row, c] == index)
                and (part < 0 or rows.part[row, c] == part)
            ]
            assert group.columns[i].tolist() == mine and group.n == len(mine)
            shown = [p for p in rows.pictures if p.row == row and index in (-1, p.index)]
            if part < 0:  # a picture that has no parts is one
                assert group.entered == sum(entered[p.row, p.index] for p in shown)
            assert (group.text, group.length) == (shown[0].text_after, rows.lengths[row])
            if shown[0].text_after != shown[-1].text_after_last:
                assert group.mixed
            # text behind the view's first token, as the columns tell
            whole = [c for c in range(rows.length) if rows.label[row, c] == shown[0].index]
            text = [c for c in range(whole[0], rows.length) if rows.label[row, c] == TEXT]
            assert rows.text_columns(group)[i].tolist() == text


def test_a_part_is_never_a_separator():
    rows = drawn_rows(torch.Generator().manual_seed(3), True, False)
    parts = [part for group in rows.groups("part") for _, _, part in group.units]
    assert parts and min(parts) == 0 and int(rows.part.min()) == -1


# ---------------------------------------------------------------------- what ends a row
@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_the_last_token_of_the_prompt_is_held(side, drafts):
    """Of two pictures that end a row only the last one's last token; padding and drafts are no end."""
    left, right = {"none": (0, 0), "left": (2, 0), "right": (0, 2)}[side]
    label = torch.tensor([[PAD] * left + [TEXT, 0, 0, 0, 1, 1, 1] + [HELD] * drafts + [PAD] * right])
    first = left + 1
    pictures = [Picture(0, i, list(range(first + 3 * i, first + 3 * i + 3)), n=3) for i in (0, 1)]
    length = label.shape[1]
    valid = None if side == "none" else label != PAD
    place = torch.arange(length)[None]
    rows = PromptRows(1, length, [7 + drafts], pictures, label, None, valid, place, place, drafts=drafts)
    rows.enter(hold=True)
    assert rows.label[0, first : first + 6].tolist() == [0, 0, 0, 1, 1, HELD]
    assert [p.n for p in pictures] == [3, 2] and [p.entered for p in pictures] == [3, 2]


def test_counts_are_read_row_by_row():
    label = torch.tensor([[0, 0, 0, 1, TEXT], [0, 1, 1, TEXT, TEXT]])
    pictures = [Picture(row, index, []) for row in (0, 1) for index in (0, 1)]
    place = torch.arange(5).expand(2, 5)
    rows = PromptRows(2, 5, [5, 5], pictures, label, None, None, place, place)
    assert [rows.count(p) for p in pictures] == [3, 1, 1, 2]


def test_a_grid_is_one_while_all_its_tokens_are_there():
    label = torch.tensor([[0] * 6 + [TEXT]])
    picture = Picture(0, 0, list(range(6)), grid=(2, 3), n=6)
    place = torch.arange(7)[None]
    rows = PromptRows(1, 7, [7], [picture], label, None, None, place, place)
    (group,) = rows.groups("picture")
    assert group.grid == (2, 3)
    rows.cut(torch.zeros(1, 7, 1), [(group, Reduction(torch.arange(5)[None]))], False)
    assert rows.groups("picture")[0].grid is None


def test_tokens_that_are_appended_are_no_pictures():
    """They are read, never cut, also where counts are read off the labels; then they are gone again."""
    rows = drawn_rows(torch.Generator().manual_seed(2), False, True)
    before = [(p.n, rows.lengths[p.row]) for p in rows.pictures]
    rows.append(2)
    for picture in rows.pictures:
        picture.n = None
    assert [(rows.count(p), rows.lengths[p.row] - 2) for p in rows.pictures] == before
    assert all(int(group.columns.max()) < rows.length - 2 for group in rows.groups("sample"))
    rows.discard(2)
    assert [(rows.count(p), rows.lengths[p.row]) for p in rows.pictures] == before


# ---------------------------------------------------------------------- notes and states
def test_what_was_written_for_some_rows_is_not_known_of_others():
    rows = drawn_rows(torch.Generator().manual_seed(1), False, False)
    both = [g for g in rows.groups("picture") if len(g.units) >= 1]
    one, other = both[0], both[1]
    state, elsewhere = TokenState(rows, one, 5), TokenState(rows, other, 5)
    state["score"] = torch.ones(len(one.units), one.n)
    assert "score" in state and list(state) == ["score"] and len(state) == 1
    assert "score" not in elsewhere and not len(elsewhere)
    with pytest.raises(KeyError):
        elsewhere["score"]
    elsewhere["score"] = torch.full((len(other.units), other.n), 2.0)
    assert state["score"].eq(1).all() and elsewhere["score"].eq(2).all()
    del state["score"]
    assert "score" not in state and "score" in elsewhere
    notes, others = RowNotes(rows, one, 5, "picture"), RowNotes(rows, other, 5, "picture")
    notes["best"] = torch.arange(len(one.units)).float()
    notes["word"] = "kept"
    assert "best" in notes and "best" not in others
    assert notes["best"].tolist() == list(range(len(one.units))) and notes["word"] == "kept"


def test_notes_of_several_rows_are_split():
    label = torch.tensor([[0, 0, TEXT], [0, 0, TEXT]])
    pictures = [Picture(row, 0, [0, 1], n=2, text_after=1, text_after_last=1) for row in (0, 1)]
    place = torch.arange(3).expand(2, 3)
    rows = PromptRows(2, 3, [3, 3], pictures, label, None, None, place, place)
    (group,) = rows.groups("picture")
    notes = RowNotes(rows, group, 0, "picture")
    notes["score"] = torch.tensor([1.0, 2.0])
    assert notes["score"].tolist() == [1.0, 2.0]
    assert [float(rows.notes[0, "picture"]["score"][unit]) for unit in group.units] == [1.0, 2.0]
    alone = replace(group, units=group.units[1:], index=group.index[1:], columns=group.columns[1:])
    assert RowNotes(rows, alone, 0, "picture")["score"].tolist() == [2.0]


# ---------------------------------------------------------------------- back to the prompt's length
@given(seed=st.integers(0, 10**6), padded=st.booleans())
def test_restored_rows_repeat_the_last_column_before(seed, padded):
    generator = torch.Generator().manual_seed(seed)
    rows = drawn_rows(generator, False, padded)
    columns, x = rows.length, torch.randn(rows.batch, rows.length, WIDTH, generator=generator)
    groups = rows.groups("picture")
    x, _ = rows.cut(x, [(g, drawn_cut(generator, "ragged", len(g.units), g.n)) for g in groups], False)
    found = rows.restore(x, columns)
    for row in range(rows.batch):
        real = range(rows.length) if rows.valid is None else rows.valid[row].nonzero()[:, 0].tolist()
        if not len(real):
            continue  # a picture and nothing else, of which nothing is left
        last = real[0]
        left = {int(rows.place[row, c]): c for c in real}
        for column in range(columns):
            last = left.get(column, last)
            assert torch.equal(found[row, column], x[row, last])


def test_hidden_tokens_leave_their_picture():
    """Runs begin where their first token that is seen stands; what is left is no grid."""
    hidden = [True, False, False, True, True, False]
    picture = Picture(0, 0, [2, 3, 4, 8, 9, 10], runs=[0, 3], grid=(2, 3), hidden=hidden)
    picture.show()
    assert (picture.columns, picture.runs, picture.grid) == ([3, 4, 10], [0, 2], None)
    seen = Picture(0, 0, [2, 3], runs=[0, 1], grid=(1, 2), hidden=[False, False])
    seen.show()
    assert (seen.columns, seen.runs, seen.grid) == ([2, 3], [0, 1], (1, 2))
    behind = Picture(0, 0, [2, 3, 7], runs=[0, 2], grid=None, hidden=[False, False, True])
    behind.show()
    assert (behind.columns, behind.runs) == ([2, 3], [0])
