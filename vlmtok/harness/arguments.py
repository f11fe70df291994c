"""What stands behind ``--model_args``, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..core.spec import parse_methods
from ..errors import ParameterError, hint
from ..forecast.estimate import attach, shape_of

NONE = "none"
"""The method of the bare model."""
PIXELS = ("min_pixels", "max_pixels")
"""Arguments that a processor is given with its pictures."""


@dataclass(frozen=True)
class Arguments:
    """Arguments of the model ``vlmtok``.

    Attributes:
        pretrained: a folder or hub id of a transformers checkpoint, or ``tiny-llava``, which ships with vlmtok.
        method: a spec string, as `vlmtok.compress` takes it, or ``none``.
        batch_size: requests that run at once.
        device: ``auto``, or a torch device; with several processes each takes the GPU of its number.
        dtype: ``auto`` (float32 on a CPU, bfloat16 elsewhere), ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: as in transformers.
        system_prompt: put in front of every conversation; text, or a file that holds it.
        min_pixels: of a picture, where the processor takes such a bound (Qwen-VL), and
        max_pixels: as a bound above.
        figures: keep books of every batch; without them ``none`` attaches nothing at all.
    """

    pretrained: str
    method: str
    batch_size: int = 1
    device: str = "auto"
    dtype: str = "auto"
    attn_implementation: str | None = None
    system_prompt: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    figures: bool = True

    @property
    def bare(self) -> bool:
        """Whether no method is asked."""
        return self.method.lower() == NONE

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Arguments:
        """From what lmms-eval hands over.

        Args:
            given: by name; values may be quoted, and numbers may be strings.

        Raises:
            ParameterError: a name that is not known, ``pretrained`` or ``method`` missing, or a value not possible.
            UnknownMethod, SpecError: of the method.
        """
        known = [one.name for one in fields(cls)]
        values = {name: unquoted(value) for name, value in given.items() if value is not None}
        values.pop("max_batch_size", None)  # lmms-eval's own, for sizes that are searched for
        for name in values:
            if name not in known:
                raise ParameterError(
                    f"model_args: there is no {name!r}{hint(name, known)} Arguments: {', '.join(known)}"
                )
        for name, why in (
            ("pretrained", "a folder or hub id of a checkpoint"),
            (
                "method",
                "a spec such as divprune:keep=0.111, or none for the bare model, so that it is always in the run",
            ),
        ):
            if not str(values.get(name, "")).strip():
                raise ParameterError(f"model_args: {name}= is missing: {why}")
        values["batch_size"] = _whole("batch_size", values.get("batch_size", 1))
        for name in PIXELS:
            if name in values:
                values[name] = _whole(name, values[name])
        if not isinstance(values.get("figures", True), bool):
            raise ParameterError(f"model_args: figures={values['figures']!r} must be true or false")
        values["method"] = str(values["method"]).strip()
        read = cls(**values)
        if not read.bare:
            parse_methods(read.method)
        return read

    def check(self) -> None:
        """Asks the checkpoint's configuration whether the method has a place there, before weights are read.

        Raises:
            LoadError: there is no such checkpoint.
            UnsupportedModel, SiteError, MissingSignal, ParameterError: as `compress`.
        """
        if not self.bare:
            attach(shape_of(self.pretrained), self.method)


def unquoted(value: Any) -> Any:
    """A value without the quotes around it that kept its commas together."""
    if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    return value


def split(text: str) -> dict[str, Any]:
    """Arguments by name, as lmms-eval takes them apart.

    Args:
        text: what stands behind ``--model_args``.

    Raises:
        ParameterError: a comma outside quotes is followed by something that is no ``name=value``.
    """
    from lmms_eval.utils import simple_parse_args_string

    try:
        found: dict[str, Any] = simple_parse_args_string(text)
    except ValueError:
        raise ParameterError(
            f"model_args: {text!r} falls into pieces that are no name=value. lmms-eval splits at commas outside "
            "quotes: quote a method that has any (method='...'), or write semicolons in its brackets, (2;3) for (2,3)"
        ) from None
    return found


def _whole(name: str, value: Any) -> int:
    text = str(value)
    if not text.isdigit() or int(text) < 1:
        raise ParameterError(f"model_args: {name}={value!r} is not possible: a whole number from 1")
    return int(text)
