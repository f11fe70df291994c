"""What several commands work on: the picture, the question, the model, their comparison and its overlay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..timing import Progress


@dataclass(frozen=True)
class Question:
    """What `vlmtok run` and `vlmtok show` were asked to look at, checked as far as that goes before weights are read.

    Attributes:
        shown: the picture.
        picture: what to call it.
        words: the question; None for towers.
        load: reads the model.
    """

    shown: Any
    picture: str
    words: str | None
    load: Callable[[], Any]


def spec_strings(given: list[str] | None) -> list[str]:
    """Spec strings as typed, swept values spread out; none where nothing was given.

    Raises:
        VlmtokError: one of them is no spec string of known methods.
    """
    from ..core.spec import expand, parse_methods

    found = [spec for text in given or () for spec in expand(text)]
    for spec in found:
        parse_methods(spec)
    return found


def sizes_of(given: list[str] | None) -> list[tuple[int, int]] | None:
    """Sizes of pictures as typed, ``896x672``; None where nothing was given.

    Raises:
        ParameterError: one is not of that form.
    """
    from ..errors import ParameterError

    found = []
    for text in given or ():
        sides = text.lower().replace("\u00d7", "x").split("x")
        if len(sides) != 2 or not all(side.strip().isdecimal() and int(side) for side in sides):
            raise ParameterError(f"--image-size {text!r}: width and height in pixels, for instance 896x672")
        found.append((int(sides[0]), int(sides[1])))
    return found or None


def question_about(
    progress: Progress,
    model: str | None,
    image: str | None,
    prompt: str | None,
    specs: Sequence[str],
    device: str,
    dtype: str,
    overlay: str | None,
    random: bool,
    adapter: str | None,
    page: str | None = None,
) -> Question:
    """Checks everything that can be checked before a model is loaded.

    Args:
        progress: told what is being done.
        model: as typed.
        image: as typed.
        prompt: as typed.
        specs: the methods; each must fit the model.
        device: as typed.
        dtype: as typed.
        overlay: where a picture is to be written, or None.
        random: whether weights are drawn.
        adapter: as typed.
        page: where a page is to be written, or None.

    Raises:
        VlmtokError: something does not fit.
    """
    from ..errors import ParameterError

    if prompt is not None and image is None:
        raise ParameterError("--prompt asks about a picture: add --image FILE")
    progress("starting", 0, 0)
    from .. import loading

    if overlay is not None:
        loading.check_writable(overlay, picture=True)
    if page is not None:
        loading.check_writable(page)
    where = loading.pick_device(device)
    loading.pick_dtype(dtype, where)
    shown, picture, words = picture_and_question(image, prompt, model)
    fits = [check_fit(model, spec, prompt, adapter) for spec in specs or (None,)]
    return Question(
        shown, picture, words if fits[0] else None, lambda: load_model(progress, model, device, dtype, random)
    )


def picture_and_question(image: str | None, prompt: str | None, model: str | None) -> tuple[Any, str, str | None]:
    """The picture, what to call it, and the question: the user's, or a sample's."""
    from .. import loading

    if image is not None:
        embedded = model in (None, loading.EMBEDDED)  # it knows the words of its samples' questions and no others
        question = loading.samples()[0].question if embedded and prompt is None else prompt
        return loading.open_picture(image), image, question
    sample = loading.samples()[0]
    return loading.open_picture(sample.path), sample.path.name, sample.question


def check_fit(model: str | None, method: str | None, prompt: str | None, adapter: str | None) -> bool:
    """Refuses, before weights are read, a model, or a method or prompt that does not fit it; says if it answers."""
    from ..adapters import adapter_for
    from ..core.model_shape import ModelShape
    from ..errors import ParameterError
    from ..forecast.estimate import attach
    from ..lab.compare import default_method
    from ..lab.prompts import NO_PROMPT
    from ..loading import skeleton

    bare = skeleton(model)
    if prompt is not None and not bare.language:
        raise ParameterError(NO_PROMPT.format(bare.name))
    carrier = adapter_for(bare.model, adapter)
    attach(ModelShape(carrier.name, carrier.layout()), method or default_method(bare.model, adapter))
    return bare.language


def load_model(progress: Progress, model: str | None, device: str, dtype: str, random: bool) -> Any:
    """The model, in eval mode."""
    from .. import loading

    progress(f"loading {model or loading.EMBEDDED}", 0, 0)
    return loading.load(model, device=device, dtype=dtype, random=random)


def check_reduced(report: Any) -> None:
    """Refuses to print a comparison in which nothing was left out: a table of 1.00 x looks like a result.

    Args:
        report: of the compressed pass.

    Raises:
        PassError: no site of any method left a token out, and no layer any work.
    """
    from ..errors import PassError

    if not report.reduced:
        raise PassError(
            f"{' + '.join(report.methods)} ran and left every token where it was; "
            + ("; ".join(report.notes) or "give it fewer tokens to keep, or another place to act")
        )


def write_overlay(result: Any, path: str) -> tuple[str | None, str]:
    """Saves the overlay of a comparison.

    Returns:
        Where it is and how to read it; or None and why there is none, since a picture is no reason to lose a table.
    """
    if result.overlay is None:
        return None, f"not drawn: {result.overlay_problem}"
    try:
        result.overlay.save(path)
    except (OSError, ValueError) as problem:
        from ..loading import line_of

        return None, f"not written to {path!r}: {line_of(problem)}"
    return path, result.overlay_legend


def write_page(result: Any, path: str) -> tuple[str | None, str]:
    """Saves the page of a comparison or sweep.

    Returns:
        Where it is; or None and why there is none, since a page is no reason to lose a table.
    """
    from ..errors import VlmtokError
    from ..loading import line_of

    try:
        result.save_html(path)
    except (OSError, ValueError, VlmtokError) as problem:
        return None, f"not written to {path!r}: {line_of(problem)}"
    return path, ""


def say_overlay(console: Any, path: str | None, words: str) -> None:
    """Where the overlay is, and how to read it."""
    console.print(f"overlay  {path} ({words})" if path else f"overlay  {words}", highlight=False, soft_wrap=True)
