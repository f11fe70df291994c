"""Classes that look as if they could be carried and cannot, with the reason. A class is a row."""

from __future__ import annotations

_WINDOWS = "its windows of attention need the whole grid of patches"
_STAGES = "its stages pool the grid of patches"
_MAPS = "its blocks convolve maps, so that the whole grid of patches has to stay"
_TABLE = "its relative position bias is a fixed table over all patches"

_TIMM: dict[str, str] = {
    # a bias over all pairs of patches that the attention adds itself, where nothing can be gathered for those left
    "beit:Beit": _TABLE,
    "vision_transformer_relpos:VisionTransformerRelPos": _TABLE,
    "levit:Levit": f"{_TABLE}, and its stages pool the grid",
    "levit:LevitDistilled": f"{_TABLE}, and its stages pool the grid",
    "convit:ConVit": "its gated attention weighs every pair of patches by their places in the whole grid",
    # windows
    "swin_transformer:SwinTransformer": "its shifted windows need the whole grid of patches",
    "swin_transformer_v2:SwinTransformerV2": "its shifted windows need the whole grid of patches",
    "swin_transformer_v2_cr:SwinTransformerV2Cr": "its shifted windows need the whole grid of patches",
    "vision_transformer_sam:VisionTransformerSAM": "its windowed attention and its neck need the whole grid of patches",
    "hieradet_sam2:HieraDet": f"{_WINDOWS}, and its stages pool it",
    "twins:Twins": f"{_WINDOWS}, and its keys are strided over it",
    "davit:DaVit": f"{_WINDOWS}, and its other half runs over channels",
    "gcvit:GlobalContextVit": _WINDOWS,
    "tiny_vit:TinyVit": _WINDOWS,
    "maxxvit:MaxxVit": "its convolutions and its attention over windows and grids need the whole grid of patches",
    "nest:Nest": "its attention runs inside blocks of the grid, which its levels join",
    "volo:VOLO": "its outlook attention looks at neighbours in the grid, and its stages pool it",
    # stages
    "hiera:Hiera": _STAGES,
    "mvitv2:MultiScaleVit": "its attention pools queries and keys over the grid of patches",
    "pit:PoolingVisionTransformer": _STAGES,
    "pvt_v2:PyramidVisionTransformerV2": "its keys are strided over the grid of patches, and its MLPs convolve it",
    "coat:CoaT": "its position encodings convolve the grid of patches",
    # attention of another form
    "cait:Cait": "its talking heads and its class attention take no bias",
    "xcit:Xcit": "its attention runs over channels and its convolutions need the grid",
    "crossvit:CrossVit": "its blocks run rows of two sizes of patches at once, which exchange class tokens",
    "tnt:TNT": "its blocks attend to the pixels of every patch beside the patches",
    "focalnet:FocalNet": "it has no attention: focal modulation convolves the grid of patches",
    "mlp_mixer:MlpMixer": "it has no attention: its weights mix patches by their places",
    "sequencer:Sequencer2d": "it has no attention: recurrent layers run along rows and columns of the grid",
    "efficientvim:EfficientViM": "it has no attention: its states run over the whole grid of patches",
    "efficientvim:EfficientViMDistilled": "it has no attention: its states run over the whole grid of patches",
    # maps
    "visformer:Visformer": _MAPS,
    "nextvit:NextViT": _MAPS,
    "fastvit:FastVit": _MAPS,
    "metaformer:MetaFormer": _MAPS,
    "edgenext:EdgeNeXt": _MAPS,
    "efficientformer:EfficientFormer": _MAPS,
    "efficientformer_v2:EfficientFormerV2": _MAPS,
    "efficientvit_mit:EfficientVit": _MAPS,
    "efficientvit_mit:EfficientVitLarge": _MAPS,
    "efficientvit_msra:EfficientVitMsra": _MAPS,
    "iformer:IFormer": _MAPS,
    "lowformer:LowFormer": _MAPS,
    "shvit:SHViT": _MAPS,
    "swiftformer:SwiftFormer": _MAPS,
    # towers of language models, which timm has with the projector behind them
    "gemma4_vit:Gemma4VitEncoder": "its pooler joins squares of patches of the whole grid",
    "gemma4_vit:Gemma4VitClassifier": "its encoder's pooler joins squares of patches of the whole grid",
    "qwen3_vit:Qwen3VitEncoder": "its merger joins squares of patches of the whole grid",
    "qwen3_vit:Qwen3VitClassifier": "no row is written for an encoder of which a merger of squares may be part",
    "deepseek_vit:DeepseekVitEncoder": "its aligner joins squares of patches of the whole grid",
    "deepseek_vit:DeepseekVitClassifier": "no row is written for an encoder of which an aligner of squares may be part",
}
"""By module and class below ``timm.models``."""


def _keyed(where: str) -> tuple[str, str]:
    module, _, name = where.partition(":")
    return f"timm.models.{module}", name


REFUSED: dict[tuple[str, str], str] = {
    **{_keyed(where): why for where, why in _TIMM.items()},
    ("torch.nn.parallel.data_parallel", "DataParallel"): (
        "its replicas share hooks across threads; use one process a device"
    ),
}
"""By module and qualified name of the class."""
