"""The command line: ``vlmtok run | list | show | estimate | bench | doctor``. It parses and prints, the rest works.

Whatever is wrong with the input is one line on standard error and exit code 2. With ``--json`` one JSON object goes to
standard output, and nothing else. Libraries are imported when a command needs them.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

if TYPE_CHECKING:
    from .bench import Progress

USAGE_ERROR = 2


class OneLine(typer.core.TyperGroup):
    """A group of commands whose errors are one line each."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Runs a command and exits."""
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except Exception as problem:
            from .guard import told

            fault = told(problem)
            if fault is not None:
                raise fault from problem
            line = _line_of(problem)
            if line is None:
                raise
            if line:  # help was asked for by giving nothing
                print(f"vlmtok: {line}", file=sys.stderr)
            code = USAGE_ERROR
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


def _line_of(problem: Exception) -> str | None:
    """An error that the user can mend, on one line; None for ours."""
    from .errors import InternalError, VlmtokError

    if isinstance(problem, InternalError):
        return None
    if isinstance(problem, VlmtokError):
        text = str(problem)
    elif hasattr(problem, "format_message"):  # of the command line itself: no such option, no such command
        text = problem.format_message()
    elif isinstance(problem, OSError):  # a file that could not be written
        text = f"{problem.strerror or problem}: {problem.filename}" if problem.filename else str(problem)
    elif type(problem).__name__ == "OutOfMemoryError":
        text = f"out of memory: {problem}"
    else:
        return None
    return " ".join(text.split())


app = typer.Typer(
    cls=OneLine,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Prune and merge the visual tokens of vision-language models that already exist.",
)


def main() -> None:
    """Entry point of the ``vlmtok`` command."""
    app()


# ---------------------------------------------------------------------- options
Model = Annotated[
    str | None,
    typer.Option(
        help="A folder or hub id of a transformers checkpoint, timm:NAME or open_clip:NAME[:PRETRAINED]; by default "
        "the checkpoint that ships with the package.",
        show_default=False,
    ),
]
Picture = Annotated[
    str | None, typer.Option("--image", help="A picture file; by default a sample.", show_default=False)
]
Prompt = Annotated[str | None, typer.Option(help="What to ask about the picture; needs --image.", show_default=False)]
Method = Annotated[
    str | None,
    typer.Option(help='A spec string, for instance "todre:keep=0.1" or "pitome:ratio=0.9+fastv".', show_default=False),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Random = Annotated[bool, typer.Option("--random", help="Draw the weights instead of loading trained ones.")]
Adapter = Annotated[
    str | None, typer.Option(help='"generic-vlm" tries a family that is not listed.', show_default=False)
]
Overlay = Annotated[str, typer.Option(help="Where the picture with what became of its patches goes.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Rounds = Annotated[int, typer.Option(min=1, help="Interleaved rounds of the measurement.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of the answer, which is greedy.")]


# ---------------------------------------------------------------------- run
@app.command()
def run(
    model: Model = None,
    image: Picture = None,
    prompt: Prompt = None,
    method: Method = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overlay: Overlay = "overlay.png",
    max_new_tokens: Tokens = 32,
    rounds: Rounds = 5,
    random: Random = False,
    adapter: Adapter = None,
    as_json: Json = False,
) -> None:
    """Answer a question about a picture, bare and compressed, side by side."""
    with _at_work() as progress:
        result, picture = _compare(
            progress, model, image, prompt, method, device, dtype, overlay, max_new_tokens, rounds, random, adapter
        )
        written = _write_overlay(result, overlay)
    if as_json:
        _print_json({**result.to_dict(), "image": picture, "overlay": written})
        return
    console = _console()
    console.print(f"picture  {picture}", highlight=False, soft_wrap=True)
    console.print(result)
    _say_overlay(console, result, written)


def _compare(
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
    from .errors import ParameterError
    from .method import parse_methods

    if method is not None:
        parse_methods(method)
    if prompt is not None and image is None:
        raise ParameterError("--prompt asks about a picture: add --image FILE")
    progress("starting", 0, 0)
    from . import loading, session

    loading.check_writable(overlay, picture=True)
    where = loading.pick_device(device)
    loading.pick_dtype(dtype, where)
    shown, picture, question = _picture(image, prompt, model)
    language = _check_fit(model, method, prompt, adapter)
    loaded = _load(progress, model, device, dtype, random)
    result = session.compare(
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


def _picture(image: str | None, prompt: str | None, model: str | None) -> tuple[Any, str, str | None]:
    """The picture, what to call it, and the question: the user's, or a sample's."""
    from . import loading

    if image is not None:
        embedded = model in (None, loading.EMBEDDED)  # it knows the words of its samples' questions and no others
        question = loading.samples()[0].question if embedded and prompt is None else prompt
        return loading.open_picture(image), image, question
    sample = loading.samples()[0]
    return loading.open_picture(sample.path), sample.path.name, sample.question


def _check_fit(model: str | None, method: str | None, prompt: str | None, adapter: str | None) -> bool:
    """Refuses, before weights are read, a model, or a method or prompt that does not fit it; says if it answers."""
    from . import session
    from .adapters import adapter_for
    from .errors import ParameterError
    from .estimate import attach
    from .flops import ModelShape

    bare = session.skeleton(model)
    if prompt is not None and not bare.language:
        raise ParameterError(session.NO_PROMPT.format(bare.name))
    carrier = adapter_for(bare.model, adapter)
    attach(ModelShape(carrier.name, carrier.layout()), method or session.default_method(bare.model, adapter))
    return bare.language


def _load(progress: Progress, model: str | None, device: str, dtype: str, random: bool) -> Any:
    from . import loading

    progress(f"loading {model or loading.EMBEDDED}", 0, 0)
    return loading.load(model, device=device, dtype=dtype, random=random)


def _write_overlay(result: Any, path: str) -> str | None:
    if result.overlay is None:
        return None
    try:
        result.overlay.save(path)
    except (OSError, ValueError) as problem:
        from .loading import LoadError, line_of

        raise LoadError(f"cannot write {path!r}: {line_of(problem)}") from None
    return path


def _say_overlay(console: Any, result: Any, written: str | None) -> None:
    if written is None:
        console.print(f"overlay  not drawn: {result.overlay_problem}", highlight=False, soft_wrap=True)
    else:
        how = "bright patches stayed, one colour is one merged group, dark ones left before the language model"
        console.print(f"overlay  {written} ({how})", highlight=False, soft_wrap=True)


# ---------------------------------------------------------------------- list
@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help='Shell wildcards, for instance "*prune*".')] = "*",
    models: Annotated[bool, typer.Option("--models", help="List adapters and model families instead.")] = False,
    as_json: Json = False,
) -> None:
    """List the methods, or with --models the adapters, families and presets."""
    from . import catalogue

    if models:
        from .presets import PRESETS

        adapters, families = catalogue.models(), catalogue.families()
        if as_json:
            _print_json({"adapters": adapters, "families": families, "presets": list(PRESETS)})
            return
        _print_table(
            ("adapter", "models"), [(row["adapter"], ", ".join(row["classes"])) for row in adapters], "adapters"
        )
        rows = [(row["family"], ", ".join(row["stages"]) or "-", row["refused"] or "") for row in families]
        _print_table(("family", "tokens can leave at", "if not: why"), rows, "families")
        _console().print(f"presets of vlmtok estimate: {', '.join(PRESETS)}", highlight=False)
        return
    entries = catalogue.methods(pattern)
    if not entries:
        from .errors import UnknownMethod

        raise UnknownMethod(f"no method matches {pattern!r}; known: {', '.join(e.name for e in catalogue.methods())}")
    if as_json:
        _print_json({"methods": [entry.to_dict() for entry in entries]})
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
    _print_table(("method", "acts at", "training-free", "adapters", "paper"), listed)


# ---------------------------------------------------------------------- show
@app.command()
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
    from . import catalogue
    from .method import parse_methods

    made = parse_methods(method)
    entries = [catalogue.entry(one.spec_name()) for one in made]
    with _at_work() as progress:
        result = None
        if model is not None:
            _check_fit(model, method, prompt, adapter)
        if image is not None or prompt is not None:
            result, _ = _compare(progress, model, image, prompt, method, device, dtype, overlay, 1, 1, random, adapter)
        sites = [catalogue.sites(one, _layout(one, model, adapter)) for one in made]
        written = None if result is None else _write_overlay(result, overlay)
    if as_json:
        found = [
            {**entry.to_dict(), "settings": one.settings(), "sites_on": place, "sites": rows}
            for entry, one, (place, rows) in zip(entries, made, sites)
        ]
        _print_json({"methods": found, "overlay": written})
        return
    console = _console()
    for entry, one, (place, rows) in zip(entries, made, sites):
        _show_method(console, entry, one.settings(), place, rows)
    if result is not None:
        _say_overlay(console, result, written)


def _layout(method: Any, model: str | None, adapter: str | None) -> Any:
    """What a model offers: the user's, or the first kind of model on which the method runs."""
    from . import catalogue

    if model is None:
        kinds = catalogue.kinds_of(method.spec_name())
        return catalogue.KINDS[kinds[0]].layout()
    from .adapters import adapter_for
    from .session import skeleton

    return adapter_for(skeleton(model).model, adapter).layout()


def _show_method(console: Any, entry: Any, settings: dict[str, Any], place: str, sites: list[dict[str, Any]]) -> None:
    from .method import format_value

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
    _print_table(("parameter", "here", "default", "what it does"), rows)
    listed = [(row["site"], row["scope"], row["positions"], ", ".join(row["needs"])) for row in sites]
    _print_table(("site", "one row is a", "positions", "signals"), listed, f"sites on {place}")
    for title, sentences in (("does badly", entry.caveats), ("differs from the released code", entry.deviations)):
        if sentences:
            console.print(title, style="bold")
        for sentence in sentences:
            console.print(f"- {sentence}", highlight=False, markup=False)


# ---------------------------------------------------------------------- estimate
@app.command()
def estimate(
    model: Annotated[
        str, typer.Argument(help="A preset (vlmtok list --models), or a model as for vlmtok run.")
    ] = "llava-1.5-7b",
    method: Method = None,
    text_tokens: Annotated[int | None, typer.Option(min=0, help="Of the prompt.", show_default=False)] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Of a prompt.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Prompts, or pictures of a tower.")] = 1,
    visual_tokens: Annotated[int | None, typer.Option(min=1, help="Of a picture.", show_default=False)] = None,
    crops: Annotated[int | None, typer.Option(min=1, help="Tower rows of a picture.", show_default=False)] = None,
    convention: Annotated[
        str | None, typer.Option(help="Also count as a paper does, for instance fastv.", show_default=False)
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a method would save, without running anything and without weights."""
    from .errors import ParameterError
    from .method import parse_methods

    if markdown + as_csv + as_json > 1:
        raise ParameterError("one of --json, --markdown and --csv")
    if method is not None:
        parse_methods(method)
    with _at_work() as progress:
        progress("starting", 0, 0)
        from . import session
        from .estimate import estimate as estimated

        subject = _subject(model)
        report = estimated(
            subject,
            method or (session.DEFAULT_METHOD if subject.language else session.DEFAULT_TOWER_METHOD),
            text_tokens=text_tokens,
            pictures=pictures,
            batch=batch,
            visual_tokens=visual_tokens,
            crops=crops,
            convention=convention,
        )
    if as_json:
        _print_json({**report.to_dict(), "convention": convention})
    elif markdown or as_csv:
        print(report.to_markdown() if markdown else report.to_csv(), end="")
    else:
        _console().print(report)


def _subject(model: str) -> Any:
    """The shape of a preset, or of a model without data."""
    import os

    from . import loading
    from .estimate import shape_of
    from .presets import PRESETS

    named = not os.path.isdir(model) and "/" not in model and ":" not in model and model != loading.EMBEDDED
    # A plain name is a preset's; a wrong one is told what there is.
    return shape_of(model if model in PRESETS or named else loading.skeleton(model).model)


# ---------------------------------------------------------------------- bench
@app.command()
def bench(
    model: Model = None,
    method: Method = None,
    image: Picture = None,
    prompt: Prompt = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Rows of the batch.")] = 1,
    max_new_tokens: Tokens = 16,
    rounds: Rounds = 9,
    limit: Annotated[float, typer.Option(min=0, help="Seconds for each group of cases that take turns.")] = 60.0,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="The standard suite on tiny shapes, to see that it runs.")
    ] = False,
    random: Random = False,
    csv: Annotated[str | None, typer.Option(help="Also write the rows to this CSV file.", show_default=False)] = None,
    out: Annotated[str | None, typer.Option(help="Also write the rows to this JSON file.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Measure a model bare and compressed in turns; without --model, the standard suite of large models on a GPU."""
    from .errors import ParameterError
    from .method import parse_methods

    if method is not None:
        parse_methods(method)
    if model is None and (method is not None or image is not None or prompt is not None):
        raise ParameterError("--method, --image and --prompt need --model; without it the standard suite runs")
    if prompt is not None and image is None:
        raise ParameterError("--prompt asks about a picture: add --image FILE")
    with _at_work() as progress:
        progress("starting", 0, 0)
        from . import loading, suite

        for path in (csv, out):
            if path is not None:
                loading.check_writable(path)
        where = loading.pick_device(device)
        if model is not None:
            loading.pick_dtype(dtype, where)
            shown, _, question = _picture(image, prompt, model)
            language = _check_fit(model, method, prompt, None)
            loaded = _load(progress, model, device, dtype, random)
            rows = suite.bench_pair(
                loaded,
                shown,
                question if language else None,
                method,
                batch=batch,
                max_new_tokens=max_new_tokens,
                rounds=rounds,
                limit=limit,
                progress=progress,
            )
        elif tiny or where.type == "cuda":
            sizes = suite.TINY if tiny else suite.FULL
            rows = suite.run_suite(where, sizes=sizes, rounds=rounds, limit=limit, progress=progress)
        else:
            rows = suite.model_suite(progress)
    _write_rows(rows, csv, out)
    if as_json:
        _print_json({"rows": rows})
    else:
        _print_rows(rows)


def _write_rows(rows: list[dict[str, Any]], csv: str | None, out: str | None) -> None:
    from .bench import write_rows

    if csv is not None:
        write_rows(csv, rows)
    if out is not None:
        with open(out, "w", encoding="utf-8") as file:
            json.dump({"rows": rows}, file, indent=1)
            file.write("\n")


def _print_rows(rows: list[dict[str, Any]]) -> None:
    """Rows of `vlmtok.suite` for people."""
    console = _console()
    measured = any(row["measured"] for row in rows)
    gpu = any(row.get("seconds") is not None for row in rows)
    head = ["model", "stage", "method", "batch", "visual tokens", "MACs promise"]
    if measured:
        head += ["measured", "of promise", "pays from"]
    if gpu:
        head += ["ms", "peak MB"]
    head += ["cache MB"]
    if not measured:
        head += ["floor ms", "floor ratio"]
    table = []
    for row in rows:
        name = row["method"] + ("" if row["kernels"] == "auto" else f" ({row['kernels']})")
        cells = [row["model"], row["stage"], name, str(row["batch"]), _cell(row["visual_tokens"], "{:.0f}")]
        cells.append(_cell(row["mac_ratio"], "{:.2f} x"))
        if measured:
            spread = "" if row["p20"] is None else f" ({row['p20']:.2f} to {row['p80']:.2f})"
            cells += [_cell(row["speedup"], "{:.2f} x") + spread, _cell(row["of_promise"], "{:.0%}")]
            cells.append(_cell(row["break_even_tokens"], "{:.0f} tokens"))
        if gpu:
            cells += [_two(row, "seconds", 1e3, "{:.2f}"), _two(row, "peak_bytes", 1e-6, "{:.0f}")]
        cells.append(_two(row, "kv_bytes", 1e-6, "{:.0f}" if not measured or gpu else "{:.3g}"))
        if not measured:
            cells += [_two(row, "floor_seconds", 1e3, "{:.2f}"), f"{row['floor_speedup']:.2f} x"]
        table.append(cells)
    _print_table(head, table)
    if measured:
        first = rows[0]
        place = f"{first['device']}, driver {first['driver']}" if gpu else "CPU: relative to bare, never absolute"
        versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "triton", "transformers", "vlmtok"))
        console.print(f"{place}; {first['dtype']}; {versions}; medians of interleaved rounds", highlight=False)
    else:
        from .suite import PEAK

        console.print(
            f"not measured: there is no GPU here. Floors are modelled for an {PEAK.name} at "
            f"{PEAK.flops / 1e12:.0f} TFLOP/s (bf16) and {PEAK.moved / 1e12:.1f} TB/s; bare > compressed.",
            style="bold",
            highlight=False,
        )


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _two(row: dict[str, Any], name: str, factor: float, form: str) -> str:
    """Bare and compressed in one cell."""
    bare, short = row.get(f"{name}_bare"), row.get(name)
    return "" if bare is None or short is None else f"{form.format(factor * bare)} > {form.format(factor * short)}"


# ---------------------------------------------------------------------- doctor
@app.command()
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
    with _at_work() as progress:
        progress("starting", 0, 0)
        from . import doctor as clinic

        report = clinic.examine(
            family or (), everything, model=model, adapter=adapter, device=device, dtype=dtype, progress=progress
        )
    if as_json:
        _print_json(report.to_dict())
    else:
        _console().print(report)
    if not report.ok:
        raise typer.Exit(1)


# ---------------------------------------------------------------------- printing
def _console() -> Any:
    """Standard output; a pipe gets lines as wide as a wide terminal."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=140)


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    _console().print(table)


def _print_json(value: dict[str, Any]) -> None:
    """One object; what JSON cannot say (infinite, not a number) is null."""
    print(json.dumps(_plain(value), indent=2))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _at_work() -> Iterator[Callable[[str, int, int], None]]:
    """Context of a command at work: gives what is told of progress, and keeps warnings to one line each.

    A bar shows on a terminal and goes away when the work is done. While a model comes from the hub, the libraries' own
    bars show instead.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def tell(what: str, done: int, steps: int) -> None:
        bar.update(task, description=what, total=steps or None, completed=done)

    with warnings.catch_warnings(), bar:
        warnings.simplefilter("ignore")
        from .errors import VlmtokWarning

        warnings.simplefilter("always", VlmtokWarning)
        warnings.showwarning = _warn  # type: ignore[assignment]
        task = bar.add_task("starting", total=None)
        yield tell


def _warn(message: Warning | str, *rest: Any) -> None:
    print(f"vlmtok: note: {' '.join(str(message).split())}", file=sys.stderr)


def _print_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        print(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of all commands."""


if __name__ == "__main__":
    main()
