"""At batch 1 a merge layer costs its launches: at most 6 on the Triton path, head mean and attention bias included."""

import pytest
import torch
from count_ops import CountOps, launches_of_a_forward

from vlmtok import kernels

PLANS = {
    "tome": lambda keys, asks: kernels.bipartite_match(keys.mean(1), 8, 1),
    "pitome": lambda keys, asks: kernels.energy_match(keys.mean(1), 8, margin=0.4),
    "crossget": lambda keys, asks: kernels.guided_match(keys.transpose(1, 2).flatten(2), asks, 8),
}


@pytest.mark.parametrize("plan, most", list(zip(PLANS, (4, 5, 6))))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_launches_of_a_merge_layer(plan, most, dtype):
    keys = torch.empty(1, 576, 16, 64, dtype=dtype, device="meta").transpose(1, 2)
    x, size = torch.empty(1, 577, 1024, dtype=dtype, device="meta"), torch.ones(1, 577, device="meta")
    with kernels.use("triton"), CountOps() as count:
        keep, src, dst, *importance = PLANS[plan](keys, x[:, 0])
        kernels.merge_rows_biased(x, size, keep, src, dst, prefix=1, importance=importance[0] if importance else None)
    assert count.total == most, count


TOWERS = ("tome:r=3", "pitome:ratio=0.9", "crossget:rv=3:guidance=none", "crossget:rv=3")


@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("method, most", list(zip(TOWERS, (4, 5, 6, 6))))
def test_launches_of_a_layer_in_a_tower(method, most, proportional):
    """Through hooks, signals and `Reduction`: what one more layer of a ViT adds, compared with the bare model.

    The merge makes the bias of proportional attention on its way, so that it costs no launch.
    """
    added = [
        launches_of_a_forward(depth, f"{method}:prop_attn={str(proportional).lower()}") - launches_of_a_forward(depth)
        for depth in (4, 5)
    ]
    layer = added[1] - added[0]
    assert layer.total() == most and layer["triton _merge_kernel"] == 1, layer


@pytest.mark.parametrize(
    "name, most",
    [
        ("match_max", 1),
        ("match_max twice", 2),
        ("energy", 1),
        ("complete", 5),
        ("guided", 5),
        ("greedy", 3),
        ("cover", 2 * 57 + 9),
        ("determinant", 3),
        ("determinant of a long row", 2 + 59),
        ("duplicates", 7 + 2 * 65),
        ("transition", 1),
    ],
)
def test_launches_of_an_op(name, most):
    x = torch.empty(1, 576, 64, dtype=torch.bfloat16, device="meta")
    start = torch.zeros(1, dtype=torch.int64, device="meta")
    importance = torch.empty(1, 576, device="meta")
    long = torch.empty(1, 2880, 64, dtype=torch.bfloat16, device="meta")
    call = {
        "match_max": lambda: kernels.match_max(x[:, ::2], x[:, 1::2]),
        "match_max twice": lambda: kernels.match_max(x, x, exclude_diag=True),  # lengths first: it must be symmetric
        "energy": lambda: kernels.energy(x, margin=0.4),
        "complete": lambda: kernels.complete_match(x, importance, 8),
        "guided": lambda: kernels.guided_match(x, x[:, 0], 8),
        "greedy": lambda: kernels.greedy_select(x, 57, start),
        "cover": lambda: kernels.greedy_cover(x, 57),  # two a round, and the places of rows that follow
        "determinant": lambda: kernels.greedy_determinant(x, 57, relevance=importance),
        "determinant of a long row": lambda: kernels.greedy_determinant(long, 58, relevance=long[..., 0]),
        "duplicates": lambda: kernels.drop_duplicates(x, 57),
        "transition": lambda: kernels.transition_stats(x, x),
    }[name]
    with kernels.use("triton"), CountOps() as count:
        call()
    # On the meta device the products of halves are widened first; the tensor cores take them as they are.
    assert count.total - count.ops["aten._to_copy.default"] <= most, count


def test_the_counter_counts():
    x = torch.empty(2, 4, device="meta")
    with CountOps() as count:
        y = x.t().reshape(8).unsqueeze(0)  # a view, a copy, a view
        y = torch.empty_like(y).copy_(y) + 1
        y.add_(1)
    assert dict(count.ops) == {
        "aten.clone.default": 1,
        "aten.copy_.default": 1,
        "aten.add.Tensor": 1,
        "aten.add_.Tensor": 1,
    }
