"""Definition of the removal of near duplicates, against plain loops in double precision; its two paths."""

import naive
import pytest
import torch
from drawn import rows
from support import referee

from vlmtok import kernels
from vlmtok.kernels.reference import duplicates_near


def lists(batch, n, m, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n, generator=generator)[:m] for _ in range(batch)])


def both(x, k, **settings):
    """What the op gives by itself, and what it gives where something counts, which takes the plain rounds."""
    found = kernels.drop_duplicates(x, k, **settings)
    with referee.counter():
        return found, kernels.drop_duplicates(x, k, **settings)


@pytest.mark.parametrize(
    "n, m, k, step", [(40, 31, 7, 8), (60, 60, 1, 3), (9, 4, 3, 8), (70, 64, 32, 1), (33, 33, 2, 50)]
)
def test_drop_duplicates(n, m, k, step):
    x, order = rows(3, n, 5), lists(3, n, m)
    valid = torch.rand(3, n, generator=torch.Generator().manual_seed(1)) > 0.4
    valid[2] = False
    valid[2, order[2, -1]] = True
    for mask in (None, valid):
        wanted = naive.drop_duplicates(x, order, k, step, mask)
        assert sum(one is not None for one in wanted) >= 2
        for found in both(x, k, order=order, step=step, valid=mask):
            assert found.shape == (3, k)
            for have, want in zip(found.tolist(), wanted):
                assert have == want or want is None


def test_too_few_valid_rows_are_followed_by_the_others():
    x = rows(1, 8, 5)
    order = torch.tensor([[7, 2, 5, 0, 1]])
    valid = torch.zeros(1, 8, dtype=torch.bool)
    valid[0, [2, 1]] = True
    for found in both(x, 4, order=order, valid=valid):
        assert found.tolist() == [[2, 1, 7, 5]]


@pytest.mark.parametrize("nearest, table", [(16, 256 << 20), (1, 256 << 20), (2, 0), (100, 0)])
def test_paths_agree(nearest, table, monkeypatch):
    """Neighbours that run out, cosines that are not kept, copies."""
    monkeypatch.setattr(duplicates_near, "NEAREST", nearest)
    monkeypatch.setattr(duplicates_near, "TABLE_BYTES", table)
    drawn = rows(2, 90, 12)
    some = torch.randint(0, 90, (90,), generator=torch.Generator().manual_seed(2))
    zero = drawn.clone()
    zero[:, ::7] = 0.0
    zero[0, 5], zero[1, 8, 3] = float("nan"), float("inf")
    for x in (drawn, drawn[:, some], zero, torch.nn.functional.one_hot(some % 5, 5).float().expand(2, -1, -1)):
        for k in (1, 20, 71):
            found, plain = both(x, k, order=lists(2, 90, 80))
            assert torch.equal(found, plain)


def test_only_rows_whose_nearest_run_out_are_compared_with_all(monkeypatch):
    asked = []
    cosines = duplicates_near._Near.cosines
    monkeypatch.setattr(
        duplicates_near._Near, "cosines", lambda self, places: asked.append(len(places)) or cosines(self, places)
    )
    kernels.drop_duplicates(rows(1, 400, 32), 50)
    compared = sum(asked)
    assert 400 + 200 + 100 <= compared < 1000  # found three times; in rounds, 8,000 and more would be compared


def test_a_batch_of_three_is_three_batches():
    x, order = rows(3, 50, 9), lists(3, 50, 50)
    for which in range(2):
        together = both(x, 11, order=order)[which]
        for i in range(3):
            assert torch.equal(both(x[i : i + 1], 11, order=order[i : i + 1])[which][0], together[i])


def test_without_a_list_rows_stand_as_they_are():
    x = rows(2, 30, 9)
    order = torch.arange(30).expand(2, 30)
    assert torch.equal(kernels.drop_duplicates(x, 9), kernels.drop_duplicates(x, 9, order=order))
    assert torch.equal(kernels.drop_duplicates(x, 30), order)
    assert kernels.drop_duplicates(x, 0).shape == (2, 0)


def test_meta_tensors_and_export():
    x = torch.empty(2, 30, 9, device="meta")
    assert kernels.drop_duplicates(x, 4, valid=x[..., 0] > 0).shape == (2, 4)

    class Module(torch.nn.Module):
        def forward(self, x):
            return kernels.drop_duplicates(x, 4)

    x = rows(2, 21, 16)
    program = torch.export.export(Module(), (x,), strict=False)
    assert torch.equal(program.module()(x), Module()(x))
