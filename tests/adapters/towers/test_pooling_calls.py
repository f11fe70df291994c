"""Pools of merged tokens, whoever calls the head and however: what is held, what stays as it was, compiled code."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import referee
from support.checks import assert_differs, assert_equal
from support.pooled import MEANS, Seen, by_hand, head_of, model_of, sizes_by_hand
from torch import nn

import vlmtok
from vlmtok.errors import ParameterError, PassError, VlmtokWarning
from vlmtok.lab.tiny import towers


# ---------------------------------------------------------------------- heads called by themselves
@pytest.fixture
def mae():
    return towers.TOWERS["timm MAE average"].build()


def test_the_head_knows_the_pass_of_the_tokens_that_it_is_given(mae):
    """Features of several calls, in any order, nested or kept, together with whole calls in between."""
    one, other = towers.pictures(2), towers.pictures(2, seed=7)
    with torch.no_grad(), vlmtok.compress(mae, "tome:r=6"):
        wanted, wanted_other = mae(one), mae(other)
        assert_equal(mae.forward_head(mae.forward_features(one)), wanted)
        first, second = mae.forward_features(one), mae.forward_features(other)
        assert_equal(mae.forward_head(first), wanted)
        mae(other)
        assert_equal(mae.forward_head(second), wanted_other)
        assert_equal(mae.forward_head(first), wanted)
        embedding = mae.forward_head(first, pre_logits=True)
        assert_equal(mae.head(embedding), wanted)
        final, rows = mae.forward_intermediates(one, norm=True, output_fmt="NLC")
        assert_equal(mae.forward_head(final), wanted)
    assert_differs(wanted, wanted_other)


def test_tokens_that_no_pass_left_are_pooled_as_they_are_and_it_says_so(mae):
    pictures = towers.pictures(2)
    with torch.no_grad():
        bare = mae.forward_features(pictures)
        wanted = mae.forward_head(bare)
        with vlmtok.compress(mae, "tome:r=6"):
            mae(pictures)
            with pytest.warns(VlmtokWarning, match="no pass of this compression left in this thread"):
                found = mae.forward_head(bare)
    assert torch.equal(found, wanted)


def test_features_alone_are_those_of_the_shorter_row_and_nothing_holds_them(mae):
    pictures = towers.pictures(2)
    with torch.no_grad(), vlmtok.compress(mae, "tome:r=6"):
        weighted = mae.forward_features(pictures)
        mae(towers.pictures(3, seed=7))
        left = weakref.ref(mae.forward_features(pictures))
        gc.collect()
        assert left() is None
        wanted = mae(pictures)
        assert_equal(mae.forward_head(weighted), wanted)
    with torch.no_grad(), vlmtok.compress(mae, "tome:r=6:pooling=plain"):
        assert torch.equal(mae.forward_features(pictures), weighted)


def test_an_exception_between_tower_and_head_leaves_nothing(mae):
    pictures, other = towers.pictures(2), towers.pictures(2, seed=7)
    with torch.no_grad(), vlmtok.compress(mae, "tome:r=6"):
        wanted, features = mae(pictures), mae.forward_features(pictures)

        def fail(module, args):
            raise RuntimeError("of the user")

        handle = mae.fc_norm.register_forward_pre_hook(fail, prepend=True)
        with pytest.raises(RuntimeError, match="of the user"):
            mae(other)
        handle.remove()
        assert_equal(mae.forward_head(features), wanted)
        assert_equal(mae(pictures), wanted)


def test_a_part_of_a_classifier_called_by_itself_is_pooled_by_whoever_calls_it():
    model, pictures = model_of("HF SigLIP classifier"), towers.pictures(2)
    with torch.no_grad(), vlmtok.compress(model, "tome:r=6"):
        tokens = model.vision_model(pixel_values=pictures).last_hidden_state
        mean = tokens.mean(1)
        found = model.classifier(mean)
        whole = model(pixel_values=pictures).logits
    assert torch.equal(found, nn.functional.linear(mean, model.classifier.weight, model.classifier.bias))
    assert_differs(found, whole)


def test_a_pool_that_was_changed_under_a_compression_is_refused(mae):
    with torch.no_grad(), vlmtok.compress(mae, "tome:r=6"):
        mae(towers.pictures(1))
        mae.global_pool = "token"
        with pytest.raises(PassError, match="pooling of this VisionTransformer was changed"):
            mae(towers.pictures(1))
    mae.global_pool = "avg"


# ---------------------------------------------------------------------- what stays as it was
@pytest.mark.parametrize("method", ["random:keep=0.5:stage=vision:layer=1", "tome:r=[0;0;0;0]"])
@pytest.mark.parametrize("name", ["timm MAE", "HF DINOv2 classifier"])
def test_nothing_changes_where_nothing_merged(name, method):
    """Pruned rows have tokens of size 1: the host's own mean, bit for bit."""
    row, model, pictures = MEANS[name], model_of(name), towers.pictures(2)
    if method.startswith("tome"):
        method = Idle()
    with torch.no_grad(), Seen(row, model) as seen:
        with vlmtok.compress(model, method):
            found = row.run(model, pictures)
        vector = seen.vector
        wanted = head_of(row, model, vector, pictures)
    assert torch.equal(found, wanted)


class Idle(vlmtok.ToMe):
    """Acts in every layer and merges nothing."""

    def reduce(self, view):
        return None


def test_a_class_token_gets_no_hook_around_its_head():
    model = towers.TOWERS["timm ViT"].build()
    with vlmtok.compress(model, "tome:r=2"):
        where = {module for module, *_ in vlmtok.core.hooks.hooks_of(model)}
        model(towers.pictures(1))
    assert not where & {model, model.norm, model.fc_norm}


def test_methods_that_disagree_are_refused(mae):
    with pytest.raises(ParameterError, match=r"tome:r=2 and pitome:pooling=plain wish pooling='size' and 'plain'"):
        vlmtok.compress(mae, ["tome:r=2", "pitome:pooling=plain"])
    with pytest.raises(ParameterError, match="pooling='mean' is not possible; one of 'size', 'plain', 'attention'"):
        vlmtok.compress(mae, "tome:pooling=mean")
    assert not list(vlmtok.core.hooks.hooks_of(mae))
    with torch.no_grad(), vlmtok.compress(mae, "tome:r=6:pooling=plain+random:keep=0.9:stage=vision:layer=2") as run:
        mae(towers.pictures(1))
        assert "pooling=plain" in str(run.report())


@pytest.mark.parametrize("kind", ["avg", "map"])
def test_a_pool_that_cannot_take_sizes_is_said(kind):
    """A class with a pool of its own, and an attention pool of another class, are not looked into."""
    model = towers.timm_vit("vit_tiny_patch16_224", global_pool=kind)

    class Own(type(model)):
        def pool(self, x, pool_type=None):
            return x[:, 1:].median(1).values

    if kind == "avg":
        model.__class__ = Own
    else:
        kind = type(model.attn_pool)
        own = {"forward": lambda self, *given, **named: kind.forward(self, *given, **named)}
        model.attn_pool.__class__ = type("OwnAttention", (kind,), own)
    with torch.no_grad(), vlmtok.compress(model, "tome:r=6") as run:
        found = model(towers.pictures(2))
        assert_equal(found, model.forward_head(model.forward_features(towers.pictures(2))))
        assert any("merged tokens count once each in the head" in note for note in run.report().notes)


# ---------------------------------------------------------------------- gradients, compiled code, dtypes, counts
def test_gradients_equal_those_of_the_explicit_computation(mae):
    pictures = towers.pictures(2)
    with vlmtok.compress(mae, "tome:r=6", trace=True) as run:
        tokens = []
        handle = mae.norm.register_forward_hook(lambda module, args, output: tokens.append(output))
        mae(pictures).square().sum().backward()
        found = [p.grad.clone() for p in mae.parameters() if p.grad is not None]
        mae.zero_grad()
        mae(pictures)
        handle.remove()
        weights = torch.stack([sizes_by_hand(run, i, 1, tokens[-1].shape[1]) for i in range(2)])[:, 1:].float()
        mean = torch.einsum("bn,bnc->bc", weights / weights.sum(1, keepdim=True), tokens[-1][:, 1:])
        head = nn.functional.layer_norm(mean, mean.shape[1:], mae.fc_norm.weight, mae.fc_norm.bias, mae.fc_norm.eps)
        nn.functional.linear(head, mae.head.weight, mae.head.bias).square().sum().backward()
    wanted = [p.grad.clone() for p in mae.parameters() if p.grad is not None]
    assert len(found) == len(wanted) > 40
    for one, other in zip(found, wanted):
        assert_equal(one, other, within=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_through_a_checkpoint_of_the_whole_model(mae, reentrant):
    from torch.utils.checkpoint import checkpoint

    pictures = towers.pictures(2).requires_grad_()
    with vlmtok.compress(mae, "tome:r=6"):
        grads = []
        for call in (mae, lambda x: checkpoint(mae, x, use_reentrant=reentrant)):
            mae.zero_grad()
            call(pictures).square().sum().backward()
            grads.append([p.grad.clone() for p in mae.parameters() if p.grad is not None])
    for one, other in zip(*grads):
        assert_equal(one, other, within=1e-4)


ONCE = "tome:r=[0;0;8;0]"
"""Merges in one layer, so that there is little to compile."""


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:vlmtok.remove:vlmtok.errors.VlmtokWarning")
@pytest.mark.parametrize(
    "name, backend", [("timm MAE", "aot_eager"), ("open_clip CLIPA", "eager"), ("HF DINOv2 classifier", "eager")]
)
def test_compiled_code_pools_as_eager_code_does(name, backend, fresh):
    row, model, pictures = MEANS[name], model_of(name), towers.pictures(2)
    with torch.no_grad():
        with vlmtok.compress(model, f"{ONCE}:pooling=plain"):
            plain = row.run(model, pictures)
        with vlmtok.compress(model, ONCE):
            wanted = row.run(model, pictures)
            call = torch.compile(lambda x: row.run(model, x), fullgraph=True, backend=backend)
            assert_equal(call(pictures), wanted)
            assert_equal(call(pictures.flip(0)), wanted.flip(0))
    assert_differs(wanted, plain)


@pytest.mark.filterwarnings("ignore:vlmtok.remove:vlmtok.errors.VlmtokWarning")
def test_compiled_features_and_a_head_called_by_itself(mae, fresh):
    """In one graph, and with the head behind it as eager code."""
    pictures = towers.pictures(2)
    with torch.no_grad(), vlmtok.compress(mae, ONCE):
        wanted = mae(pictures)
        both = torch.compile(lambda x: mae.forward_head(mae.forward_features(x)), fullgraph=True, backend="eager")
        assert_equal(both(pictures), wanted)
        features = torch.compile(mae.forward_features, backend="eager")
        assert_equal(mae.forward_head(features(pictures)), wanted)


@pytest.mark.filterwarnings("ignore:vlmtok.remove:vlmtok.errors.VlmtokWarning")
def test_an_attention_pool_with_sizes_compiles(fresh):
    model, pictures = towers.TOWERS["timm SigLIP"].build(), towers.pictures(2)
    with torch.no_grad(), vlmtok.compress(model, f"{ONCE}:pooling=attention"):
        wanted = model(pictures)
        call = torch.compile(lambda x: model(x), fullgraph=True, backend="eager")
        assert_equal(call(pictures), wanted)


def test_half_precision_sums_in_fp32():
    model, pictures = towers.TOWERS["timm MAE average"].build().bfloat16(), towers.pictures(2).bfloat16()
    row, seen = MEANS["timm MAE"], None
    with torch.no_grad(), vlmtok.compress(model, "tome:r=6", trace=True) as run:
        vectors = []
        model.fc_norm.register_forward_pre_hook(lambda module, args: vectors.append(args[0]))
        with Seen(row, model) as seen:
            model(pictures)
            model.forward_head(model.forward_features(pictures))
        for i in range(2):
            size = sizes_by_hand(run, i, 1, seen.tokens.shape[1])
            exact = by_hand(row, seen.tokens[i].float(), size)
            for vector in vectors:
                assert vector.dtype == torch.bfloat16 and torch.equal(vector[i], exact.bfloat16())


def test_no_product_is_added(mae):
    counts = []
    for pooling in ("size", "plain"):
        with torch.no_grad(), vlmtok.compress(mae, f"tome:r=6:pooling={pooling}") as run:
            with referee.counter() as counter:
                mae(towers.pictures(2))
            counts.append((counter.get_total_flops(), [(line.name, line.after) for line in run.report().lines]))
    assert counts[0] == counts[1]


def test_two_threads_pool_their_own_passes(mae):
    pictures = [towers.pictures(2, seed=seed) for seed in range(4)]
    with torch.no_grad(), vlmtok.compress(mae, "tome:r=6"):
        wanted = [mae(x) for x in pictures]

        def work(x):
            with torch.no_grad():
                return [mae.forward_head(mae.forward_features(x)) if turn % 2 else mae(x) for turn in range(6)]

        with ThreadPoolExecutor(2) as pool:
            for found, right in zip(pool.map(work, pictures), wanted):
                for one in found:
                    assert_equal(one, right)


def test_a_copy_pools_as_the_bare_model(mae):
    pictures = towers.pictures(2)
    with torch.no_grad():
        bare = mae(pictures)
        with vlmtok.compress(mae, "tome:r=6"):
            mae(pictures)
            twin = copy.deepcopy(mae)
            assert torch.equal(twin(pictures), bare)
            assert torch.equal(twin.forward_head(twin.forward_features(pictures)), bare)
