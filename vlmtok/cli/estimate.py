"""``vlmtok estimate``: what a model costs, without running it."""

from __future__ import annotations

from typing import Annotated, Any

import typer.core

from .application import Once, app
from .console import at_work, print_json, standard_output
from .inputs import sizes_of, spec_strings
from .options import ImageSize, Json, Methods


@app.command(cls=Once)
def estimate(
    model: Annotated[
        str, typer.Argument(help="A preset (vlmtok list --models), or a model as for vlmtok run.")
    ] = "llava-1.5-7b",
    method: Methods = None,
    text_tokens: Annotated[int | None, typer.Option(min=0, help="Of the prompt.", show_default=False)] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Of a prompt.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Prompts, or pictures of a tower.")] = 1,
    visual_tokens: Annotated[int | None, typer.Option(min=1, help="Of a picture.", show_default=False)] = None,
    crops: Annotated[int | None, typer.Option(min=1, help="Tower rows of a picture.", show_default=False)] = None,
    image_size: ImageSize = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Of a clip of --image-size.", show_default=False)] = None,
    convention: Annotated[
        str | None, typer.Option(help="Also count as a paper does, for instance fastv.", show_default=False)
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a method would save, without running anything and without weights."""
    from ..errors import ParameterError

    if markdown + as_csv + as_json > 1:
        raise ParameterError("one of --json, --markdown and --csv")
    specs, sizes = spec_strings(method), sizes_of(image_size)
    with at_work() as progress:
        progress("starting", 0, 0)
        from ..cost.reports import Reports
        from ..forecast.estimate import estimate as estimated
        from ..lab import compare as comparing

        subject = _subject(model)
        default = comparing.DEFAULT_METHOD if subject.shape.language else comparing.DEFAULT_TOWER_METHOD
        reports = [
            estimated(
                subject,
                spec,
                text_tokens=text_tokens,
                pictures=pictures,
                batch=batch,
                visual_tokens=visual_tokens,
                crops=crops,
                image_size=sizes[0] if sizes and len(sizes) == 1 else sizes,
                frames=frames,
                convention=convention,
            )
            for spec in specs or [default]
        ]
    found = reports[0] if len(reports) == 1 else Reports(tuple(reports))
    if as_json:
        rows = {"rows": [report.to_dict() for report in reports]} if len(reports) > 1 else reports[0].to_dict()
        print_json({**rows, "convention": convention})
    elif markdown or as_csv:
        print(found.to_markdown() if markdown else found.to_csv(), end="")
    else:
        standard_output().print(found)


def _subject(model: str) -> Any:
    """A preset, or a model without data; with it comes what prepares its pictures."""
    import os

    from .. import loading
    from ..forecast.presets import PRESETS, preset
    from ..forecast.subject import subject_of

    named = not os.path.isdir(model) and "/" not in model and ":" not in model and model not in loading.SHIPPED
    if named and model not in PRESETS:
        preset(model)  # a plain name is a preset's; a wrong one is told what there is
    return subject_of(model)
