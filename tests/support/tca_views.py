"""A tower layout and views of it, made by hand for TCA."""

from vlmtok.core.signals import tower_signals
from vlmtok.core.site import Layout, Site, StageLayout
from vlmtok.core.view import TokenView


def layout(prefix=1, depth=12):
    points = frozenset({"start", "mid", "end"})
    return Layout(
        "by hand", {"vision": StageLayout(depth, 8, 2, depth - 1, points, tower_signals(prefix), prefix)}
    )  # fmt: skip


def mid_view(attention, x, layer=3, depth=12):
    return TokenView(x, Site("vision", layer, "mid"), num_prefix=1, depth=depth, signals={"cls_attention": attention})
