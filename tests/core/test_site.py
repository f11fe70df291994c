"""Sites that cannot be, and how the layout of a model resolves layers."""

from __future__ import annotations

import pytest

from vlmtok import Layout, Site, StageLayout
from vlmtok.errors import (
    SiteError,
)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"stage": "tower"}, "stage 'tower' does not exist; stages: vision, features"),
        ({"stage": "vision"}, "needs a layer"),
        ({"stage": "projected", "layer": 0}, "has no layer"),
        ({"stage": "vision", "layer": 0, "point": "middle"}, "point 'middle' does not exist"),
        ({"stage": "projected", "positions": "drop"}, "positions 'drop'"),
        ({"stage": "projected", "scope": "batch"}, "scope 'batch'"),
    ],
)
def test_sites_that_cannot_be(given, says):
    with pytest.raises(SiteError, match=says):
        Site(**given)


def test_layers_are_resolved_by_the_layout():
    layout = Layout("host", {"vision": StageLayout(12, 8, 2, 10)}, {"decoder": "it has none"})
    assert layout.layers("vision") == [*range(11)]
    assert layout.layers("vision", -3) == [9]
    assert layout.layers("vision", (5, 0, 5, 11)) == [0, 5], "ascending, once each, none behind the last that is read"
    for wrong in (12, -13, True, 1.5, "x"):
        with pytest.raises(SiteError, match=r"ToMe: layer .* does not exist; vision of host has layers 0 to 11"):
            layout.layers("vision", wrong if isinstance(wrong, int) else [wrong], "ToMe")
    with pytest.raises(
        SiteError, match=r"stage 'decoder', which host does not offer \(it has none\); it offers: vision"
    ):
        layout.stage("decoder")
