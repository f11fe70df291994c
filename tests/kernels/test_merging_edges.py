"""Merging at the edges: empty entries, pairs without size, sums without an order of their own."""

import torch
from drawn import rows

from vlmtok import kernels
from vlmtok.kernels.reference import rows as rows_of_a_batch


def test_empty_entries_go_nowhere():
    """They may name no token, and what stands where they would read leaves no trace, gradients included."""
    x = rows(2, 5, 4)
    x[:, 0] = float("inf")
    keep, src, dst = torch.tensor([[0, 1]] * 2), torch.tensor([[-1, 3, -1]] * 2), torch.tensor([[-1, 1, -1]] * 2)
    size, half = torch.ones(2, 5), {"keep_weight": torch.ones(2, 2), "src_weight": torch.full((2, 3), 0.5)}
    for weights in ({}, half, {"importance": rows(2, 5, 1)[..., 0]}):
        leaf = x.clone().requires_grad_()
        merged, total = kernels.merge_rows(leaf, size, keep, src, dst, **weights)
        alone, other = kernels.merge_rows(x, size, keep, src[:, 1:2], dst[:, 1:2], **{
            name: value[:, 1:2] if name == "src_weight" else value for name, value in weights.items()
        })  # fmt: skip
        assert torch.equal(merged, alone) and torch.equal(total, other) and merged[:, 0].isinf().all()
        merged[:, 1].sum().backward()
        assert leaf.grad[:, [2, 4]].eq(0).all() and leaf.grad[:, [1, 3]].isfinite().all()
    none = keep[:, :0]
    merged, total = kernels.merge_rows(x, size, none, src[:, :1], dst[:, :1], prefix=1)
    assert torch.equal(merged, x[:, :1]) and total.tolist() == [[1.0], [1.0]]


def test_pairs_without_size_have_weights():
    found = kernels.pair_weights(*torch.tensor([[[0]], [[1]], [[0]]]), torch.zeros(1, 2), torch.zeros(1, 2))
    assert all(weight.isfinite().all() for weight in found)


def test_sizes_have_no_gradient():
    size = torch.ones(1, 4, requires_grad=True)
    keep, src = torch.tensor([[0, 1]]), torch.tensor([[2, 3]])
    merged, total = kernels.merge_rows(rows(1, 4, 3).requires_grad_(), size, keep, src, keep)
    assert merged.requires_grad and not total.requires_grad
    merged.sum().backward()
    assert size.grad is None


def test_sums_in_order_are_the_same_sums(monkeypatch):
    """The form for devices whose `index_add_` has no order, on one that has."""
    x, size = rows(2, 12, 5), torch.rand(2, 12) + 0.5
    keep, src = torch.arange(4).expand(2, 4), torch.arange(4, 12).expand(2, 8)
    dst = torch.tensor([[0, 0, 1, -1, 1, 1, 3, 0], [2] * 8])
    ways = (
        {},
        {"keep_weight": rows(2, 4, 1)[..., 0], "src_weight": rows(2, 8, 1)[..., 0]},
        {"importance": rows(2, 12, 1)[..., 0]},
    )
    expected = [kernels.merge_rows(x, size, keep, src, dst, **way) for way in ways]
    monkeypatch.setattr(rows_of_a_batch, "UNORDERED", ("cpu",))
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(kernels.merge_rows, fullgraph=True, backend=backend)
    for way, (merged, total) in zip(ways, expected):
        for merge in (kernels.merge_rows, compiled):
            found = merge(x, size, keep, src, dst, **way)
            torch.testing.assert_close(found[0], merged)
            assert torch.equal(found[1], total)
    assert sum("vlmtok.merge_rows" in name for name in seen) == len(ways)  # compiled sums would have no order again
    leaf = x.clone().requires_grad_()
    compiled(leaf, size, keep, src, dst)[0].square().sum().backward()
    plain = x.clone().requires_grad_()
    kernels.merge_rows(plain, size, keep, src, dst)[0].square().sum().backward()
    torch.testing.assert_close(leaf.grad, plain.grad)
