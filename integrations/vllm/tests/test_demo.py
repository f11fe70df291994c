"""The demonstration: what it expects, and one run of it; how it ends when it is told to."""

import json
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from vlmtok.loading import samples
from vlmtok_vllm import demo
from vlmtok_vllm.client import Answer, Refused


def answer(text, tokens):
    return Answer(text, tokens, 3, 0.1, 0.2)


def found(**changed):
    right = [answer(one.answer, 152) for one in samples()]
    return {"none": right, "divprune:keep=16": [answer(one.answer, 24) for one in samples()], **changed}


def test_all_is_as_expected():
    assert demo.unexpected(samples(), found(), known=True) == []


def test_a_prompt_that_is_not_shorter_is_not_as_expected():
    longer = [answer(one.answer, 152) for one in samples()]
    said = demo.unexpected(samples(), found(**{"scope:keep=16": longer}), known=True)
    assert len(said) == len(samples()) and "scope:keep=16" in said[0] and "152" in said[0]


def test_a_wrong_answer_is_unexpected_of_the_bare_model_that_ships_alone():
    bare, pruned = found().values()
    wrong = [answer("purple", 152), *bare[1:]]
    assert len(demo.unexpected(samples(), found(none=wrong), known=True)) == 1
    assert demo.unexpected(samples(), found(none=wrong), known=False) == []
    assert demo.unexpected(samples(), found(**{"divprune:keep=16": [answer("purple", 24), *pruned[1:]]}), True) == []


def test_the_table_has_a_row_a_question_and_the_lengths_by_method():
    table = demo.answers_table(samples(), found())
    for sample in samples():
        assert re.search(rf"{re.escape(sample.question)} +│ {sample.answer} .*152 / 24", table), sample.question


class Asked:
    """A client whose server refuses as it is told."""

    def __init__(self, refusal):
        self.refusal = refusal
        self.methods = []

    def ask(self, question, method):
        self.methods.append(method)
        if method == demo.REFUSED and self.refusal is not None:
            raise self.refusal
        return answer("red", 24)


@pytest.mark.parametrize(
    "refusal, said", [(Refused(400, "no"), []), (Refused(500, "no"), ["HTTP 500"]), (None, ["not refused"])]
)
def test_the_refusal_must_be_a_400_and_the_next_request_is_sent(refusal, said):
    client = Asked(refusal)
    problems = demo.show_refusal(client)
    assert client.methods == [demo.REFUSED, "none"]
    assert len(problems) == len(said) and all(word in problem for word, problem in zip(said, problems))


@pytest.mark.parametrize(
    "words, said",
    [
        (["--method", "nosuch"], "nosuch"),
        (["--method", "none"], "measured anyway"),
        (["--rounds", "0"], "at least 1"),
        (["--log", "/no/such/folder/x"], "no folder"),
        (["--", "--port", "1"], "--port"),
    ],
)
def test_a_wrong_option_is_told_before_a_server_starts(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        demo.main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_run_shows_answers_ratio_and_refusal_and_ends_well():
    command = [sys.executable, "-m", "vlmtok_vllm.demo", "--rounds", "2", "--requests", "8"]
    done = subprocess.run(
        [*command, "--method", "divprune:keep=16", "scope:keep=16"], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("153 / 25 / 25") == 3
    for method in ("divprune:keep=16", "scope:keep=16"):
        assert re.search(rf"{method}: \d+\.\d\d x \(.*\) the requests a second of bare; prompts of 25", done.stdout)
    assert re.search("fastv: HTTP 400: .*FastV", done.stdout)
    assert "the server is stopped" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_demonstration_that_is_ended_takes_its_server_along(number):
    process = subprocess.Popen([sys.executable, "-m", "vlmtok_vllm.demo"], stdout=subprocess.DEVNULL)
    try:
        family = psutil.Process(process.pid)
        end = time.monotonic() + 120
        while not any("api_server" in " ".join(one.cmdline()) for one in family.children()):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.2)
        time.sleep(2)
        children = family.children(recursive=True)
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number
        assert [one for one in children if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []
    finally:
        process.kill()
        process.wait()


@pytest.mark.long
def test_a_benchmark_writes_figures_of_every_concurrency(tmp_path):
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "vlmtok_vllm.bench", "--json", str(file), "--method", "divprune:keep=16"]
    more = ["--concurrency", "1", "4", "--requests", "8", "--rounds", "2", "--repeat-pictures", "2"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(file.read_text())
    assert [(row["concurrency"], row["method"]) for row in result["rows"]] == [
        (1, "none"),
        (1, "divprune:keep=16"),
        (4, "none"),
        (4, "divprune:keep=16"),
    ]
    for bare, pruned in zip(result["rows"][::2], result["rows"][1::2]):
        assert bare["prompt_tokens"] - pruned["prompt_tokens"] == 128 == bare["kv_tokens"] - pruned["kv_tokens"]
        assert pruned["requests_in_cache"] > 2 * bare["requests_in_cache"]
        assert bare["prefix_hits"] >= 2 * 4 * 128, "the second question about a picture finds its blocks"
    assert done.stdout.count("| divprune:keep=16 |") == 2
