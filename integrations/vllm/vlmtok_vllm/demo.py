"""``python -m vlmtok_vllm.demo``: the sample questions through vLLM's OpenAI server, bare and pruned."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence

from vlmtok.loading import Sample, samples
from vlmtok.tabular import Table, plain

from . import engine_args
from .client import Answer, Client, Question, Refused
from .command import BARE, at_least, folder, guarded, parse, parser, picture_size, ships
from .load import asked, take_turns
from .pictures import file_url, fresh
from .server import Server, on_cpu

REFUSED = "fastv"
"""A method that no paged cache can serve: it cuts between the layers of the language model."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts a server, asks it, measures it and stops it.

    Returns:
        0 where all was as expected, 1 where it was not; standard error says what.
    """
    made = parser("demo", "Asks vLLM's OpenAI server the sample questions of vlmtok, bare and pruned, on loopback.")
    made.add_argument("--rounds", type=at_least(1), default=7, help="of the measurement (%(default)s)")
    made.add_argument("--requests", type=at_least(1), default=24, help="in a round of each method (%(default)s)")
    options = parse(made, arguments)
    return guarded("demo", lambda: _show(options))


def _show(options: argparse.Namespace) -> int:
    model = folder(options.model)
    say(f"starting vLLM's OpenAI server with {model}")
    began = time.monotonic()
    with Server(model, engine_args(), options.more, limit=options.limit, log=options.log) as server:
        say(f"it answers at {server.url} after {time.monotonic() - began:.0f} s")
        client = Client(server.port, server.model, begin=ships(options.model))
        problems = show_answers(client, options.method, known=ships(options.model))
        show_ratio(client, options, fresh(picture_size(options.model)))
        problems += show_refusal(client)
    say("the server is stopped")
    for line in problems:
        print(f"vlmtok_vllm.demo: not as expected: {line}", file=sys.stderr)
    return 1 if problems else 0


def say(line: str) -> None:
    """Prints a line at once, also into a pipe."""
    print(line, flush=True)


def show_answers(client: Client, methods: Sequence[str], known: bool) -> list[str]:
    """Asks the sample questions and prints a table.

    Args:
        client: of the server.
        methods: to ask with, besides none.
        known: whether the model is known to answer all of them.

    Returns:
        What is not as expected.
    """
    found = {
        method: [client.ask(Question(file_url(one.path), one.question), method) for one in samples()]
        for method in (BARE, *methods)
    }
    say("")
    say(answers_table(samples(), found))
    return unexpected(samples(), found, known)


def answers_table(asked_about: Sequence[Sample], found: dict[str, list[Answer]]) -> str:
    """Questions with the right answers, the answers by method, and the lengths of the prompts in the same order."""
    rows = []
    for i, sample in enumerate(asked_about):
        given = [answers[i] for answers in found.values()]
        lengths = " / ".join(str(answer.prompt_tokens) for answer in given)
        rows.append([sample.question, sample.answer, *(answer.text for answer in given), lengths])
    names = ["bare" if method == BARE else method for method in found]
    return plain(Table(["question", "right answer", *names, "prompt tokens"], rows).rich())


def unexpected(asked_about: Sequence[Sample], found: dict[str, list[Answer]], known: bool) -> list[str]:
    """What is not as it should be: a prompt that is not shorter, a known answer that is wrong."""
    problems = []
    for method, answers in found.items():
        for sample, bare, answer in zip(asked_about, found[BARE], answers):
            if method == BARE and known and answer.text != sample.answer:
                problems.append(f"{sample.question} Bare, the answer is {answer.text!r} and not {sample.answer!r}")
            if method != BARE and answer.prompt_tokens >= bare.prompt_tokens:
                problems.append(
                    f"{sample.question} Under {method} the prompt has {answer.prompt_tokens} tokens, "
                    f"bare {bare.prompt_tokens}"
                )
    return problems


def show_ratio(client: Client, options: argparse.Namespace, pictures: Iterator[str]) -> None:
    """Measures bare and pruned in turns on new pictures, and prints how many times more requests are answered."""
    found = take_turns(
        client,
        [BARE, *options.method],
        lambda: asked(pictures, options.requests),
        concurrency=8,
        tokens=8,
        rounds=options.rounds,
    )
    bare = found[BARE]
    say("")
    for method in options.method:
        one = found[method]
        times = "" if on_cpu() else f", {one.rate:.1f} instead of {bare.rate:.1f} requests a second"
        say(
            f"{method}: {one.faster_than(bare)} the requests a second of bare{times}; prompts of "
            f"{one.prompt_tokens:.0f} instead of {bare.prompt_tokens:.0f} tokens, 8 requests at a time, "
            f"every picture new ({one.hit_share:.0%} of the prompts cached)"
        )


def show_refusal(client: Client) -> list[str]:
    """Asks with a method that cannot be served and prints the refusal; then asks again.

    Returns:
        What is not as expected.
    """
    sample = samples()[0]
    question = Question(file_url(sample.path), sample.question)
    try:
        client.ask(question, REFUSED)
    except Refused as refusal:
        say(f"\n{REFUSED}: {refusal}")
        problems = [] if refusal.status == 400 else [f"{REFUSED} was refused with HTTP {refusal.status}, not 400"]
    else:
        problems = [f"{REFUSED} was not refused"]
    client.ask(question, BARE)  # a refusal must leave the engine alive
    return problems


if __name__ == "__main__":
    sys.exit(main())
