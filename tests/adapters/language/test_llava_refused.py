"""Caches, masks and sites that do not fit LLaVA, what is said of them, and what a failure leaves behind."""

from __future__ import annotations

import warnings

import pytest
import torch
from support import models
from support.checks import assert_differs, assert_same, hooks
from support.hosts_of import cache_of, with_cache
from support.llava_by_oracle import BOTH, CUTS, generated, llava
from support.models import Batch

import vlmtok
from vlmtok import Site
from vlmtok.errors import CacheError, MissingSignal, PassError, SiteError


def test_caches_of_others_are_refused():
    model, batch = llava(), Batch.of("^3I5")
    more = {"input_ids": models.prompt("3")[None]}
    with torch.no_grad():
        with vlmtok.compress(model, CUTS["boundary renumbered"]):
            cache = cache_of(model(**batch.inputs(), use_cache=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its hooks have nothing to do
            with (
                vlmtok.compress(model, CUTS["boundary kept"]),
                pytest.raises(CacheError, match="another compression"),
            ):
                model(**more, **with_cache(model, cache))
        with vlmtok.compress(model, CUTS["boundary renumbered"]) as run:
            cache = cache_of(model(**batch.inputs(), use_cache=True))
            with run.paused():
                model(**more, **with_cache(model, cache))
            with pytest.raises(CacheError, match="paused"):
                model(**more, **with_cache(model, cache))
            cache = cache_of(model(**batch.inputs(), use_cache=True))
            cache.batch_repeat_interleave(2)
            with pytest.raises(CacheError, match=r"1 rows.*2"):
                model(input_ids=models.prompt("3").expand(2, -1), **with_cache(model, cache))
            two = Batch.of("^3I5", "^3I5", seed=2)
            cache = cache_of(model(**two.inputs(), use_cache=True))
            cache.batch_select_indices(torch.tensor([1]))
            with pytest.raises(CacheError, match=r"2 rows.*1"):
                model(**more, **with_cache(model, cache))


def test_a_cache_that_was_reset_starts_anew():
    from transformers import DynamicCache

    model, batch = llava(), Batch.of("^3I5")
    with torch.no_grad(), vlmtok.compress(model, BOTH):
        wanted = model(**batch.inputs(), use_cache=True).logits
        cache = DynamicCache(config=model.config.text_config)
        for _ in range(2):
            assert_same(model(**batch.inputs(), **with_cache(model, cache)).logits, wanted)
            cache.reset()


def test_static_caches_and_dense_masks_are_refused():
    from transformers import StaticCache

    model, batch = llava(), Batch.of("^3I5")
    length = len(batch.rows[0])
    bare = generated(model, batch)[1]
    with vlmtok.compress(model, CUTS["boundary renumbered"]):
        with pytest.raises(CacheError, match=r"(?i)static|4-D|2-D"):
            model.generate(**batch.inputs(), max_new_tokens=2, cache_implementation="static")
        static = StaticCache(config=model.config.text_config, max_cache_len=64)
        with torch.no_grad(), pytest.raises(CacheError, match="StaticCache"):
            model(**batch.inputs(), **with_cache(model, static))
        dense = torch.zeros(1, 1, length, length)
        given = {**batch.inputs(), "attention_mask": dense}
        with torch.no_grad(), pytest.raises(CacheError, match="4-D"):
            model(**given)
        good = generated(model, batch)[1]
    assert_differs(good, bare)
    assert_same(generated(model, batch)[1], bare)


def test_what_cannot_fit_is_said():
    model, batch = llava(), Batch.of("^3I5")
    with vlmtok.compress(model, "pitome:ratio=0.8"), pytest.raises(PassError, match="feature layer"), torch.no_grad():
        model(**batch.inputs(), vision_feature_layer=-3)
    with pytest.raises(SiteError, match=r"stage 'text', which .* does not offer"):
        vlmtok.compress(model, Unknown())
    with pytest.raises(MissingSignal, match="has not run"):
        vlmtok.compress(model, Early())
    assert not hooks(model)


class Unknown(vlmtok.Random):
    def sites(self, layout):
        return [Site("text", 0)]


class Early(vlmtok.Random):
    def sites(self, layout):
        return [Site("decoder", 2, "end", ("text_attention@decoder:4",))]


def test_an_exception_while_pictures_are_encoded_leaves_nothing_behind():
    """The pictures of a call that failed must not be taken for those of the next one."""
    model, batch = llava(), Batch.of("^3I5")
    other = Batch.of("^2I1I4", seed=3)
    with torch.no_grad(), vlmtok.compress(model, CUTS["everything"]):
        good = model(**other.inputs()).logits
        text = model(**Batch.of("6").inputs()).logits

        def boom(*_):
            raise RuntimeError("made to fail")

        for victim in (model.model.multi_modal_projector, model.model.language_model.layers[3]):
            handle = victim.register_forward_hook(boom)
            with pytest.raises(RuntimeError, match="made to fail"):
                model(**batch.inputs())
            handle.remove()
            embeds = model.get_input_embeddings()(Batch.of("6").rows[0][None])
            direct = model.model.language_model(inputs_embeds=embeds).last_hidden_state
            assert_same(model.lm_head(direct), text, "the language model called by itself")
            assert_same(model(**other.inputs()).logits, good)
        # Too few placeholders: the host refuses, and goes on.
        wrong = {**batch.inputs(), "input_ids": batch.rows[0][None, :-10]}
        wrong["attention_mask"] = torch.ones_like(wrong["input_ids"])
        with pytest.raises((ValueError, RuntimeError, CacheError)):
            model(**wrong)
        assert_same(model(**other.inputs()).logits, good)
