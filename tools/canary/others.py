"""Facts of timm and of open_clip, and of what all families of transformers share."""

from __future__ import annotations

from types import ModuleType

from vlmtok.adapters import account, host_objects, hosts
from vlmtok.adapters.language import checks as decoder_checks
from vlmtok.adapters.language import decoder, layers, masks
from vlmtok.adapters.towers import tower_account
from vlmtok.adapters.towers.open_clip_vit import MHA_BLOCK, OpenClip, OpenClipTimm, OpenClipVision, text_spec
from vlmtok.adapters.towers.timm_vit import TimmEva, TimmViT

from vlmtok.core import stream

from .auto import Chooser
from .classes import External, HostClass
from .facts import Findings, Questions, either
from .needs import ROLES, Read, file_reads, reads
from .shown import calls_of, strings
from .towers import block_facts, has_attributes

CACHE_READERS: tuple[ModuleType, ...] = (decoder, layers, decoder_checks, host_objects, masks, stream)
"""Files of ours that read a cache."""
EOS = ("text_eos_id", "eos_id")
TEXT_NAMES = (("text_pool_type", "pool_type"), EOS, ("attn_mask",), ("context_length",))
"""Attributes of a text tower of open_clip that are read with a default, under the names of either kind of tower."""


# ---------------------------------------------------------------------- transformers
def shared_facts(findings: Findings, chooser: Chooser) -> None:
    """Facts that no single family has: caches, generation, gradient checkpointing."""
    caches(findings.about("caches"), chooser)
    ask, module = findings.about("generate"), chooser.library.module("transformers.generation.utils")
    said = set() if module is None else strings(module.tree)
    known = [*ROLES["ENCODED"].names, hosts.IMAGE_KEY, hosts.CLIP_KEY]
    missing = [word for word in known if word not in said]
    ask.check(not missing, f"generate() does not encode pictures before its loop: it knows no {', '.join(missing)}")
    ask = findings.about("gradient checkpointing")
    layer = chooser.find("transformers.modeling_layers", "GradientCheckpointingLayer")
    if ask.check(layer is not None, "there is no GradientCheckpointingLayer"):
        assert layer is not None
        outside = not layer.has("__call__")
        ask.check(outside, "it wraps `__call__` of layers and not `forward`, so that their hooks run again in backward")


def caches(ask: Questions, chooser: Chooser) -> None:
    """A cache has what we read of it, and its methods take what we hand them."""
    cache, layer = (chooser.find("transformers.cache_utils", name) for name in ("Cache", "DynamicLayer"))
    top = chooser.library.module("transformers")
    ask.check(top is not None and '"Cache"' in top.text, "transformers gives out no `Cache`")
    if not ask.check(cache is not None and layer is not None, "there is no Cache or no DynamicLayer"):
        return
    assert cache is not None and layer is not None
    for read in file_reads(CACHE_READERS, "cache"):
        first, _, element = read.path.partition("[].")
        ask.check(cache.has(first), f"a cache has no `{first}`")
        ask.check(not element or layer.has(element), f"the `{first}` of a cache have no `{element}`")
    sizes, length = cache.signature("get_mask_sizes"), cache.signature("get_seq_length")
    fits = sizes is not None and sizes.names[1:] == ROLES["LAYER"].names
    ask.check(fits, "`get_mask_sizes` takes no count and layer")
    ask.check(length is not None and not length.required, "`get_seq_length` wants arguments")


# ---------------------------------------------------------------------- timm
def timm_facts(findings: Findings, chooser: Chooser) -> None:
    """Facts of timm's towers."""
    for adapter in (TimmViT, TimmEva):
        for module, name in adapter.targets:
            ask, cls = findings.about(name), chooser.find(module, name)
            if ask.check(cls is not None, f"{module} has no {name}"):
                assert cls is not None
                wanted = (*reads(TimmViT._spec, "model"), *reads(tower_account.of_timm, "trunk"))
                has_attributes(ask, cls, "the model", [*wanted, Read("cls_token"), Read("attn_pool")])
            for form in adapter.blocks:
                place, _, block_name = form.partition(":")
                block = chooser.find(place, block_name)
                if ask.check(block is not None, f"{place} has no {block_name}"):
                    assert block is not None
                    known = [kind for kind in block.made_of("attn") if isinstance(kind, HostClass)]
                    ask.check(known, "its blocks have no `attn` of a class that is known", block)
                    block_facts(ask, block, adapter.block, known)
            pool = chooser.find(module, "AttentionPoolLatent")
            if ask.check(pool is not None, f"{module} has no AttentionPoolLatent"):
                assert pool is not None
                has_attributes(ask, pool, "its pooling", [*reads(account.latent_pool, "pool"), Read("pos_embed")])


# ---------------------------------------------------------------------- open_clip
def open_clip_facts(findings: Findings, chooser: Chooser) -> None:
    """Facts of open_clip's towers and dual encoders."""
    wanted = {
        OpenClipVision: (*reads(OpenClipVision.tower, "model"), *reads(tower_account.of_open_clip_tower, "tower")),
        OpenClipTimm: (*reads(OpenClipTimm.__init__, "model"), *reads(tower_account.of_open_clip_timm, "outer")),
        OpenClip: reads(OpenClip.__init__, "model"),
    }
    for adapter, read in wanted.items():
        for module, name in adapter.targets:
            ask, cls = findings.about(name), chooser.find(module, name)
            if ask.check(cls is not None, f"{module} has no {name}"):
                assert cls is not None
                has_attributes(ask, cls, "the model", read)
                if adapter is OpenClipVision:
                    _blocks(ask, cls)
                elif adapter is OpenClip:
                    _text(ask, cls)


def _blocks(ask: Questions, tower: HostClass) -> None:
    holders = [kind for kind in tower.made_of("transformer") if isinstance(kind, HostClass)]
    ask.check(holders, "the tower has no `transformer` of a class that is known", tower)
    for holder in holders:
        has_attributes(ask, holder, "the tower's transformer", [Read("resblocks"), Read("batch_first"), Read("width")])
        kinds = [kind for kind in holder.made_of("resblocks") if isinstance(kind, HostClass)]
        plain = [kind for kind in kinds if External("nn.MultiheadAttention") in kind.made_of("attn")]
        ask.check(plain, "the tower has no blocks with nn.MultiheadAttention", holder)
        for block in plain:
            block_facts(ask, block, MHA_BLOCK, ())
            for call in calls_of(block, f"self.{MHA_BLOCK.attn}"):
                given = {keyword.arg for keyword in call.keywords}
                free = len(call.args) == 3 and not given & set(ROLES["KEY_BIAS"].names)
                ask.check(free, "its blocks do not call their attention with q, k and v alone by position", block)


def _text(ask: Questions, cls: HostClass) -> None:
    """The text tower, kept on the model itself or below `text`."""
    owners = [cls]
    if cls.has("text"):
        owners = [kind for kind in cls.made_of("text") if isinstance(kind, HostClass) and kind.has("ln_final")]
        ask.check(owners, "the `text` of the model is of no class with `ln_final`", cls)
    for owner in owners:
        has_attributes(ask, owner, "the text tower", reads(text_spec, "tower"))
        module = owner.module.library.module("open_clip.transformer")
        pools = set() if module is None else strings(module.tree)
        for names in TEXT_NAMES:
            if names == EOS and "eos" not in pools:
                continue  # no pooling reads it
            ask.check(any(map(owner.has, names)), f"the text tower has no {either(names)}", owner)
