"""What several commands work on: the picture, the question, the model, their comparison and its overlay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..timing import Progress


def compare_inputs(
    progress: Progress,
    model: str | None,
    image: str | None,
    prompt: str | None,
    method: str | None,
    device: str,
    dtype: str,
    overlay: str,
    max_new_tokens: int,
    rounds: int,
    random: bool,
    adapter: str | None,
) -> tuple[Any, str]:
    """Checks everything that can be checked before a model is loaded, then compares."""
    from ..core.spec import parse_methods
    from ..errors import ParameterError

    if method is not None:
        parse_methods(method)
    if prompt is not None and image is None:
        raise ParameterError("--prompt asks about a picture: add --image FILE")
    progress("starting", 0, 0)
    from .. import loading
    from ..lab.compare import compare

    loading.check_writable(overlay, picture=True)
    where = loading.pick_device(device)
    loading.pick_dtype(dtype, where)
    shown, picture, question = picture_and_question(image, prompt, model)
    language = check_fit(model, method, prompt, adapter)
    loaded = load_model(progress, model, device, dtype, random)
    result = compare(
        loaded,
        shown,
        question if language else None,
        method,
        max_new_tokens=max_new_tokens,
        rounds=rounds,
        adapter=adapter,
        progress=progress,
    )
    return result, picture


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


def say_overlay(console: Any, path: str | None, words: str) -> None:
    """Where the overlay is, and how to read it."""
    console.print(f"overlay  {path} ({words})" if path else f"overlay  {words}", highlight=False, soft_wrap=True)
