"""How the decoder layers of hosts make queries and keys: what differs between them, in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import forms

_BEFORE = ("input_layernorm", "operator_norm")
_AFTER = ("mlp", "feed_forward")
_OUT = ("o_proj", "out_proj")
_NORMS = {"q": ("q_norm", "q_layernorm"), "k": ("k_norm", "k_layernorm")}
_KNOWN = frozenset({"q_proj", "k_proj", "v_proj", "v_norm", *_OUT, *_NORMS["q"], *_NORMS["k"]})
"""Modules with weights that an attention may have; one with others makes queries or keys in another way."""
_TURNED: dict[str, Callable[[Any], bool]] = {
    "cohere2": lambda attn: attn.sliding_window is not None,
    "exaone4": lambda attn: attn.sliding_window is None or attn.is_sliding,
}
"""Text models of which some layers have no rotary embeddings, and which layers have them."""
_UNNORMED = frozenset({"exaone4"})
"""Text models whose layers norm what attention gives, and not what it takes."""
ROTARY = "apply_rotary_pos_emb"
"""The rotary function, as it is called beside an attention: of (q, k, cos, sin), or of (x, cos, sin)."""
COMPLEX = {"Llama4TextAttention": "apply_rotary_emb"}
"""Attentions that turn by complex numbers, norm heads behind that, and warm up where they do not turn; by the class
whose forward they run, and what the rotary function of (q, k, table) is called beside it."""
_MIXERS = ("self_attn", "linear_attn", "conv")
"""What a layer calls the module that mixes its tokens."""


@dataclass(frozen=True)
class AttentionForm:
    """How one layer makes queries and keys.

    Attributes:
        attn: the attention.
        before: the norm of its input.
        mlp: the module of the other branch.
        norms: norms of heads, by ``"q"`` and ``"k"``; None where there are none.
        gated: whether `q_proj` gives, head by head, a query and a gate.
        turn: the host's own rotary function, or None where no rotary embeddings are applied.
        cap: the soft cap of the logits, or None.
    """

    attn: Any
    before: nn.Module
    mlp: nn.Module
    norms: dict[str, nn.Module | None]
    gated: bool
    turn: Callable[..., Any] | None
    cap: float | None

    def projection(self, which: str) -> nn.Module:
        """The module behind which q or k is caught."""
        found: nn.Module = getattr(self.attn, f"{which}_proj")
        return found

    @property
    def output(self) -> nn.Module:
        """The projection of what the heads gave."""
        found = _first(self.attn, _OUT)
        assert found is not None
        return found

    def heads(self, x: Tensor, which: str) -> Tensor:
        """What `projection` gave, `[B, L, H d]`, as q or k before rope, `[B, H, L, d]`."""
        width = self.attn.head_dim
        x = x.unflatten(-1, (-1, 2 * width if self.gated and which == "q" else width))[..., :width]
        norm = self.norms[which]
        return (x if norm is None else norm(x)).transpose(1, 2)

    def rotate(self, x: Tensor, rotary: Any, queries: Tensor | None = None) -> Tensor:
        """Makes of what `heads` gave what the attention compares, by the family's own rotary function.

        Args:
            x: `[G, H, R, d]`.
            rotary: what the host hands the layer, for these tokens; layers without rope leave it.
            queries: of queries, the place of each among the keys of its layer, int64 `[G, R]`; None for keys.
        """
        if self.turn is None or rotary is None:
            return x
        cos, sin = rotary
        parameters = self.turn.__code__.co_varnames[: self.turn.__code__.co_argcount]
        rotated: Tensor = self.turn(x, x, cos, sin)[0] if parameters[1] == "k" else self.turn(x, cos, sin)
        return rotated


class ComplexForm(AttentionForm):
    """Llama 4: rotary tables of complex numbers, then a norm; layers without rope scale queries by their place."""

    def rotate(self, x: Tensor, rotary: Any, queries: Tensor | None = None) -> Tensor:
        """See `AttentionForm.rotate`."""
        attn, x = self.attn, x.transpose(1, 2)
        if self.turn is not None:
            x = self.turn(x, x, rotary)[0]
        if hasattr(attn, "qk_norm"):
            x = attn.qk_norm(x)
        if queries is not None and self.turn is None and attn.attn_temperature_tuning:
            warmth = torch.log1p(torch.floor((queries.float() + 1.0) / attn.floor_scale)) * attn.attn_scale + 1.0
            x = (x * warmth[:, :, None, None]).to(x.dtype)
        return x.transpose(1, 2)


def attention_form(block: Any) -> AttentionForm | None:
    """How a decoder layer makes queries and keys, or None where its attention is none of the known kinds."""
    attn: Any = getattr(block, "self_attn", None)
    kind = getattr(getattr(attn, "config", None), "model_type", None)
    before, mlp, out = _first(block, _BEFORE), _first(block, _AFTER), _first(attn, _OUT)
    if before is None and kind in _UNNORMED:
        before = nn.Identity()
    q, k, width = getattr(attn, "q_proj", None), getattr(attn, "k_proj", None), getattr(attn, "head_dim", None)
    if before is None or mlp is None or out is None or q is None or k is None or width is None:
        return None
    weighted = {name for name, part in attn.named_children() if any(True for _ in part.parameters())}
    if weighted - _KNOWN or not hasattr(attn, "scaling"):
        return None
    made, heads = getattr(q, "out_features", 0), getattr(out, "in_features", 0)
    if made not in (heads, 2 * heads):
        return None
    has_rope = bool(getattr(attn, "use_rope", True))
    if kind in _TURNED:
        has_rope = _TURNED[kind](attn)
    own = next((name for name in COMPLEX if forms.known(attn, (f"transformers:{name}",))), None)
    turn = forms.found_beside(attn, ROTARY if own is None else COMPLEX[own]) if has_rope else None
    if has_rope and turn is None:
        return None
    norms = {which: _first(attn, names) for which, names in _NORMS.items()}
    cap = getattr(attn, "attn_logit_softcapping", None)
    made_as = AttentionForm if own is None else ComplexForm
    return made_as(attn, before, mlp, norms, made != heads, turn, None if cap is None else float(cap))


def branches(block: Any) -> tuple[nn.Module, nn.Module] | None:
    """What a layer's two branches run, the one that mixes its tokens and the MLP, or None where they are not known."""
    mixer, mlp = _first(block, _MIXERS), _first(block, _AFTER)
    return None if mixer is None or mlp is None else (mixer, mlp)


def _first(owner: Any, names: tuple[str, ...]) -> nn.Module | None:
    """The first of these submodules that there is."""
    found = (getattr(owner, name, None) for name in names)
    return next((part for part in found if isinstance(part, nn.Module)), None)
