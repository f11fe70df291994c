"""PrefixKV: the released allocation and kept sets, and ours, which is exact, ends always and grows with its budget."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.caches import best, kept, layout, view_of
from support.decoder_by_hand import golden, golden_names

import vlmtok
from vlmtok import PrefixKV
from vlmtok.core.layer_profile import LayerProfile
from vlmtok.errors import ParameterError, SpecError
from vlmtok.pruners.prefixkv import TOLERANCE, allocate, bisected, levelled, retained

NAMES = golden_names("prefixkv_*.npz")


# ---------------------------------------------------------------------- the release
@pytest.mark.parametrize("name", NAMES)
def test_the_allocation_equals_the_release(name):
    """Bisection, and what rescaling and truncation make of it."""
    data = golden(name)
    protect = data["start_size"] + data["protect"]
    assert bisected(data["score"], data["ratio"], protect).tolist() == data["forget_raw"].tolist()
    assert allocate(data["score"], data["ratio"], protect) == data["forget_scaled"].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_kept_sets_equal_the_release(name):
    """Of its own allocation, or of a profile, which may ask for more than a layer has."""
    data = golden(name)
    found = retained(data["score"], data["forget"].tolist(), data["start_size"], data["protect"])
    assert [one.tolist() for one in found] == [data[f"kept_{layer}"].tolist() for layer in range(len(found))]


@pytest.mark.parametrize("name", [name for name in NAMES if "profile" in name])
def test_from_scores_to_kept_sets(name):
    data = golden(name)
    forget = allocate(data["score"], data["ratio"], data["start_size"] + data["protect"])
    found = retained(data["score"], forget, data["start_size"], data["protect"])
    assert [one.tolist() for one in found] == [data[f"kept_{layer}"].tolist() for layer in range(len(found))]


def test_scores_are_sums_over_rows_of_the_mean_over_heads():
    """What `attention_mass` has to be for the release's sets to be ours."""
    data = golden("prefixkv_01_profile_small.npz")
    torch.testing.assert_close(data["attention"].mean(1).sum(1), data["score"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_our_level_is_where_the_release_looks_for_it(name):
    """Without protected columns: its bisection ends within its tolerance of our sum, and no layer lies further off."""
    data = golden(name)
    score = data["score"]
    total = int((1 - data["ratio"]) * score.numel() + 0.5)
    ours = levelled(list(score[:, None]), total)[0]
    theirs = score.shape[1] - bisected(score, data["ratio"])
    assert int(ours.sum()) == total and abs(int(theirs.sum()) - total) <= TOLERANCE
    gap = ours - theirs
    assert bool((gap >= 0).all()) or bool((gap <= 0).all())  # one level is above the other


def test_the_released_bisection_ends_where_layers_are_alike():
    """By its halvings: the counts jump past the target together."""
    score = torch.ones(4, 16)
    assert bisected(torch.cat([score, score * 3]), 0.5).tolist() == [8] * 8
    alike = torch.rand(16).expand(32, 16)
    assert abs(int(bisected(alike, 0.53).sum()) - 0.53 * alike.numel()) >= TOLERANCE


def test_the_first_prefix_that_reaches_a_level_counts():
    """One that equals it reaches it."""
    assert bisected(torch.ones(1, 16), 0.5).tolist() == [8]


# ---------------------------------------------------------------------- our level
def by_halvings(masses, total):
    """Sixty halvings of the level, then what is missing to the layers whose next entry is the largest."""
    tables = [sorted((x / sum(mass) for x in mass), reverse=True) for mass in masses]

    def at(level):
        found = []
        for table in tables:
            reached, k = 0.0, 0
            while k < len(table) and (k == 0 or reached < level):
                reached += table[k]
                k += 1
            found.append(k)
        return found

    low, high = 0.0, 1.0 + 1e-9
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) <= total else (low, middle)
    found = at(low)
    while sum(found) < total:
        open_to = [layer for layer, k in enumerate(found) if k < len(tables[layer])]
        found[max(open_to, key=lambda layer: (tables[layer][found[layer]], -layer))] += 1
    return found


masses_of = st.lists(st.lists(st.integers(1, 10_000), min_size=1, max_size=12), min_size=1, max_size=6)


@given(masses=masses_of, share=st.floats(0, 1))
def test_the_level_equals_halvings(masses, share):
    """Also where layers hold different numbers, as above a cut inside the language model."""
    total = max(len(masses), int(share * sum(map(len, masses)) + 0.5))
    found = levelled([torch.tensor([mass], dtype=torch.float32) for mass in masses], total)[0].tolist()
    assert sum(found) == total
    wanted = by_halvings(masses, total)
    if len({round(sum(sorted(m, reverse=True)[:k]) / sum(m), 9) for m in masses for k in range(1, len(m))}) == sum(
        len(m) - 1 for m in masses
    ):
        assert found == wanted  # where two layers reach one level at once, rounding may settle it
    else:
        assert max(abs(one - other) for one, other in zip(found, wanted)) <= total


@given(masses=masses_of, data=st.data())
def test_a_larger_total_takes_from_no_layer(masses, data):
    given_masses = [torch.tensor([mass], dtype=torch.float32) for mass in masses]
    entries = sum(map(len, masses))
    before = [0] * len(masses)
    for total in sorted(data.draw(st.sets(st.integers(len(masses), entries), max_size=4)) | {entries}):
        found = levelled(given_masses, total)[0].tolist()
        assert sum(found) == total
        assert all(b <= k <= len(m) for b, k, m in zip(before, found, masses))
        assert min(found) >= 1
        before = found
    assert before == [len(mass) for mass in masses]


def test_identical_layers_end_and_share_evenly():
    """The release's bisection cannot; the first layers get what is left over."""
    mass = torch.rand(2, 16)
    found = levelled([mass] * 5, 42)
    assert found.tolist() == [[9, 9, 8, 8, 8]] * 2
    flat = levelled([torch.ones(1, 16), torch.zeros(1, 16), torch.full((1, 16), 1e-30)], 24)
    assert flat.tolist() == [[8, 8, 8]]  # a layer without mass is one whose entries are alike


def test_of_layers_that_reach_a_level_together_the_larger_share_goes_first():
    """Half is held by the first entry of both; then come 3 of 10 and 5 of 10."""
    given_masses = [torch.tensor([[5.0, 3.0, 2.0]]), torch.tensor([[5.0, 5.0]])]
    assert [levelled(given_masses, total).tolist() for total in (2, 3, 4)] == [[[1, 1]], [[1, 2]], [[2, 2]]]


def test_a_layer_of_one_heavy_entry_keeps_few():
    peaked, flat = torch.full((1, 100), 1e-4), torch.ones(1, 100)
    peaked[0, 40] = 1.0
    found = levelled([peaked, flat], 80)[0].tolist()
    assert found[0] < 5 and sum(found) == 80


def test_nan_counts_as_no_mass():
    mass = torch.rand(1, 20)
    broken = mass.clone()
    broken[0, 7] = float("nan")
    without = mass.clone()
    without[0, 7] = 0.0
    other = torch.rand(1, 20)
    assert torch.equal(levelled([broken, other], 17), levelled([without, other], 17))


# ---------------------------------------------------------------------- the method
def asked(method, masses, depth=None, entered=None):
    """What it keeps in each layer: a plan over all views, then one after the other."""
    row: dict = {}
    depth = len(masses) if depth is None else depth
    views = [
        view_of({"attention_mass": mass}, layer, depth, row, entered or masses[0].shape[-1])
        for layer, mass in enumerate(masses)
    ]
    with torch.no_grad():
        method.plan(views)
        return views, [method.reduce(view) for view in views]


def masses(layers=6, batch=3, n=24, heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sharp = torch.linspace(0.2, 6, layers)
    return [(torch.randn(batch, heads, n, generator=generator) * sharp[layer]).exp() for layer in range(layers)]


@given(keep=st.floats(0.01, 1.0), seed=st.integers(0, 50), n=st.integers(1, 24), layers=st.integers(1, 6))
def test_the_sum_over_layers_is_exact(keep, seed, n, layers):
    """round(keep N L), half up, in every row; one entry a layer at least."""
    views, found = asked(PrefixKV(keep=keep), masses(layers, 2, n, seed=seed))
    counts = [[n, n] if one is None else [len(row) for row in kept(one, n)] for one in found]
    wanted = max(layers, int(keep * n * layers + 0.5))
    assert [sum(layer[row] for layer in counts) for row in range(2)] == [wanted] * 2


def test_each_layer_keeps_its_best_and_rows_may_differ():
    given_masses = masses()
    views, found = asked(PrefixKV(keep=0.4), given_masses)
    wanted = levelled([mass.mean(1) for mass in given_masses], round(0.4 * 24 * 6))
    ragged = 0
    for layer, (mass, one) in enumerate(zip(given_masses, found, strict=True)):
        numbers = wanted[:, layer].tolist()
        assert kept(one, 24) == [best(row, k) for row, k in zip(mass.mean(1).tolist(), numbers)]
        assert one.slots == max(numbers) and (one.valid is None) == (len(set(numbers)) == 1)
        ragged += one.valid is not None
    assert ragged, "all rows keep as many"


@pytest.mark.parametrize("method", [PrefixKV(keep=0.37), PrefixKV(keep=7), PrefixKV(keep=0.001)])
def test_what_all_layers_keep_together_is_told_beforehand(method):
    views, found = asked(method, masses(6, 1))
    left = sum(24 if one is None else len(kept(one, 24)[0]) for one in found)
    assert method.together([view.counts for view in views]) == left
    assert PrefixKV(keep=0.37, min_tokens=24).together([view.counts for view in views]) is None


def test_a_batch_equals_its_rows():
    given_masses = masses(seed=4)
    together = [kept(one, 24) for one in asked(PrefixKV(keep=0.3), given_masses)[1]]
    for row in range(3):
        alone = asked(PrefixKV(keep=0.3), [mass[row : row + 1] for mass in given_masses])[1]
        assert [kept(one, 24)[0] for one in alone] == [layer[row] for layer in together]
        assert all(one.valid is None for one in alone)


def test_a_count_is_what_layers_keep_on_average():
    _, found = asked(PrefixKV(keep=5), masses(4, 1, 24))
    assert sum(len(kept(one, 24)[0]) for one in found) == 20
    cut = [*masses(2, 1, 24), *masses(2, 1, 3)]  # above a cut inside the language model
    views, found = asked(PrefixKV(keep=5), cut, entered=24)
    counts = [view.counts.n if one is None else len(kept(one, view.counts.n)[0]) for view, one in zip(views, found)]
    assert sum(counts) == 5 + 5 + 3 + 3


@pytest.mark.parametrize("method", [PrefixKV(keep=1.0), PrefixKV(keep=24), PrefixKV(keep=1.0, profile=(0.5, 0.1))])
def test_keeping_all_is_doing_nothing(method):
    views, found = asked(method, masses())
    assert found == [None] * 6 and not views[0].row
    assert [method.count(view.counts) for view in views] == [24] * 6


def test_small_rows_are_left_whole_and_ask_for_no_plan():
    views, found = asked(PrefixKV(keep=0.5, min_tokens=24), masses())
    assert found == [None] * 6 and not views[0].row
    assert asked(PrefixKV(keep=0.5, min_tokens=23), masses())[1] != [None] * 6


def test_without_a_plan_it_says_so():
    view = view_of({"attention_mass": torch.rand(1, 2, 8)}, 2)
    with pytest.raises(ParameterError, match="no plan for cache layer 2.*profile"):
        PrefixKV().reduce(view)
    assert PrefixKV().count(view.counts) is None


def test_on_tensors_without_data_every_slot_may_be_real():
    views, found = asked(PrefixKV(keep=0.3), [mass.to("meta") for mass in masses()])
    for one in found:
        assert one.keep.shape == one.valid.shape == (3, 24) and one.keep.device.type == "meta"


def test_the_host_waits_once(monkeypatch):
    """Numbers of all layers and rows come over together; nothing else is read."""
    reads = []
    of_tensors = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(tuple(self.shape)) or of_tensors(self))
    for name in ("item", "__bool__", "__int__", "__float__", "nonzero", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *_: pytest.fail("the device was read"))
    asked(PrefixKV(keep=0.3), masses())
    assert reads == [(6, 3)]


def test_sites_and_words():
    (site, *_) = PrefixKV().sites(layout(3))
    assert (site.stage, site.needs, site.scope, site.window) == ("cache", ("attention_mass",), "sample", 0)
    assert str(vlmtok.parse_methods("prefixkv:ratio=0.8")[0]) == "prefixkv:keep=0.2"
    with pytest.raises(ParameterError, match="start_size"):
        vlmtok.create_method("prefixkv", start_size=4)


# ---------------------------------------------------------------------- profiles
SHARES = (0.9, 0.6, 0.3, 0.2, 0.2, 0.2)


@given(keep=st.floats(0.02, 1.0), more=st.floats(0.02, 1.0), n=st.integers(1, 24), depth=st.integers(1, 8))
def test_a_profile_is_exact_and_grows_by_supersets(keep, more, n, depth):
    """For any depth; counts are host ints and are what is kept."""
    given_masses, sets = masses(depth, 1, n), []
    for share in sorted((keep, more)):
        method = PrefixKV(keep=share, profile=SHARES)
        views, found = asked(method, given_masses)
        numbers = [method.count(view.counts) for view in views]
        assert all(type(one) is int for one in numbers)
        assert sum(numbers) == max(depth, int(share * n * depth + 0.5))
        sets.append([set(range(n)) if one is None else set(kept(one, n)[0]) for one in found])
        assert list(map(len, sets[-1])) == numbers
    assert all(one <= other for one, other in zip(*sets, strict=True))


def test_a_profile_needs_no_plan():
    """Mass ranks the entries of a layer, and no other layer is looked at."""
    mass = torch.rand(2, 2, 20)
    reduction = PrefixKV(keep=0.4, profile=SHARES).reduce(view_of({"attention_mass": mass}, 1, 6))
    assert kept(reduction, 20) == [best(row, 12) for row in mass.mean(1).tolist()]


@pytest.mark.parametrize("form", ["path", "mapping", "tuple", "profile"])
def test_forms_of_a_profile(form, tmp_path):
    path = tmp_path / "shares.json"
    LayerProfile(SHARES, "a model", 0.4, 12).save(path)
    forms = {
        "path": path,
        "mapping": json.loads(path.read_text()),
        "tuple": SHARES,
        "profile": LayerProfile(SHARES),
    }
    method = PrefixKV(keep=0.4, profile=forms[form])
    counts = [method.count(view.counts) for view in asked(method, masses(6, 1, 20))[0]]
    assert counts == [18, 12, 6, 4, 4, 4]


def test_a_spec_string_names_the_file_or_the_shares(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    LayerProfile(SHARES).save("shares.json")
    for spec in (
        "prefixkv:profile=shares.json",
        "prefixkv:keep=0.25:profile=(0.5;0.25)",
        "prefixkv:profile=./shares.json",
    ):
        (method,) = vlmtok.parse_methods(spec)
        assert str(method) == spec
    assert str(PrefixKV(profile=tmp_path / "shares.json")) == f"prefixkv:profile={tmp_path / 'shares.json'}"
    of_mapping = str(PrefixKV(keep=0.3, profile={"shares": SHARES}))
    assert of_mapping == "prefixkv:keep=0.3:profile=given"
    with pytest.raises(ParameterError, match=r"profile='given' is not possible; a path to a file \(\.json\)"):
        vlmtok.parse_methods(of_mapping)
    with pytest.raises(ParameterError, match=r"'other\.json' cannot be read"):
        vlmtok.parse_methods("prefixkv:profile=other.json")
    with pytest.raises(SpecError, match="is no value"):
        vlmtok.parse_methods("prefixkv:profile=two words.json")


def test_reports_say_what_a_profile_was_made_for():
    said = PrefixKV(keep=0.3, profile=LayerProfile(SHARES, keep=0.4)).remarks(layout(12))
    assert said == [
        "PrefixKV: the profile has 6 layers, interpolated to the 12 of caches by hand; the profile was made for "
        "keep=0.4, scaled to keep=0.3"
    ]
    assert PrefixKV(keep=0.4, profile=LayerProfile(SHARES, keep=0.4)).remarks(layout(6)) == []
    assert PrefixKV().remarks(layout(6)) == []


@pytest.mark.parametrize(
    "bad", [{"keep": 0.0}, {"keep": 2.0}, {"layers": 0.5}, {"profile": 3}, {"profile": True}, {"profile": (0.0, 0.0)}]
)
def test_bad_parameters(bad):
    with pytest.raises(ParameterError, match="PrefixKV"):
        PrefixKV(**bad)
