"""A plain Llama in a few lines, and a loop that runs one method in it with hand-built views.

Nothing here uses hooks, adapters or the core: attention is dense, there is no cache, and the visual tokens are one
block of the row. Tests of methods that act inside a language model compare with it.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from vlmtok.core.site import Counts, Layout, StageLayout
from vlmtok.core.view import TokenView

from .places import GOLDEN

ELSEWHERE = [Path(folder) for folder in os.environ.get("VLMTOK_GOLDEN", "").split(os.pathsep) if folder]
"""More folders with reference files, searched behind the one of the repository."""


def golden(name):
    """Arrays of a reference file: tensors, or plain numbers where there is only one.

    A file may hold the name of another in ``base``: that one's arrays, where it has none of its own.
    """
    path = next(folder / name for folder in (GOLDEN, *ELSEWHERE) if (folder / name).exists())
    with np.load(path) as data:
        own = {key: data[key].item() if data[key].ndim == 0 else torch.from_numpy(data[key]) for key in data.files}
    return {**golden(own.pop("base")), **own} if isinstance(own.get("base"), str) else own


def found_names(pattern):
    return sorted({path.name for folder in (GOLDEN, *ELSEWHERE) for path in folder.glob(pattern)})


def golden_names(pattern):
    names = found_names(pattern)
    assert names, f"no reference file {pattern}"
    return names


def layout(depth, width=32, heads=4):
    """A language model without a tower."""
    points = frozenset({"start", "end"})
    given = {"text_attention", "last_attention", "attention_to_text", "attention_logits", "transition"}
    return Layout(
        "by hand",
        {
            "projected": StageLayout(1, width, 0, 0, provides=frozenset({"text"})),
            "decoder": StageLayout(depth, width, heads, depth - 1, points, frozenset(given)),
        },
    )


def visual_tokens_by_layer(method, depth, n):
    """How many visual tokens each layer runs with, by `sites` and `count` alone."""
    entered, found = n, []
    sites = method.sites(layout(depth))
    for site in sites:
        if site.stage == "projected":
            n = entered = method.count(Counts(site, n, n))
    for layer in range(depth):
        for point in ("start", "end"):
            for site in sites:
                if (site.stage, site.layer, site.point) == ("decoder", layer, point):
                    n = method.count(Counts(site, n, entered, 0, depth))
            if point == "start":
                found.append(n)
    return found


# ---------------------------------------------------------------------- the model
def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope(x, positions, theta):
    """x [H, L, d], first half of the channels paired with the second."""
    d = x.shape[-1]
    angle = positions.float()[:, None] * theta ** (-torch.arange(0, d, 2).float() / d)
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
    turned = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1)
    return x * cos + turned * sin


def causal_logits(x, q_weight, k_weight, positions, heads, theta):
    """Scaled logits [H, L, L] of normed tokens x [L, D], -inf above the diagonal."""
    length = x.shape[0]
    q = (x @ q_weight.T).view(length, heads, -1).transpose(0, 1)
    k = (x @ k_weight.T).view(length, heads, -1).transpose(0, 1)
    q, k = rope(q, positions, theta), rope(k, positions, theta)
    logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    return logits.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))


class PlainLlama:
    """A Llama from the state dict of a reference file."""

    def __init__(self, data):
        self.weights = {key[3:]: value for key, value in data.items() if key.startswith("sd/")}
        self.heads, self.depth = data["num_heads"], data["num_layers"]
        self.eps, self.theta = data["rms_eps"], data["rope_theta"]

    def logits_of(self, layer, h, positions):
        """Attention logits of a layer for its input h [L, D]."""
        at = f"model.layers.{layer}."
        x = rms_norm(h, self.weights[at + "input_layernorm.weight"], self.eps)
        q, k = (self.weights[at + f"self_attn.{name}_proj.weight"] for name in "qk")
        return x, causal_logits(x, q, k, positions, self.heads, self.theta)

    def layer(self, layer, h, positions, hidden=()):
        """Output [L, D], attention logits, and (in, out) of attention and MLP; nobody sees the columns `hidden`."""
        at = f"model.layers.{layer}."
        w = self.weights
        x, logits = self.logits_of(layer, h, positions)
        logits[:, :, list(hidden)] = float("-inf")
        v = (x @ w[at + "self_attn.v_proj.weight"].T).view(len(x), self.heads, -1).transpose(0, 1)
        mixed = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
        attention = mixed @ w[at + "self_attn.o_proj.weight"].T
        h = h + attention
        z = rms_norm(h, w[at + "post_attention_layernorm.weight"], self.eps)
        gate, up = z @ w[at + "mlp.gate_proj.weight"].T, z @ w[at + "mlp.up_proj.weight"].T
        mlp = (F.silu(gate) * up) @ w[at + "mlp.down_proj.weight"].T
        return h + mlp, logits, ((x, attention), (z, mlp))

    def head(self, h):
        return rms_norm(h, self.weights["model.norm.weight"], self.eps) @ self.weights["lm_head.weight"].T


# ---------------------------------------------------------------------- a method in it
def signals_of(logits, start, n, modules=None):
    """What a view at a decoder site can ask for, from attention logits [H, L, L]."""
    rows = logits.softmax(-1)[None, :, :, start : start + n]
    found = {
        "text_attention": rows[:, :, start + n :],
        "last_attention": rows[:, :, -1],
        "attention_logits": logits[None],
    }
    if modules is not None:
        stats = [(y.norm(dim=-1) / x.norm(dim=-1), F.cosine_similarity(x, y, dim=-1)) for x, y in modules]
        found["transition"] = torch.stack([torch.stack(pair) for pair in stats])[None]
    return found


class Run:
    """One prefill of one prompt [L, D] with visual tokens start .. start + n and a method inside the decoder.

    Attributes:
        cuts: for each cut (site, reduction, signals, state before it).
        plan: for each layer the places in the prompt of the tokens it ran with; a merged slot has that of its
            representative.
        lengths: tokens that each layer ran with.
        hidden: output of the last layer [L', D].
        positions: position ids with which each layer ran.
    """

    def __init__(self, llama, embeds, start, n, method):
        self.start, self.n, self.entered, self.method, self.llama = start, n, n, method, llama
        self.embeds, self.h, self.places = embeds, embeds, torch.arange(len(embeds))
        self.positions_now = torch.arange(len(embeds))
        self.state, self.row = {}, {}
        self.cuts, self.lengths, self.positions, self.plan = [], [], [], []
        sites = method.sites(layout(llama.depth))
        for site in sites:
            if site.stage == "projected":
                self.visit(site, {"text": embeds[None, start + n :]})
                self.entered = self.n
        for layer in range(llama.depth):
            for site in sites:
                if (site.layer, site.point) == (layer, "start"):
                    _, logits = llama.logits_of(layer, self.h, self.positions_now)
                    self.visit(site, signals_of(logits, self.start, self.n))
            self.lengths.append(len(self.h))
            self.positions.append(self.positions_now)
            self.plan.append(self.places)
            self.h, logits, modules = llama.layer(layer, self.h, self.positions_now)
            for site in sites:
                if (site.layer, site.point) == (layer, "end"):
                    self.visit(site, signals_of(logits, self.start, self.n, modules))
        self.hidden = self.h

    def visit(self, site, signals):
        s, e = self.start, self.start + self.n
        view = TokenView(
            self.h[None, s:e],
            site,
            depth=self.llama.depth,
            entered=self.entered,
            columns=torch.arange(s, e)[None],
            signals={name: signals[name] for name in site.needs},
            state=self.state,
            row=self.row,
        )
        expected = self.method.count(view.counts)
        reduction = self.method.reduce(view)
        state = dict(self.state)
        assert expected == (self.n if reduction is None else reduction.slots)
        if reduction is None:
            return
        keep = reduction.keep[0] + s
        self.h = torch.cat([self.h[:s], reduction.apply(view.tokens)[0][0], self.h[e:]])
        self.places = torch.cat([self.places[:s], self.places[keep], self.places[e:]])
        self.positions_now = torch.cat([self.positions_now[:s], self.positions_now[keep], self.positions_now[e:]])
        if site.positions == "renumber" or site.stage == "projected":
            self.positions_now = torch.arange(len(self.h))
        for name, value in self.state.items():
            self.state[name] = reduction.gather(value)
        self.n = reduction.slots
        self.cuts.append((site, reduction, signals, state))

    def replay(self, more):
        """Output of the last layer for the prompt and more tokens [M, D] behind it, with the same cuts (no merges)."""
        prompt = self.plan[0]
        h, places = torch.cat([self.embeds, more]), prompt
        for layer in range(self.llama.depth):
            stays = torch.isin(places, self.plan[layer]).nonzero()[:, 0]
            h = torch.cat([h[stays], h[len(places) :]])
            places, positions = self.plan[layer], self.positions[layer]
            behind = positions[-1] + 1 + torch.arange(len(more))
            h, _, _ = self.llama.layer(layer, h, torch.cat([positions, behind]))
        return h
