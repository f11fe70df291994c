"""A layout with a tower of pictures and one of text, made by hand for CrossGET."""

from vlmtok.core.signals import tower_signals
from vlmtok.core.site import Layout, StageLayout


def layout(prefix=1, depth=4, stages=("vision", "text", "features")):
    points = frozenset({"start", "mid", "end"})
    tower = StageLayout(depth, 64, 4, depth - 1, points, tower_signals(prefix), prefix)
    features = StageLayout(1, 64, 0, 0, provides=frozenset({"protected"}))
    made = {
        "vision": tower,
        "text": StageLayout(depth, 48, 4, depth - 1, points, tower_signals(1)),
        "features": features,
    }
    return Layout("by hand", {name: made[name] for name in stages})
