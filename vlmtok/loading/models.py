"""Models by name, with weights or without data: `load`, `skeleton`, `configured`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ..errors import ParameterError
from ..guard import guarded
from ..sheet import Sheet, Shown
from ..tabular import Table
from . import names
from .devices import pick_device, pick_dtype
from .names import EMBEDDED, SHIPPED
from .problems import LoadError, check_listed, one_line_errors, quiet

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Loaded(Shown):
    """A model that is ready to look at pictures.

    Attributes:
        name: as the user typed it.
        model: in eval mode, on its device.
        processor: a transformers processor or image processor, or a transform from a PIL picture to `[3, H, W]`.
        language: whether it answers in words.
        trained: whether its weights are trained ones.
        pixels: towers: from a picture to `[1, 3, H, W]`.
        encode: towers: from `[B, 3, H, W]` to class scores or an embedding, `[B, F]`.
        labels: names of the classes where `encode` gives scores of known classes.
        words: dual encoders: from sentences to token ids `[T, L]`, which its text tower takes.
    """

    name: str
    model: nn.Module
    processor: Any
    language: bool
    trained: bool = True
    pixels: Callable[[Image.Image], Tensor] | None = None
    encode: Callable[[Tensor], Tensor] | None = None
    labels: Sequence[str] | None = None
    words: Callable[[Sequence[str]], Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.model.parameters()).dtype

    @property
    def parameters(self) -> int:
        """How many it has."""
        return sum(p.numel() for p in self.model.parameters())

    def sheet(self) -> Sheet:
        """What it consists of."""
        from .parts import parts_of

        rows, notes = parts_of(self.model)
        lines = [] if self.trained else ["the weights are random: what it says means nothing"]
        return Sheet(self._title(), lines, [Table(["part", "what it is"], rows)] if rows else [], notes)

    def _title(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        size = f"{type(self.model).__name__}, {self.parameters:,} parameters"
        return f"{self.name}: {size}, {dtype} on {self.device}"

    def __repr__(self) -> str:
        return f"<Loaded {self._title()}>"


@guarded
def load(
    name: str | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    random: bool = False,
    attn_implementation: str | None = None,
) -> Loaded:
    """Loads a model and what prepares its pictures.

    Args:
        name: a folder or hub id of a transformers checkpoint, ``timm:NAME``, ``open_clip:NAME[:PRETRAINED]``, a
            checkpoint that ships with the package (``tiny-llava``, ``scenes-llava``, ``scenes-clip``), or None for the
            first of these.
        device: ``auto`` or a torch device.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        random: draw the weights instead of loading trained ones; figures of speed hold, answers mean nothing.
        attn_implementation: of a transformers checkpoint, as transformers names it; None leaves it to transformers.

    Returns:
        The model in eval mode.

    Raises:
        LoadError: it cannot be had.
    """
    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    made = _make(name, random, kind, attention=attn_implementation)
    made.model.to(device=where, dtype=kind).eval()
    return made


def skeleton(name: str | None = None) -> Loaded:
    """The same model without data, on torch's meta device: for counting, and for refusing before weights are read.

    Args:
        name: as in `load`.

    Returns:
        The model; there is no processor.

    Raises:
        LoadError: it cannot be had.
    """
    with _without_data():
        return _make(name, random=True, dtype=None, bare=True)


@contextmanager
def _without_data() -> Iterator[None]:
    """Context in which modules are made on torch's meta device."""
    import torch
    import torch._dynamo  # torchvision brings it in later, and while torch <= 2.8 imports it, no tensor may be on meta

    with torch.device("meta"):
        yield


def configured(config: Any) -> nn.Module:
    """A model of transformers without data, from its configuration.

    Args:
        config: a configuration, or its dict with ``"model_type"``.

    Raises:
        ParameterError: transformers makes no model of it.
    """
    import transformers

    if isinstance(config, Mapping):
        if "model_type" not in config:
            raise ParameterError("estimate: a configuration dict needs 'model_type'")
        config = transformers.AutoConfig.for_model(**config)
    for maker in (transformers.AutoModelForImageTextToText, transformers.AutoModel):
        if type(config) in maker._model_mapping:
            with _without_data():
                return _from_config(maker, config)
    raise ParameterError(f"estimate: transformers makes no model of a {type(config).__name__}")


def _make(
    name: str | None, random: bool, dtype: torch.dtype | None, bare: bool = False, attention: str | None = None
) -> Loaded:
    """Finds the library; with `bare` there is nothing that prepares pictures."""
    prefix, _, rest = (name or "").partition(":")
    if attention is not None and (random or prefix in ("timm", "open_clip")):
        raise LoadError(f"attn_implementation={attention!r} is for checkpoints of transformers, with their weights")
    with quiet():
        if prefix == "timm":
            return _timm(rest, random, bare)
        if prefix == "open_clip":
            return _open_clip(rest, random, bare)
        return _transformers(name, random, dtype, bare, attention)


# ---------------------------------------------------------------------- transformers
def _transformers(
    name: str | None, random: bool, dtype: torch.dtype | None, bare: bool, attention: str | None
) -> Loaded:
    import transformers

    shown, place = place_of(name)
    config = one_line_errors(shown, lambda: transformers.AutoConfig.from_pretrained(place))
    language = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    maker: Any = transformers.AutoModelForImageTextToText if language else _tower_class(config)
    if random:
        model = one_line_errors(shown, lambda: _from_config(maker, config))
    else:
        asked = {} if attention is None else {"attn_implementation": attention}
        model = one_line_errors(shown, lambda: maker.from_pretrained(place, dtype=dtype, **asked))
    if bare:
        return Loaded(shown, model, None, language, False)
    reader: Any = transformers.AutoProcessor if language else transformers.AutoImageProcessor
    processor = one_line_errors(shown, lambda: reader.from_pretrained(place))
    if language:
        return Loaded(shown, model, processor, True, not random)
    classes = getattr(config, "num_labels", 0) if type(model).__name__.endswith("Classification") else 0
    labels = None if not classes else numbered(classes) if random else [config.id2label[i] for i in range(classes)]

    def pixels(image: Image.Image) -> Tensor:
        made: Tensor = processor(images=image, return_tensors="pt")["pixel_values"]
        return made

    words = _words(shown, place, config) if hasattr(model, "get_text_features") else None
    return Loaded(shown, model, processor, False, not random, pixels, encoder_of(model), labels, words)


def _words(shown: str, place: str, config: Any) -> Callable[[Sequence[str]], Tensor]:
    """From sentences to token ids, padded as in training; the tokenizer is loaded when it is asked for."""

    @cache
    def tokenizer() -> Any:
        import transformers

        return one_line_errors(shown, lambda: transformers.AutoTokenizer.from_pretrained(place))

    def words(sentences: Sequence[str]) -> Tensor:
        length = config.get_text_config().max_position_embeddings
        made = tokenizer()(
            list(sentences), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        ids: Tensor = made["input_ids"]
        return ids

    return words


def place_of(name: str | None) -> tuple[str, str]:
    """What to call a checkpoint, and where it is."""
    name = EMBEDDED if name is None else name
    if name in SHIPPED:
        folder = names.DATA / name
        if not folder.is_dir():
            raise LoadError(f"the checkpoint of the package is missing: there is no folder {str(folder)!r}")
        return name, str(folder)
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise LoadError(f"folder {name!r} holds no checkpoint: it has no config.json")
        return name, name
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise LoadError(
            f"no model {name!r}: there is no such folder, and a hub id is OWNER/NAME (also: timm:NAME, open_clip:NAME)"
        )
    return name, name


def _tower_class(config: Any) -> Any:
    """The class that a checkpoint names, or transformers' guess."""
    import transformers

    named = (getattr(config, "architectures", None) or [""])[0]
    return getattr(transformers, named, transformers.AutoModel)


def _from_config(maker: Any, config: Any) -> nn.Module:
    """A model with drawn weights; automatic classes and model classes are made differently."""
    made: nn.Module = maker.from_config(config) if hasattr(maker, "from_config") else maker(config)
    return made


def encoder_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """From pixels to class scores or an embedding, for a vision model or dual encoder.

    Args:
        model: of transformers, timm or open_clip.
    """
    if not hasattr(model, "config"):
        return getattr(model, "encode_image", model)

    def encode(pixels: Tensor) -> Tensor:
        if hasattr(model, "get_image_features"):
            found = model.get_image_features(pixel_values=pixels)  # type: ignore[operator]
        else:
            found = model(pixel_values=pixels)
        for name in ("logits", "image_embeds", "pooler_output"):
            if getattr(found, name, None) is not None:
                return getattr(found, name)
        return found if not hasattr(found, "last_hidden_state") else found.last_hidden_state.mean(1)

    return encode


# ---------------------------------------------------------------------- timm and open_clip
def _timm(name: str, random: bool, bare: bool) -> Loaded:
    import timm

    shown = f"timm:{name}"
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        check_listed(shown, name.split(".")[0], timm.list_models())
    model = one_line_errors(shown, lambda: timm.create_model(name, pretrained=not random))
    if bare:
        return Loaded(shown, model, None, False, False)
    settings = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**settings, is_training=False)
    classes = int(getattr(model, "num_classes", 0) or 0)
    labels = None if not classes else numbered(classes) if random else _class_names(model, classes)
    return Loaded(shown, model, transform, False, not random, _one(transform), model, labels)


def numbered(classes: int) -> list[str]:
    """What classes without names are called."""
    return [f"class {i}" for i in range(classes)]


def _class_names(model: Any, classes: int) -> list[str]:
    """Names of a timm classifier's classes: its own, those of the ImageNet variant that it is one of, or numbers."""
    import timm

    own = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if own and len(own) == classes:
        return [str(name) for name in own]
    subset = timm.data.infer_imagenet_subset(model)
    if not subset:
        return numbered(classes)
    info = timm.data.ImageNetInfo(subset)
    names = [info.index_to_description(i) for i in range(info.num_classes())]
    return names if len(names) == classes else numbered(classes)


def _open_clip(name: str, random: bool, bare: bool) -> Loaded:
    import open_clip

    shown = f"open_clip:{name}"
    if name.startswith(("hf-hub:", "local-dir:")):
        tag = ""
    else:
        name, _, tag = name.partition(":")
        check_listed(shown, name, open_clip.list_models())
        if tag and not os.path.exists(tag):
            check_listed(shown, tag, open_clip.list_pretrained_tags_by_model(name), what="trained weights")
    trained = bool(tag) or name.startswith(("hf-hub:", "local-dir:"))
    given = {"pretrained": (tag or None) if not random else None, "load_weights": trained and not random}
    given["device"] = "meta" if bare else "cpu"
    model, _, transform = one_line_errors(shown, lambda: open_clip.create_model_and_transforms(name, **given))
    if bare:
        return Loaded(shown, model, None, False, False)
    words = cache(lambda: one_line_errors(shown, lambda: open_clip.get_tokenizer(name)))
    return Loaded(
        shown,
        model,
        transform,
        False,
        trained and not random,
        _one(transform),
        model.encode_image,
        words=lambda sentences: words()(list(sentences)),
    )


def _one(transform: Any) -> Callable[[Image.Image], Tensor]:
    def pixels(image: Image.Image) -> Tensor:
        made: Tensor = transform(image).unsqueeze(0)
        return made

    return pixels
