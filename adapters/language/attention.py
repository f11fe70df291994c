"""How the decoder layers of hosts make queries and keys: what differs between them, in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class AttentionForm:
    """How one layer makes queries and keys.

    Attributes:
        attn: the attention.
        before: the norm of its input.
        mlp: the module of the other branch.
        norms: norms of heads, by ``"q"`` and ``"k"``; None where there are none.
        gated: whether `q_proj` gives, head by head, a query and a gate.
        has_rope: whether rotary embeddings are applied.
        cap: the soft cap of the logits, or None.
    """

    attn: Any
    before: nn.Module
    mlp: nn.Module
    norms: dict[str, nn.Module | None]
    gated: bool
    has_rope: bool
    cap: float | None

    def projection(self, which: str) -> nn.Module:
        """The module behind which q or k is caught."""
        found: nn.Module = getattr(self.attn, f"{which}_proj")
        return found

    def heads(self, x: Tensor, which: str) -> Tensor:
        """What `projection` gave, `[B, L, H d]`, as q or k before rope, `[B, H, L, d]`."""
        width = self.attn.head_dim
        x = x.unflatten(-1, (-1, 2 * width if self.gated and which == "q" else width))[..., :width]
        norm = self.norms[which]
        return (x if norm is None else norm(x)).transpose(1, 2)

    def rotate(self, x: Tensor, rotary: Any) -> Tensor:
        """Applies the family's own rotary function to `[G, H, R, d]`; layers without rope leave it."""
        if not self.has_rope or rotary is None:
            return x
        apply = forms.beside(self.attn, "apply_rotary_pos_emb")
        cos, sin = rotary
        parameters = apply.__code__.co_varnames[: apply.__code__.co_argcount]
        rotated: Tensor = apply(x, x, cos, sin)[0] if parameters[1] == "k" else apply(x, cos, sin)
        return rotated


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
    norms = {which: _first(attn, names) for which, names in _NORMS.items()}
    cap = getattr(attn, "attn_logit_softcapping", None)
    return AttentionForm(attn, before, mlp, norms, made != heads, has_rope, None if cap is None else float(cap))


def _first(owner: Any, names: tuple[str, ...]) -> nn.Module | None:
    """The first of these submodules that there is."""
    found = (getattr(owner, name, None) for name in names)
    return next((part for part in found if isinstance(part, nn.Module)), None)
