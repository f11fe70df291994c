"""``python -m vlmtok_vllm.bench``: vLLM's OpenAI server under load, bare and pruned in turns."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vlmtok.tabular import Table
from vlmtok.timing import environment

from . import engine_args
from .client import Client, label
from .command import BARE, at_least, folder, guarded, parse, parser, picture_size, ships
from .load import Measured, asked, take_turns
from .pictures import fresh
from .server import Server, on_cpu
from .versions import installed

CACHE = "vllm:cache_config_info"


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts a server, measures it, stops it and prints a table in Markdown.

    Returns:
        0, or 1 where the server or a request failed; standard error says why.
    """
    options = parse(_parser(), arguments)
    options.picture_size = tuple(options.picture_size or picture_size(options.model))
    return guarded("bench", lambda: _bench(options))


def _bench(options: argparse.Namespace) -> int:
    tell("starting the server")
    how = {"limit": options.limit, "log": options.log}
    with Server(folder(options.model), engine_args(), options.more, **how) as server:
        client = Client(server.port, server.model, begin=ships(options.model))
        found = measure(client, options)
        cache = Cache.of(client.metrics())
    rows = [row for concurrency, one in found.items() for row in rows_of(concurrency, one, cache, not on_cpu())]
    result = {
        "model": options.model or "the checkpoint that ships with vlmtok",
        "requests": options.requests,
        "rounds": options.rounds,
        "output_tokens": options.output_tokens,
        "picture_size": list(options.picture_size),
        "repeat_pictures": options.repeat_pictures,
        "server": options.more,
        "cache": None if cache is None else asdict(cache),
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
    made.add_argument("--requests", type=number, default=32, help="in a round of each method (%(default)s)")
    made.add_argument("--rounds", type=number, default=7, help="at each concurrency (%(default)s)")
    made.add_argument("--output-tokens", type=number, default=8, help="of every request (%(default)s)")
    made.add_argument("--picture-size", type=number, nargs=2, metavar=("W", "H"), help="in pixels")
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
    pictures = fresh(options.picture_size)
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


@dataclass(frozen=True)
class Cache:
    """The server's cache of keys and values.

    Attributes:
        tokens: that it holds.
        block: tokens that are given to a request at a time.
    """

    tokens: int
    block: int

    @classmethod
    def of(cls, metrics: str) -> Cache | None:
        """What the server says of it in Prometheus text; None where it does not."""
        said = [label(metrics, CACHE, key) for key in ("kv_cache_size_tokens", "block_size")]
        return cls(*map(int, said)) if all(text and text.isdigit() for text in said) else None

    def requests(self, found: Measured) -> int:
        """How many requests of a kind it holds at once."""
        taken = [-(-answer.kv_tokens // self.block) * self.block for answer in found.answers]
        return int(self.tokens // statistics.fmean(taken))


def rows_of(concurrency: int, found: dict[str, Measured], cache: Cache | None, absolute: bool) -> list[dict[str, Any]]:
    """What was measured at one concurrency, a row a method.

    Args:
        concurrency: requests at a time.
        found: by method, bare first.
        cache: of the server.
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
            "requests_in_cache": None if cache is None else cache.requests(one),
            "prefix_queries": sum(block.queries for block in one.blocks),
            "prefix_hits": sum(block.hits for block in one.blocks),
            "prefix_hit_share": one.hit_share,
        }
        for method, one in found.items()
    ]


def machine() -> dict[str, Any]:
    """Card or processor, and the versions that a figure depends on."""
    engine, version = installed()
    place = environment("cuda" if torch.cuda.is_available() else "cpu")
    return {**place, "vllm": version, "vllm_distribution": engine}


def report(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    absolute = any(row["requests_per_second"] is not None for row in result["rows"])
    head = ["concurrency", "method"]
    head += ["requests/s", "first token, ms"] if absolute else []
    head += ["throughput", "first token sooner", "prompt tokens", "KV tokens", "fit the cache", "prefix hits"]
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
                "" if row["requests_in_cache"] is None else str(row["requests_in_cache"]),
                f"{row['prefix_hit_share']:.0%}",
            ]
        )
    place = result["machine"]
    notes = [
        f"{place['device']}; vLLM {place['vllm']}, torch {place['torch']}, transformers {place['transformers']}, "
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
