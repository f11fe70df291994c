"""The OpenAI server with the plug-in, over HTTP."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from http_exam import FOLDER, drawn, expected, questions

from vlmtok_vllm import engine_args
from vlmtok_vllm.client import Client, Question, Refused, counted
from vlmtok_vllm.load import HITS, WORDS
from vlmtok_vllm.pictures import fresh
from vlmtok_vllm.server import Server, ServerError

DEFAULT = "divprune:keep=16"
SPECS = ("none", DEFAULT, "divprune:keep=32", "scope:keep=16", "visionzip:keep=20", "pitome:ratio=0.8")


@pytest.fixture(scope="module")
def server():
    # Small caches, of processed pictures and of keys and values, which warming up fills: what grows behind that leaks.
    small = {"max_model_len": 512, "mm_processor_cache_gb": 0.01, "num_gpu_blocks_override": 128}
    settings = {**engine_args(DEFAULT), **small}
    with pytest.MonkeyPatch.context() as patch:
        # Pictures get pages of their own from malloc: what is kept shows, and what is freed leaves no holes to fill.
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
        with Server(FOLDER, settings, limit=400) as running:
            yield running
    assert running.processes() == []


@pytest.fixture(scope="module")
def client(server):
    return Client(server.port, server.model, begin=True, limit=60)


def test_twenty_questions_get_the_answers_of_transformers_under_the_method_of_the_server(client):
    found = [client.ask(question) for question in questions()[:20]]
    answers, lengths = expected(DEFAULT, 20)
    assert [one.text for one in found] == answers
    assert [one.prompt_tokens for one in found] == lengths
    assert sum(one.text == right for one, (_, _, right) in zip(found, drawn())) >= 14


@pytest.mark.parametrize("spec", SPECS)
def test_a_request_names_its_own_method_and_gets_the_prompt_that_its_plan_says(client, spec):
    found = [client.ask(question, spec) for question in questions()[:6]]
    assert ([one.text for one in found], [one.prompt_tokens for one in found]) == expected(spec, 6)


def test_the_methods_do_not_all_say_the_same(client):
    # Otherwise the equalities above would hold for a server that ignores what a request names.
    assert len({tuple(expected(spec, 6)[1]) for spec in SPECS}) >= 4


@pytest.mark.parametrize(
    "spec, word",
    [
        ("fastv", "fastv"),
        ("pyramiddrop", "pyramiddrop"),
        ("nosuch", "nosuch"),
        ("divprune:keep=0", "keep"),
        ("divprune:keep=16:scope=sample", "scope"),
        ("averagepool:output_size=5", "divided"),
        ("todre:keep=16", "tau=none"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason_and_the_next_request_is_answered(client, spec, word):
    with pytest.raises(Refused) as refusal:
        client.ask(questions()[0], spec)
    assert refusal.value.status == 400
    assert word in refusal.value.reason.lower() and "\n" not in refusal.value.reason
    assert client.ask(questions()[0]).text == expected(DEFAULT, 20)[0][0]


def test_the_same_picture_is_cached_for_its_method_alone(client):
    picture = next(fresh((96, 96), start=900_000))

    def hits(spec):
        before = counted(client.metrics(), HITS)
        client.ask(Question(picture, WORDS[0]), spec)
        return counted(client.metrics(), HITS) - before

    assert hits("divprune:keep=64") == 0
    assert hits("divprune:keep=64") >= 32
    assert hits("scope:keep=64") == 0, "blocks of another method's tokens were served"


PICTURE = 3 * 96 * 96 * 4
"""Bytes of a processed picture."""


def send(client, pictures, number, concurrency):
    """Mixed requests about new pictures; (method, answer) of each."""
    sent = [(Question(next(pictures), WORDS[0]), SPECS[i % len(SPECS)]) for i in range(number)]
    with ThreadPoolExecutor(concurrency) as pool:
        return [(spec, one) for (_, spec), one in zip(sent, pool.map(lambda one: client.ask(*one, 8, True), sent))]


def test_mixed_requests_at_concurrency_16_all_end_with_the_right_lengths_and_memory_stays(server, client):
    pictures = fresh((96, 96), start=100_000)
    lengths = {spec: expected(spec, 1)[1][0] for spec in SPECS}
    bare = client.ask(Question(next(pictures), WORDS[0]), "none").prompt_tokens
    send(client, pictures, 100, 16)
    before, began = server.memory(), time.monotonic()
    done = send(client, pictures, 200, 16)
    taken, grown = time.monotonic() - began, server.memory() - before
    for spec, answer in done:
        assert answer.prompt_tokens - bare == lengths[spec] - lengths["none"]
        assert answer.output_tokens == 8
    assert taken < 120
    assert counted(client.metrics(), "vllm:num_requests_running") == 0
    assert counted(client.metrics(), "vllm:num_requests_waiting") == 0
    # Steps of a new number of tokens still make the engine grow, with its stock classes as well.
    assert grown < 128 * 2**20, f"{grown / 2**20:.0f} MiB more after 200 requests"
    # One by one the steps are alike, so what is kept of a request would show.
    send(client, pictures, 30, 1)
    before = server.memory()
    send(client, pictures, 60, 1)
    grown = server.memory() - before
    assert grown < 60 * PICTURE / 2, f"{grown / 2**20:.1f} MiB more after 60 requests"


def test_a_server_that_cannot_start_says_why_keeps_its_log_and_leaves_no_process(tmp_path):
    server = Server(str(tmp_path), limit=120)
    with pytest.raises(ServerError, match="ended .exit code 1. before it answered") as problem, server:
        pass
    assert server.processes() == []
    log = Path(re.search(r"its log, (.*\.log), says:", str(problem.value))[1])
    assert str(tmp_path) in log.read_text()
    log.unlink()


def test_a_server_that_is_too_slow_is_stopped(tmp_path):
    server = Server(FOLDER, engine_args(), limit=1, log=tmp_path / "said")
    with pytest.raises(ServerError, match="did not answer within 1 seconds; its log, .*said"), server:
        pass
    assert server.processes() == []
