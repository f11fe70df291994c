"""Models and pictures by the names that users type: folders, hub ids, ``timm:NAME``, ``open_clip:NAME[:PRETRAINED]``.

Libraries are imported when a name asks for them. Whatever goes wrong on the way (no such name, no network, a file that
is no picture) is a `LoadError` of one line.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import ParameterError, VlmtokError
from .guard import guarded

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor, nn

DATA = Path(__file__).parent / "data"
"""What ships with the package: ``tiny-llava/`` (a checkpoint), ``pictures/`` and ``pictures/questions.json``."""
EMBEDDED = "tiny-llava"
"""Name of the checkpoint that ships with the package."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
T = TypeVar("T")


class LoadError(VlmtokError, OSError):
    """A model, a picture or a file cannot be had under the name that was given."""


# ---------------------------------------------------------------------- pictures and files
@dataclass(frozen=True)
class Sample:
    """A picture that ships with the package, and a question about it.

    Attributes:
        path: of the picture.
        question: what to ask.
        answer: the right answer.
    """

    path: Path
    question: str
    answer: str


def samples() -> list[Sample]:
    """Pictures that ship with the package, a question about each; `questions.json` names them in order.

    Raises:
        LoadError: they are missing.
    """
    table = DATA / "pictures" / "questions.json"
    try:
        rows = json.loads(table.read_text("utf-8"))
    except (OSError, ValueError) as problem:
        raise LoadError(f"the sample pictures of the package are missing: {line_of(problem)}") from None
    return [Sample(table.parent / row["picture"], row["question"], row["answer"]) for row in rows]


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Reads a picture, upright and in RGB.

    Args:
        path: of a file that Pillow reads.

    Raises:
        LoadError: no such file, or no picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            return upright.convert("RGB")
    except UnidentifiedImageError:
        raise LoadError(f"{os.fspath(path)!r} is no picture that Pillow can read") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        raise LoadError(f"cannot read picture {os.fspath(path)!r}: {line_of(problem)}") from None


def check_writable(path: str | os.PathLike[str], picture: bool = False) -> Path:
    """Checks that a file can be written, before anything is computed for it; nothing is written.

    Args:
        path: of the file to be.
        picture: whether it will be a picture, whose name says its format.

    Returns:
        The path.

    Raises:
        LoadError: its folder does not exist, or does not let us write; or its name says no format.
    """
    from PIL import Image

    target = Path(path)
    if picture and target.suffix.lower() not in Image.registered_extensions():
        raise LoadError(f"cannot write {str(target)!r}: no picture format is called {target.suffix!r}; use .png")
    folder = target.parent
    if not folder.is_dir():
        raise LoadError(f"cannot write {str(target)!r}: there is no folder {str(folder)!r}")
    if target.is_dir():
        raise LoadError(f"cannot write {str(target)!r}: it is a folder")
    if not os.access(target if target.exists() else folder, os.W_OK):
        raise LoadError(f"cannot write {str(target)!r}: permission denied")
    return target


# ---------------------------------------------------------------------- devices
def pick_device(name: str = "auto") -> torch.device:
    """The device of a name.

    Args:
        name: ``auto`` (CUDA where there is one, else CPU), or a torch device.

    Raises:
        LoadError: torch knows no such device, or this machine has none.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        raise LoadError(f"device {name!r} cannot be used here: {line_of(problem)}") from None
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name.

    Args:
        name: one of `DTYPES`; ``auto`` is float32 on CPU and bfloat16 elsewhere.
        device: where the model will be.

    Raises:
        LoadError: none of them.
    """
    import torch

    if name not in DTYPES:
        raise LoadError(f"dtype {name!r} is not possible; one of {', '.join(DTYPES)}")
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


# ---------------------------------------------------------------------- models
@dataclass(frozen=True, eq=False)
class Loaded:
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
    """

    name: str
    model: nn.Module
    processor: Any
    language: bool
    trained: bool = True
    pixels: Callable[[Image.Image], Tensor] | None = None
    encode: Callable[[Tensor], Tensor] | None = None
    labels: Sequence[str] | None = None

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


@guarded
def load(name: str | None = None, *, device: str = "auto", dtype: str = "auto", random: bool = False) -> Loaded:
    """Loads a model and what prepares its pictures.

    Args:
        name: a folder or hub id of a transformers checkpoint, ``timm:NAME``, ``open_clip:NAME[:PRETRAINED]``, or None
            for the checkpoint that ships with the package.
        device: ``auto`` or a torch device.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        random: draw the weights instead of loading trained ones; figures of speed hold, answers mean nothing.

    Returns:
        The model in eval mode.

    Raises:
        LoadError: it cannot be had.
    """
    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    made = _make(name, random, kind)
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


def _make(name: str | None, random: bool, dtype: torch.dtype | None, bare: bool = False) -> Loaded:
    """Finds the library; with `bare` there is nothing that prepares pictures."""
    prefix, _, rest = (name or "").partition(":")
    with quiet():
        if prefix == "timm":
            return _timm(rest, random, bare)
        if prefix == "open_clip":
            return _open_clip(rest, random, bare)
        return _transformers(name, random, dtype, bare)


# ---------------------------------------------------------------------- transformers
def _transformers(name: str | None, random: bool, dtype: torch.dtype | None, bare: bool) -> Loaded:
    import transformers

    shown, place = _place(name)
    config = _reading(shown, lambda: transformers.AutoConfig.from_pretrained(place))
    language = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    maker: Any = transformers.AutoModelForImageTextToText if language else _tower_class(config)
    if random:
        model = _reading(shown, lambda: _from_config(maker, config))
    else:
        model = _reading(shown, lambda: maker.from_pretrained(place, dtype=dtype))
    if bare:
        return Loaded(shown, model, None, language, False)
    reader: Any = transformers.AutoProcessor if language else transformers.AutoImageProcessor
    processor = _reading(shown, lambda: reader.from_pretrained(place))
    if language:
        return Loaded(shown, model, processor, True, not random)
    classes = getattr(config, "num_labels", 0) if type(model).__name__.endswith("Classification") else 0
    labels = [config.id2label[i] for i in range(classes)] if classes and not random else None

    def pixels(image: Image.Image) -> Tensor:
        made: Tensor = processor(images=image, return_tensors="pt")["pixel_values"]
        return made

    return Loaded(shown, model, processor, False, not random, pixels, _encoder(model), labels)


def _place(name: str | None) -> tuple[str, str]:
    """What to call a checkpoint, and where it is."""
    if name is None or name == EMBEDDED:
        folder = DATA / EMBEDDED
        if not folder.is_dir():
            raise LoadError(f"the checkpoint of the package is missing: there is no folder {str(folder)!r}")
        return EMBEDDED, str(folder)
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


def _encoder(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """From pixels to class scores or an embedding, for a vision model or dual encoder of transformers."""

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
        _known(shown, name.split(".")[0], timm.list_models())
    model = _reading(shown, lambda: timm.create_model(name, pretrained=not random))
    if bare:
        return Loaded(shown, model, None, False, False)
    settings = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**settings, is_training=False)
    labels = None if random else _imagenet(model)
    return Loaded(shown, model, transform, False, not random, _one(transform), model, labels)


def _imagenet(model: Any) -> list[str] | None:
    """Names of a timm classifier's classes, where it is one of timm's ImageNet variants."""
    import timm

    subset = timm.data.infer_imagenet_subset(model)
    if not subset:
        return None
    info = timm.data.ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(info.num_classes())]


def _open_clip(name: str, random: bool, bare: bool) -> Loaded:
    import open_clip

    shown = f"open_clip:{name}"
    if name.startswith(("hf-hub:", "local-dir:")):
        tag = ""
    else:
        name, _, tag = name.partition(":")
        _known(shown, name, open_clip.list_models())
        if tag and not os.path.exists(tag):
            _known(shown, tag, open_clip.list_pretrained_tags_by_model(name), what="trained weights")
    trained = bool(tag) or name.startswith(("hf-hub:", "local-dir:"))
    given = {"pretrained": (tag or None) if not random else None, "load_weights": trained and not random}
    given["device"] = "meta" if bare else "cpu"
    model, _, transform = _reading(shown, lambda: open_clip.create_model_and_transforms(name, **given))
    if bare:
        return Loaded(shown, model, None, False, False)
    return Loaded(shown, model, transform, False, trained and not random, _one(transform), model.encode_image)


def _one(transform: Any) -> Callable[[Image.Image], Tensor]:
    def pixels(image: Image.Image) -> Tensor:
        made: Tensor = transform(image).unsqueeze(0)
        return made

    return pixels


# ---------------------------------------------------------------------- errors
def line_of(problem: BaseException) -> str:
    """The first sentence of an error, on one line."""
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror.lower()
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return re.split(r"(?<=[a-z'\")])\. ", lines[0])[0].rstrip(".") if lines else type(problem).__name__


def _known(shown: str, name: str, names: Sequence[str], what: str = "model") -> None:
    """Refuses a name that a library does not list."""
    if name in names:
        return
    near = difflib.get_close_matches(name, names, 3, 0.5) or (list(names) if len(names) < 20 else [])
    raise LoadError(f"no {what} {name!r} for {shown!r}" + (f"; nearest: {', '.join(near)}" if near else ""))


def _reading(name: str, read: Callable[[], T]) -> T:
    """Runs a library's loader; its errors, of any kind, become one line."""
    try:
        return read()
    except MemoryError:
        raise
    except Exception as problem:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        local = os.path.isdir(name) or name == EMBEDDED
        hint = " (HF_HUB_OFFLINE is set)" if offline and not local else ""
        raise LoadError(f"cannot load {name!r}: {line_of(problem)}{hint}") from problem


@contextmanager
def quiet() -> Iterator[None]:
    """Context without the log lines of the libraries; their progress bars show on a terminal only."""
    import transformers

    before = logging.root.manager.disable
    bars = transformers.utils.logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    logging.disable(logging.ERROR)  # what goes wrong is raised, too
    if bars:
        transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(before)
        if bars:
            transformers.utils.logging.enable_progress_bar()
