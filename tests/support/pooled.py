"""Models whose heads read a mean over a tower's tokens, and what the modules around such a pool see."""

from __future__ import annotations

import functools

import torch
from torch import nn

from vlmtok.lab.tiny import towers


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


def head_of(row, model, vector, pictures):
    """What a model gives for another vector in its head."""
    handle = row.reader(model).register_forward_pre_hook(lambda module, args: (vector, *args[1:]))
    try:
        return row.run(model, pictures)
    finally:
        handle.remove()
