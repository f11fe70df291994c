"""LLaVA 1.5 with cuts of every kind, and what it generates and answers in a second turn, held against the oracle."""

from __future__ import annotations

import functools

import torch

import vlmtok
from vlmtok import Reduction, Site

from . import models, oracle
from .checks import assert_differs, assert_equal
from .hosts_of import cache_of, with_cache
from .player import Player

STEPS = 4
SPECIAL = list(range(models.IMAGE, models.VOCAB))
# Text around a picture, a picture first, two pictures, none, a picture last, two pictures side by side.
ROWS = ("^3I5", "2I2", "^2I1I4", "6", "^4I", "^1II3")


class Top(vlmtok.Random):
    """Keeps the longest tokens, wherever it is put; slots fall in length if `ordered` is off."""

    def __init__(
        self,
        keep,
        stage="projected",
        layer=2,
        point="start",
        positions=None,
        scope="picture",
        ordered=True,
        forget=False,
    ):
        super().__init__(keep=keep)
        self.place = (stage, layer, point, positions, scope, ordered)
        self.forget = forget

    def sites(self, layout):
        stage, layer, point, positions, scope, _ = self.place
        if stage in ("projected", "features"):
            return [Site(stage, positions=positions, scope=scope)]
        return [Site(stage, layer, point, positions=positions, scope=scope, forget=self.forget)]

    def reduce(self, view):
        best = view.tokens.float().norm(dim=-1).argsort(dim=1, descending=True, stable=True)
        best = best[:, : self.count(view.counts)]
        return Reduction(best.sort(1).values if self.place[-1] else best)

    def __str__(self):
        return "top"


def decider(methods, run):
    memory = {at: run.memory(at) for at in range(len(methods))}
    return lambda: Player(methods, run.layout, memory)


def generated(model, batch, **more):
    given = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = model.generate(**batch.inputs(), **{**given, **more})
    return found.sequences[:, batch.inputs()["input_ids"].shape[1] :], torch.stack(found.logits, 1)


@functools.cache
def llava(attention="sdpa", depth=6):
    return models.llava(attention, depth=depth)


def assert_generates_as_the_oracle(model, batch, methods, cached=True, **more):
    bare = generated(model, batch, use_cache=cached, **more)[1]
    with vlmtok.compress(model, methods) as run:
        tokens, logits = generated(model, batch, use_cache=cached, **more)
    reference = oracle.Llava(model)
    methods = run.methods
    for row in range(len(batch)):
        ids, wanted = reference.generate(
            batch.rows[row], batch.pixels[row], decider(methods, run), STEPS, again=not cached, row=row
        )
        assert tokens[row].tolist() == ids.tolist(), f"tokens of row {row}"
        assert_equal(logits[row], wanted, what=f"logits of row {row}")
    assert_differs(logits, bare)


CUTS = {
    "boundary renumbered": [Top(0.5)],
    "boundary kept": [Top(0.5, positions="keep")],
    "boundary of the sample": [Top(0.4, scope="sample")],
    "boundary in slot order": [Top(0.5, ordered=False)],
    "boundary in slot order, kept": [Top(0.5, positions="keep", ordered=False)],
    "sample in slot order": [Top(0.5, scope="sample", ordered=False)],
    "features": [Top(0.5, "features", ordered=False)],
    "decoder kept": [Top(0.25, "decoder")],
    "decoder renumbered": [Top(0.25, "decoder", positions="renumber")],
    "decoder end": [Top(0.25, "decoder", 1, "end", ordered=False)],
    "decoder twice": [Top(0.5, "decoder", 1), Top(0.5, "decoder", 4, positions="renumber")],
    "decoder twice, kept last": [Top(0.5, "decoder", 1, positions="renumber"), Top(0.5, "decoder", 4)],
    "one boundary between layers": [Top(0.5, "decoder", 2, "end"), Top(0.5, "decoder", 3, "start")],
    "two in one place": [Top(0.5, "decoder", 2), Top(0.5, "decoder", 2, scope="sample", positions="renumber")],
    "boundary and decoder": [Top(0.5), Top(0.5, "decoder", 2)],
    "boundary kept, decoder renumbered": [Top(0.5, positions="keep"), Top(0.5, "decoder", 2, positions="renumber")],
    "everything": [
        *vlmtok.parse_methods("pitome:ratio=0.8"),
        Top(0.8, "features"),
        Top(0.7, scope="sample", ordered=False),
        Top(0.6, "decoder", 1, "end"),
        Top(0.5, "decoder", 4, positions="renumber"),
    ],
}


BOTH = [Top(0.5), Top(0.5, "decoder", 2, positions="renumber")]


def first_turn(model, batch, **more):
    return model.generate(**batch.inputs(), max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, **more)


def follow_up(model, batch, one, question):
    """A forward of new ids and a mask of the full length on a returned cache.

    Args:
        model: compressed.
        batch: of the first turn.
        one: what `first_turn` gave.
        question: int64 `[B, M]`, new ids.
    """
    count, more = question.shape
    seen = torch.cat([batch.inputs()["attention_mask"], torch.ones(count, STEPS + more - 1, dtype=torch.int64)], 1)
    # The last token that was generated has not been fed yet.
    fresh = torch.cat([one.sequences[:, -1:], question], 1)
    mask = torch.cat([seen, torch.ones(count, 1, dtype=torch.int64)], 1)
    return model(
        input_ids=fresh,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1)[:, -more - 1 :],
        **with_cache(model, cache_of(one)),
        use_cache=True,
    )


def assert_follow_up_equals_the_oracle(model, batch, question, methods, run, one, out):
    """Both turns equal the whole conversation from scratch; arguments as of `follow_up`, whose result is `out`."""
    reference = oracle.Llava(model)
    for row in range(len(question)):
        plan, decide = oracle.Plan(), decider(methods, run)
        ids, _ = reference.generate(batch.rows[row], batch.pixels[row], decide, STEPS, row=row, plan=plan)
        assert ids.tolist() == one.sequences[row, -STEPS:].tolist()
        whole = torch.cat([batch.rows[row], ids, question[row]])
        with torch.no_grad():
            hidden, _ = reference.forward(whole, batch.pixels[row], decide(), row, plan)
            wanted = model.lm_head(hidden[-question.shape[1] - 1 :])
        assert_equal(out.logits[row].detach(), wanted, what=f"row {row}")


def assert_two_turns_equal_the_oracle(methods, batch, more, shorter=True):
    """A prompt, its answer, a second prompt with pictures of its own that ends in four words, and one token more.

    Rows become `shorter` where tokens leave, and not where entries of caches do.
    """
    model = llava()
    with torch.no_grad(), vlmtok.compress(model, methods) as run:
        one = first_turn(model, batch)
        fresh = torch.cat([one.sequences[:, -1:], more.rows[0][None]], 1)
        full = torch.ones(1, one.sequences.shape[1] + len(more.rows[0]), dtype=torch.int64)
        start = full.shape[1] - fresh.shape[1]
        out = model(
            input_ids=fresh,
            attention_mask=full,
            pixel_values=more.pixels[0],
            position_ids=torch.arange(start, full.shape[1])[None],
            **with_cache(model, cache_of(one)),
            use_cache=True,
        )
        # And a token more, on the twice-cut cache.
        answer = out.logits[:, -1].argmax(-1, keepdim=True)
        again = model(
            input_ids=answer,
            attention_mask=torch.ones(1, full.shape[1] + 1, dtype=torch.int64),
            position_ids=torch.tensor([[full.shape[1]]]),
            **with_cache(model, cache_of(out)),
        )
    reference, plan = oracle.Llava(model), oracle.Plan()
    reference.generate(batch.rows[0], batch.pixels[0], decider(methods, run), STEPS, plan=plan)
    whole = torch.cat([one.sequences[0], more.rows[0]])
    pixels = torch.cat([batch.pixels[0], more.pixels[0]])
    with torch.no_grad():
        hidden, kept = reference.forward(whole, pixels, decider(methods, run)(), 0, plan)
        assert (len(kept.h) < len(whole) - 8) == shorter
        assert_equal(out.logits[0, -4:], model.lm_head(hidden[-4:]), what="the second question")
        hidden, _ = reference.forward(torch.cat([whole, answer[0]]), pixels, decider(methods, run)(), 0, plan)
        assert_equal(again.logits[0, -1], model.lm_head(hidden[-1]), what="its answer")
