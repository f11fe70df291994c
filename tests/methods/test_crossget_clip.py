"""CrossGET in CLIP: a tiny one block by block, and those of open_clip and transformers."""

import pytest
import torch
import torch.nn.functional as F
from support import openai_clip
from support.crossget_views import layout
from support.decoder_by_hand import golden, golden_names

import vlmtok
from vlmtok import kernels
from vlmtok.core.site import Site
from vlmtok.core.view import TokenView
from vlmtok.mergers.crossget import CrossGET, CrossTokens, cross_loss, cross_tokens


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
