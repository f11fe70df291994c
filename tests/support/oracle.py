"""What a compressed model must compute, written out: one picture or one row at a time, no cache, no padding, no hook.

Nothing here comes from the library under test, and masks, rotations and attention are written by hand; of the host
models only weights, norms, MLPs, embeddings and heads are used. What to keep is asked of a `Decider`, which sees
dense signals (softmax over all keys of the layer, then cut to the columns in question).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Cut(NamedTuple):
    """What becomes of N tokens.

    Attributes:
        keep: int64 [K], the token whose place, position and rotation each slot takes.
        mix: [K, M], the values: slots = mix @ tokens, M = N and the protected tokens that may be named behind them.
        own: [K, M] of 0 and 1, which slot owns which token.
    """

    keep: Tensor
    mix: Tensor
    own: Tensor

    def tokens(self, x: Tensor) -> Tensor:
        return (self.mix.double() @ x.double()).to(x.dtype)

    def follow(self, table: Tensor, axis: int = 0) -> Tensor:
        """A table with one entry a token; tokens that only `features` can name have none (zeros)."""
        extra = self.mix.shape[1] - table.shape[axis]
        if extra:
            shape = list(table.shape)
            shape[axis] = extra
            table = torch.cat([table, table.new_zeros(shape)], axis)
        return table.index_select(axis, self.keep)


def select(keep: Tensor, n: int) -> Cut:
    """Pruning."""
    rows = F.one_hot(keep, n).double()
    return Cut(keep, rows, rows)


Signals = dict[str, tuple[Tensor, int | None]]
"""Name to a tensor without batch and the axis of its tokens."""


@dataclass
class Moment:
    """One place of the forward, as one view row sees it.

    Attributes:
        stage, layer, point: where.
        tokens: [N, C].
        size: [N].
        who: int64 [N], which token that entered each one is (or goes on from).
        signals: those of this place, and ``name@stage:layer`` for those carried here.
        prefix: protected tokens in front.
        depth: layers of the stage.
        entered: tokens when the stage began.
        grid: of the patches, or None.
        columns: int64 [N], places in the whole row.
        unit: row and picture (-1: all of the row).
    """

    stage: str
    layer: int | None
    point: str
    tokens: Tensor
    size: Tensor
    who: Tensor
    signals: Signals
    prefix: int = 0
    depth: int = 1
    entered: int = 0
    grid: tuple[int, int] | None = None
    columns: Tensor | None = None
    unit: tuple[int, int] = (0, -1)


class Decider(Protocol):
    """Who decides; visits are opaque to the oracle, but for the attribute `index`, which tells methods apart."""

    def visits(self, stage: str, layer: int | None = None, point: str = "end") -> list[Any]:
        """Who acts here, in order."""

    def acts(self, stage: str) -> bool:
        """Whether anybody acts in this stage."""

    def scope(self, visit: Any) -> str:
        """``picture`` or ``sample``."""

    def renumbers(self, visit: Any) -> bool:
        """Whether positions become contiguous after its cut."""

    def insert(self, visit: Any, moment: Moment) -> Tensor | None:
        """Tokens [E, C] to put at the end of the row for one block."""

    def decide(self, visit: Any, moment: Moment) -> Cut | None:
        """What stays."""

    def bias_from(self) -> int:
        """First tower layer whose attention logits get log(size)."""


# ---------------------------------------------------------------------- towers
@dataclass
class Block:
    """A pre-norm block, in pieces that take one row."""

    norm1: Callable[[Tensor], Tensor]
    qkv: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    scale: float
    out: Callable[[Tensor], Tensor]
    norm2: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]


@dataclass
class Vision:
    """A tower, in pieces.

    Attributes:
        embed: pixels [1, 3, H, W] to tokens [1, L, C].
        blocks: in order.
        prefix: protected tokens.
        tokens: what the library does with the last block's output before it is seen.
        head: from that to what the user gets.
        rope: pixels to (sin, cos) [N, d] each, or None.
        half: rotate halves instead of neighbours.
        grid: of the patches.
    """

    embed: Callable[[Tensor], Tensor]
    blocks: list[Block]
    prefix: int
    tokens: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    rope: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    half: bool = False
    grid: tuple[int, int] | None = None


def _heads(x: Tensor, heads: int) -> Tensor:
    """[L, H d] to [H, L, d]."""
    return x.view(x.shape[0], heads, -1).transpose(0, 1)


def _flat(x: Tensor) -> Tensor:
    """[H, L, d] to [L, H d]."""
    return x.transpose(0, 1).flatten(1)


def _fused(weight: Tensor, bias: Tensor | None, heads: int, q_norm: Any = None, k_norm: Any = None) -> Callable:
    def qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (_heads(part, heads) for part in F.linear(x, weight, bias).chunk(3, -1))
        return (q if q_norm is None else q_norm(q)), (k if k_norm is None else k_norm(k)), v

    return qkv


def _apart(q_proj: nn.Module, k_proj: nn.Module, v_proj: nn.Module, heads: int, norms: tuple = ()) -> Callable:
    def qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (_heads(made(x), heads) for made in (q_proj, k_proj, v_proj))
        return (norms[0](q), norms[1](k), v) if norms else (q, k, v)

    return qkv


def _timm_block(block: nn.Module) -> Block:
    attn = block.attn
    heads, norms = attn.num_heads, (attn.q_norm, attn.k_norm)
    if attn.qkv is None:
        qkv = _apart(attn.q_proj, attn.k_proj, attn.v_proj, heads, norms)
    else:
        bias = attn.qkv.bias
        if bias is None and getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        qkv = _fused(attn.qkv.weight, bias, heads, *norms)
    scale1 = getattr(block, "ls1", None) or (lambda x: x if block.gamma_1 is None else block.gamma_1 * x)
    scale2 = getattr(block, "ls2", None) or (lambda x: x if block.gamma_2 is None else block.gamma_2 * x)
    return Block(
        block.norm1,
        qkv,
        (attn.proj.in_features // heads) ** -0.5,
        lambda x: scale1(attn.proj(attn.norm(x))),
        block.norm2,
        lambda x: scale2(block.mlp(x)),
    )


def _timm(model: nn.Module) -> Vision:
    def embed(x: Tensor) -> Tensor:
        made = model._pos_embed(model.patch_embed(x))
        return model.norm_pre(made[0] if isinstance(made, tuple) else made)

    def rope(x: Tensor) -> tuple[Tensor, Tensor]:
        return model._pos_embed(model.patch_embed(x))[1].chunk(2, -1)

    rotary = getattr(model, "rope", None) is not None
    return Vision(
        embed,
        [_timm_block(block) for block in model.blocks],
        int(model.num_prefix_tokens),
        model.norm,
        model.forward_head,
        rope if rotary else None,
        bool(rotary and getattr(model.blocks[0].attn, "rotate_half", False)),
        tuple(model.patch_embed.grid_size),
    )


def _open_clip_block(block: nn.Module) -> Block:
    attn = block.attn
    return Block(
        block.ln_1,
        _fused(attn.in_proj_weight, attn.in_proj_bias, attn.num_heads),
        (attn.embed_dim // attn.num_heads) ** -0.5,
        lambda x: block.ls_1(F.linear(x, attn.out_proj.weight, attn.out_proj.bias)),
        block.ln_2,
        lambda x: block.ls_2(block.mlp(x)),
    )


def _open_clip(model: nn.Module) -> Vision:
    visual = getattr(model, "visual", model)
    if hasattr(visual, "trunk"):
        inner = _timm(visual.trunk)
        inner.head = lambda x: visual.head(visual.trunk.forward_head(x))
        return inner

    def head(x: Tensor) -> Tensor:
        pooled = visual._pool(x)[0] @ visual.proj
        return F.normalize(pooled, dim=-1) if type(model).__name__ == "CoCa" else pooled

    return Vision(
        visual._embeds,
        [_open_clip_block(block) for block in visual.transformer.resblocks],
        1,
        lambda x: x,
        head,
        grid=tuple(visual.grid_size),
    )


def _hf_block(block: nn.Module) -> Block:
    kind = type(block).__name__
    attn = block.self_attn if hasattr(block, "self_attn") else block.attention
    out = attn.out_proj if hasattr(attn, "out_proj") else attn.o_proj
    heads = int(attn.config.num_attention_heads)
    norms = {
        "ViTLayer": ("layernorm_before", "layernorm_after"),
        "Dinov2Layer": ("norm1", "norm2"),
    }.get(kind, ("layer_norm1", "layer_norm2"))
    one = block.layer_scale1 if kind == "Dinov2Layer" else (lambda x: x)
    two = block.layer_scale2 if kind == "Dinov2Layer" else (lambda x: x)
    return Block(
        getattr(block, norms[0]),
        _apart(attn.q_proj, attn.k_proj, attn.v_proj, heads),
        (int(attn.config.hidden_size) // heads) ** -0.5,
        lambda x: one(out(x)),
        getattr(block, norms[1]),
        lambda x: two(block.mlp(x)),
    )


def _hf(model: nn.Module) -> Vision:
    kind = type(model).__name__
    dual = hasattr(model, "vision_model")
    tower = model.vision_model if dual else getattr(model, "vit", model)
    layers = [m for m in tower.modules() if type(m).__name__.endswith("Layer") and hasattr(m, "mlp")]
    blocks = [_hf_block(layer) for layer in layers]
    side = tower.config.image_size // tower.config.patch_size
    if "CLIP" in type(tower).__name__:
        pooled = lambda x: tower.post_layernorm(x[:, 0])  # noqa: E731
        head = (lambda x: model.visual_projection(pooled(x))) if dual else pooled
        return Vision(
            lambda x: tower.pre_layrnorm(tower.embeddings(x)), blocks, 1, lambda x: x, head, grid=(side, side)
        )
    if "Siglip" in type(tower).__name__:
        return Vision(tower.embeddings, blocks, 0, tower.post_layernorm, tower.head, grid=(side, side))
    heads = {
        "ViTModel": lambda x: model.pooler(x),
        "ViTForImageClassification": lambda x: model.classifier(x[:, 0]),
        "Dinov2Model": lambda x: x[:, 0],
    }
    return Vision(tower.embeddings, blocks, 1, tower.layernorm, heads[kind], grid=(side, side))


def vision_of(model: nn.Module) -> Vision:
    """A tower in pieces, by the library that its class comes from."""
    library = type(model).__module__.partition(".")[0]
    return {"timm": _timm, "open_clip": _open_clip, "transformers": _hf}[library](model)


def _turn(x: Tensor, sin: Tensor, cos: Tensor, half: bool) -> Tensor:
    """Rotates [H, L, d]."""
    if half:
        a, b = x.chunk(2, -1)
        other = torch.cat([-b, a], -1)
    else:
        other = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
    return x * cos + other * sin


@dataclass
class TowerRun:
    """One picture on its way through a tower.

    Attributes:
        x: [L, C], the row now.
        size: [L].
        prefix: protected tokens in front.
        entered: patches.
        who: int64 [N], patch that each view token goes on from.
        source: int64 [entered], slot of every patch, -1 where it was dropped.
        own: signals of the block that runs now.
        carried: signals of the blocks before, by ``name@vision:layer``.
        inserted: (method, count) of the tokens at the end of the row.
        outputs: what became of the tokens that a method inserted last.
        hidden: output of every block.
    """

    x: Tensor
    size: Tensor
    prefix: int
    entered: int
    who: Tensor
    source: Tensor
    own: Signals = field(default_factory=dict)
    carried: Signals = field(default_factory=dict)
    inserted: list[tuple[int, int]] = field(default_factory=list)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    hidden: list[Tensor] = field(default_factory=list)

    @property
    def n(self) -> int:
        return self.x.shape[0] - self.prefix - sum(count for _, count in self.inserted)

    def view(self, x: Tensor) -> Tensor:
        return x[self.prefix : self.prefix + self.n]

    def guard(self, x: Tensor) -> Tensor:
        """Protected tokens, inserted ones last."""
        return torch.cat([x[: self.prefix], x[self.prefix + self.n :]])

    def take(self, cut: Cut) -> None:
        n, end = self.n, self.prefix + self.n
        sizes = cut.own.to(self.size) @ self.view(self.size)
        values = cut.tokens(self.view(self.x))
        self.x = torch.cat([self.x[: self.prefix], values, self.x[end:]])
        self.size = torch.cat([self.size[: self.prefix], sizes, self.size[end:]])
        self.book(cut, n)

    def book(self, cut: Cut, n: int) -> None:
        """Everything but the tokens and their sizes."""
        self.who = cut.follow(self.who)
        owner = torch.full((n,), -1)
        for slot, token in cut.own[:, :n].nonzero().tolist():
            owner[token] = slot
        self.source = torch.where(self.source < 0, -1, owner[self.source.clamp(min=0)])
        for table in (self.own, self.carried):
            for name, (value, axis) in table.items():
                if axis is not None:
                    table[name] = (cut.follow(value, axis), axis)


def _tower_signals(run: TowerRun, q: Tensor, k: Tensor, logits: Tensor) -> Signals:
    """Everything that a block's attention tells of the row as it is; logits [H, L, L]."""
    n, lo = run.n, run.prefix
    rows = logits.softmax(-1)
    guarded = torch.cat([rows[:, :lo], rows[:, lo + n :]], 1)[:, :, lo : lo + n]
    found: Signals = {
        "keys": (k[:, lo : lo + n].mean(0), 0),
        "keys_full": (_flat(k)[lo : lo + n], 0),
        "protected_queries": (run.guard(_flat(q)), None),
        "protected_keys": (run.guard(_flat(k)), None),
        "received_attention": (rows.mean((0, 1))[lo : lo + n], 0),
    }
    if guarded.shape[1]:
        found["protected_attention"] = (guarded.transpose(0, 1), 2)
        found["cls_attention"] = (guarded[:, 0], 1)
    return {name: (value.float(), axis) for name, (value, axis) in found.items()}


def run_tower(vision: Vision, pixels: Tensor, decider: Decider, unit: tuple[int, int] = (0, -1)) -> TowerRun:
    """One picture [1, 3, H, W] through a tower."""
    x = vision.embed(pixels)[0]
    depth, n = len(vision.blocks), x.shape[0] - vision.prefix
    run = TowerRun(x, torch.ones(x.shape[0]), vision.prefix, n, torch.arange(n), torch.arange(n))
    table = None if vision.rope is None else vision.rope(pixels)
    grid = vision.grid if vision.grid and vision.grid[0] * vision.grid[1] == n else None

    def moment(layer: int, point: str, visit: Any) -> Moment:
        signals = {**run.carried, **run.own, "protected": (run.guard(run.x), None)}
        if visit.index in run.outputs:
            signals["inserted"] = (run.outputs[visit.index], None)
        columns = torch.arange(vision.prefix, vision.prefix + run.n)
        tokens, size = run.view(run.x), run.view(run.size)
        return Moment(
            "vision", layer, point, tokens, size, run.who, signals, vision.prefix, depth, n, grid, columns, unit
        )

    def turn(x: Tensor) -> Tensor:
        if table is None:
            return x
        lo, hi = run.prefix, run.prefix + run.n
        middle = _turn(x[:, lo:hi], table[0][run.who], table[1][run.who], vision.half)
        return torch.cat([x[:, :lo], middle, x[:, hi:]], 1)

    def attention(layer: int, block: Block) -> tuple[Tensor, Tensor]:
        q, k, v = block.qkv(block.norm1(run.x))
        logits = (turn(q).double() @ turn(k).double().transpose(1, 2)) * block.scale
        if layer >= decider.bias_from():
            logits = logits + run.size.double().log()
        run.own = _tower_signals(run, q, k, logits)
        return logits, v

    def visit_all(layer: int, point: str) -> None:
        for visit in decider.visits("vision", layer, point):
            if point == "start":
                attention(layer, vision.blocks[layer])  # looks ahead
                tokens = decider.insert(visit, moment(layer, point, visit))
                if tokens is not None and len(tokens):
                    run.x = torch.cat([run.x, tokens.to(run.x)])
                    run.size = torch.cat([run.size, torch.ones(len(tokens))])
                    run.inserted.append((visit.index, len(tokens)))
                    attention(layer, vision.blocks[layer])
            cut = decider.decide(visit, moment(layer, point, visit))
            if cut is not None:
                run.take(cut)

    for layer, block in enumerate(vision.blocks):
        visit_all(layer, "start")
        logits, v = attention(layer, block)
        run.carried.update({f"{name}@vision:{layer}": value for name, value in run.own.items()})
        run.x = run.x + block.out(_flat((logits.softmax(-1) @ v.double()).to(v.dtype)))
        visit_all(layer, "mid")
        run.x = run.x + block.mlp(block.norm2(run.x))
        run.carried[f"protected@vision:{layer}"] = (run.guard(run.x), None)
        visit_all(layer, "end")
        at = end = run.prefix + run.n
        for index, count in run.inserted:
            run.outputs[index] = run.x[at : at + count]
            at += count
        run.x, run.size, run.inserted = run.x[:end], run.size[:end], []
        run.hidden.append(run.x)
    return run


# ---------------------------------------------------------------------- the language model
def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    scale = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * (x.double() * scale).to(x.dtype)


def rotary(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """sin and cos [L, d], halves equal."""
    angle = positions.double()[:, None] * theta ** (-torch.arange(0, width, 2).double() / width)
    angle = torch.cat([angle, angle], -1)
    return angle.sin(), angle.cos()


class LlamaLayer:
    """A Llama layer on one row [L, C]."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self.module, self.width = module, config.hidden_size // config.num_attention_heads
        self.theta = config.rope_parameters["rope_theta"]

    def attend(self, h: Tensor, positions: Tensor, unseen: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Normed input, what attention adds, and logits [H, L, L]; nobody looks at the columns `unseen` but they."""
        attn = self.module.self_attn
        x = rms_norm(h, self.module.input_layernorm)
        q, k, v = (_heads(part(x), part.out_features // self.width) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
        sin, cos = rotary(positions, self.width, self.theta)
        q, k = _turn(q.double(), sin, cos, True), _turn(k.double(), sin, cos, True)
        many = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(many, 0), v.double().repeat_interleave(many, 0)
        length = len(h)
        blocked = torch.ones(length, length).triu(1).bool()
        if unseen is not None:
            blocked = blocked | (unseen[None, :] & ~unseen[:, None])
        logits = (q @ k.transpose(1, 2) * self.width**-0.5).masked_fill(blocked, float("-inf"))
        return x, attn.o_proj(_flat(logits.softmax(-1) @ v).to(h.dtype)), logits

    def run(self, h: Tensor, positions: Tensor, unseen: Tensor | None = None) -> tuple[Tensor, Tensor, Any]:
        """Output, logits, and (in, out) of attention and MLP."""
        x, mixed, logits = self.attend(h, positions, unseen)
        h = h + mixed
        z = rms_norm(h, self.module.post_attention_layernorm)
        mlp = self.module.mlp
        y = mlp.down_proj(F.silu(mlp.gate_proj(z)) * mlp.up_proj(z))
        return h + y, logits, ((x, mixed), (z, y))


@dataclass
class RowRun:
    """One row on its way through a language model.

    Attributes:
        h: [L, C].
        picture: int64 [L], picture of each column, -1 for text.
        positions: int64 [L].
        size: [L].
        place: int64 [L], prompt column whose place each column takes.
        who: int64 [L], prompt column that its token goes on from.
        row: number of the row, for the decider.
        began: first prompt column of each picture.
        carried: the tower's signals of each picture; rows of them belong to `rank`.
        rank: int64 [L], which of the features of its picture each column is.
        entered: tokens of each picture when the stage began.
        held: prompt column of a visual token that ends the row and therefore stays, or -1.
        lengths: columns that each layer ran with.
    """

    h: Tensor
    picture: Tensor
    positions: Tensor
    size: Tensor
    place: Tensor
    who: Tensor
    row: int
    began: dict[int, int]
    carried: dict[int, Signals]
    rank: Tensor
    entered: dict[int, int] = field(default_factory=dict)
    held: int = -1
    lengths: list[int] = field(default_factory=list)

    def columns(self, picture: int) -> Tensor:
        """Columns of a picture (-1: of all) that may be cut."""
        mine = self.picture >= 0 if picture < 0 else self.picture == picture
        return (mine & (self.place != self.held)).nonzero()[:, 0]

    def enter(self) -> None:
        self.entered = {p: len(self.columns(p)) for p in self.began}

    def units(self, scope: str) -> list[tuple[int, Tensor]]:
        """(picture or -1, columns) of each view row."""
        pictures = ([-1] if self.began else []) if scope == "sample" else sorted(self.began)
        found = [(p, self.columns(p)) for p in pictures]
        return [(p, columns) for p, columns in found if len(columns)]

    def text_behind(self, picture: int) -> Tensor:
        """Text columns behind the first token of a picture (-1: of the first picture)."""
        first = self.began[min(self.began) if picture < 0 else picture]
        return ((self.picture < 0) & (self.place > first)).nonzero()[:, 0]

    def take(self, cuts: list[tuple[Tensor, Cut]]) -> Tensor:
        """Cuts view rows (columns, cut); slots fill the places of what stays of their own view row, in slot order.

        Returns where columns came from.
        """
        stay, source = torch.ones(len(self.h), dtype=torch.bool), torch.arange(len(self.h))
        h, size = self.h, self.size
        for columns, cut in cuts:
            kept = columns[cut.keep]
            h = h.index_copy(0, kept, cut.tokens(self.h[columns]))
            size = size.index_copy(0, kept, cut.own.to(self.size) @ self.size[columns])
            stay[columns] = False
            stay[kept] = True
            source[kept.sort().values] = kept
        self.h, self.size, source = h, size, source[stay]
        self.h, self.size, self.picture = self.h[source], self.size[source], self.picture[source]
        self.positions, self.rank, self.who = self.positions[source], self.rank[source], self.who[source]
        self.place = self.place[stay]
        return source

    def renumber(self) -> None:
        self.positions = self.positions.min() + torch.arange(len(self.h))


def _row_signals(run: RowRun, picture: int, columns: Tensor, logits: Tensor, now: Tensor, modules: Any) -> Signals:
    """What a layer tells of one view row.

    Args:
        run: the row as it is.
        picture: of the view row.
        columns: of its tokens.
        logits: [H, L0, L0] of the layer.
        now: int64 [L], the layer's column of each column.
        modules: (in, out) [L0, C] of attention and MLP, or None where the layer has not run.
    """
    rows = logits.softmax(-1)[:, now][:, :, now]
    text = run.text_behind(picture)
    found: Signals = {
        "last_attention": (rows[:, -1][:, columns], 1),
        "attention_logits": (logits[:, now][:, :, now], None),
        "attention_to_text": (rows[:, columns][:, :, text].sum(-1).mean(0), 0),
    }
    if len(text):
        found["text_attention"] = (rows[:, text][:, :, columns], 2)
    if modules is not None:
        stats = [(y.norm(dim=-1) / x.norm(dim=-1), F.cosine_similarity(x, y, dim=-1)) for x, y in modules]
        found["transition"] = (torch.stack([torch.stack(pair) for pair in stats])[:, :, now], None)
    return {name: (value.float(), axis) for name, (value, axis) in found.items()}


@dataclass
class Plan:
    """Cuts of a prompt, to be taken again with more behind it.

    Attributes:
        cuts: by site, method and picture; pictures that are not in it are decided on when they come.
        held: the visual token that ended the prompt, or -1.
        done: whether the prompt has been seen.
    """

    cuts: dict[tuple[Any, ...], Cut | None] = field(default_factory=dict)
    held: int = -1
    done: bool = False


class Llava:
    """LLaVA 1.5 for one row."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.core = model.model if hasattr(model, "lm_head") else model
        self.lm = self.core.language_model
        self.layers = [LlamaLayer(module, self.lm.config) for module in self.lm.layers]
        self.image = self.core.config.image_token_id
        self.vision = _hf(self.core.vision_tower)
        index, depth = self.core.config.vision_feature_layer, len(self.vision.blocks)
        self.feature = (index if index >= 0 else depth + 1 + index) - 1

    # ------------------------------------------------------------------ from pixels to the language model's input
    def features(self, pixels: Tensor, decider: Decider, unit: tuple[int, int]) -> tuple[Tensor, Tensor, TowerRun]:
        """Projected features [K, C] of one picture and their sizes."""
        run = run_tower(self.vision, pixels, decider, unit)  # to the end: layers behind the features may be read
        x, size = run.hidden[self.feature], run.size
        protected, x, size = x[: run.prefix], x[run.prefix :], size[run.prefix :]
        for visit in decider.visits("features"):
            signals = {**run.carried, "protected": (protected, None)}
            grid = self.vision.grid
            cut = decider.decide(
                visit,
                Moment("features", None, "end", x, size, run.who, signals, entered=run.entered, grid=grid, unit=unit),
            )
            if cut is not None:
                n = len(x)
                named = torch.cat([x, protected])[: cut.mix.shape[1]]
                x = cut.tokens(named)
                size = cut.own.to(size) @ torch.cat([size, size.new_zeros(len(named) - n)])
                run.book(cut, n)
        projector = self.core.multi_modal_projector
        return projector.linear_2(projector.act(projector.linear_1(x))), size, run

    def embed(self, ids: Tensor, pixels: Tensor | None, decider: Decider, row: int) -> RowRun:
        """A row at the language model's input: what the tower left fills the first placeholders of its picture."""
        length, count = len(ids), 0 if pixels is None else len(pixels)
        h, size = self.lm.embed_tokens(ids), torch.ones(length)
        picture, rank, stay = torch.full((length,), -1), torch.zeros(length, dtype=torch.int64), torch.ones(length) > 0
        columns, began, carried = (ids == self.image).nonzero()[:, 0], {}, {}
        for index in range(count):
            x, sizes, run = self.features(pixels[index : index + 1], decider, (row, index))
            mine, columns = columns[: run.entered], columns[run.entered :]
            used = mine[: len(x)]
            h, size = h.index_copy(0, used, x), size.index_copy(0, used, sizes)
            rank[used], picture[mine], stay[mine[len(x) :]] = torch.arange(len(x)), index, False
            began[index], carried[index] = int(mine[0]), dict(run.carried)
        assert not count or not len(columns), "placeholders without a picture"
        place = stay.nonzero()[:, 0]
        positions = torch.arange(len(place)) if len(place) < length else place.clone()
        return RowRun(
            h[stay], picture[stay], positions, size[stay], place, place.clone(), row, began, carried, rank[stay]
        )

    # ------------------------------------------------------------------ one forward
    def forward(
        self,
        ids: Tensor,
        pixels: Tensor | None,
        decider: Decider,
        row: int = 0,
        plan: Plan | None = None,
        mask_from: int | None = None,
    ) -> tuple[Tensor, RowRun]:
        """Last hidden states [L', C] of a row.

        Args:
            ids: [L], the whole row.
            pixels: its pictures.
            decider: who decides.
            row: number of the row, for the decider.
            plan: None decides on all of `ids`; else cuts are recorded, or taken again where they are.
            mask_from: from this layer on text no longer looks at pictures (masking instead of dropping).
        """
        run = self.embed(ids, pixels, decider, row)

        def visit_all(stage: str, layer: int | None, point: str, logits: Any = None, modules: Any = None) -> None:
            now = torch.arange(len(run.h))
            for visit in decider.visits(stage, layer, point):
                if point == "start":
                    now = torch.arange(len(run.h))
                seen = logits() if point == "start" else logits
                ready: list[tuple[Tensor, Cut]] = []
                for picture, columns in run.units(decider.scope(visit)):
                    key = (stage, layer, point, visit.index, picture)
                    if plan is not None and key in plan.cuts:
                        cut = plan.cuts[key]
                    else:
                        moment = self._moment(run, stage, layer, point, picture, columns, seen, now, modules)
                        cut = decider.decide(visit, moment)
                        if plan is not None:
                            plan.cuts[key] = cut
                    if cut is not None:
                        ready.append((columns, cut))
                before = len(run.h)
                now = now[run.take(ready)]
                if len(run.h) < before and decider.renumbers(visit):
                    run.renumber()

        run.enter()
        visit_all("projected", None, "end")
        if decider.acts("decoder"):
            if plan is not None and plan.done:
                run.held = plan.held
            elif run.picture[-1] >= 0:
                run.held = int(run.place[-1])
            run.enter()
        for layer, part in enumerate(self.layers):
            visit_all("decoder", layer, "start", lambda part=part: part.attend(run.h, run.positions)[2])
            run.lengths.append(len(run.h))
            unseen = run.picture >= 0 if mask_from is not None and layer >= mask_from else None
            run.h, logits, modules = part.run(run.h, run.positions, unseen)
            visit_all("decoder", layer, "end", logits, modules)
        if plan is not None:
            plan.done, plan.held = True, run.held
        return rms_norm(run.h, self.lm.norm), run

    def _moment(
        self,
        run: RowRun,
        stage: str,
        layer: int | None,
        point: str,
        picture: int,
        columns: Tensor,
        logits: Tensor | None,
        now: Tensor,
        modules: Any,
    ) -> Moment:
        signals: Signals = {}
        if stage == "projected":
            text = run.text_behind(picture)
            if len(text):
                signals["text"] = (run.h[text], None)
        elif logits is not None:
            signals = _row_signals(run, picture, columns, logits, now, modules)
        for name, (value, axis) in run.carried.get(picture, {}).items():
            signals[name] = (value if axis is None else value.index_select(axis, run.rank[columns]), axis)
        return Moment(
            stage,
            layer,
            point,
            run.h[columns],
            run.size[columns],
            run.who[columns],
            signals,
            depth=len(self.layers) if stage == "decoder" else 1,
            entered=sum(run.entered.values()) if picture < 0 else run.entered[picture],
            grid=self.vision.grid if stage == "projected" and picture >= 0 else None,
            columns=columns,
            unit=(run.row, picture),
        )

    # ------------------------------------------------------------------ generation
    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        pixels: Tensor | None,
        decider: Callable[[], Decider],
        steps: int,
        *,
        again: bool = False,
        row: int = 0,
        given: Tensor | None = None,
        mask_from: int | None = None,
        plan: Plan | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Greedy tokens [steps] and their logits [steps, V], each from the whole row.

        Args:
            ids: [L], the prompt.
            pixels: its pictures.
            decider: makes a decider for each forward.
            steps: how many tokens.
            again: decide anew at every step, with what was generated as text (what a host without a cache does);
                else the prompt alone decides.
            row: number of the row, for the decider.
            given: tokens to go on with instead of the best ones.
            mask_from: see `forward`.
            plan: of the turns before.
        """
        if plan is None and not again:
            plan = Plan()
        found, prompt = [], len(ids)
        for step in range(steps):
            hidden, _ = self.forward(ids, pixels, decider(), row, plan, mask_from)
            found.append(self.model.lm_head(hidden[-1]))
            following = found[-1].argmax() if given is None else given[step]
            ids = torch.cat([ids, following.reshape(1)])
        return ids[prompt:], torch.stack(found)
