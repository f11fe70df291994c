"""What host libraries call things: the one room that knows an argument, an output field or a cache by its name.

Hosts rename: in twelve minor releases of transformers out of twenty-four an argument that hooks read had another name
or form. So each thing is a `Role` with every name it had while both live; what a module at hand calls it is read off
the signature of its `forward` when hooks are placed (`Arguments`), and a cache is known by its type. What cannot be
found is refused before anything is changed; a call that is not what it was taken for is `HostChanged`.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from ..errors import HostChanged, UnsupportedModel

Host = Any
"""A module of the model: what its attributes are is its library's business, so none of them is checked."""


@dataclass(frozen=True)
class Role:
    """Something that hosts hand around under names of their own.

    Attributes:
        what: it is, for messages.
        names: that it had, newest first.
    """

    what: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.what} ({' or '.join(map(repr, self.names))})"


# Arguments of language models and their layers.
CACHE = Role("key-value cache", ("cache", "past_key_values"))
MASK = Role("attention mask", ("attention_mask",))
POSITIONS = Role("position ids", ("position_ids",))
IDS = Role("token ids", ("input_ids", "input"))
EMBEDDINGS = Role("embeddings", ("inputs_embeds",))
HIDDEN = Role("hidden states", ("hidden_states", "x", "q_x", "query", "input", "hidden_state"))
ROTARY = Role("rotary embeddings", ("position_embeddings",))
TURNS = Role("rotary table of complex numbers", ("freqs_ci",))
LOGITS = Role("count of last tokens whose logits are wanted", ("logits_to_keep",))
CACHING = Role("wish for a cache", ("use_cache",))
LAYER_TYPE = Role("layer type", ("layer_type",))
PER_LAYER = Role("inputs of every layer", ("per_layer_inputs",))
PER_LAYER_SLICE = Role("input of one layer", ("per_layer_input",))
DEEPSTACK_COLUMNS = Role("mask of visual columns", ("visual_pos_masks",))
DEEPSTACK_FEATURES = Role("features that early layers add", ("deepstack_visual_embeds",))

LOSS = Role("what only losses read", ("labels", "shift_labels", "num_items_in_batch"))

# Arguments about pictures.
PIXELS = Role("pixels of pictures", ("pixel_values",))
CLIP_PIXELS = Role("pixels of clips", ("pixel_values_videos",))
ENCODED = Role("pictures that were encoded before", ("mm_encoder_outputs",))
TOKEN_TYPES = Role("token types", ("token_type_ids",))
MODAL_TYPES = Role("token types", ("mm_token_type_ids",))
IMAGE_SIZES = Role("sizes of pictures in pixels", ("image_sizes",))
PATCH_SHAPES = Role("rows and columns of patches", ("spatial_shapes",))
PATCH_PLACES = Role("rows and columns of each patch", ("patch_coord",))
PATCH_REAL = Role("which patches are no padding", ("patch_valid",))
IMAGE_GRIDS = Role("grids of pictures", ("image_grid_thw",))
CLIP_GRIDS = Role("grids of clips", ("video_grid_thw",))
TOWER_GRIDS = Role("grids of what a tower encodes", ("grid_thw",))
IMAGE_PLACES = Role("places of a picture's patches", ("image_position_ids",))
CLIP_PLACES = Role("places of a clip's patches", ("video_position_ids",))
PIXEL_PLACES = Role("places of patches", ("pixel_position_ids",))
CLIP_FRAMES = Role("frames of each clip", ("num_frames_per_video",))
SHARED_PICTURES = Role("pictures of each prompt", ("batch_num_images",))
FEATURES = Role("features of pictures", ("image_features", "vision_encodings", "hidden_states"))
SEPARATOR = Role("embedding behind a row of crops", ("image_newline",))

# Arguments of towers.
KEY_BIAS = Role("bias on the keys", ("key_padding_mask",))
BIAS = Role("bias on the logits", ("attn_mask", "attention_mask"))
ROPE = Role("rotary table", ("rope",))
CAUSAL = Role("causal switch", ("is_causal",))
BOUNDS = Role("boundaries of rows that see each other", ("cu_seqlens",))
LONGEST = Role("length of the longest of them", ("max_seqlen",))
MAPS = Role("format of what is collected", ("output_fmt",))

# Arguments of the host's own mask functions.
CONFIG = Role("configuration", ("config",))
LAYER = Role("layer whose cache gives the length", ("layer_idx",))
BLOCKS = Role("bidirectional blocks", ("block_sequence_ids",))
OR_MASK = Role("mask to join", ("or_mask_function",))
AND_MASK = Role("mask to cut with", ("and_mask_function",))
MAY_SKIP = Role("leave to make no mask", ("allow_is_causal_skip",))

# Fields of outputs.
LAST_HIDDEN = Role("last hidden states", ("last_hidden_state", "hidden_states"))
RECORDED = Role("hidden states of every layer", ("hidden_states",))
POOLED = Role("features of each picture", ("pooler_output",))

IMAGE_KEY, CLIP_KEY = "image", "video"
"""Keys of encoded pictures and clips."""

_EMPTY = inspect.Parameter.empty
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Attributes under which wrappers with a forward of any arguments keep the module."""
_DISTRIBUTIONS = {"open_clip": "open_clip_torch"}


# ---------------------------------------------------------------------- libraries
def library_of(thing: Any) -> str:
    """Name and version of the library that a module or function comes from, for messages."""
    where = thing.__module__ if hasattr(thing, "__qualname__") else type(thing).__module__
    name = str(where).partition(".")[0]
    return f"{name} {version_of(name)}"


@lru_cache(maxsize=16)
def version_of(name: str) -> str:
    """Version of an importable library; of an unpacked one, what it says itself."""
    try:
        return importlib.metadata.version(_DISTRIBUTIONS.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(name), "__version__", "of unknown version"))


def changed(module: Host, fact: str) -> HostChanged:
    """The error for a call that is not what the hooks take it for.

    Args:
        module: whose call.
        fact: what was found.
    """
    return HostChanged(
        f"{library_of(module)}, {type(module).__name__}: {fact}. The answer would be wrong without a word, so the call "
        "stops here; `vlmtok doctor` shows what else this version changed, constraints.txt names versions that were "
        "tested"
    )


# ---------------------------------------------------------------------- arguments
def parameters_of(module: nn.Module) -> list[inspect.Parameter]:
    """The parameters of a module's forward, without `self`, behind decorators and wrappers.

    A subclass whose forward takes anything and passes it on has the parameters of the class below, and its own.
    """
    for name in _WRAPPERS:
        if hasattr(module, name):
            return parameters_of(getattr(module, name))
    found = list(inspect.signature(module.forward).parameters.values())
    for kind in type(module).__mro__[1:]:
        if {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} - {p.kind for p in found}:
            break
        below = kind.__dict__.get("forward")
        if below is None or kind is nn.Module:
            continue
        own = [p for p in found if p.kind == p.KEYWORD_ONLY]
        found = [*list(inspect.signature(below).parameters.values())[1:], *own]
    return found


class Arguments:
    """Where a module's call has its arguments, looked up once.

    Args:
        module: whose forward.
        roles: what must be there.
        optional: what may be missing; `get` gives None then.

    Raises:
        UnsupportedModel: a role has none of its names in the signature.
    """

    def __init__(self, module: Host, roles: Iterable[Role], optional: Iterable[Role] = ()) -> None:
        self.who = type(module).__name__
        self.library = library_of(module)
        parameters = parameters_of(module)
        named = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        self.names = tuple(named)
        self._at: dict[Role, tuple[int, str, Any]] = {}
        missing = [role for role in roles if not self._find(role, parameters, named)]
        for role in optional:
            self._find(role, parameters, named)
        if missing:
            raise UnsupportedModel(
                f"{self.who}.forward of {self.library} has no argument for the "
                f"{' nor for the '.join(map(str, missing))}; it has {', '.join(named) or 'none that is named'}. Use a "
                "version of constraints.txt, or a newer vlmtok; `vlmtok doctor` tells which families run here"
            )

    def _find(self, role: Role, parameters: list[inspect.Parameter], named: list[str]) -> bool:
        for name in role.names:
            if name in named:
                at = named.index(name)
                parameter = parameters[at]
                index = len(named) if parameter.kind is parameter.KEYWORD_ONLY else at
                self._at[role] = (index, name, parameter.default)
                return True
        return False

    def has(self, role: Role) -> bool:
        """Whether the signature names it."""
        return role in self._at

    def get(self, role: Role, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The value of a role in a call; the host's own default where the caller gave none.

        Args:
            role: asked for when this was made.
            args: of the call.
            kwargs: of the call.

        Raises:
            HostChanged: the call has no value and the host no default.
        """
        found = self._at.get(role)
        if found is not None:
            index, name, default = found
            if index < len(args):
                return args[index]
            if name in kwargs:
                return kwargs[name]
        else:
            default = None
        for name in role.names:  # callers may still write the old name, which the host turns into the new one
            if name in kwargs:
                return kwargs[name]
        if default is _EMPTY:
            raise HostChanged(
                f"{self.library}, {self.who} was called without the {role}; it got {len(args)} arguments by position "
                f"and {', '.join(kwargs) or 'none'} by name. `vlmtok doctor` shows what this version changed"
            )
        return default

    def called(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of a call under their own names; those left out are missing."""
        return {**dict(zip(self.names, args)), **kwargs}

    def put(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], values: Mapping[Role, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call with other values, each in the place and under the name that the caller used.

        Args:
            args: of the call.
            kwargs: of the call.
            values: by role; a role without an argument goes by its first name.
        """
        places, names = list(args), dict(kwargs)
        for role, value in values.items():
            index, name, _ = self._at.get(role, (len(places), role.names[0], None))
            if index < len(places):
                places[index] = value
                continue
            for other in role.names:
                if other in names and other != name:
                    del names[other]
            names[name] = value
        return tuple(places), names

    def others(self, kwargs: Mapping[str, Any], known: Iterable[Role]) -> dict[str, Any]:
        """Keyword arguments that are none of these roles."""
        names = {name for role in known for name in role.names}
        return {name: value for name, value in kwargs.items() if name not in names}


def first_tensor(module: Host, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The first tensor of a call: what a module of one input works on, whatever it is called.

    Raises:
        HostChanged: there is none.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise changed(module, "it was called without a tensor")


def named(function: Callable[..., Any], values: Mapping[Role, Any]) -> dict[str, Any]:
    """Keyword arguments for a function of the host.

    Args:
        function: of the host.
        values: by role.

    Raises:
        UnsupportedModel: it has no argument for one of them.
    """
    found, missing = {}, []
    names = _names_of(function)
    for role, value in values.items():
        name = next((name for name in role.names if name in names), None)
        if name is None:
            missing.append(role)
        else:
            found[name] = value
    if missing:
        raise UnsupportedModel(
            f"{function.__name__}() of {library_of(function)} has no argument for the "
            f"{' nor for the '.join(map(str, missing))}; it has {', '.join(names)}. Use a version of constraints.txt, "
            "or a newer vlmtok"
        )
    return found


@lru_cache(maxsize=64)
def _names_of(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)
