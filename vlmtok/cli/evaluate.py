"""``vlmtok eval``: methods x budgets over a task, with intervals; a run that was stopped goes on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer.core

from .application import Once, app
from .console import at_work, print_json, print_table, standard_output
from .options import Device, Dtype, Json

if TYPE_CHECKING:
    from ..evaluation.table import Evaluation

_FORMS = {"csv": "to_csv", "md": "to_markdown", "tex": "to_latex"}


@app.command(name="eval", cls=Once)
def evaluate(
    task: Annotated[str | None, typer.Argument(help="Name of a task; see --list.", show_default=False)] = None,
    model: Annotated[
        str | None, typer.Option(help="As for vlmtok run; by default the task's own.", show_default=False)
    ] = None,
    methods: Annotated[
        str,
        typer.Option(help='Behind commas: names, spec strings, stacks ("tome+fastv"); all: every one registered.'),
    ] = "all",
    # Methods have settings of the names keep and seed, which their refusals name.
    shares: Annotated[
        str, typer.Option("--keep", help="Budgets behind commas: shares of the visual tokens.")
    ] = "0.5,0.25,0.1",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions; by default all of the task.", show_default=False)
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="Folder of pictures, for the tasks that take one.", show_default=False)
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Answers by methods that draw.")] = 3,
    first_seed: Annotated[int, typer.Option("--seed", min=0, help="Of what methods draw, and of the intervals.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 8,
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="Random choice and smaller pictures in the table.")
    ] = True,
    as_written: Annotated[
        str | None,
        typer.Option(help="Further spec strings, which keep their settings whatever the budget.", show_default=False),
    ] = None,
    latency: Annotated[
        int, typer.Option(min=0, help="Rounds of the measurement of time; 0 measures none, and runs are alike.")
    ] = 0,
    out: Annotated[str, typer.Option(help="Folder of the journal, the table (csv, md, tex) and the plot.")] = "eval",
    device: Device = "auto",
    dtype: Dtype = "auto",
    listing: Annotated[bool, typer.Option("--list", help="List the tasks.")] = False,
    as_json: Json = False,
) -> None:
    """Measure what methods keep of a task's answers at equal numbers of visual tokens."""
    from ..errors import ParameterError

    if listing:
        from ..evaluation.task import TASKS, task_named

        made = [task_named(name) for name in TASKS]
        print_table(
            ["task", "model", "what it measures"], [[one.name, one.model or "yours", one.about] for one in made]
        )
        return
    if task is None:
        raise ParameterError("vlmtok eval needs a task; --list shows them")
    keeps = [_share(text) for text in shares.split(",") if text.strip()]
    try:
        with at_work() as progress:
            progress("starting", 0, 0)
            from ..evaluation.engine import evaluate as run
            from ..evaluation.task import task_named
            from ..evaluation.ways import split_names

            chosen = task_named(task, **({} if images is None else {"images": images}))
            folder = Path(out)
            found = run(
                chosen,
                model,
                split_names(methods),
                keeps,
                limit=limit,
                repeats=repeats,
                seed=first_seed,
                batch=batch,
                baselines=baselines,
                as_written=split_names(as_written or ""),
                latency_rounds=latency,
                folder=folder,
                device=device,
                dtype=dtype,
                progress=progress,
            )
            written = _write(found, folder / task)
    except KeyboardInterrupt:
        print(f"vlmtok: stopped; the same command goes on from {out}/{task}.jsonl", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print_json({"rows": found.to_records(), "files": written})
        return
    console = standard_output()
    console.print(found)
    for path in written:
        console.print(f"written  {path}", highlight=False, soft_wrap=True)


def _share(text: str) -> float:
    """A budget as typed.

    Raises:
        ParameterError: no number.
    """
    from ..errors import ParameterError

    try:
        return float(text)
    except ValueError:
        raise ParameterError(f"--keep {text!r} is no share of the visual tokens, such as 0.25") from None


def _write(found: Evaluation, stem: Path) -> list[str]:
    """The table in all its forms, and plots where matplotlib is installed."""
    from ..errors import MissingPackage, ParameterError
    from ..evaluation.plot import AXES

    written = []
    for ending, form in _FORMS.items():
        path = stem.with_suffix(f".{ending}")
        path.write_text(getattr(found, form)(), "utf-8")
        written.append(str(path))
    for cost in AXES:
        path = stem.with_name(f"{stem.name}-{cost}.png")
        try:
            figure: Any = found.plot(cost).figure
        except MissingPackage as missing:
            print(f"vlmtok: note: no plots are drawn: {missing}", file=sys.stderr)
            break
        except ParameterError:  # no row has this cost
            continue
        figure.savefig(path, dpi=150)
        written.append(str(path))
    return written
