"""CrossGET: the released reducer and loss, a tiny CLIP end to end, and the rules every method keeps."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import openai_clip
from support.decoder_by_hand import golden, golden_names

import vlmtok
from vlmtok import kernels
from vlmtok.core.registry import create_method
from vlmtok.core.signals import tower_signals
from vlmtok.core.site import Counts, Layout, Site, StageLayout
from vlmtok.core.spec import parse_methods
from vlmtok.core.view import TokenView
from vlmtok.errors import MissingSignal, ParameterError, SiteError
from vlmtok.mergers.crossget import CrossGET, CrossTokens, attention_importance, cross_loss, cross_tokens, ensemble


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


# ---------------------------------------------------------------------- the released reducer
def split(data, llava):
    """Places of the tokens that the reducer may touch, `[B, n]`, by the released rule."""
    batch, n, _ = data["x"].shape
    protected = torch.zeros(batch, n, dtype=torch.bool)
    if data["class_token"] or llava:
        protected[:, 0] = True
    if data["class_token"]:
        protected[:, -1] = True
    if "eot" in data:
        protected[torch.arange(batch), data["eot"]] = True
    return torch.stack([(~row).nonzero().flatten() for row in protected])


def whole_row(data, place, reduction):
    """The released output: what the view's slots and the other tokens give together, in the order of the row."""
    size = data["token_size"][..., 0]
    tokens, sizes = reduction.apply(kernels.take_rows(data["x"], place), size.gather(1, place))
    row, at = data["x"].clone(), place.gather(1, reduction.keep)
    row.scatter_(1, at.unsqueeze(-1).expand_as(tokens), tokens)
    size = size.clone().scatter_(1, at, sizes)
    kept = data["kept_idx"]
    return kernels.take_rows(row, kept), size.gather(1, kept).unsqueeze(-1)


def check(data, view, place, method):
    reduction = method.reduce(view)
    if data["r"] == 0:
        assert reduction is None
        assert torch.equal(data["x"], data["out_x"])
        return
    joined = place.gather(1, reduction.keep).gather(1, reduction.dst)
    assert torch.equal(place.gather(1, reduction.src), data["src_idx"])
    assert torch.equal(joined, data["dst_idx"])
    tokens, size = whole_row(data, place, reduction)
    torch.testing.assert_close(tokens, data["out_x"], atol=1e-5, rtol=0)
    torch.testing.assert_close(size, data["out_token_size"], atol=1e-5, rtol=0)
    assert method.count(view.counts) == reduction.slots


@pytest.mark.parametrize("name", golden_names("crossget_clip_*.npz"))
def test_clip_reducer_equals_the_release(name):
    data = golden(name)
    place = split(data, llava=False)
    guidance = "cross" if data["guided"] else None
    text = "eot" in data
    signals = {"keys_full": kernels.take_rows(data["key"], place)}
    if "query_token" in data:
        # The query asked is EOT's in text (first), the cross token's in vision (last).
        other = torch.full_like(data["query_token"], float("nan"))
        pair = [data["query_token"], other] if text else [other, data["query_token"]]
        signals["protected_queries"] = torch.cat(pair, 1)
        importance = kernels.query_cosine(data["key"], data["query_token"][:, 0])
        torch.testing.assert_close(importance, data["importance"], atol=1e-6, rtol=0)
    size = data["token_size"][..., 0].gather(1, place)
    site = Site("text" if text else "vision", 0, "mid")
    view = TokenView(kernels.take_rows(data["x"], place), site, size, signals=signals)
    method = CrossGET(rv=None if text else data["r"], rl=data["r"] if text else None, guidance=guidance)
    check(data, view, place, method)


@pytest.mark.parametrize("name", golden_names("crossget_llava_*.npz"))
def test_llava_reducer_equals_the_release(name):
    data = golden(name)
    place = split(data, llava=True)
    n = place.shape[1]
    columns = data["attn"].gather(2, place.unsqueeze(1).expand(-1, data["attn"].shape[1], -1))
    rows = columns[:, [0, -1]] if data["class_token"] else columns[:, -1:]  # CLS, cross token
    received = columns.mean(1)
    importance = attention_importance(received, rows[:, -1:], data["x"].shape[1] - n)
    torch.testing.assert_close(importance, data["importance"].gather(1, place), atol=1e-6, rtol=0)
    signals = {
        "keys": kernels.take_rows(data["key"], place),
        "received_attention": received,
        "protected_attention": rows.unsqueeze(2),
    }
    size = data["token_size"][..., 0].gather(1, place)
    view = TokenView(kernels.take_rows(data["x"], place), Site("vision", 0, "mid"), size, signals=signals)
    r = data["r"] if data["protected"] < 0 else min(data["r"], (data["x"].shape[1] - data["protected"]) // 2)
    check(data, view, place, CrossGET(rv=r, guidance="attention"))


def test_weights_are_those_of_the_release():
    data = golden("crossget_clip_07_sizes.npz")
    place = split(data, llava=False)
    importance = data["importance"].gather(1, place)
    size = data["token_size"][..., 0].gather(1, place)
    keep, src, dst = kernels.complete_match(kernels.take_rows(data["key"], place), importance, data["r"])
    reduction = ensemble(keep, src, dst, importance, size)
    total = size.gather(1, keep).scatter_add(1, dst, size.gather(1, src)).gather(1, dst)
    share = 2.0 * data["weight"][..., 0] * size.gather(1, src) / total
    torch.testing.assert_close(reduction.src_weight, share, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", golden_names("crossget_e2e_*.npz"))
def test_loss_equals_the_release_and_js_is_another(name):
    data = golden(name)
    torch.testing.assert_close(
        cross_loss(data["image_cross"], data["text_cross"]).item(), data["loss_js"], atol=1e-6, rtol=0
    )
    p, q = data["image_cross"].softmax(-1), data["text_cross"].softmax(-1)
    m = (p + q) / 2
    true = sum(F.kl_div(m.log(), x, reduction="batchmean") for x in (p, q)) / 2
    torch.testing.assert_close(cross_loss(data["image_cross"], data["text_cross"], "js"), true, atol=1e-6, rtol=0)
    assert abs(true.item() - data["loss_js"]) > 0.02


# ---------------------------------------------------------------------- a tiny CLIP, block by block
class PlainClip:
    """OpenAI's CLIP from its weights, with one method in it through hand-built views."""

    def __init__(self, data, method):
        self.w = {key[3:]: value for key, value in data.items() if key.startswith("sd.")}
        self.method = method
        depth = 4
        self.memory = CrossTokens((depth, 64), (depth, 64))
        self.memory.load_state_dict(
            {
                "cross_image": self.w["visual.transformer.cross_image"],
                "cross_text": self.w["transformer.cross_text"],
            }
        )

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def linear(self, x, name):
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def block(self, x, size, guarded, inserted, row, stage, layer, path, heads):
        """One block over view tokens, protected tokens `guarded` (places) and the cross token behind them.

        Returns the row with the cross token at its end, sizes, and the new places of the guarded ones.
        """
        batch, n, width = x.shape
        inner = torch.tensor([i for i in range(n) if i not in guarded])

        def view(point, signals):
            return TokenView(
                x[:, inner], Site(stage, layer, point), size[:, inner], num_prefix=1, depth=4, signals=signals, row=row,
                memory=self.memory,
            )  # fmt: skip

        cross = self.method.insert(view("start", {"protected": x[:, list(guarded)], "inserted": inserted}))
        assert self.method.reduce(view("start", {})) is None
        x = torch.cat([x, cross], 1)
        size = torch.cat([size, torch.ones(batch, 1)], 1)
        h = self.norm(x, f"{path}.ln_1")
        qkv = F.linear(h, self.w[f"{path}.attn.in_proj_weight"], self.w[f"{path}.attn.in_proj_bias"])
        q, k, v = qkv.chunk(3, -1)
        by_head = [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
        logits = by_head[0] @ by_head[1].transpose(2, 3) / (width // heads) ** 0.5 + size.log()[:, None, None]
        if stage == "text":
            logits = logits + torch.full(logits.shape[2:], float("-inf")).triu(1)
        out = (logits.softmax(-1) @ by_head[2]).transpose(1, 2).flatten(2)
        x = x + self.linear(out, f"{path}.attn.out_proj")
        around = [*guarded, n]
        decided = self.method.reduce(
            view("mid", {"keys_full": k[:, inner], "protected_queries": q[:, around]})
        ) if self.has_mid else None  # fmt: skip
        if decided is not None:
            # As the core does it: slots and protected tokens lie in the order of their columns.
            tokens, sizes = decided.apply(x[:, inner], size[:, inner])
            column = torch.cat([inner[decided.keep], torch.tensor(around).expand(batch, -1)], 1)
            order = column.argsort(dim=1)
            x = kernels.take_rows(torch.cat([tokens, x[:, around]], 1), order)
            size = torch.cat([sizes, size[:, around]], 1).gather(1, order)
            guarded = [int((order[0] == tokens.shape[1] + i).nonzero()) for i in range(len(guarded))]
        h = self.norm(x, f"{path}.ln_2")
        h = self.linear(h, f"{path}.mlp.c_fc")
        x = x + self.linear(h * torch.sigmoid(1.702 * h), f"{path}.mlp.c_proj")
        return x, size, guarded

    def run(self, x, guarded, stage, path, heads):
        self.has_mid = any(s.stage == stage and s.point == "mid" for s in self.method.sites(layout()))
        row, hidden, inserted = {}, [], None
        size = torch.ones(x.shape[:2])
        for layer in range(4):
            x, size, guarded = self.block(
                x, size, guarded, inserted, row, stage, layer, f"{path}.resblocks.{layer}", heads
            )
            hidden.append(x)
            x, inserted = x[:, :-1], x[:, -1:]
            sizes, size = size, size[:, :-1]
        return hidden, sizes, guarded, row

    def image(self, image):
        x = F.conv2d(image, self.w["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
        x = torch.cat([self.w["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
        x = self.norm(x + self.w["visual.positional_embedding"], "visual.ln_pre")
        return self.run(x, [0], "vision", "visual.transformer", heads=1)

    def text(self, text):
        eot = text.argmax(-1)
        assert len(set(eot.tolist())) == 1 or not self.method.rl, "rows of this loop share one place of EOT"
        x = self.w["token_embedding.weight"][text] + self.w["positional_embedding"]
        return [self.run(x[i : i + 1], [int(eot[i]), 0], "text", "transformer", heads=4) for i in range(len(x))]


@pytest.mark.parametrize("name", golden_names("crossget_e2e_*.npz"))
@torch.no_grad()
def test_tiny_clip_end_to_end(name):
    data = golden(name)
    clip = PlainClip(data, CrossGET(rv=data["rv"], rl=data["rl"], guidance="cross"))
    hidden, size, _, row = clip.image(data["image"])
    for layer, x in enumerate(hidden):
        assert x.shape[1] == data["vis_len"][layer]
        torch.testing.assert_close(x, data[f"vis_hidden{layer}"], atol=1e-4, rtol=0)
    torch.testing.assert_close(size.unsqueeze(-1), data["vis_token_size"], atol=1e-5, rtol=0)
    feature = clip.norm(hidden[-1][:, 0], "visual.ln_post") @ clip.w["visual.proj"]
    torch.testing.assert_close(F.normalize(feature, dim=-1), F.normalize(data["image_feat"], dim=-1), atol=1e-4, rtol=0)
    image = clip.norm(cross_tokens(row), "visual.ln_pre") @ clip.w["visual.proj"]
    torch.testing.assert_close(image, data["image_cross"], atol=1e-4, rtol=0)

    rows = clip.text(data["text"])
    for layer in range(4):
        x = torch.cat([hidden[layer] for hidden, *_ in rows])
        assert x.shape[1] == data["txt_len"][layer]
        torch.testing.assert_close(x, data[f"txt_hidden{layer}"], atol=1e-4, rtol=0)
    tokens = torch.stack([cross_tokens(row) for *_, row in rows], 1).flatten(0, 1)
    text = clip.norm(tokens, "ln_final") @ clip.w["text_projection"]
    torch.testing.assert_close(text, data["text_cross"], atol=1e-4, rtol=0)
    torch.testing.assert_close(cross_loss(image, text).item(), data["loss_js"], atol=1e-4, rtol=0)


def weights_of(data):
    """The weights of the model, and those of its cross tokens as a compression takes them."""
    weights = {key[3:]: value for key, value in data.items() if key.startswith("sd.")}
    learned = {f"0.{key.rsplit('.', 1)[1]}": weights.pop(key) for key in list(weights) if "cross_" in key}
    return weights, learned


class OpenClip:
    """The tiny CLIP in open_clip."""

    def __init__(self, data):
        weights, self.learned = weights_of(data)
        self.model = openai_clip.open_clip_of(weights, heads=1, text_heads=4)

    def image(self, pictures):
        return self.model.encode_image(pictures)

    def text(self, ids):
        return self.model.encode_text(ids)

    def joint(self, image, text):
        """Cross tokens of both towers in the joint space, through norms and projections that do not learn."""
        visual = self.model.visual
        weight, bias = visual.ln_pre.weight.detach(), visual.ln_pre.bias.detach()
        final = self.model.ln_final
        return (
            F.layer_norm(image, image.shape[-1:], weight, bias) @ visual.proj.detach(),
            F.layer_norm(text, text.shape[-1:], final.weight.detach(), final.bias.detach())
            @ self.model.text_projection.detach(),
        )


class Transformers:
    """The tiny CLIP in transformers."""

    def __init__(self, data):
        weights, self.learned = weights_of(data)
        self.model = openai_clip.transformers_of(weights, heads=1, text_heads=4, eot=int(data["text"].max()))

    def image(self, pictures):
        return self.model.get_image_features(pixel_values=pictures).pooler_output

    def text(self, ids):
        return self.model.get_text_features(input_ids=ids).pooler_output

    def joint(self, image, text):
        before, after = self.model.vision_model.pre_layrnorm, self.model.text_model.final_layer_norm
        return (
            F.layer_norm(image, image.shape[-1:], before.weight.detach(), before.bias.detach())
            @ self.model.visual_projection.weight.detach().T,
            F.layer_norm(text, text.shape[-1:], after.weight.detach(), after.bias.detach())
            @ self.model.text_projection.weight.detach().T,
        )


LIBRARIES = {"open_clip": OpenClip, "transformers": Transformers}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", golden_names("crossget_e2e_*.npz"))
@torch.no_grad()
def test_libraries_end_to_end(name, library):
    data = golden(name)
    clip = LIBRARIES[library](data)
    with vlmtok.compress(clip.model, CrossGET(rv=data["rv"], rl=data["rl"], guidance="cross")) as run:
        run.load_state_dict(clip.learned)
        image, text = clip.image(data["image"]), clip.text(data["text"])
        row, words = run.row(0), run.row(0, "text")
    torch.testing.assert_close(F.normalize(image), F.normalize(data["image_feat"]), atol=1e-4, rtol=0)
    torch.testing.assert_close(F.normalize(text), F.normalize(data["text_feat"]), atol=1e-4, rtol=0)
    seen, read = clip.joint(cross_tokens(row), cross_tokens(words))
    torch.testing.assert_close(seen, data["image_cross"], atol=1e-4, rtol=0)
    torch.testing.assert_close(read, data["text_cross"], atol=1e-4, rtol=0)
    torch.testing.assert_close(cross_loss(seen, read).item(), data["loss_js"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("library", LIBRARIES)
@torch.no_grad()
def test_libraries_merge_text_as_the_loop_does(library):
    """EOT is found behind every merge, wherever it stands in a row."""
    data = golden("crossget_e2e_01_vision.npz")
    text, last = data["text"].clone(), data["text"].argmax(-1)
    text[0, 3], text[0, last[0]] = text[0, last[0]].item(), 0  # a text that ends early
    assert len(set(text.argmax(-1).tolist())) > 1
    method = CrossGET(rv=None, rl=2, guidance="cross")
    tower = LIBRARIES[library](data)
    with vlmtok.compress(tower.model, method) as run:
        run.load_state_dict({"0.cross_text": tower.learned["0.cross_text"]})
        found = tower.text(text)
    clip = PlainClip(data, method)
    expected = []
    for i in range(len(text)):
        (hidden, _, guarded, _), *_ = clip.text(text[i : i + 1])
        assert hidden[-1].shape[1] == 17 - 4 * 2
        expected.append(clip.norm(hidden[-1][:, guarded[0]], "ln_final") @ clip.w["text_projection"])
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", ["released", "js"])
def test_cross_tokens_learn_in_a_model_and_load_alone(library, kind):
    """An optimiser takes the compression's parameters; they are saved without the model's."""
    data = golden("crossget_e2e_01_vision.npz")
    clip = LIBRARIES[library](data)
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    with vlmtok.compress(clip.model, CrossGET(rv=4, rl=2, guidance="cross")) as run:
        assert {name: tuple(p.shape) for name, p in run.named_parameters()} == {
            "0.cross_image": (1, 4, 64),
            "0.cross_text": (1, 4, 64),
        }
        optimiser = torch.optim.Adam(run.parameters(), lr=0.05)
        losses = []
        for _ in range(6):
            clip.image(data["image"])
            clip.text(data["text"])
            loss = cross_loss(*clip.joint(cross_tokens(run.row(0)), cross_tokens(run.row(0, "text"))), kind)
            optimiser.zero_grad()
            loss.backward()
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in run.parameters())
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        state = run.state_dict()
        with torch.no_grad():
            trained = clip.image(data["image"])
    assert set(state) == {"0.cross_image", "0.cross_text"}
    assert all(torch.equal(value, before[name]) for name, value in clip.model.state_dict().items())
    with torch.no_grad(), vlmtok.compress(clip.model, CrossGET(rv=4, rl=2, guidance="cross")) as run:
        assert (clip.image(data["image"]) - trained).abs().max() > 1e-3
        run.load_state_dict(state)
        torch.testing.assert_close(clip.image(data["image"]), trained)


def test_mutual_best_pairs_tie_in_small_graphs():
    """The similarity of i and j is that of j and i, bit for bit, or rounding would choose who merges."""
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        batch, n, width = 1 + seed % 3, 3 + seed % 11, 20 + seed
        key = torch.randn(batch, n, width, generator=g)
        value, index = kernels.match_max(key, key, exclude_diag=True)
        mutual = index.gather(1, index) == torch.arange(n)
        assert mutual.any()
        assert torch.equal(value[mutual], value.gather(1, index)[mutual])


# ---------------------------------------------------------------------- cross tokens
def start_view(method, memory, stage, layer, protected, inserted, row):
    signals = {"protected": protected, "inserted": inserted}
    return TokenView(
        torch.zeros(len(protected), 5, 6), Site(stage, layer, "start"), signals=signals, row=row, memory=memory
    )


def made(**settings):
    method = CrossGET(guidance="cross", **settings)
    plan = Layout("by hand", {n: StageLayout(3, 6, 1, 2, provides=tower_signals(1)) for n in ("vision", "text")})
    return method, method.build(plan)


def test_untrained_cross_token_is_the_class_token():
    method, memory = made(rl=0)
    assert {n: list(p.shape) for n, p in memory.named_parameters()} == {
        "cross_image": [1, 3, 6],
        "cross_text": [1, 3, 6],
    }
    protected, before = torch.randn(2, 2, 6), torch.randn(2, 1, 6)
    first = method.insert(start_view(method, memory, "vision", 0, protected, None, {}))
    assert torch.equal(first, protected[:, :1])
    assert torch.equal(method.insert(start_view(method, memory, "vision", 1, protected, before, {})), before)
    assert torch.equal(method.insert(start_view(method, memory, "text", 1, protected, before, {})), protected[:, :1])


def test_cross_tokens_learn_and_load():
    torch.manual_seed(0)
    method, memory = made(rl=0)
    protected = torch.randn(4, 1, 6, requires_grad=True)
    texts = torch.randn(4, 1, 6)
    optimiser = torch.optim.Adam(memory.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        image, text = {}, {}
        before = None
        for layer in range(3):
            before = method.insert(start_view(method, memory, "vision", layer, protected, before, image))
            method.insert(start_view(method, memory, "text", layer, texts, None, text))
        loss = cross_loss(cross_tokens(image), cross_tokens(text))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert protected.grad is None  # what the cross token was is detached
    assert losses[-1] < 0.5 * losses[0]
    _, other = made(rl=0)
    other.load_state_dict(memory.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(memory.parameters(), other.parameters()))


def test_cross_tokens_come_layer_by_layer():
    row = {f"cross.{layer}": torch.full((2, 1, 3), float(layer)) for layer in (10, 0, 9)}
    assert cross_tokens(row)[:, 0].tolist() == [0, 0, 9, 9, 10, 10]
    with pytest.raises(ParameterError, match="no cross token"):
        cross_tokens({})
    with pytest.raises(ParameterError, match="as many"):
        cross_loss(torch.zeros(2, 3), torch.zeros(4, 3))


def test_llava_hands_the_cross_token_on():
    method = CrossGET.preset("llava")
    protected, tokens = torch.randn(2, 3, 8), torch.randn(2, 6, 8)
    view = TokenView(tokens, Site("features"), signals={"protected": protected})
    reduction = method.reduce(view)
    out, size = reduction.apply(tokens, None, protected)
    assert torch.equal(out, torch.cat([tokens, protected[:, 2:]], 1))
    assert size.tolist() == [[1.0] * 6 + [0.0]] * 2
    assert method.count(view.counts) == reduction.slots == 7


# ---------------------------------------------------------------------- rules of every method
def mid_view(batch, n, stage="vision", seed=0, prefix=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    signals = {
        "keys_full": rand(batch, n, 12),
        "keys": rand(batch, n, 4),
        "protected_queries": rand(batch, prefix + 1, 12),
        "received_attention": torch.rand(batch, n, generator=g),
        "protected_attention": torch.rand(batch, prefix + 1, 3, n, generator=g),
    }
    return TokenView(rand(batch, n, 8), Site(stage, 1, "mid"), num_prefix=prefix, depth=4, signals=signals)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 24),
    r=st.integers(0, 14),
    batch=st.integers(1, 2),
    guidance=st.sampled_from(["cls", "cross", "attention", None]),
    stage=st.sampled_from(["vision", "text"]),
)
def test_count_is_what_reduce_keeps(n, r, batch, guidance, stage):
    if guidance == "attention":
        stage = "vision"
    method = CrossGET(guidance=guidance, **({"rv": r} if stage == "vision" else {"rv": None, "rl": r}))
    view = mid_view(batch, n, stage)
    reduction = method.reduce(view)
    assert method.count(view.counts) == (n if reduction is None else reduction.slots)
    if reduction is not None:
        owner = reduction.assignment(n)
        assert (owner >= 0).all()  # nothing is dropped
        _, size = reduction.apply(view.tokens)
        assert torch.allclose(size.sum(1), torch.full((batch,), float(n)))
        assert (reduction.keep.diff(dim=1) > 0).all()
    for point in ("start", "end"):
        assert method.count(Counts(Site(stage, 1, point), n, n)) == n


@pytest.mark.parametrize("guidance", ["cls", "cross", "attention", None])
def test_batch_equals_single_rows(guidance):
    method = CrossGET(rv=5, guidance=guidance)
    view = mid_view(3, 17, seed=1)
    together = method.reduce(view)
    for i in range(3):
        signals = {name: value[i : i + 1] for name, value in view.signals.items()}
        alone = method.reduce(TokenView(view.tokens[i : i + 1], view.site, signals=signals))
        for name in ("keep", "src", "dst"):
            assert torch.equal(getattr(together, name)[i : i + 1], getattr(alone, name))


@pytest.mark.parametrize("guidance", ["cls", "cross", "attention", None])
def test_runs_on_meta_and_compiled(guidance):
    method = CrossGET(rv=5, guidance=guidance)
    view = mid_view(2, 17)
    signals = {name: value.to("meta") for name, value in view.signals.items()}
    shape = method.reduce(TokenView(view.tokens.to("meta"), view.site, signals=signals))
    assert shape.keep.shape == (2, 12) and shape.src.shape == (2, 5)

    def run(tokens, signals):
        return method.reduce(TokenView(tokens, view.site, signals=signals)).apply(tokens)[0]

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(view.tokens, view.signals), run(view.tokens, view.signals))


def test_ties_go_to_the_lowest_index():
    keys = torch.eye(4)[[0, 1, 2, 3, 0, 1, 2, 3]].unsqueeze(0)
    view = TokenView(torch.zeros(1, 8, 4), Site("vision", 0, "mid"), signals={"keys_full": keys})
    reduction = CrossGET(rv=2, guidance=None).reduce(view)
    # Every pair ties: the lower index of a pair ranks first, looks at the other, and is the source.
    assert reduction.src.tolist() == [[0, 1]]
    assert reduction.keep.gather(1, reduction.dst).tolist() == [[4, 5]]
    assert reduction.keep_weight is None  # no guidance is the size-weighted mean


def test_nan_tokens_stay_out():
    view = mid_view(1, 12, seed=3)
    view.signals["keys_full"][0, 5] = float("nan")
    view.tokens[0, 5] = float("nan")
    reduction = CrossGET(rv=6).reduce(view)
    assert 5 not in reduction.src[0].tolist()
    out, _ = reduction.apply(view.tokens)
    assert int(out.isnan().any(-1).sum()) == 1


def test_important_tokens_merge_later():
    torch.manual_seed(0)
    keys = torch.randn(1, 10, 6).repeat_interleave(2, 1) + 0.01 * torch.randn(1, 20, 6)
    query = keys[:, 7]
    signals = {"keys_full": keys, "protected_queries": torch.stack([query, -query], 1)}
    view = TokenView(torch.randn(1, 20, 4), Site("vision", 0, "mid"), signals=signals)
    assert not {6, 7} & set(CrossGET(rv=5).reduce(view).src[0].tolist())  # CLS asks for 7 and its twin
    assert {6, 7} & set(CrossGET(rv=5, guidance="cross").reduce(view).src[0].tolist())  # the cross token does not


def test_half_precision_is_compared_in_fp32():
    view = mid_view(2, 16, dtype=torch.bfloat16)
    wide = {name: value.float() for name, value in view.signals.items()}
    a = CrossGET(rv=4).reduce(view)
    b = CrossGET(rv=4).reduce(TokenView(view.tokens.float(), view.site, signals=wide))
    assert torch.equal(a.src, b.src) and torch.equal(a.keep, b.keep) and torch.equal(a.keep_weight, b.keep_weight)


def test_sites():
    def listed(method, plan=None):
        return [(s.stage, s.layer, s.point) for s in method.sites(plan or layout())]

    assert listed(CrossGET()) == [("vision", i, "mid") for i in range(4)]
    both = [("vision", i, p) for i in range(4) for p in ("start", "mid")]
    assert listed(CrossGET(guidance="cross")) == both
    assert listed(CrossGET(guidance="cross", rl=0)) == both + [("text", i, "start") for i in range(4)]
    assert listed(CrossGET.preset("llava")) == [*both, ("features", None, "end")]
    assert listed(CrossGET.preset("llava"), layout(stages=("vision",))) == both
    assert listed(CrossGET(rv=0)) == []
    assert listed(CrossGET(guidance=None), layout(prefix=0)) == [("vision", i, "mid") for i in range(4)]
    with pytest.raises(MissingSignal, match="guidance=None"):
        CrossGET().sites(layout(prefix=0))
    with pytest.raises(SiteError, match="text"):
        CrossGET(rl=2).sites(layout(stages=("vision",)))
    assert CrossGET().build(layout()) is None
    assert CrossGET.preset("llava").build(layout()).cross_text is None


def test_parameters():
    for wrong in ({"rv": -1}, {"rv": True}, {"guidance": "text"}, {"rv": None}, {"guidance": "attention", "rl": 2}):
        with pytest.raises(ParameterError):
            CrossGET(**wrong)
    with pytest.raises(ParameterError):
        CrossGET.preset("blip")
    for spec in ("crossget", "crossget:rv=13:guidance=attention", "crossget:rl=6:guidance=none:prop_attn=false"):
        assert str(parse_methods(spec)[0]) == spec
    assert create_method("crossget", preset="llava").rv == 13
    assert not CrossGET(prop_attn=False).proportional


def test_token_counts_of_the_paper():
    def after(n, depth, **settings):
        method, found = CrossGET(**settings), []
        stage = "vision" if settings.get("rv") else "text"
        protected = 2 if stage == "vision" else 3  # CLS, or EOT and the text's first token; and the cross token
        n -= protected
        for layer in range(depth):
            n = method.count(Counts(Site(stage, layer, "mid"), n, n, 1, depth))
            found.append(n + protected)
        return found

    assert after(198, 12, rv=16) == [182, 166, 150, 134, 118, 102, 86, 70, 54, 38, 22, 12]
    assert after(198, 12, rv=12)[-2:] == [66, 54]
    assert after(78, 12, rv=None, rl=6)[-3:] == [18, 12, 8]
    assert after(578, 24, rv=13)[-3:] == [292, 279, 266]
