"""Vision towers: reference vectors of the published implementations, gradients, and compiled graphs."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import hosts_of, models, oracle
from support.checks import Print, assert_differs, assert_equal, assert_same
from support.places import GOLDEN
from support.player import Player

import vlmtok
from vlmtok import PiToMe, Reduction, Site, ToDRE, TokenView, ToMe
from vlmtok.errors import PassError, VlmtokWarning


def golden(name):
    with np.load(GOLDEN / name) as data:
        return {key: data[key].item() if data[key].ndim == 0 else torch.from_numpy(data[key]) for key in data.files}


def golden_names(pattern, count):
    names = sorted(path.name for path in GOLDEN.glob(pattern))
    assert len(names) == count, f"{pattern}: {names}"
    return names


# ---------------------------------------------------------------------- end to end, weights included
MICRO = {
    "tome_r4": ToMe(r=4),
    "tome_r4_noprop": ToMe(r=4, prop_attn=False),
    "tome_r7": ToMe(r=7),
    "tome_r7_dec": ToMe(r=(7, -1)),
    "pitome_deit_095": PiToMe.preset("deit", ratio=0.95),
    "pitome_deit_090": PiToMe.preset("deit", ratio=0.9),
    "pitome_mae_090": PiToMe.preset("mae", ratio=0.9),
    "pitome_all_090": PiToMe.preset("aug", ratio=0.9),
    "pitome_paper_0925": PiToMe.preset("paper", ratio=0.925),
}


@pytest.fixture(scope="module")
def micro():
    from timm.models.vision_transformer import VisionTransformer

    data = golden("e2e_micro_vit.npz")
    model = VisionTransformer(
        img_size=64, patch_size=8, embed_dim=48, depth=6, num_heads=3, num_classes=10, mlp_ratio=2.0
    )
    model.load_state_dict({key[2:]: value for key, value in data.items() if key.startswith("w.")})
    return model.eval(), data


def test_the_micro_vit_is_the_published_one(micro):
    model, data = micro
    variants = {key.partition(".")[0] for key in data if key.endswith(".logits")}
    assert variants == {"none", *MICRO}
    with torch.no_grad():
        assert_equal(model(data["x"]), data["none.logits"], 1e-5)


@pytest.mark.parametrize("variant", MICRO)
def test_micro_vit_end_to_end(micro, variant):
    """Logits to 1e-4 and identical sources, tokens of every layer included."""
    model, data = micro
    bare = data["none.logits"]
    lengths = []
    handles = [block.register_forward_hook(lambda m, a, y: lengths.append(y.shape[1])) for block in model.blocks]
    with torch.no_grad(), vlmtok.compress(model, MICRO[variant], trace=True) as run:
        found = model(data["x"])
        trace = run.trace()
    for handle in handles:
        handle.remove()
    assert lengths == data[f"{variant}.tokens_out"].tolist()
    assert_equal(found, data[f"{variant}.logits"], 1e-4)
    assert_differs(found, bare)
    for row in range(len(found)):
        source = data[f"{variant}.source"][row, 1:, 1:]  # slots by patches, without the class token
        assert same_groups(trace[row].owner.tolist(), source.float().argmax(0).tolist())
        sizes = data[f"{variant}.size"][row, 1:, 0]
        assert sorted(trace[row].group_sizes().tolist()) == sorted(
            int(sizes[slot]) for slot in source.float().argmax(0).tolist()
        )


def same_groups(one, other):
    """Whether two owner maps group the patches alike, whatever the slots are called."""
    return len(set(one)) == len(set(other)) == len(set(zip(one, other)))


@pytest.mark.parametrize("variant", MICRO)
def test_the_oracle_agrees_with_the_published_micro_vit(micro, variant):
    """What all other models are compared with gives the published numbers here."""
    model, data = micro
    from vlmtok.adapters import adapter_for

    layout, vision = adapter_for(model).layout(), oracle.vision_of(model)
    with torch.no_grad():
        for row in range(3):
            run = oracle.run_tower(vision, data["x"][row : row + 1], Player([MICRO[variant]], layout))
            assert_equal(vision.head(vision.tokens(run.x[None])), data[f"{variant}.logits"][row : row + 1], 1e-4)
            source = data[f"{variant}.source"][row, 1:, 1:].float().argmax(0)
            assert run.source.tolist() == source.tolist(), "the order of the slots"


TINY = {
    "tome:r=16": [181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11],
    "tome:r=(16;-1)": [165, 136, 110, 87, 67, 50, 36, 25, 17, 12, 10, 10],
    "pitome:preset=deit:ratio=0.95": [188, 179, 171, 163, 155, 148, 141, 134, 128, 122, 116, 111],
    "pitome:preset=paper:ratio=0.925": [183, 170, 158, 147, 137, 127, 118, 110, 102, 95, 88, 82],
}
"""Tokens behind each block of the published runs on a vit_tiny_patch16_224 (12 blocks, 197 tokens)."""


@pytest.fixture(scope="module")
def vit_tiny():
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    torch.manual_seed(1)
    return model, torch.randn(2, 3, 224, 224)


@pytest.mark.parametrize("spec", TINY)
def test_vit_tiny_has_the_published_lengths_and_the_tokens_of_the_oracle(vit_tiny, spec):
    model, x = vit_tiny
    methods, lengths = vlmtok.parse_methods(spec), []
    handles = [block.register_forward_hook(lambda m, a, y: lengths.append(y.shape[1])) for block in model.blocks]
    with torch.no_grad(), vlmtok.compress(model, methods, trace=True) as run:
        found = model(x)
        trace = run.trace()
    for handle in handles:
        handle.remove()
    assert lengths == TINY[spec]
    vision = oracle.vision_of(model)
    with torch.no_grad():
        wanted = oracle.run_tower(vision, x[:1], Player(methods, run.layout))
        assert_equal(found[:1], vision.head(vision.tokens(wanted.x[None])), 1e-4)
        assert_differs(found, model(x))
    assert same_groups(trace[0].owner.tolist(), wanted.source.tolist())


# ---------------------------------------------------------------------- matching alone
def hand_view(data, prefix, layer=0):
    size = data["size_in"][..., 0] if "size_in" in data else None
    keys = data["metric"][:, prefix:]
    return TokenView(
        data["x"][:, prefix:],
        Site("vision", layer, "mid"),
        size=None if size is None else size[:, prefix:],
        num_prefix=prefix,
        signals={"keys": keys},
    )


def shortened(data, reduction, view, prefix):
    """(tokens, sizes) with the prefix in front, as the reference files hold them."""
    x, size = view.tokens, torch.ones(view.tokens.shape[:2]) if view.size is None else view.size
    if reduction is not None:
        x, size = reduction.apply(x, size)
    head = data["size_in"][:, :prefix, 0] if "size_in" in data else torch.ones(len(x), prefix)
    return torch.cat([data["x"][:, :prefix], x], 1), torch.cat([head, size], 1)


def owners(reduction, n, prefix):
    """Slot of every token of the whole row."""
    batch = 1 if reduction is None else reduction.keep.shape[0]
    if reduction is None:
        return torch.arange(n + prefix).expand(batch, -1)
    inner = reduction.assignment(n)
    return torch.cat([torch.arange(prefix).expand(batch, prefix), inner + prefix], 1)


TOME = ["tome_10_ties_duplicates.npz", "tome_12_zero_norm.npz"]
"""Files whose indices are no reference: ties, and a division by zero."""


@pytest.mark.parametrize("name", [name for name in golden_names("tome_*.npz", 9) if name not in TOME])
def test_tome_reference_vectors(name):
    data = golden(name)
    prefix = int(data["class_token"]) + int(data["distill_token"])
    view = hand_view(data, prefix)
    method = ToMe(r=data["r"])
    reduction = method.reduce(view)
    assert method.count(view.counts) == (view.tokens.shape[1] if reduction is None else reduction.slots)
    x, size = shortened(data, reduction, view, prefix)
    assert_equal(x, data["x_out"], 1e-5)
    assert_equal(size, data["size_out"][..., 0], 0)
    if "source_out" not in data or reduction is None:
        return
    assert_merged_back_and_plain(data, reduction, view, prefix)
    gaps = [data[key] for key in ("gap_boundary", "gap_order_min", "gap_argmax_min") if key in data]
    assert min(gaps) > 1e-6
    assert torch.equal(owners(reduction, view.tokens.shape[1], prefix), data["source_out"].argmax(1))


def assert_merged_back_and_plain(data, reduction, view, prefix):
    """`unmerge` and `Reduction.mean` against the published ones, where a file has them."""
    if "x_unmerged" in data:
        inner = reduction.unmerge(data["x_out"][:, prefix:], view.tokens.shape[1])
        assert_equal(torch.cat([data["x_out"][:, :prefix], inner], 1), data["x_unmerged"], 1e-5)
    if "x_mean" in data:
        plain = Reduction.mean(reduction.keep, reduction.src, reduction.dst).apply(view.tokens, view.size)[0]
        assert_equal(plain, data["x_mean"][:, prefix:], 2e-5)


def test_tome_ties_go_to_the_lowest_index():
    data = golden("tome_10_ties_duplicates.npz")
    view = hand_view(data, int(data["class_token"]))
    reduction = ToMe(r=data["r"]).reduce(view)
    again = ToMe(r=data["r"]).reduce(view)
    assert torch.equal(reduction.keep, again.keep)
    assert torch.equal(reduction.dst, again.dst)
    x = torch.ones(1, 8, 4)
    reduction = ToMe(r=2).reduce(TokenView(x, signals={"keys": x}))
    assert (reduction.src.tolist(), reduction.keep.tolist(), reduction.dst.tolist()) == (
        [[0, 2]],
        [[4, 6, 1, 3, 5, 7]],
        [[2, 2]],
    )


def test_a_zero_key_merges_last():
    """The release divides by zero there and merges every token into one."""
    data = golden("tome_12_zero_norm.npz")
    view = hand_view(data, int(data["class_token"]))
    reduction = ToMe(r=data["r"]).reduce(view)
    x, size = reduction.apply(view.tokens, view.size)
    assert bool(x.isfinite().all())
    assert float(size.sum()) == view.tokens.shape[0] * view.tokens.shape[1]


MODES = {
    "full": {},
    "obsm": {"protect": "none"},
    "text": {"energy": "gaussian", "split": "halves"},
    "bsm": {"plain": 1},
}


@pytest.mark.parametrize(
    "name", [name for name in golden_names("pitome_*.npz", 11) if name != "pitome_12_ties_duplicates.npz"]
)
def test_pitome_reference_vectors(name):
    data = golden(name)
    prefix = int(data["class_token"])
    view = hand_view(data, prefix)
    method = PiToMe(ratio=data["ratio"], margin=data["margin"], alpha=data["alpha"], **MODES[data["mode"]])
    reduction = method.reduce(view)
    assert method.count(view.counts) == (view.tokens.shape[1] if reduction is None else reduction.slots)
    x, size = shortened(data, reduction, view, prefix)
    wanted, sizes = data["x_out"], data["size_out"][..., 0]
    n = view.tokens.shape[1]
    if data.get("gap_energy_order_min", 1.0) > 1e-6:
        assert_equal(x, wanted, 2e-5)
        assert_equal(size, sizes, 0)
        if "source_out" in data and reduction is not None:
            assert torch.equal(owners(reduction, n, prefix), data["source_out"].argmax(1))
            assert_merged_back_and_plain(data, reduction, view, prefix)
        return
    # Two energies tie: protected tokens may stand in another order.
    assert data["gap_energy_top"] > 1e-6
    for row in range(len(x)):
        found = {tuple(sorted(group)) for group in groups(owners(reduction, n, prefix)[row])}
        assert found == {tuple(sorted(group)) for group in groups(data["source_out"].argmax(1)[row])}
    assert_equal(x.sort(1).values, wanted.sort(1).values, 2e-5)


def test_pitome_ties_go_to_the_lowest_index():
    data = golden("pitome_12_ties_duplicates.npz")
    prefix = int(data["class_token"])
    view = hand_view(data, prefix)
    method = PiToMe(ratio=data["ratio"], margin=data["margin"], alpha=data["alpha"])
    reduction, again = method.reduce(view), method.reduce(view)
    assert reduction.slots == data["x_out"].shape[1] - prefix
    for name in ("keep", "src", "dst"):
        assert torch.equal(getattr(reduction, name), getattr(again, name))
    x, size = reduction.apply(view.tokens, view.size)
    assert_equal((x * size.unsqueeze(-1)).sum(1), view.tokens.sum(1))
    x = torch.ones(1, 8, 4)
    reduction = PiToMe(ratio=0.75).reduce(TokenView(x, signals={"keys": x}))
    assert (reduction.src.tolist(), reduction.keep.tolist(), reduction.dst.tolist()) == (
        [[0, 2]],
        [[4, 5, 6, 7, 1, 3]],
        [[4, 4]],
    )


def groups(owner):
    found = {}
    for token, slot in enumerate(owner.tolist()):
        found.setdefault(slot, []).append(token)
    return found.values()


def pitome_by_hand(metric, r, margin, alpha):
    """pitome.md 1.1 for one row, in plain loops: (protected by falling energy, [(a, b)], b by falling energy)."""
    x = metric.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    similar = x @ x.T
    above = similar - margin
    energy = np.where(above > 0, above, alpha * (np.exp(np.minimum(above, 0)) - 1)).mean(1)
    order = sorted(range(len(x)), key=lambda i: (-energy[i], i))
    top, protected = order[: 2 * r], order[2 * r :]
    a, b = top[0::2], top[1::2]
    return protected, [(i, max(b, key=lambda j: (similar[i, j], -b.index(j)))) for i in a], b


def tome_by_hand(metric, r, prefix):
    """ToMe for one row, in plain loops: (kept even ones, [(a, b)], odd ones), places among the view's tokens."""
    x = metric.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    n = len(x)
    even = [i for i in range(n) if (i + prefix) % 2 == 0]
    odd = [i for i in range(n) if (i + prefix) % 2 == 1]
    r = min(r, (n + prefix - (prefix > 0)) // 2, len(even), len(odd))
    best = {i: max(odd, key=lambda j: (x[i] @ x[j], -j)) for i in even}
    order = sorted(even, key=lambda i: (-(x[i] @ x[best[i]]), i))
    stay = order[r:]
    return sorted(stay) if prefix else stay, [(i, best[i]) for i in order[:r]], odd


@given(seed=st.integers(0, 10_000), n=st.integers(4, 40), prefix=st.integers(0, 3), data=st.data())
def test_tome_equals_plain_loops(seed, n, prefix, data):
    r = data.draw(st.integers(1, n // 2))
    keys = torch.randn(1, n, 6, generator=torch.Generator().manual_seed(seed))
    reduction = ToMe(r=r).reduce(TokenView(keys, num_prefix=prefix, signals={"keys": keys}))
    stay, pairs, odd = tome_by_hand(keys[0], r, prefix)
    assert reduction.keep[0].tolist() == [*stay, *odd]
    slots = [*stay, *odd]
    assert list(zip(reduction.src[0].tolist(), reduction.dst[0].tolist())) == [(a, slots.index(b)) for a, b in pairs]


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(4, 40),
    ratio=st.floats(0.5, 0.95),
    margin=st.floats(-0.5, 0.9),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_pitome_equals_plain_loops(seed, n, ratio, margin, alpha):
    keys = torch.randn(1, n, 6, generator=torch.Generator().manual_seed(seed))
    method = PiToMe(ratio=ratio, margin=margin, alpha=alpha)
    reduction = method.reduce(TokenView(keys, num_prefix=1, signals={"keys": keys}))
    r = min(math.floor(n - n * ratio), n // 2)
    if r == 0:
        assert reduction is None
        return
    protected, pairs, b = pitome_by_hand(keys[0], r, margin, alpha)
    slots = [*protected, *b]
    if alpha == 0:  # energies are zero exactly for many tokens: only the sets are certain
        assert sorted(reduction.keep[0].tolist() + reduction.src[0].tolist()) == list(range(n))
        return
    assert reduction.keep[0].tolist() == slots
    assert list(zip(reduction.src[0].tolist(), reduction.dst[0].tolist())) == [(a, slots.index(j)) for a, j in pairs]


@pytest.mark.parametrize("kind", ["tome", "pitome"])
def test_chains_keep_sizes_and_sources(kind):
    """Three steps behind each other (r = 8, 6, 20; ratios .9, .85, .8): sums, sizes and sources stay exact."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 50, 12, generator=generator)
    original, size, joined = x, None, None
    steps = [8, 6, 20] if kind == "tome" else [0.9, 0.85, 0.8]
    lengths = []
    for step, value in enumerate(steps):
        keys = torch.randn(2, x.shape[1], 8, generator=generator)
        method = ToMe(r=value) if kind == "tome" else PiToMe(ratio=value, margin=(0.75, 0.5, 0.25)[step])
        reduction = method.reduce(TokenView(x, size=size, signals={"keys": keys}))
        x, size = reduction.apply(x, size)
        joined = reduction if joined is None else joined.then(reduction)
        lengths.append(x.shape[1])
    assert lengths == ([42, 36, 18] if kind == "tome" else [45, 39, 32])
    owner = joined.assignment(50)
    for row in range(2):
        for slot in range(x.shape[1]):
            members = (owner[row] == slot).nonzero()[:, 0]
            assert int(size[row, slot]) == len(members)
            assert_equal(x[row, slot], original[row, members].mean(0))
    once, sizes = joined.apply(original)
    assert_equal(once, x)
    assert_equal(sizes, size, 0)


# ---------------------------------------------------------------------- ToDRE alone
KINDS = {"maxsum": "sum", "kcenter": "max"}


@pytest.mark.parametrize("name", golden_names("todre_maxsum_*.npz", 9) + golden_names("todre_kcenter_*.npz", 9))
def test_todre_selection_reference_vectors(name):
    from vlmtok.pruners.todre import diverse_subset

    data = golden(name)
    x, n = data["x"], data["x"].shape[1]
    k = min(data["k"], n)
    keep, order = diverse_subset(x, k, data["pivot"], rule=KINDS[name.split("_")[1]])
    assert torch.equal(keep, data["keep_sorted"])
    assert torch.equal(order, data["order"])
    # The same through the method, as the core calls it: the pivot is the token that the class token looks at most.
    attention = data.get("cls_attn")
    if attention is None or k == n:
        return
    signals, part = {"cls_attention@vision:-1": attention.reshape(x.shape[0], 1, -1).expand(-1, 3, -1)}, None
    if "thumb_len" in data:
        part = torch.ones(1, n, dtype=torch.int64)
        part[:, : data["thumb_len"]] = 0
    view = TokenView(x, Site("projected"), part=part, signals=signals)
    if "frames" in data:
        return  # which frame the pivot comes from is the host's business
    reduction = ToDRE(keep=data["k"], rule=KINDS[name.split("_")[1]], tau=None).reduce(view)
    assert torch.equal(reduction.keep, data["keep_sorted"])


@pytest.mark.parametrize("name", golden_names("todre_stage2_*.npz", 6))
def test_todre_relevance_reference_vectors(name):
    from vlmtok.pruners.todre import relevance

    data = golden(name)
    kind, attention = data["token_type"], data["attn"]
    visual, text = (kind == 1).nonzero()[:, 0], (kind == 2).nonzero()[:, 0]
    to_vision = attention[:, text][:, :, visual][None]
    to_text = attention[:, visual][:, :, text].sum(-1).mean(0)[None]
    found = relevance(to_vision, to_text)
    assert abs(float(found[0]) - data["a_tv"]) < 1e-6
    assert abs(float(found[1]) - data["a_vt"]) < 1e-6
    for tau, drop in zip(data["taus"].tolist(), data["drop"].tolist()):
        view = TokenView(
            torch.zeros(1, len(visual), 4),
            Site("decoder", 3, "end"),
            signals={"text_attention": to_vision, "attention_to_text": to_text},
        )
        reduction = ToDRE(keep=None, tau=tau).reduce(view)
        assert bool(reduction.valid.any()) is not bool(drop)
        assert bool(reduction.valid.all()) is not bool(drop)


# ---------------------------------------------------------------------- PiToMe in LLaVA's tower
def llava_tower(depth=16):
    import transformers as tf

    torch.manual_seed(0)
    config = tf.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=depth,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        attn_implementation="eager",
    )
    return models.randomize(tf.CLIPVisionModel(config), gain=1.0)


@pytest.mark.parametrize("ratio", [0.95, 0.9])
def test_pitome_llava_preset_equals_the_released_recipe(ratio):
    """pitome.md 1.3, HF row, written out: after the whole block, on its output; plain matching with the class token
    counted in r and in the parity for layers 0 to 12, energy matching behind; plain means; no sizes anywhere."""
    model = llava_tower()
    depth = 16
    x = models.pictures(2, 3, (64, 64))
    seen = []
    handles = [m.register_forward_hook(lambda m, a, y: seen.append(y)) for m in model.encoder.layers]
    with torch.no_grad():
        bare = model(pixel_values=x, output_hidden_states=True)
        seen.clear()
        with vlmtok.compress(model, PiToMe.preset("llava", ratio=ratio)):
            found = model(pixel_values=x, output_hidden_states=True)
        for handle in handles:
            handle.remove()
        lengths = {0.95: [62, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 38, 37, 36, 35]}.get(ratio)
        lengths = lengths or [59, 54, 49, 45, 41, 37, 34, 31, 28, 26, 24, 22, 20, 19, 18, 17]
        assert [h.shape[1] for h in found.hidden_states[1:]] == lengths, "transformers' own record"
        assert [h.shape[1] for h in seen] == lengths, "hooks that were there before"
        for row in range(2):
            h = model.pre_layrnorm(model.embeddings(x[row : row + 1]))
            for layer, block in enumerate(model.encoder.layers):
                h = block(h, attention_mask=None)
                h = h[0] if isinstance(h, tuple) else h
                h = released_step(h[0], ratio, layer, depth)[None]
                assert_equal(found.hidden_states[layer + 1][row : row + 1], h, what=f"hidden state {layer + 1}")
    assert_differs(found.pooler_output, bare.pooler_output)


def released_step(h, ratio, layer, depth):
    """One layer's merge of a row [1 + T, C], class token first."""
    cls, patches = h[:1], h[1:]
    if layer <= 12:
        total = len(h)
        stay, pairs, targets = tome_by_hand(patches, math.floor(total - total * ratio), 1)
    else:
        total = len(patches)
        stay, pairs, targets = pitome_by_hand(
            patches, math.floor(total - total * ratio), 0.9 - 0.9 * layer / depth, 1.0
        )
    if not pairs:
        return h
    merged = []
    for b in targets:
        members = [b, *(a for a, to in pairs if to == b)]
        merged.append(patches[members].mean(0))
    return torch.cat([cls, patches[stay], torch.stack(merged)])


# ---------------------------------------------------------------------- gradients
TRAINED = [
    "timm DeiT-3",
    "timm EVA-02",
    "timm DINOv2 registers",
    "open_clip CustomTextCLIP",
    "HF CLIP vision",
    "HF DINOv2",
]
METHODS = ["tome:r=6", "pitome:ratio=0.8", "pitome:ratio=0.8:point=end:weighted=false", "tca:ratio=0.6:update=false"]


def checkpointed(model, name):
    if name.startswith("HF"):
        hosts_of.checkpoint(model)
    else:
        getattr(model, "visual", model).set_grad_checkpointing(True)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(found, wanted):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert_equal(found[name], value, 2e-5, f"gradient of {name}")


def explicit_loss(model, methods, layout, pictures):
    vision = oracle.vision_of(model)
    total = 0.0
    for row in range(len(pictures)):
        run = oracle.run_tower(vision, pictures[row : row + 1], Player(methods, layout))
        total = total + vision.head(vision.tokens(run.x[None])).square().sum()
    return total


@pytest.mark.parametrize("checkpoint", [False, True], ids=["whole", "checkpointed"])
@pytest.mark.parametrize("spec", METHODS)
@pytest.mark.parametrize("name", TRAINED)
def test_gradients_in_training_equal_an_explicit_implementation(name, spec, checkpoint):
    model, tower = models.fresh(name), models.TOWERS[name]
    methods = vlmtok.parse_methods(spec)
    if spec.startswith("tca"):
        methods = vlmtok.parse_methods(spec + ":reservoir_size=0")
    pictures = tower.pictures(2)
    model.train()
    bare = gradients(model, tower.run(model, pictures).square().sum())
    from vlmtok.adapters import adapter_for

    wanted = gradients(model, explicit_loss(model, methods, adapter_for(model).layout(), pictures))
    if checkpoint:
        checkpointed(model, name)
    before = Print.of(model)
    with vlmtok.compress(model, methods) as run:
        found = gradients(model, tower.run(model, pictures).square().sum())
        booked = dict(run._attachment.ledger.fired)
    before.assert_still(model)
    assert_gradients(found, wanted)
    assert set(booked.values()) == {1}, "blocks that autograd runs again were counted twice"
    some = max(wanted, key=lambda key: float((wanted[key] - bare[key]).abs().max()))
    assert_differs(wanted[some], bare[some])


@pytest.mark.parametrize("name", ["timm ViT", "HF CLIP vision", "open_clip CLIP"])
def test_gradients_in_eval_mode_too(name):
    model, tower = models.fresh(name), models.TOWERS[name]
    pictures = tower.pictures(2)
    from vlmtok.adapters import adapter_for

    methods = vlmtok.parse_methods("tome:r=6")
    wanted = gradients(model, explicit_loss(model, methods, adapter_for(model).layout(), pictures))
    with vlmtok.compress(model, methods):
        assert_gradients(gradients(model, tower.run(model, pictures).square().sum()), wanted)


@pytest.mark.parametrize("name", ["timm ViT", "HF CLIP vision"])
def test_partly_frozen_towers_train(name):
    """Blocks whose input needs no gradient take the side channel, those behind the whole way."""
    model, tower = models.fresh(name), models.TOWERS[name]
    pictures = tower.pictures(2)
    from vlmtok.adapters import adapter_for

    for p in model.parameters():
        p.requires_grad_(False)
    blocks = [m for m in model.modules() if type(m).__name__ in ("Block", "CLIPEncoderLayer")]
    for p in blocks[2].parameters():
        p.requires_grad_(True)
    methods = vlmtok.parse_methods("tome:r=6")
    wanted = gradients(model, explicit_loss(model, methods, adapter_for(model).layout(), pictures))
    assert wanted
    with vlmtok.compress(model, methods):
        assert_gradients(gradients(model, tower.run(model, pictures).square().sum()), wanted)


def test_stochastic_depth_acts_before_the_merge():
    """One picture, the same draws: a dropped MLP branch leaves the merged residual."""
    import timm

    model = models.randomize(
        timm.create_model(
            "vit_tiny_patch16_224",
            pretrained=False,
            img_size=48,
            patch_size=8,
            depth=4,
            embed_dim=32,
            num_heads=4,
            num_classes=10,
            drop_path_rate=0.6,
        )
    ).train()
    picture = models.pictures(1)
    from vlmtok.adapters import adapter_for

    methods = vlmtok.parse_methods("tome:r=6")
    layout = adapter_for(model).layout()
    vision = oracle.vision_of(model)
    for block, host in zip(vision.blocks, model.blocks):
        out, mlp = block.out, block.mlp
        block.out = lambda x, out=out, host=host: host.drop_path1(out(x)[None])[0]
        block.mlp = lambda x, mlp=mlp, host=host: host.drop_path2(mlp(x)[None])[0]
    results = set()
    for seed in range(6):
        torch.manual_seed(seed)
        run = oracle.run_tower(vision, picture, Player(methods, layout))
        wanted = vision.head(vision.tokens(run.x[None]))
        torch.manual_seed(seed)
        with vlmtok.compress(model, methods):
            found = model(picture)
        assert_equal(found, wanted, what=f"seed {seed}")
        results.add(round(float(found.detach().sum()), 4))
    assert len(results) > 2, "stochastic depth never acted"


@pytest.mark.parametrize("name", ["timm ViT", "open_clip CLIP", "HF CLIP vision"])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["whole", "checkpointed"])
def test_two_forwards_before_backward_are_right_or_refused(name, checkpoint):
    """A contrastive loss runs the tower twice; a recomputed block must not follow the other forward's plan."""
    model, tower = models.fresh(name), models.TOWERS[name]
    one, other = tower.pictures(2, 1), tower.pictures(2, 2)
    model.train()
    methods = vlmtok.parse_methods("tome:r=6")
    with vlmtok.compress(model, methods):
        wanted = gradients(model, tower.run(model, one).square().sum())
    if checkpoint:
        checkpointed(model, name)
    with vlmtok.compress(model, methods):
        first = tower.run(model, one).square().sum()
        second = tower.run(model, other).square().sum()
        model.zero_grad()
        if not checkpoint:
            first.backward()
            assert_gradients({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, wanted)
            second.backward()
            return
        for loss, right in ((first, wanted), (first + second, None)):
            model.zero_grad()
            try:
                loss.backward(retain_graph=True)
            except PassError as refusal:
                assert "backward must follow its own forward" in str(refusal)
            else:
                assert right is not None, "a joint backward used one plan for two forwards"
                assert_gradients({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, right)


@pytest.mark.parametrize("name", ["timm ViT", "HF CLIP vision"])
def test_an_evaluation_between_forward_and_backward_does_no_harm(name):
    model, tower = models.fresh(name), models.TOWERS[name]
    one, other = tower.pictures(2, 1), tower.pictures(3, 2)
    model.train()
    checkpointed(model, name)
    methods = vlmtok.parse_methods("tome:r=6")
    with vlmtok.compress(model, methods):
        wanted = gradients(model, tower.run(model, one).square().sum())
        loss = tower.run(model, one).square().sum()
        with torch.no_grad():
            tower.run(model, other)
        assert_gradients(gradients(model, loss), wanted)


@pytest.mark.parametrize("name", ["timm ViT", "open_clip CLIP", "HF CLIP vision"])
def test_backward_of_a_checkpointed_model_outside_with_is_never_silently_wrong(name):
    model, tower = models.fresh(name), models.TOWERS[name]
    pictures = tower.pictures(2)
    model.train()
    methods = vlmtok.parse_methods("tome:r=6")
    with vlmtok.compress(model, methods):
        wanted = gradients(model, tower.run(model, pictures).square().sum())
    checkpointed(model, name)
    with vlmtok.compress(model, methods):
        loss = tower.run(model, pictures).square().sum()
    try:
        found = gradients(model, loss)
    except Exception:
        return
    assert_gradients(found, wanted)


def test_reentrant_checkpointing_is_refused():
    """It runs blocks without gradients first: the residual that a merge needs has no history."""
    import timm.layers

    for name in ("timm ViT", "HF CLIP vision"):
        model, tower = models.fresh(name), models.TOWERS[name]
        model.train()
        if name.startswith("HF"):
            hosts_of.checkpoint(model, reentrant=True)
        else:
            model.set_grad_checkpointing(True)
        usual = timm.layers.use_reentrant_ckpt()
        timm.layers.set_reentrant_ckpt(True)
        try:
            pictures = tower.pictures(2).requires_grad_()
            with (
                pytest.raises(PassError, match=r"use_reentrant=False|never ran with"),
                vlmtok.compress(model, "tome:r=6"),
            ):
                tower.run(model, pictures).square().sum().backward()
        finally:
            timm.layers.set_reentrant_ckpt(usual)


def test_gradients_reach_what_methods_insert():
    """Cross tokens train, also where the model is frozen and where blocks are checkpointed."""
    found = []
    for checkpoint in (False, True):
        model, tower = models.fresh("timm ViT"), models.TOWERS["timm ViT"]
        model.train()
        for p in model.parameters():
            p.requires_grad_(False)
        if checkpoint:
            model.set_grad_checkpointing(True)
        with vlmtok.compress(model, "crossget:guidance=cross:rv=4") as run:
            with torch.no_grad():
                for p in run.parameters():
                    p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
            tower.run(model, tower.pictures(2)).square().sum().backward()
            found.append([p.grad.clone() for p in run.parameters()])
            assert all(float(g.abs().max()) > 0 for g in found[-1])
    for one, other in zip(*found):
        assert_equal(one, other)


# ---------------------------------------------------------------------- torch.compile (more in test_compile.py)
@contextlib.contextmanager
def clean_dynamo():
    import torch._dynamo as dynamo

    dynamo.reset()
    try:
        yield
    finally:
        dynamo.reset()


@pytest.mark.filterwarnings("ignore:vlmtok:vlmtok.errors.VlmtokWarning")
def test_a_compiled_pass_counts_as_one_that_ran():
    import warnings

    model, tower = models.fresh("timm ViT"), models.TOWERS["timm ViT"]
    with torch.no_grad(), clean_dynamo(), warnings.catch_warnings():
        warnings.filterwarnings("error", "the hooks", VlmtokWarning)
        with vlmtok.compress(model, "tome:r=6"):
            torch.compile(model, backend="eager", fullgraph=True)(tower.pictures(1))


# ---------------------------------------------------------------------- more than one method, odd places
MIXES = [
    "tome:r=4+pitome:ratio=0.8",
    "tome:r=4+pitome:ratio=0.8:point=end",
    "pitome:ratio=0.8:point=end+random:keep=0.6:stage=vision:layer=1",
    "tca:ratio=0.6:update=false+tome:r=3",
    "crossget:guidance=cross:rv=4",
    "crossget:guidance=attention:rv=3+tome:r=3",
]


@pytest.mark.parametrize("spec", MIXES)
@pytest.mark.parametrize("name", ["timm DINOv2 registers", "timm EVA-02", "open_clip CLIP", "HF CLIP vision"])
def test_several_methods_in_one_layer_equal_the_oracle(name, spec):
    """Where one method cuts, the signals of the next ones in that layer follow."""
    model, tower = models.shared(name), models.TOWERS[name]
    pictures, methods = tower.pictures(2), vlmtok.parse_methods(spec)
    vision = oracle.vision_of(model)
    with torch.no_grad():
        bare = tower.run(model, pictures)
        with vlmtok.compress(model, methods) as run:
            found, tokens = tower.run(model, pictures), tower.tokens(model, pictures)
        memory = {at: run.memory(at) for at in range(len(methods))}
        for row in range(2):
            player = Player(methods, run.layout, memory)
            wanted = vision.tokens(oracle.run_tower(vision, pictures[row : row + 1], player).x[None])
            assert_equal(tokens[row : row + 1], wanted, what="tokens")
            assert_equal(found[row : row + 1], vision.head(wanted))
    assert_differs(found, bare)


class Ahead(vlmtok.Random):
    """Cuts at a start by signals that must be computed ahead, after putting tokens in."""

    insertions = 0

    def sites(self, layout):
        names = ["keys", "received_attention", "protected_keys", "keys_full"]
        names += ["cls_attention"] if layout.gives("vision", "cls_attention") else []
        return [Site("vision", layer, "start", tuple(names)) for layer in (1, 2)]

    def insert(self, view):
        return view.tokens[:, : self.insertions] * 0.5 if self.insertions else None

    def reduce(self, view):
        score = view.signal("received_attention") * 10 + view.signal("keys").norm(dim=-1)
        if view.has("cls_attention"):
            score = score + view.signal("cls_attention").mean(1)
        k = self.count(view.counts)
        return Reduction(score.argsort(dim=1, descending=True, stable=True)[:, :k])


class AheadInserting(Ahead):
    insertions = 2


@pytest.mark.parametrize("method", [Ahead(keep=0.7), AheadInserting(keep=0.7)], ids=["plain", "inserting"])
@pytest.mark.parametrize("name", ["timm ViT", "timm SigLIP", "timm EVA-02", "timm DINOv3", "open_clip CLIP", "HF ViT"])
def test_looking_ahead_at_a_start_equals_the_oracle(name, method):
    """Slots in an order of their own, signals of a block that has not run, inserted tokens among its keys."""
    model, tower = models.shared(name), models.TOWERS[name]
    pictures = tower.pictures(2)
    vision = oracle.vision_of(model)
    methods = [method, ToMe(r=3)]
    with torch.no_grad():
        bare = tower.run(model, pictures)
        with vlmtok.compress(model, methods) as run:
            found = tower.run(model, pictures)
        for row in range(2):
            player = Player(methods, run.layout)
            wanted = oracle.run_tower(vision, pictures[row : row + 1], player)
            assert_equal(found[row : row + 1], vision.head(vision.tokens(wanted.x[None])))
    assert_differs(found, bare)


@pytest.mark.parametrize("name", ["timm ViT", "open_clip CLIP", "HF CLIP vision", "timm EVA-02"])
def test_looking_ahead_works_under_autocast(name):
    model, tower = models.shared(name), models.TOWERS[name]
    with (
        torch.no_grad(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        vlmtok.compress(model, [Ahead(keep=0.7), ToMe(r=3)]),
    ):
        assert bool(tower.run(model, tower.pictures(2)).isfinite().all())


class Remote(vlmtok.Random):
    """Decides at one layer by what other layers told."""

    def sites(self, layout):
        needs = ("keys@vision:0", "cls_attention@vision:1", "received_attention@vision:-3", "protected@vision:0")
        return [Site("vision", 2, "mid", (*needs, "keys")), Site("vision", 3, "end", needs)]

    def reduce(self, view):
        score = view.signal("keys@vision:0").norm(dim=-1) + 5 * view.signal("cls_attention@vision:1").mean(1)
        score = score + view.signal("received_attention@vision:-3")
        score = score + (view.tokens @ view.signal("protected@vision:0")[:, 0].unsqueeze(-1)).squeeze(-1) * 0.01
        return Reduction(score.argsort(dim=1, descending=True, stable=True)[:, : self.count(view.counts)])


@pytest.mark.parametrize("name", ["timm ViT", "timm DINOv3", "open_clip CLIP", "HF DINOv2"])
def test_signals_of_other_layers_follow_the_cuts_between(name):
    model, tower = models.shared(name), models.TOWERS[name]
    pictures = tower.pictures(2)
    vision, methods = oracle.vision_of(model), [Remote(keep=0.6), PiToMe(ratio=0.8)]
    with torch.no_grad(), vlmtok.compress(model, methods) as run:
        found = tower.run(model, pictures)
    with torch.no_grad():
        for row in range(2):
            wanted = oracle.run_tower(vision, pictures[row : row + 1], Player(methods, run.layout))
            assert_equal(found[row : row + 1], vision.head(vision.tokens(wanted.x[None])))


class Keeps(vlmtok.Random):
    """Writes into `state` and `row` at one layer, reads them at another."""

    def sites(self, layout):
        return [Site("vision", layer, "end") for layer in (0, 2, 3)]

    def reduce(self, view):
        if view.layer == 0:
            view.state["mark"] = view.tokens.norm(dim=-1)
            view.row["mean"] = view.tokens.mean((1, 2))
            return None
        score = view.state["mark"] + view.row["mean"][:, None]
        view.state["mark"] = score * 2
        return Reduction(score.argsort(dim=1, descending=True, stable=True)[:, : self.count(view.counts)])


def test_state_follows_the_cuts_of_any_method():
    model, tower = models.shared("timm ViT"), models.TOWERS["timm ViT"]
    pictures = tower.pictures(2)
    vision, methods = oracle.vision_of(model), [Keeps(keep=0.6), ToMe(r=5), Keeps(keep=0.9)]
    with torch.no_grad():
        bare = tower.run(model, pictures)
        with vlmtok.compress(model, methods) as run:
            found = [tower.run(model, pictures) for _ in range(2)]
        assert_same(found[0], found[1], "state leaked from one forward into the next")
        for row in range(2):
            wanted = oracle.run_tower(vision, pictures[row : row + 1], Player(methods, run.layout))
            assert_equal(found[0][row : row + 1], vision.head(vision.tokens(wanted.x[None])))
    assert_differs(found[0], bare)


def test_a_user_signal_is_seen_and_wins():
    model, tower = models.shared("timm ViT"), models.TOWERS["timm ViT"]
    pictures = tower.pictures(2)

    class Mine(vlmtok.Random):
        def sites(self, layout):
            return [Site("vision", 1, "end", ("mine", "keys"))]

        def reduce(self, view):
            assert torch.equal(view.signal("keys"), view.tokens[..., :2])
            score = view.signal("mine")
            return Reduction(score.argsort(dim=1, stable=True)[:, : self.count(view.counts)])

    signals = {"mine": lambda view: -view.columns.float(), "keys": lambda view: view.tokens[..., :2]}
    with torch.no_grad(), vlmtok.compress(model, Mine(keep=5), signals=signals, trace=True) as run:
        model(pictures)
        owner = run.trace()[0].owner
    assert (owner >= 0).tolist() == [False] * 31 + [True] * 5
    with pytest.raises(vlmtok.errors.MissingSignal, match="mine"):
        vlmtok.compress(model, Mine(keep=5), signals={"other": signals["mine"]})


def test_a_proportional_method_refuses_a_model_called_with_a_mask():
    model = models.shared("HF ViT")
    mask = torch.ones(1, 37)
    mask[:, -3:] = 0
    with torch.no_grad(), vlmtok.compress(model, "tome:r=6"):
        try:
            found = model(pixel_values=models.pictures(1), attention_mask=mask)
        except PassError as refusal:
            assert "mask" in str(refusal)
        else:
            raise AssertionError(f"a mask of the uncut length was accepted: {found.last_hidden_state.shape}")
