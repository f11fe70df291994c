"""KVNorm: short keys stay, head by head or all heads alike."""

import pytest
import torch
from support.caches import best, kept, layout, view_of

import vlmtok
from vlmtok import KVNorm
from vlmtok.errors import ParameterError, SiteError


def test_the_shortest_keys_of_each_head_stay():
    """Scope head: rows are heads, which choose apart; equal norms go to the lowest index, NaN goes."""
    keys = torch.randn(6, 11, 8)
    keys[0] = 1.0
    keys[1, 4] = float("nan")
    keys[1, 5] = 0.0
    reduction = KVNorm(keep=4).reduce(view_of({"keys_cached": keys}))
    wanted = [best([-float(sum(x * x for x in one.tolist()) ** 0.5) for one in row], 4) for row in keys]
    assert kept(reduction, 11) == wanted
    assert wanted[0] == [0, 1, 2, 3] and 5 in wanted[1] and 4 not in wanted[1]
    assert reduction.src is None and reduction.valid is None


def test_heads_agree_on_the_mean_norm_elsewhere():
    keys = torch.randn(2, 3, 9, 4)
    reduction = KVNorm(keep=0.5, scope="picture").reduce(view_of({"keys_cached": keys}))
    wanted = [best((-row.double().norm(dim=-1).mean(0)).float().tolist(), 5) for row in keys]
    assert kept(reduction, 9) == wanted


def test_a_rotation_does_not_move_the_choice():
    """Keys are cached behind rope, which turns pairs of channels and leaves norms."""
    keys = torch.randn(2, 9, 4, dtype=torch.float64)
    angle = torch.arange(9.0, dtype=torch.float64)[:, None]
    a, b = keys[..., :2], keys[..., 2:]
    turned = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
    one, other = (KVNorm(keep=3).reduce(view_of({"keys_cached": x})).keep for x in (keys, turned))
    assert torch.equal(one, other)


def test_half_precision_keys_are_measured_in_fp32():
    """These two norms are one number in half precision."""
    keys = torch.tensor([[[1000.0, 1.0], [1000.0, 0.0]]], dtype=torch.float16)
    assert kept(KVNorm(keep=1).reduce(view_of({"keys_cached": keys})), 2) == [[1]]


def test_sites():
    """Every layer that can lose entries, or those that are named."""
    model = layout(4, blind={1: "its window is all it keeps"})
    sites = KVNorm().sites(model)
    assert [site.layer for site in sites] == [0, 2, 3]
    assert {(site.stage, site.point, site.scope, site.needs) for site in sites} == {
        ("cache", "end", "head", ("keys_cached",))
    }
    assert [site.layer for site in KVNorm(layers=(-1, 0), scope="sample").sites(model)] == [0, 3]
    assert KVNorm(scope="sample").sites(model)[0].scope == "sample"
    with pytest.raises(SiteError, match="KVNorm: layer 1 of .* its window"):
        KVNorm(layers=1).sites(model)
    with pytest.raises(SiteError, match="layer 4 does not exist"):
        KVNorm(layers=4).sites(model)


@pytest.mark.parametrize(
    "bad", [{"keep": 0.0}, {"keep": 1.5}, {"scope": "clip"}, {"layers": 1.5}, {"layers": (1, "a")}]
)
def test_bad_parameters(bad):
    with pytest.raises(ParameterError, match="KVNorm"):
        KVNorm(**bad)


def test_the_spec_string_has_an_underscore():
    (method,) = vlmtok.parse_methods("kv_norm:keep=0.25:layers=(2;3)+kv_random")[:1]
    assert isinstance(method, KVNorm) and str(method) == "kv_norm:keep=0.25:layers=(2;3)"
