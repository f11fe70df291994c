"""Ways of running that take a minute or more each: several ranks, compiled code, prompts in chunks, bfloat16."""

from __future__ import annotations

import pytest
from checkpoints import make, prompt
from engine_side import Request, run
from pictures import pictures
from PIL import Image
from test_families import same
from transformers_side import Asked, reference

pytestmark = pytest.mark.long

SPECS = {
    "llava_clip": (None, "divprune:keep=40", "visionzip:keep=9:contextual=2", "pitome:ratio=0.8", "cdpruner:keep=33"),
    "qwen3_vl": (None, "divprune:keep=40", "visionzip:keep=9:contextual=2", "cdpruner:keep=33"),
}
WAYS = {
    "chunks of 32 tokens": {"max_num_batched_tokens": 32, "enable_chunked_prefill": True, "max_num_seqs": 4},
    "two ranks": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    "compiled": {"enforce_eager": False},
}


def prompts(family: str) -> list[Asked]:
    """Of one picture and of two."""
    first, second, third = pictures(3, (80, 56))
    return [
        Asked(prompt(family, 1, "what color is it ?"), (first,)),
        Asked(prompt(family, 2, "how many are there ?"), (second, third)),
    ]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", SPECS)
def test_it_says_what_transformers_says(family, way, tmp_path, record_property):
    folder, asked = make(family, tmp_path / family), prompts(family)
    mixed = [Request(one.text, one.pictures, spec or "none") for spec in SPECS[family] for one in asked]
    (replies,) = run(folder, [mixed], timeout=1500, **WAYS[way])
    expected = reference(folder, SPECS[family], asked, tmp_path / "answers")
    answers = [answer for spec in SPECS[family] for answer in expected[spec]]
    for answer, reply in zip(answers, replies):
        same(answer, reply)
    record_property("requests", len(replies))


def test_bfloat16_says_the_same_words(tmp_path):
    """Greedy choices of the shipped checkpoint, which is trained and so has no near ties."""
    from vlmtok.loading import samples
    from vlmtok.loading.names import DATA, EMBEDDED

    folder = DATA / EMBEDDED
    asked = [
        Request(f"USER: <image>\n{one.question} ASSISTANT:", (Image.open(one.path).convert("RGB"),), "none")
        for one in samples()
    ]
    pruned = [Request(one.text, one.pictures, "divprune:keep=40") for one in asked]
    exact = run(folder, [asked, pruned], max_model_len=512, steps=1)
    rough = run(folder, [asked, pruned], max_model_len=512, steps=1, dtype="bfloat16")
    assert [[reply.ids for reply in replies] for replies in exact] == [
        [reply.ids for reply in replies] for replies in rough
    ]
