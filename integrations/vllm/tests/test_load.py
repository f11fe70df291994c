"""Load and its figures, without an engine."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice

import pytest
from PIL import Image

from vlmtok_vllm import bench
from vlmtok_vllm.client import Answer, Client, Question, Refused, counted, label
from vlmtok_vllm.load import HITS, QUERIES, Block, Measured, asked, take_turns
from vlmtok_vllm.pictures import draw, fresh
from vlmtok_vllm.server import Server, cpu_environment, cpu_settings, flags

METRICS = f"""# HELP {QUERIES} words
{QUERIES}{{engine="0",model_name="m"}} 30.0
{QUERIES}{{engine="1",model_name="m"}} 12.0
{QUERIES.removesuffix("_total")}_created{{engine="0",model_name="m"}} 1.7e+09
vllm:external_prefix_cache_hits_total{{engine="0"}} 5.0
{HITS}{{engine="0",model_name="m"}} 1.2e+01
vllm:cache_config_info{{block_size="32",kv_cache_size_tokens="65536",num_gpu_blocks="2048"}} 1.0
"""


def test_counters_are_summed_over_engines_and_not_taken_for_others():
    assert counted(METRICS, QUERIES) == 42
    assert counted(METRICS, HITS) == 12
    with pytest.raises(KeyError, match="nosuch"):
        counted(METRICS, "nosuch")


def test_the_cache_holds_whole_blocks():
    cache = bench.Cache.of(METRICS)
    assert cache == bench.Cache(65536, 32)
    assert cache.requests(Measured((block(1.0, tokens=152),))) == 409  # 159 tokens take 5 blocks
    assert cache.requests(Measured((block(1.0, tokens=24),))) == 2048  # 31 take one
    assert bench.Cache.of("") is None


def test_flags_that_are_set_already_are_refused():
    for flag in ("--port", "--served_model_name=x"):
        with pytest.raises(ValueError, match=flag):
            Server("m", {}, [flag, "1"])


def test_labels_are_read_by_name():
    assert label(METRICS, bench.CACHE, "kv_cache_size_tokens") == "65536"
    assert label(METRICS, bench.CACHE, "size_tokens") is None


def test_settings_become_flags_as_the_server_takes_them():
    said = flags(
        {"hf_overrides": {"vlmtok": "a:b=1"}, "max_model_len": 512, "enforce_eager": True, "x_y": False, "z": None}
    )
    assert said == ["--hf-overrides", '{"vlmtok": "a:b=1"}', "--max-model-len", "512", "--enforce-eager", "--no-x-y"]


def test_what_the_user_sets_wins_over_what_suits_a_cpu():
    assert cpu_settings({"dtype": "bfloat16"}) == {"dtype": "bfloat16", "block_size": 32, "enforce_eager": True}
    assert cpu_environment({"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"
    assert cpu_environment({})["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert Server("m", {"dtype": "float32"}, ["--dtype", "auto"]).command[-2:] == ["--dtype", "auto"]


def test_drawn_pictures_are_all_different_and_of_the_size_asked():
    drawn = list(islice(fresh((40, 24)), 500))
    assert len(set(drawn)) == 500
    picture = Image.open(io.BytesIO(base64.b64decode(drawn[0].partition(",")[2])))
    assert picture.size == (40, 24)
    assert len(draw(5, (96, 96)).getcolors()) >= 3


def test_a_repeated_picture_comes_with_another_question_each_time():
    questions = asked(fresh((16, 16)), 12, times=4)
    assert len(set(questions)) == 12
    assert len({one.picture for one in questions}) == 3
    assert len({one.picture for one in asked(fresh((16, 16)), 12)}) == 12


def block(seconds, first=0.5, tokens=152, hits=0):
    return Block(seconds, (Answer("red", tokens, 8, first, 1.0),) * 4, 4 * tokens, hits)


def test_figures_of_blocks():
    bare = Measured((block(2.0), block(4.0), block(3.0)))
    pruned = Measured((block(1.0, 0.25, 24, 12), block(1.0, 0.25, 24, 12), block(1.0, 0.25, 24)))
    assert pruned.faster_than(bare).median == 3.0
    assert pruned.sooner_than(bare).median == 2.0
    assert pruned.rate == 4.0
    assert (pruned.prompt_tokens, pruned.kv_tokens) == (24, 31)
    assert pruned.hit_share == pytest.approx(24 / 288)


@pytest.mark.parametrize("absolute", [True, False])
def test_a_cpu_tells_ratios_alone(absolute):
    one = {"none": Measured((block(2.0),)), "divprune:keep=16": Measured((block(1.0, 0.25, 24),))}
    rows = bench.rows_of(4, one, bench.Cache(65536, 32), absolute)
    machine = {"device": "card", "vllm": "0", "torch": "2", "transformers": "5", "vlmtok": "0"}
    said = bench.report({"rows": rows, "requests": 4, "rounds": 1, "output_tokens": 8, "machine": machine})
    assert "2.00 x (2.00 to 2.00)" in said
    assert ("requests/s" in said, "250.0" in said) == (absolute, absolute)
    assert (rows[0]["requests_per_second"] is None) is not absolute
    assert ("ratios only" in said) is not absolute


class Replies(BaseHTTPRequestHandler):
    """Answers as the server does: a stream of events, or a refusal before or in it."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        method = body.get("mm_processor_kwargs", {}).get("vlmtok")
        self.send_response(400 if method == "refused" else 200)
        self.end_headers()
        if method == "refused":
            self.wfile.write(b'{"error": {"message": "no\\nway", "code": 400}}')
            return
        if method == "late":
            self.wfile.write(b'data: {"error": {"message": "later", "code": 400}}\n\ndata: [DONE]\n\n')
            return
        events = [{"choices": [{"delta": {"content": word}}]} for word in ("", " red", " star")]
        events += [] if method == "cut" else [{"choices": [], "usage": {"prompt_tokens": 24, "completion_tokens": 3}}]
        for event in events:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(METRICS.encode())

    def log_message(self, *rest):
        pass


@pytest.fixture
def replies():
    with ThreadingHTTPServer(("127.0.0.1", 0), Replies) as server:
        server.bodies = []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


QUESTION = Question("data:image/png;base64,AA", "What color?")


def test_an_answer_is_read_from_the_stream(replies):
    found = Client(replies.server_port, "m").ask(QUESTION)
    assert (found.text, found.prompt_tokens, found.output_tokens) == ("red star", 24, 3)
    assert 0 < found.first <= found.seconds
    assert "mm_processor_kwargs" not in replies.bodies[0]


@pytest.mark.parametrize("method, words", [("refused", "no way"), ("late", "later")])
def test_a_refusal_is_told_wherever_it_comes(replies, method, words):
    with pytest.raises(Refused, match=f"HTTP 400: {words}"):
        Client(replies.server_port, "m").ask(QUESTION, method)


def test_a_stream_without_an_end_is_no_answer(replies):
    with pytest.raises(ConnectionError, match="ended early"):
        Client(replies.server_port, "m").ask(QUESTION, "cut")


def test_methods_take_turns_in_another_order_each_round(replies):
    client = Client(replies.server_port, "m")
    found = take_turns(
        client, ["none", "a"], lambda: [QUESTION] * 3, concurrency=1, tokens=8, rounds=2, tell=lambda said: None
    )
    sent = [body["mm_processor_kwargs"]["vlmtok"] for body in replies.bodies]
    assert sent == ["none", "a", *["none"] * 3, *["a"] * 6, *["none"] * 3]
    assert [len(one.answers) for one in found.values()] == [6, 6]
    assert all(body["ignore_eos"] and body["max_tokens"] == 8 for body in replies.bodies)


def test_a_failed_request_ends_a_block(replies):
    with pytest.raises(Refused):
        take_turns(
            Client(replies.server_port, "m"), ["refused"], lambda: [QUESTION] * 3, concurrency=2, tokens=8, rounds=1
        )
