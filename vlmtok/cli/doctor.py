"""``vlmtok doctor``: the libraries installed here, on tiny random models."""

from __future__ import annotations

from typing import Annotated

import typer.core

from .application import Once, app
from .console import at_work, print_json, standard_output
from .options import Adapter, Json


@app.command(cls=Once)
def doctor(
    family: Annotated[
        list[str] | None,
        typer.Option(
            help="A family (config.model_type), a tower, or a library: timm, open_clip, transformers; repeatable.",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every tower and family.")] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Test this checkpoint instead: as for vlmtok run, tiny-llava too.", show_default=False),
    ] = None,
    adapter: Adapter = None,
    device: Annotated[str, typer.Option(help="cpu, auto, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the checkpoint: float32, bfloat16 or float16.")] = "float32",
    as_json: Json = False,
) -> None:
    """Test vlmtok against the libraries installed here, on tiny random models; exit code 1 if something is broken."""
    with at_work() as progress:
        progress("starting", 0, 0)
        from ..lab import doctor as clinic

        report = clinic.examine(
            family or (), everything, model=model, adapter=adapter, device=device, dtype=dtype, progress=progress
        )
    if as_json:
        print_json(report.to_dict())
    else:
        standard_output().print(report)
    if not report.ok:
        raise typer.Exit(1)
