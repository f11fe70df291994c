"""``vlmtok recommend``: two or three methods for a model and a budget, with the rows behind them."""

from __future__ import annotations

from typing import Annotated

import typer.core

from .application import Once, app
from .console import at_work, print_json, standard_output
from .options import Adapter, Json


@app.command(cls=Once)
def recommend(
    model: Annotated[
        str | None,
        typer.Option(
            help="As for vlmtok run, or a preset of vlmtok estimate; no weights are read.", show_default=False
        ),
    ] = None,
    budget: Annotated[
        str, typer.Option(help="Visual tokens that may stay: a share such as 0.25, or a number such as 64.")
    ] = "0.25",
    task: Annotated[
        str | None,
        typer.Option(
            help="ocr, chat or classification; by default chat, and classification for towers.", show_default=False
        ),
    ] = None,
    results: Annotated[
        list[str] | None,
        typer.Option(help="A CSV file of vlmtok eval; by default those that ship.", show_default=False),
    ] = None,
    adapter: Adapter = None,
    as_json: Json = False,
) -> None:
    """Name methods for a model and a budget by what was measured; none that the model refuses."""
    share = _budget(budget)
    with at_work() as progress:
        progress("starting", 0, 0)
        from ..evaluation.recommend import recommend as ask

        found = ask(model, share, task, results=results, adapter=adapter)
    if as_json:
        print_json(found.to_dict())
    else:
        standard_output().print(found)


def _budget(text: str) -> float | int:
    """A share or a number, as typed.

    Raises:
        ParameterError: neither.
    """
    from ..errors import ParameterError

    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise ParameterError(f"--budget {text!r}: a share such as 0.25, or a number such as 64") from None
