"""``vlmtok list`` and ``vlmtok show``: what there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer.core

from .application import Once, app
from .console import at_work, print_json, print_table, standard_output
from .inputs import check_fit, question_about, say_overlay, write_overlay
from .matrix import check_matrix, list_matrix
from .options import Adapter, Device, Dtype, Json, Model, Overlay, Picture, Prompt, Random

if TYPE_CHECKING:
    from ..lab.batch_one import Cost


@app.command("list", cls=Once)
def list_(
    pattern: Annotated[str, typer.Argument(help='Shell wildcards, for instance "*prune*".')] = "*",
    models: Annotated[bool, typer.Option("--models", help="List adapters and model families instead.")] = False,
    conventions: Annotated[bool, typer.Option("--conventions", help="List ways of counting instead.")] = False,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="List which method runs on which family, where, and why not elsewhere.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="With --matrix: this model alone, as for vlmtok run; no weights are read.", show_default=False
        ),
    ] = None,
    adapter: Adapter = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="With --matrix: print CSV.")] = False,
    as_json: Json = False,
) -> None:
    """List the methods; --models lists families, --matrix what runs on what, --conventions how papers count."""
    check_matrix(matrix, models or conventions, {"--model": model, "--adapter": adapter, "--csv": as_csv}, as_json)
    if matrix:
        list_matrix(pattern, model, adapter, as_csv, as_json)
        return
    from ..lab import catalogue, family_table

    if conventions:
        _list_conventions(as_json)
        return
    if models:
        from ..forecast.presets import PRESETS
        from ..forecast.published import PUBLISHED

        adapters, families = family_table.models(), family_table.families()
        if as_json:
            print_json({"adapters": adapters, "families": families, "presets": list(PRESETS)})
            return
        print_table(
            ("adapter", "models"), [(row["adapter"], ", ".join(row["classes"])) for row in adapters], "adapters"
        )
        rows = [(row["family"], ", ".join(row["stages"]) or "-", row["refused"] or "") for row in families]
        print_table(("family", "tokens can leave at", "if not: why"), rows, "families")
        known = [(name, PUBLISHED[name].checkpoint if name in PUBLISHED else "") for name in PRESETS]
        print_table(("preset", "checkpoint"), known, "presets of vlmtok estimate")
        return
    entries = catalogue.methods(pattern)
    if not entries:
        from ..errors import UnknownMethod

        raise UnknownMethod(f"no method matches {pattern!r}; known: {', '.join(e.name for e in catalogue.methods())}")
    if as_json:
        print_json({"methods": [entry.to_dict() for entry in entries]})
        return
    listed = [
        (
            entry.name,
            ", ".join(entry.stages),
            "yes" if entry.training_free else "no",
            ", ".join(entry.adapters) + (f" ({limits})" if (limits := catalogue.limits(entry)) else ""),
            entry.paper + (f", arXiv {entry.arxiv}" if entry.arxiv else ""),
        )
        for entry in entries
    ]
    print_table(("method", "acts at", "training-free", "adapters", "paper"), listed)


def _list_conventions(as_json: bool) -> None:
    from ..cost.conventions import CONVENTIONS

    found = [(c.name, c.unit, " and ".join(c.stages), c.summary, c.source, c.gives) for c in CONVENTIONS.values()]
    head = ("convention", "unit", "counts", "formula", "source", "published figures that it gives")
    if as_json:
        print_json({"conventions": [dict(zip(head, row)) for row in found]})
    else:
        print_table(head, found)


@app.command(cls=Once)
def show(
    method: Annotated[str, typer.Argument(metavar="METHOD", help='A name or spec string, such as "todre:keep=0.1".')],
    model: Model = None,
    image: Picture = None,
    prompt: Prompt = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overlay: Overlay = "overlay.png",
    random: Random = False,
    adapter: Adapter = None,
    as_json: Json = False,
) -> None:
    """Show a method: paper, parameters, sites, signals, deviations; with --model and --image also its overlay."""
    from ..core.spec import parse_methods
    from ..lab import catalogue
    from ..lab.batch_one import costs

    made = parse_methods(method)
    entries = [catalogue.entry(one.spec_name()) for one in made]
    with at_work() as progress:
        result = None
        if model is not None:
            check_fit(model, method, prompt, adapter)
        if image is not None or prompt is not None:
            from ..lab.compare import compare

            asked = question_about(progress, model, image, prompt, [method], device, dtype, overlay, random, adapter)
            result = compare(
                asked.load(), asked.shown, asked.words, method, max_new_tokens=1, rounds=0, adapter=adapter
            )
        layouts = [_layout(one, model, adapter) for one in made]
        sites = [catalogue.sites(one, layout) for one, layout in zip(made, layouts)]
        refused = [catalogue.refused_settings(one, layout) for one, layout in zip(made, layouts)]
        remarks = [catalogue.remarks(one, layout) for one, layout in zip(made, layouts)]
        said = [catalogue.said_of(one, layout) for one, layout in zip(made, layouts)]
        path, words = (None, "") if result is None else write_overlay(result, overlay)
    if as_json:
        found = [
            {
                **entry.to_dict(),
                "settings": one.settings(),
                "sites_on": place,
                "sites": rows,
                "refused_settings": cannot,
                "remarks": chosen,
                "notes": notes,
                "batch_one": [cost.to_dict() for cost in costs(entry.name)],
            }
            for entry, one, (place, rows), cannot, chosen, notes in zip(entries, made, sites, refused, remarks, said)
        ]
        print_json({"methods": found, "overlay": path})
        return
    console = standard_output()
    for entry, one, (place, rows), cannot, notes in zip(entries, made, sites, refused, said):
        _show_method(console, entry, one.settings(), place, rows)
        _show_limits(console, place, cannot, notes)
        _show_costs(costs(entry.name))
        _show_doubts(console, entry)
    if result is not None:
        say_overlay(console, path, words)


def _layout(method: Any, model: str | None, adapter: str | None) -> Any:
    """What a model offers: the user's, or the first kind of model on which the method runs."""
    from ..lab import catalogue

    if model is None:
        kinds = catalogue.kinds_of(method.spec_name())
        return catalogue.KINDS[kinds[0]].layout()
    from ..adapters import adapter_for
    from ..loading import skeleton

    return adapter_for(skeleton(model).model, adapter).layout()


def _show_method(console: Any, entry: Any, settings: dict[str, Any], place: str, sites: list[dict[str, Any]]) -> None:
    from ..core.settings import format_value

    console.print(f"{entry.title} ({entry.name})", style="bold", highlight=False)
    facts = [
        ("", entry.summary),
        ("paper", entry.paper),
        ("arXiv", f"https://arxiv.org/abs/{entry.arxiv}" if entry.arxiv else ""),
        ("code", entry.code or "none published"),
        ("training", "needs none" if entry.training_free else "needs training"),
        ("compared with", entry.parity),
        ("presets", ", ".join(entry.presets)),
        ("adapters", ", ".join(entry.adapters)),
    ]
    for name, text in facts:
        if text:
            console.print(f"{name:<14}{text}" if name else text, highlight=False, markup=False)
    rows = [(p.name, format_value(settings[p.name]), p.default, p.what) for p in entry.parameters]
    print_table(("parameter", "here", "default", "what it does"), rows)
    if entry.other_names:
        named = [(one.name, one.stands_for, one.whose) for one in entry.other_names]
        print_table(("also read", "stands for", "name in"), named)
    listed = [(row["site"], row["scope"], row["positions"], ", ".join(row["needs"])) for row in sites]
    print_table(("site", "one row is a", "positions", "signals"), listed, f"sites on {place}")


def _show_limits(console: Any, place: str, refused: list[dict[str, str]], notes: list[str]) -> None:
    """What a model refuses of a method's settings, and what else holds there."""
    if refused:
        print_table(("setting", "why"), [(row["setting"], row["why"]) for row in refused], f"refused on {place}")
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def _show_costs(found: Sequence[Cost]) -> None:
    """What a method costs for one picture, where that is on record."""
    if found:
        rows = [(c.what, str(c.tokens), c.spec, f"{c.times:.2f} x", c.verdict, f"{c.device}, {c.dtype}") for c in found]
        print_table(("what", "tokens", "setting", "takes", "so it", "on"), rows, "time of one picture (batch 1)")


def _show_doubts(console: Any, entry: Any) -> None:
    for title, sentences in (("does badly", entry.caveats), ("differs from the released code", entry.deviations)):
        if sentences:
            console.print(title, style="bold")
        for sentence in sentences:
            console.print(f"- {sentence}", highlight=False, markup=False)
