"""Heads that pool a tower's tokens: a merged one counts there by its size, as an explicit computation has it."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.checks import assert_differs, assert_equal
from support.merging_by_hand import golden
from torch import nn

import vlmtok
from vlmtok.errors import ParameterError, PassError, UnsupportedModel, VlmtokWarning
from vlmtok.lab.tiny import towers

METHODS = ("tome:r=6", "pitome:ratio=0.7", "crossget:rv=5:guidance=none", "tca:reservoir_size=0:ratio=0.6")


def hf(kind):
    import transformers as tf

    torch.manual_seed(0)
    if kind == "Dinov2ForImageClassification":
        sizes = {key: value for key, value in towers.SIZES.items() if key != "intermediate_size"}
        config = tf.Dinov2Config(**sizes, layerscale_value=0.5, num_labels=towers.CLASSES)
    else:
        family = kind.removesuffix("ForImageClassification")
        text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = getattr(tf, f"{family}Config")(vision_config=towers.SIZES, text_config=text, num_labels=towers.CLASSES)
    return towers.randomize(getattr(tf, kind)(config))


def open_clip_model(**vision):
    import open_clip

    torch.manual_seed(0)
    return towers.randomize(
        open_clip.CLIP(embed_dim=32, vision_cfg={**towers._VISION, **vision}, text_cfg=towers._TEXT)
    )


def open_clip_trunk(pool, name="vit_tiny_patch16_224"):
    """A dual encoder around a trunk of timm, which pools."""
    import open_clip
    import timm

    torch.manual_seed(0)
    tower = {"timm_model_name": name, "image_size": 224, "timm_pool": pool, "timm_proj": "linear"}
    made = open_clip.CustomTextCLIP(embed_dim=32, vision_cfg=tower, text_cfg=towers._TEXT)
    width = {"embed_dim": 32, "num_heads": 4, "depth": 4, "img_size": towers.SIDE, "patch_size": towers.PATCH}
    made.visual.trunk = timm.create_model(name, pretrained=False, num_classes=0, global_pool=pool, **width)
    made.visual.head = nn.Sequential(nn.Linear(32, 32, bias=False))
    return towers.randomize(made)


class Pooled:
    """A model whose head reads a mean.

    Attributes:
        build: makes it.
        run: what its user gets.
        tokens: the module whose output is pooled, from the model, and
        reader: the one that reads the vector.
        skip: tokens in front that the mean leaves out.
        form: what is made of the mean and all tokens.
    """

    def __init__(self, build, run, tokens, reader, skip, form=lambda mean, tokens: mean):
        self.build, self.run, self.tokens, self.reader, self.skip, self.form = build, run, tokens, reader, skip, form


def timm_row(name, skip, form=lambda mean, tokens: mean, **changes):
    build = functools.partial(towers.timm_vit, name, **changes)
    return Pooled(build, lambda m, x: m(x), lambda m: m.norm, lambda m: m.fc_norm, skip, form)


def hf_row(kind, part, skip, form=lambda mean, tokens: mean):
    run = lambda m, x: m(pixel_values=x).logits  # noqa: E731
    return Pooled(functools.partial(hf, kind), run, lambda m: getattr(m, part), lambda m: m.classifier, skip, form)


MEANS = {
    "timm MAE": timm_row("vit_base_patch16_224.mae", 1, global_pool="avg"),
    "timm mean behind the norm": timm_row("vit_tiny_patch16_224", 1, global_pool="avg", fc_norm=False),
    "timm mean and maximum": timm_row(
        "vit_tiny_patch16_224", 1, lambda mean, tokens: 0.5 * (mean + tokens[1:].amax(0)), global_pool="avgmax"
    ),
    "timm mean with the class token": timm_row("vit_tiny_patch16_224", 0, global_pool="avg", pool_include_prefix=True),
    "timm registers": timm_row("vit_small_patch14_reg4_dinov2", 5, global_pool="avg"),
    "timm EVA-02": timm_row("eva02_base_patch14_224", 1, global_pool="avg"),
    "open_clip CLIPA": Pooled(
        functools.partial(open_clip_model, pool_type="avg", final_ln_after_pool=True),
        lambda m, x: m.encode_image(x),
        lambda m: m.visual.transformer,
        lambda m: m.visual.ln_post,
        1,
    ),
    "open_clip timm trunk": Pooled(
        functools.partial(open_clip_trunk, "avg"),
        lambda m, x: m.encode_image(x),
        lambda m: m.visual.trunk.norm,
        lambda m: m.visual.trunk.fc_norm,
        1,
    ),
    "HF CLIP classifier": hf_row("CLIPForImageClassification", "vision_model", 1),
    "HF SigLIP classifier": hf_row("SiglipForImageClassification", "vision_model", 0),
    "HF DINOv2 classifier": hf_row(
        "Dinov2ForImageClassification", "dinov2", 1, lambda mean, tokens: torch.cat([tokens[0], mean])
    ),
}


@functools.cache
def model_of(name):
    return MEANS[name].build()


class Seen:
    """What the modules around a pool see, by hooks that stand there before vlmtok's.

    The hook on the reader runs before ours, so that it notes the host's own vector.
    """

    def __init__(self, row, model):
        self.tokens, self.vector = None, None
        self.handles = [
            row.tokens(model).register_forward_hook(self.take),
            row.reader(model).register_forward_pre_hook(self.give),
        ]

    def take(self, module, args, output):
        self.tokens = output if isinstance(output, torch.Tensor) else output.last_hidden_state

    def give(self, module, args):
        self.vector = args[0]

    def __enter__(self):
        return self

    def __exit__(self, *args):
        for handle in self.handles:
            handle.remove()


def sizes_by_hand(run, picture, prefix, length):
    """How many patches each token of a row stands for, counted in the source map."""
    slots = run._attachment.drivers["vision"].current.sequence.source[picture].tolist()
    return torch.tensor([1.0] * prefix + [float(slots.count(slot)) for slot in range(length - prefix)]).double()


def by_hand(row, tokens, size):
    """The vector for one picture [L, C], token by token."""
    total, mean = float(size[row.skip :].sum()), torch.zeros(tokens.shape[1]).double()
    for token, count in zip(tokens[row.skip :].double(), size[row.skip :]):
        mean += token * float(count) / total
    return row.form(mean, tokens.double()).float()


def prefix_of(run):
    return run.layout.stages["vision"].num_prefix


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MEANS)
def test_a_mean_weighs_tokens_by_size(name, method):
    row, model = MEANS[name], model_of(name)
    pictures = towers.pictures(2)
    with torch.no_grad(), Seen(row, model) as seen:
        bare = row.run(model, pictures)
        with vlmtok.compress(model, method, trace=True) as run:
            found = row.run(model, pictures)
            tokens, vector, vectors = seen.tokens, seen.vector, []
            for i in range(2):
                size = sizes_by_hand(run, i, prefix_of(run), tokens.shape[1])
                assert size.max() > 1, "nothing merged"
                vectors.append(by_hand(row, tokens[i], size))
        wanted = head_of(row, model, torch.stack(vectors), pictures)
        plain = head_of(row, model, vector, pictures)
        with vlmtok.compress(model, f"{method}:pooling=plain"):
            unweighted = row.run(model, pictures)
        assert torch.equal(row.run(model, pictures), bare), "removed"
    assert_equal(found, wanted)
    assert_equal(unweighted, plain)
    assert_differs(found, plain)


def head_of(row, model, vector, pictures):
    """What a model gives for another vector in its head."""
    handle = row.reader(model).register_forward_pre_hook(lambda module, args: (vector, *args[1:]))
    try:
        return row.run(model, pictures)
    finally:
        handle.remove()


# ---------------------------------------------------------------------- attention pools
def attention_by_hand(attn, queries, tokens, size):
    """`nn.MultiheadAttention` over tokens `[B, L, C]`, each written out as often as it has size."""
    rows = []
    for row, counts in zip(tokens, size):
        copies = torch.cat([token.expand(int(count), -1) for token, count in zip(row, counts)])
        rows.append(attn(queries, copies[None], copies[None], need_weights=False)[0])
    return torch.cat(rows)


def siglip_pool(model, tokens, size):
    head = model.head
    pooled = attention_by_hand(head.attention, head.probe, tokens, size)
    return (pooled + head.mlp(head.layernorm(pooled)))[:, 0]


def map_pool(model, tokens, size):
    """timm's, with each token written out as often as it has size."""
    rows = []
    for row, counts in zip(tokens, size):
        copies = torch.cat([token.expand(int(count), -1) for token, count in zip(row, counts)])
        rows.append(model.head(model.fc_norm(model.attn_pool(copies[None]))))
    return torch.cat(rows)


def coca_pool(model, tokens, size):
    visual = model.visual
    pool = visual.attn_pool
    pooled = attention_by_hand(pool.attn, pool.ln_q(pool.query)[None], pool.ln_k(tokens), size)
    return nn.functional.normalize(visual.ln_post(pooled)[:, 0] @ visual.proj, dim=-1)


ATTENTION = {
    "timm SigLIP": (lambda: towers.TOWERS["timm SigLIP"].build(), lambda m, x: m(x), lambda m: m.norm, map_pool),
    "timm EVA map": (
        lambda: towers.timm_vit("eva02_base_patch14_224", global_pool="map"),
        lambda m, x: m(x),
        lambda m: m.norm,
        map_pool,
    ),
    "HF SigLIP vision": (
        lambda: towers.TOWERS["HF SigLIP vision"].build(),
        lambda m, x: m(pixel_values=x).pooler_output,
        lambda m: m.post_layernorm,
        siglip_pool,
    ),
    "open_clip CoCa": (
        lambda: towers.TOWERS["open_clip CoCa"].build(),
        lambda m, x: m.encode_image(x),
        lambda m: m.visual.transformer,
        coca_pool,
    ),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_an_attention_pool_takes_sizes_where_it_is_asked_to(name):
    """Equal to a pool that reads each token as often as it has size; by default the pool knows nothing of sizes."""
    build, run_model, read, by_copies = ATTENTION[name]
    model, pictures, seen = build(), towers.pictures(2), []
    handle = read(model).register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        with vlmtok.compress(model, "tome:r=6:pooling=attention", trace=True) as run:
            found = run_model(model, pictures)
            sizes = [sizes_by_hand(run, i, prefix_of(run), seen[-1].shape[1]) for i in range(2)]
        tokens = seen[-1]
        handle.remove()
        assert_equal(found, by_copies(model, tokens, sizes))
        with vlmtok.compress(model, "tome:r=6"):
            plain = run_model(model, pictures)
        assert_equal(plain, by_copies(model, tokens, [torch.ones(tokens.shape[1])] * 2))
    assert_differs(found, plain)


def test_parallel_attention_pools_take_sizes_and_the_second_of_a_cascade_does_not():
    pictures = towers.pictures(2)
    masks = []

    def note(module, args, kwargs, output):
        masks.append(kwargs.get("key_padding_mask") is not None)

    for kind, wanted in (("parallel", [True, True]), ("cascade", [True, False])):
        model = open_clip_model(attentional_pool=kind, attn_pooler_queries=3, attn_pooler_heads=2)
        for pool in (model.visual.attn_pool, model.visual.attn_pool_contrastive):
            pool.attn.register_forward_hook(note, with_kwargs=True)
        masks.clear()
        with torch.no_grad(), vlmtok.compress(model, "tome:r=6:pooling=attention"):
            model.encode_image(pictures)
        assert masks == wanted, kind


@pytest.mark.parametrize("name", ["timm ViT", "timm MAE average", "HF ViT classifier", "open_clip CLIP"])
def test_sizes_wanted_in_an_attention_pool_that_is_not_there(name):
    model = towers.TOWERS[name].build()
    with pytest.raises(UnsupportedModel, match="wants sizes in an attention pool, but this tower is read by none"):
        vlmtok.compress(model, "tome:r=2:pooling=attention")
    assert not list(vlmtok.core.hooks.hooks_of(model))


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


@pytest.mark.parametrize("changes", [{"global_pool": "prr"}, {}])
def test_a_pool_that_cannot_take_sizes_is_said(changes):
    """timm's refinement of patches takes no bias; a class with a pool of its own is not looked into."""
    model = towers.timm_vit("vit_tiny_patch16_224", **{"global_pool": "avg", **changes})
    if not changes:

        class Own(type(model)):
            def pool(self, x, pool_type=None):
                return x[:, 1:].median(1).values

        model.__class__ = Own
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


COMPILED = ("timm MAE", "open_clip CLIPA", "HF DINOv2 classifier")


@pytest.mark.filterwarnings("ignore:vlmtok.remove:vlmtok.errors.VlmtokWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_code_pools_as_eager_code_does(name, backend):
    torch._dynamo.reset()
    row, model, pictures = MEANS[name], model_of(name), towers.pictures(2)
    with torch.no_grad():
        with vlmtok.compress(model, "tome:r=6:pooling=plain"):
            plain = row.run(model, pictures)
        with vlmtok.compress(model, "tome:r=6"):
            wanted = row.run(model, pictures)
            call = torch.compile(lambda x: row.run(model, x), fullgraph=True, backend=backend)
            assert_equal(call(pictures), wanted)
            assert_equal(call(pictures.flip(0)), wanted.flip(0))
    torch._dynamo.reset()
    assert_differs(wanted, plain)


@pytest.mark.filterwarnings("ignore:vlmtok.remove:vlmtok.errors.VlmtokWarning")
def test_compiled_features_and_a_head_called_by_itself(mae):
    """In one graph, and with the head behind it as eager code."""
    torch._dynamo.reset()
    pictures = towers.pictures(2)
    with torch.no_grad(), vlmtok.compress(mae, "tome:r=6"):
        wanted = mae(pictures)
        both = torch.compile(lambda x: mae.forward_head(mae.forward_features(x)), fullgraph=True, backend="eager")
        assert_equal(both(pictures), wanted)
        features = torch.compile(mae.forward_features, backend="aot_eager")
        assert_equal(mae.forward_head(features(pictures)), wanted)
    torch._dynamo.reset()


def test_an_attention_pool_with_sizes_compiles():
    torch._dynamo.reset()
    build, run_model, *_ = ATTENTION["timm SigLIP"]
    model, pictures = build(), towers.pictures(2)
    run = vlmtok.compress(model, "tome:r=6:pooling=attention")
    with torch.no_grad():
        wanted = run_model(model, pictures)
        call = torch.compile(lambda x: run_model(model, x), fullgraph=True, backend="eager")
        assert_equal(call(pictures), wanted)
    with pytest.warns(VlmtokWarning, match="compiled code"):
        run.remove()
    torch._dynamo.reset()


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
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for pooling in ("size", "plain"):
        with torch.no_grad(), vlmtok.compress(mae, f"tome:r=6:pooling={pooling}") as run:
            with FlopCounterMode(display=False) as counter:
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


# ---------------------------------------------------------------------- the release
@pytest.mark.parametrize(
    "variant, method", [("pitome_mae_090", "pitome:preset=mae:ratio=0.9"), ("tome_r7", "tome:r=7")]
)
def test_the_released_mae_patch(variant, method):
    """Blocks, sizes and weights are those of the released code's run; its MAE patch pools them as
    ``sum(x * size)[1:] / patches``, in front of `fc_norm`."""
    from timm.models.vision_transformer import VisionTransformer

    data = golden("e2e_micro_vit.npz")
    model = VisionTransformer(
        img_size=64,
        patch_size=8,
        embed_dim=48,
        depth=6,
        num_heads=3,
        num_classes=10,
        mlp_ratio=2.0,
        global_pool="avg",
    )
    state = {key[2:]: value for key, value in data.items() if key.startswith("w.")}
    # An MAE has its norm behind the pool.
    model.load_state_dict(
        {key.replace("norm.", "fc_norm.") if key[:5] == "norm." else key: v for key, v in state.items()}
    )
    model.eval()
    tokens, size = golden("e2e_micro_mae.npz")[f"{variant}.block5"], data[f"{variant}.size"]
    pooled = (tokens * size)[:, 1:].sum(1) / 64
    with torch.no_grad():
        head = nn.functional.layer_norm(pooled, (48,), state["norm.weight"], state["norm.bias"], model.fc_norm.eps)
        wanted = nn.functional.linear(head, state["head.weight"], state["head.bias"])
        plain = model.head(model.fc_norm(tokens[:, 1:].mean(1)))
        with vlmtok.compress(model, method):
            found = model(data["x"])
        with vlmtok.compress(model, f"{method}:pooling=plain"):
            unweighted = model(data["x"])
    assert_equal(found, wanted, 1e-4)
    assert_equal(unweighted, plain, 1e-4)
    assert_differs(found, unweighted)
