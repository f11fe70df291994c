"""``vlmtok bench``: speed and memory, bare and compressed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer.core

from .application import Once, app
from .console import at_work, print_json, print_table, standard_output
from .inputs import check_fit, load_model, picture_and_question, sizes_of, spec_strings
from .options import Device, Dtype, Json, Methods, Model, Picture, Prompt, Random, Rounds, Tokens

_STEPS = 16
"""Tokens that a model generates unless told otherwise."""


@app.command(cls=Once)
def bench(
    model: Model = None,
    method: Methods = None,
    image: Picture = None,
    prompt: Prompt = None,
    image_size: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="Width and height in pixels that the picture gets first.", show_default=False),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Rows of the batch.")] = 1,
    max_new_tokens: Tokens = _STEPS,
    rounds: Rounds = 9,
    limit: Annotated[float, typer.Option(min=0, help="Seconds for each group of cases that take turns.")] = 60.0,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Tiny shapes, to see that the standard suite or --all runs.")
    ] = False,
    all_: Annotated[
        str | None,
        typer.Option(
            "--all",
            metavar="FOLDER",
            help="Everything on this card: kernels beside torch, torch.compile and the rivals that are installed, "
            "launches, towers, language models; rows, a page, a roofline plot and dispatch thresholds go there.",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Of --all: kernels, launches or models; give several. All by default.", show_default=False),
    ] = None,
    random: Random = False,
    csv: Annotated[str | None, typer.Option(help="Also write the rows to this CSV file.", show_default=False)] = None,
    out: Annotated[str | None, typer.Option(help="Also write the rows to this JSON file.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Measure a model bare and compressed in turns; without --model, the standard suite of large models on a GPU."""
    from ..errors import ParameterError

    specs = spec_strings(method)
    if model is None and (specs or image is not None or prompt is not None):
        raise ParameterError("--method, --image and --prompt need --model; without it the standard suite runs")
    if model is None and (
        image_size is not None or dtype != "auto" or batch != 1 or max_new_tokens != _STEPS or random
    ):
        raise ParameterError(
            "--image-size, --dtype, --batch, --max-new-tokens and --random need --model; the standard suite has its own"
        )
    if only and all_ is None:
        raise ParameterError("--only chooses from --all FOLDER")
    if all_ is not None:
        if model is not None or csv is not None or out is not None:
            raise ParameterError("--all FOLDER writes files of its own: it takes no --model, --csv and --out")
        _measure_all(all_, only, device, tiny, rounds, limit, as_json)
        return
    resized = sizes_of(None if image_size is None else [image_size])
    if prompt is not None and image is None:
        raise ParameterError("--prompt asks about a picture: add --image FILE")
    with at_work() as progress:
        progress("starting", 0, 0)
        from .. import loading
        from ..lab import suite, suite_modelled, suite_models

        for path in (csv, out):
            if path is not None:
                loading.check_writable(path)
        where = loading.pick_device(device)
        if model is not None:
            loading.pick_dtype(dtype, where)
            shown, _, question = picture_and_question(image, prompt, model)
            shown = shown if resized is None else shown.resize(resized[0])
            fits = [check_fit(model, spec, prompt, None) for spec in specs or (None,)]
            loaded = load_model(progress, model, device, dtype, random)
            rows = [
                row
                for spec in specs or (None,)
                for row in suite.bench_pair(
                    loaded,
                    shown,
                    question if fits[0] else None,
                    spec,
                    batch=batch,
                    max_new_tokens=max_new_tokens,
                    rounds=rounds,
                    limit=limit,
                    progress=progress,
                )
            ]
        elif tiny or where.type == "cuda":
            sizes = suite_models.TINY if tiny else suite_models.FULL
            rows = suite.run_suite(where, sizes=sizes, rounds=rounds, limit=limit, progress=progress)
        else:
            rows = suite_modelled.model_suite(progress)
    _write_rows(rows, csv, out)
    if as_json:
        print_json({"rows": rows})
    else:
        _print_rows(rows)


def _measure_all(
    folder: str, parts: list[str] | None, device: str, tiny: bool, rounds: int, limit: float, as_json: bool
) -> None:
    """`--all`: measures, and names the files and where the figures of each part are from."""
    with at_work() as progress:
        progress("starting", 0, 0)
        from .. import loading
        from ..lab import card

        found = card.measure_card(
            folder,
            loading.pick_device(device),
            tiny=tiny,
            parts=parts or card.PARTS,
            rounds=rounds,
            limit=limit,
            progress=progress,
        )
    if as_json:
        print_json(
            {
                "files": [str(path) for path in found.files],
                "status": found.status,
                "policies": None if found.policies is None else str(found.policies),
            }
        )
        return
    console = standard_output()
    for path in found.files:
        console.print(str(path), highlight=False, soft_wrap=True)
    for name, status in found.status.items():
        console.print(f"{name}: {status}", style="bold", highlight=False)
    if found.policies is not None:
        console.print(f"VLMTOK_POLICIES={found.policies} takes these thresholds", highlight=False, soft_wrap=True)


def _write_rows(rows: list[dict[str, Any]], csv: str | None, out: str | None) -> None:
    from ..timing import write_rows

    if csv is not None:
        write_rows(csv, rows)
    if out is not None:
        with open(out, "w", encoding="utf-8") as file:
            json.dump({"rows": rows}, file, indent=1)
            file.write("\n")


def _print_rows(rows: list[dict[str, Any]]) -> None:
    """Rows of `vlmtok.lab.suite` for people."""
    from ..cost.units import binary

    console = standard_output()
    measured = any(row["measured"] for row in rows)
    gpu = any(row.get("seconds") is not None for row in rows)
    head = ["model", "stage", "method", "batch", "visual tokens", "MACs promise"]
    if measured:
        head += ["measured", "of promise", "pays from"]
    if gpu:
        head += ["ms", "peak memory"]
    head += ["key-value cache"]
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
            cells += [_two(row, "seconds", _milliseconds), _two(row, "peak_bytes", binary)]
        cells.append(_two(row, "kv_bytes", binary))
        if not measured:
            cells += [_two(row, "floor_seconds", _milliseconds), f"{row['floor_speedup']:.2f} x"]
        table.append(cells)
    print_table(head, table)
    if measured:
        first = rows[0]
        place = f"{first['device']}, driver {first['driver']}" if gpu else "CPU: relative to bare, never absolute"
        versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "triton", "transformers", "vlmtok"))
        console.print(f"{place}; {first['dtype']}; {versions}; medians of interleaved rounds", highlight=False)
    else:
        from ..lab.suite_measure import PEAK

        console.print(
            f"not measured: there is no GPU here. Floors are modelled for an {PEAK.name} at "
            f"{PEAK.flops / 1e12:.0f} TFLOP/s (bf16) and {PEAK.moved / 1e12:.1f} TB/s; bare > compressed.",
            style="bold",
            highlight=False,
        )


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _two(row: dict[str, Any], name: str, show: Callable[[float], str]) -> str:
    """Bare and compressed in one cell."""
    bare, short = row.get(f"{name}_bare"), row.get(name)
    return "" if bare is None or short is None else f"{show(bare)} > {show(short)}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"
