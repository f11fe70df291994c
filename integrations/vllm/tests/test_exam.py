"""The shipped, trained checkpoint: 24 pictures under every setting that is served, all of them in one batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_side import Request, run
from http_exam import FOLDER, drawn
from test_families import same
from transformers_side import Asked, reference

from vlmtok import list_methods, parse_methods
from vlmtok.errors import VlmtokError
from vlmtok.loading import skeleton
from vlmtok.serving import Counter

SPECS = (
    *(None, "random:keep=16", "divprune:keep=16", "divprune:keep=0.25"),
    *("todre:keep=16:tau=none", "todre:keep=16:tau=none:pivot=center", "todre:keep=16:tau=none:rule=max"),
    *("cdpruner:keep=16:negate=false", "cdpruner:keep=16", "averagepool:output_size=4", "aim:prune=false"),
    *("visionzip:keep=16:contextual=4", "scope:keep=16", "prumerge:keep=16", "tome:r=16", "tome:r=16:prop_attn=false"),
    *("pitome:ratio=0.8", "pitome:ratio=0.8+divprune:keep=16", "crossget:rv=16", "tca"),
    *("dart:at=embeddings:keep=16:positions=none", "vispruner:keep=16", "fastervlm:keep=16", "hiprune:keep=16"),
    *("mmtok:keep=16", "holov:keep=16", "grid:keep=16", "tokencorr:keep=16", "evs", "vidcom2"),
    "visionzip:keep=40+divprune:keep=16",
)
UNGIVEN = {"learned": "shows nothing that layers of its language model compute", "recoverable": "signal 'relevance'"}
"""What an engine cannot give, of methods that no place rules out; others cut where none can."""
CLOSE = ("pitome",)
"""Methods with near ties on some picture: transformers itself jumps where pixels change by 1e-6 of their size."""


@pytest.fixture(scope="module")
def asked():
    return [Asked(f"USER: <image>\n{question} ASSISTANT:", (picture,)) for picture, question, _ in drawn()[:24]]


def test_every_method_that_is_served_is_asked():
    """What the list above leaves out cannot be served at all."""
    counter = Counter(skeleton().model)
    met = {type(method).spec_name() for spec in SPECS if spec for method in parse_methods(spec)}
    for name in set(list_methods()) - met:
        with pytest.raises(VlmtokError, match=UNGIVEN.get(name, "one length for all layers")):
            counter.plan(name)


def test_24_pictures_under_every_setting(asked, tmp_path):
    requests = [Request(one.text, one.pictures, spec or "none") for one in asked for spec in SPECS]
    (replies,) = run(FOLDER, [requests], max_model_len=512, steps=4, timeout=1200)
    expected = reference(Path(FOLDER), SPECS, asked, tmp_path, steps=4)
    answers = [expected[spec][picture] for picture in range(len(asked)) for spec in SPECS]
    for request, answer, reply in zip(requests, answers, replies):
        if request.spec is not None and request.spec.startswith(CLOSE):
            assert reply.ids == answer.ids and len(reply.prompt) == answer.rows
        else:
            same(answer, reply)


def test_settings_differ_by_more_than_the_tolerance(asked, tmp_path):
    """Equal numbers of tokens, other choices: the comparison above tells them apart."""
    alike = ("random:keep=16", "divprune:keep=16", "todre:keep=16:tau=none", "scope:keep=16")
    expected = reference(Path(FOLDER), alike, asked[:6], tmp_path, steps=1)
    firsts = [torch.stack([answer.logprobs[0] for answer in expected[spec]]) for spec in alike]
    for i, one in enumerate(firsts):
        for other in firsts[:i]:
            assert float((one - other).abs().max()) > 0.02
