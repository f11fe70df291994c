"""Which adapter carries a model: found by the name of the model's class, so that no library is imported.

`registry.ROWS` names every class that an adapter carries, `language.families.ROWS` every family of vision-language
models. Third parties add theirs through the entry-point group ``vlmtok.adapters`` (an `Adapter` subclass with
`targets`).
"""

from __future__ import annotations

import difflib
import importlib.metadata
import warnings

from torch import nn

from ..errors import UnsupportedModel, VlmtokWarning
from .base import Adapter
from .refused import REFUSED
from .registry import ROWS, class_names, listed, unwrap
from .wholes import wholes


def _vlm(model: nn.Module) -> Adapter | None:
    """A vision-language model of transformers: told by its config, so that a family is a row in one file."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(kind, str) or not any(name.startswith("transformers.") for name, _ in class_names(model)):
        return None
    from .language import families
    from .language.hf_vlm import HFVLM

    return HFVLM(model) if kind in families.ROWS or kind in families.REFUSED else None


def _third_parties() -> dict[tuple[str, str], type[Adapter]]:
    found: dict[tuple[str, str], type[Adapter]] = {}
    for entry in importlib.metadata.entry_points(group="vlmtok.adapters"):
        try:
            adapter = entry.load()
            found.update(dict.fromkeys(adapter.targets, adapter))
        except Exception as problem:
            warnings.warn(f"adapter plug-in {entry.name!r} does not load: {problem!r}", VlmtokWarning, stacklevel=3)
    return found


def adapter_for(model: nn.Module, name: str | None = None) -> Adapter:
    """The adapter that carries a model.

    Args:
        model: any module; wrappers are looked through.
        name: None, or ``"generic-vlm"`` for a vision-language model of transformers that no row describes.

    Returns:
        The adapter, holding the unwrapped model.

    Raises:
        UnsupportedModel: nothing carries it; the message names the reason, or what was looked at.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(f"compress() takes a torch.nn.Module, got {type(model).__name__}")
    model = unwrap(model)
    if name is not None:
        return _named(model, name)
    found = listed(model) or _vlm(model)
    if found is not None:
        return found
    others = _third_parties()
    for known in class_names(model):
        if known in others:
            return others[known](model)
    carried = sorted({qualified for _, qualified in ROWS})
    near = difflib.get_close_matches(type(model).__name__, carried, 3, 0.5)
    hint = f" Nearest: {', '.join(near)}." if near else ""
    raise UnsupportedModel(
        f"no adapter carries {type(model).__module__}.{type(model).__name__}.{hint} Carried: {', '.join(carried)}, "
        f"and the vision-language models {', '.join(vlm_families())}. A vision-language model of transformers with the "
        "standard layout may run with adapter='generic-vlm'; CONTRIBUTING.md says how to write an adapter."
    )


def check_alone(carrier: Adapter) -> None:
    """Refuses a tower that a language model reads by the number of its placeholders.

    Args:
        carrier: of the model that is to be compressed.

    Raises:
        UnsupportedModel: the model is part of a vision-language model.
    """
    from .language import families

    for whole in wholes(carrier.model) if carrier.is_part else ():
        spec = families.ROWS.get(getattr(getattr(whole, "config", None), "model_type", ""))
        if spec is not None and hasattr(whole, "generate") and spec.tower_cut != "free":
            raise carrier.refuse(
                f"it is part of a {type(whole).__name__}, whose language model expects a feature for each "
                "placeholder; compress the whole: vlmtok.compress(model, ...)"
            )


def vlm_families() -> list[str]:
    """Model types of transformers that a row describes."""
    from .language import families

    return sorted(families.ROWS)


def _named(model: nn.Module, name: str) -> Adapter:
    from .language.discovery import discover
    from .language.hf_vlm import HFVLM

    if name != "generic-vlm":
        raise UnsupportedModel(f"adapter {name!r} cannot be asked for by name; 'generic-vlm' can")
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise UnsupportedModel(f"adapter 'generic-vlm' takes models of transformers, got {type(model).__name__}")
    return HFVLM(model, discover(model))


__all__ = ["REFUSED", "ROWS", "Adapter", "adapter_for", "check_alone", "unwrap", "vlm_families"]
