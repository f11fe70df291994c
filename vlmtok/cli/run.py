"""``vlmtok run``: a question about a picture, bare and compressed, side by side."""

from __future__ import annotations

from typing import Any

import typer

from .application import FAILED, Once, app
from .console import at_work, print_json, standard_output
from .inputs import check_reduced, question_about, say_overlay, spec_strings, write_overlay, write_page
from .options import (
    Adapter,
    Device,
    Dtype,
    Html,
    Json,
    Methods,
    Model,
    Overlay,
    Picture,
    Prompt,
    Random,
    Rounds,
    Tokens,
)


@app.command(cls=Once)
def run(
    model: Model = None,
    image: Picture = None,
    prompt: Prompt = None,
    method: Methods = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overlay: Overlay = "overlay.png",
    html: Html = None,
    max_new_tokens: Tokens = 32,
    rounds: Rounds = 5,
    random: Random = False,
    adapter: Adapter = None,
    as_json: Json = False,
) -> None:
    """Answer a question about a picture, bare and compressed, side by side."""
    specs = spec_strings(method)
    several = len(specs) > 1
    with at_work() as progress:
        asked = question_about(
            progress, model, image, prompt, specs, device, dtype, None if several else overlay, random, adapter, html
        )
        loaded = asked.load()
        from ..lab.compare import compare
        from ..lab.sweep import sweep

        how: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "rounds": rounds,
            "adapter": adapter,
            "progress": progress,
        }
        if several:
            found = sweep(loaded, asked.shown, specs, asked.words, **how)
            for one in found:
                check_reduced(one.report)
        else:
            result = compare(loaded, asked.shown, asked.words, specs[0] if specs else None, **how)
            check_reduced(result.report)
            path, words = write_overlay(result, overlay)
        page, problem = (None, "") if html is None else write_page(found if several else result, html)
    console = standard_output()
    if several and as_json:
        said = {"model": loaded.name, "image": asked.picture, "prompt": asked.words, "rows": found.to_records()}
        print_json({**said, "page": page})
    elif several:
        console.print(
            f"{loaded.name}, picture {asked.picture}, prompt {asked.words!r}", highlight=False, soft_wrap=True
        )
        console.print(found)
    elif as_json:
        print_json({**result.to_dict(), "image": asked.picture, "overlay": path, "overlay_words": words, "page": page})
    else:
        console.print(f"picture  {asked.picture}", highlight=False, soft_wrap=True)
        console.print(result)
        say_overlay(console, path, words)
    if html is not None and not as_json:
        console.print(f"page     {page or problem}", highlight=False, soft_wrap=True)
    if several and found.failed:
        raise typer.Exit(FAILED)  # the table says why
