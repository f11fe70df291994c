"""Load on a server: requests at a fixed concurrency, several methods in turns so that all meet the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from vlmtok.timing import Ratio, Timing

from .client import Answer, Client, Question, counted

QUERIES, HITS = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"

WORDS = (
    "What color is the square?",
    "What color is the triangle?",
    "Which shape is yellow?",
    "Which shape is red?",
    "How many circles are there?",
    "Where is the blue thing?",
    "Where is the triangle?",
    "What is at the top left?",
)
"""Questions that take turns; the checkpoint that ships with vlmtok knows their words."""


@dataclass(frozen=True)
class Block:
    """Requests under one method that ran together.

    Attributes:
        seconds: from the first request to the last answer.
        answers: in the order of the questions.
        queries: prompt tokens that the server looked up in the cache of prefixes.
        hits: those that it found there.
    """

    seconds: float
    answers: tuple[Answer, ...]
    queries: float
    hits: float


@dataclass(frozen=True)
class Measured:
    """Blocks of one method at one concurrency, a block a round."""

    blocks: tuple[Block, ...]

    @property
    def answers(self) -> list[Answer]:
        """Of all rounds."""
        return [answer for block in self.blocks for answer in block.answers]

    @property
    def rate(self) -> float:
        """Requests a second, median of the rounds."""
        return statistics.median(len(block.answers) / block.seconds for block in self.blocks)

    @property
    def first(self) -> float:
        """Seconds to the first token, median of all requests."""
        return statistics.median(answer.first for answer in self.answers)

    @property
    def prompt_tokens(self) -> float:
        """Mean length of the prompts."""
        return statistics.fmean(answer.prompt_tokens for answer in self.answers)

    @property
    def kv_tokens(self) -> float:
        """Mean number of tokens that a request held in the cache at its end."""
        return statistics.fmean(answer.kv_tokens for answer in self.answers)

    @property
    def hit_share(self) -> float:
        """Share of the prompt tokens that the cache of prefixes held."""
        queries = sum(block.queries for block in self.blocks)
        return sum(block.hits for block in self.blocks) / queries if queries else 0.0

    def faster_than(self, bare: Measured) -> Ratio:
        """How many times more requests a second than `bare`, round by round."""
        return Ratio.of(bare.durations(), self.durations())

    def sooner_than(self, bare: Measured) -> Ratio:
        """How many times shorter the wait for the first token is than that of `bare`, round by round."""
        return Ratio.of(bare.waits(), self.waits())

    def durations(self) -> Timing:
        """Seconds of each block."""
        return Timing(tuple(block.seconds for block in self.blocks))

    def waits(self) -> Timing:
        """Median seconds to the first token in each block."""
        return Timing(tuple(statistics.median(one.first for one in block.answers) for block in self.blocks))


def run(client: Client, questions: Sequence[Question], method: str, concurrency: int, tokens: int) -> Block:
    """Asks all questions, `concurrency` at a time.

    Raises:
        Refused, OSError: of the first request that fails; those that wait are not sent any more.
    """
    before = client.metrics()
    began = time.perf_counter()
    pool = ThreadPoolExecutor(concurrency)
    try:
        sent = [pool.submit(client.ask, question, method, tokens, True) for question in questions]
        answers = tuple(future.result() for future in sent)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after a failure, the others end with their server
    seconds = time.perf_counter() - began
    after = client.metrics()
    queries, hits = (counted(after, name) - counted(before, name) for name in (QUERIES, HITS))
    return Block(seconds, answers, queries, hits)


def asked(pictures: Iterator[str], number: int, times: int = 1) -> list[Question]:
    """Questions about pictures.

    Args:
        pictures: new ones.
        number: of questions.
        times: how often a picture comes, with another question each time.
    """
    drawn = list(islice(pictures, -(-number // times)))
    return [
        Question(drawn[i % len(drawn)], WORDS[(i % len(drawn) + i // len(drawn)) % len(WORDS)]) for i in range(number)
    ]


def take_turns(
    client: Client,
    methods: Sequence[str],
    questions: Callable[[], list[Question]],
    *,
    concurrency: int,
    tokens: int,
    rounds: int,
    tell: Callable[[str], None] = lambda said: None,
) -> dict[str, Measured]:
    """Measures methods in turns, in another order each round, each on questions of its own.

    Args:
        client: of the server.
        methods: that requests name; ``"none"`` is bare.
        questions: makes those of a block; called before its clock starts.
        concurrency: requests at a time.
        tokens: that each request generates.
        rounds: blocks of each method; `concurrency` requests of each run before, unmeasured.
        tell: told before each block.

    Returns:
        What was measured, by method.
    """
    for method in methods:
        tell(f"{method}: warming up")
        run(client, questions()[:concurrency], method, concurrency, tokens)
    found: dict[str, list[Block]] = {method: [] for method in methods}
    for turn in range(rounds):
        first = turn % len(methods)
        for method in (*methods[first:], *methods[:first]):
            tell(f"{method}: {concurrency} at a time, round {turn + 1} of {rounds}")
            found[method].append(run(client, questions(), method, concurrency, tokens))
    return {method: Measured(tuple(blocks)) for method, blocks in found.items()}
