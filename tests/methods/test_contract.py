"""What is always true (DESIGN.md, section 6), for every method of the registry on every model.

`matrix.json` says what runs and what is refused and why. A new method or model needs no line here: write the table
anew with ``python -m support.matrix`` and look at the difference.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from support import matrix, models, oracle, referee
from support.checks import Print, Subject, assert_differs, assert_equal, assert_same, hooks, idle, watched
from support.matrix import spec_of
from support.player import Player

import vlmtok
from vlmtok import Counts, Reduction, TokenView
from vlmtok.errors import VlmtokError

EXPECTED = matrix.expected()
CELLS = [(method, model) for method, row in EXPECTED.items() for model in row]
RUNS = [cell for cell in CELLS if EXPECTED[cell[0]][cell[1]] == "runs"]
REFUSED = [cell for cell in CELLS if cell not in set(RUNS)]
LLAVA_RUNS = [cell for cell in RUNS if cell[1] in models.LLAVA]
TOWER_RUNS = [cell for cell in RUNS if cell[1] in models.TOWERS]

KEEP_ALL = {
    "averagepool": "averagepool:output_size=(4;4)",
    "cdpruner": "cdpruner:keep=1.0",
    "divprune": "divprune:keep=1.0",
    "fastv": "fastv:keep=1.0",
    "pyramiddrop": "pyramiddrop:ratios=(1.0;1.0;1.0)",
    "random": "random:keep=1.0",
    "scope": "scope:keep=1.0",
    "todre": "todre:keep=1.0:tau=0",
    "transprune": "transprune:ratios=(1.0;1.0;1.0)",
    "visionzip": "visionzip:keep=1.0",
}
"""Settings that keep every token, of the methods that have such settings and then still visit their sites."""


def ids(cells):
    return [" on ".join(cell) for cell in cells]


def made(method):
    return vlmtok.parse_methods(spec_of(method))


# ---------------------------------------------------------------------- the table
def test_the_table_has_every_method_and_every_model():
    assert sorted(EXPECTED) == vlmtok.list_methods(), "methods came or went: run python -m support.matrix"
    for method, row in EXPECTED.items():
        assert sorted(row) == sorted(models.BUILDERS), f"models came or went for {method}: run python -m support.matrix"


def test_the_table_has_the_size_that_was_looked_at():
    assert (len(EXPECTED), len(models.BUILDERS), len(RUNS), len(REFUSED)) == (17, 30, 189, 321)


@pytest.mark.parametrize(("method", "model"), REFUSED, ids=ids(REFUSED))
def test_refused_before_anything_is_changed(method, model):
    """9: says what was asked and what was found, and leaves the model alone."""
    found = models.shared(model)
    before = Print.of(found)
    with pytest.raises(VlmtokError) as refusal:
        vlmtok.compress(found, made(method))
    kind, message = type(refusal.value).__name__, str(refusal.value)
    assert f"refused: {kind}: {matrix.reason(message)}" == EXPECTED[method][model]
    assert type(made(method)[0]).__name__ in message, f"the message does not say who asks: {message}"
    before.assert_still(found)


# ---------------------------------------------------------------------- 1: bit-identical where nothing is done
@pytest.mark.parametrize(("method", "model"), RUNS, ids=ids(RUNS))
def test_a_method_that_does_nothing_changes_no_bit(method, model):
    """1: None at every site, with every signal derived and nothing inserted."""
    subject = Subject(model)
    with torch.no_grad():
        bare = subject.out()
        with vlmtok.compress(subject.model, idle(spec_of(method))) as run:
            found = subject.out()
        assert run._attachment.ledger.fired, "no site was visited"
        assert_same(found, bare)


KEPT = [cell for cell in RUNS if cell[0] in KEEP_ALL]


@pytest.mark.parametrize(("method", "model"), KEPT, ids=ids(KEPT))
def test_keeping_all_changes_no_bit(method, model):
    subject = Subject(model)
    with torch.no_grad():
        bare = subject.out()
        with vlmtok.compress(subject.model, KEEP_ALL[method]):
            assert_same(subject.out(), bare)


def test_every_method_that_can_keep_all_is_in_the_list():
    """`keep` as a share has a keep-all setting by definition."""
    for name in vlmtok.list_methods():
        settings = vlmtok.create_method(name).settings()
        if isinstance(settings.get("keep"), (int, float)):
            assert name in KEEP_ALL


@pytest.mark.parametrize(("method", "model"), RUNS, ids=ids(RUNS))
def test_the_exact_model_comes_back(method, model):
    """1: after removal, after an exception in the middle of a forward, and in a deep copy. 2: it fired."""
    subject = Subject(model)
    before = Print.of(subject.model)
    methods = made(method)
    with torch.no_grad():
        bare = subject.out()
        with vlmtok.compress(subject.model, methods) as run:
            first = subject.out()
            twin = copy.deepcopy(subject.model)
            assert_same(subject.out(twin), bare, "a deep copy and the bare model")
        assert run._attachment.ledger.fired
        assert_differs(first, bare)
        before.assert_still(subject.model)
        assert_same(subject.out(), bare, "output after removal and before")

        calls = []

        def fail(view):
            calls.append(view)
            raise RuntimeError("made to fail")

        methods[0].__dict__["reduce"] = fail
        try:
            with pytest.raises(RuntimeError, match="made to fail"), vlmtok.compress(subject.model, methods):
                subject.out()
        finally:
            del methods[0].__dict__["reduce"]
        assert calls
        before.assert_still(subject.model)
        assert_same(subject.out(), bare, "output after an exception and before")

        with vlmtok.compress(subject.model, methods):
            assert_same(subject.out(), first, "the same compression again")
    # The copy carries inert hooks until it is compressed itself.
    with torch.no_grad(), vlmtok.compress(twin, methods):
        assert_same(subject.out(twin), first, "the copy, compressed")
    assert not hooks(twin)


@pytest.mark.parametrize(("method", "model"), RUNS, ids=ids(RUNS))
def test_an_exception_inside_a_forward_leaves_the_next_one_right(method, model):
    """Nothing of a broken pass reaches the one after it, in the same compression."""
    subject = Subject(model)
    methods = made(method)
    with torch.no_grad(), vlmtok.compress(subject.model, methods) as run:
        first = subject.out()
        run.reset()
        visits = 0

        def fail(view):
            nonlocal visits
            visits += 1
            if visits > 1:
                raise RuntimeError("made to fail")
            return type(methods[0]).reduce(methods[0], view)

        methods[0].__dict__["reduce"] = fail
        try:
            subject.out()
        except RuntimeError:
            pass
        finally:
            del methods[0].__dict__["reduce"]
        run.reset()
        assert_same(subject.out(), first)
        # Another batch, another shape.
        assert_equal(subject.out(row=0), subject.row_of(first, 0))


# ---------------------------------------------------------------------- 3: rows do not meet
@pytest.mark.parametrize(("method", "model"), RUNS, ids=ids(RUNS))
def test_a_batch_equals_its_rows(method, model):
    """3: also left-padded rows, rows with two pictures, one or none."""
    subject = Subject(model)
    with torch.no_grad():
        bare = subject.out()
        with vlmtok.compress(subject.model, made(method)):
            whole = subject.out()
            for row in range(subject.rows):
                assert_equal(subject.row_of(whole, row), subject.out(row=row), what=f"row {row} in a batch and alone")
    assert_differs(whole, bare)


# ---------------------------------------------------------------------- 4: every patch has one owner or none
def owner_by_hand(reduction: Reduction, row: int, n: int) -> list[int]:
    owner = [-1] * n
    real = [True] * reduction.slots if reduction.valid is None else reduction.valid[row].tolist()
    for slot, token in enumerate(reduction.keep[row].tolist()):
        if real[slot]:
            owner[token] = slot
    if reduction.src is not None and reduction.dst is not None:
        kept = {token for token, is_real in zip(reduction.keep[row].tolist(), real) if is_real}
        for token, slot in zip(reduction.src[row].tolist(), reduction.dst[row].tolist()):
            if slot >= 0 and owner[token] < 0 and token not in kept:
                owner[token] = slot
    return owner


@pytest.mark.parametrize(("method", "model"), RUNS, ids=ids(RUNS))
def test_patches_are_owned_once_and_mass_is_kept(method, model):
    """4, and `count` tells what `reduce` returns, and `reduce` runs on meta tensors with the same shapes."""
    subject = Subject(model)
    methods = made(method)
    with torch.no_grad(), watched(methods) as seen, vlmtok.compress(subject.model, methods):
        subject.out()
    assert any(s.reduction is not None for s in seen)
    for s in seen:
        view, reduction = s.view, s.reduction
        batch, n, _ = view.tokens.shape
        count = s.method.count(view.counts)
        if reduction is None:
            assert count in (None, n), f"count says {count} of {n}, and reduce left all"
            continue
        assert count in (None, reduction.slots), f"count says {count}, reduce made {reduction.slots} slots of {n}"
        protected = s.signals.get("protected")
        spare = 0 if view.site.stage != "features" or protected is None else protected.shape[1]
        size = torch.ones(batch, n) if view.size is None else view.size
        tokens = torch.cat([view.tokens, protected], 1) if spare else view.tokens
        slots, sizes = reduction.apply(view.tokens, size, protected if spare else None)
        size = torch.cat([size, torch.zeros(batch, spare)], 1)
        owner = reduction.assignment(n + spare)
        real = torch.ones(batch, reduction.slots, dtype=torch.bool) if reduction.valid is None else reduction.valid
        for row in range(batch):
            keep = reduction.keep[row].tolist()
            assert len(set(keep)) == len(keep), f"a token represents two slots: {keep}"
            assert owner[row].tolist() == owner_by_hand(reduction, row, n + spare)
        owned = torch.zeros(batch, reduction.slots + 1)
        owned.scatter_add_(1, torch.where(owner < 0, reduction.slots, owner), size)
        assert_equal(sizes * real, owned[:, :-1] * real, what="sizes of the slots and what they own")
        assert_equal((sizes * real).sum(1) + owned[:, -1], size.sum(1), what="patches before and after")
        if reduction.keep_weight is None and bool((owner >= 0).all()) and not spare:
            before = (tokens.double() * size[..., None].double()).sum(1)
            assert_equal((slots.double() * sizes[..., None].double()).sum(1), before, what="mass before and after")


@pytest.mark.parametrize(("method", "model"), RUNS, ids=ids(RUNS))
def test_reduce_runs_on_meta_tensors(method, model):
    """Its own cost is counted that way; shapes must be those of the real run."""
    subject = Subject(model)
    methods = made(method)
    with torch.no_grad(), watched(methods) as seen, vlmtok.compress(subject.model, methods) as run:
        subject.out()
    memories = {id(method): run.memory(at) for at, method in enumerate(methods)}
    for s in seen:
        view, memory = s.view, memories[id(s.method)]
        again = TokenView(
            view.tokens.to("meta"),
            view.site,
            size=None if view.size is None else view.size.to("meta"),
            num_prefix=view.num_prefix,
            depth=view.depth,
            grid=view.grid,
            entered=view.entered,
            signals=on_meta(s.signals),
            state=on_meta(s.state),
            row=on_meta(s.row),
            memory=None if memory is None else copy.deepcopy(memory).to("meta"),
        )
        with torch.no_grad():
            found = s.method.reduce(again)
        assert (found is None) == (s.reduction is None)
        if found is not None and s.reduction is not None:
            for name in ("keep", "src", "dst", "keep_weight", "src_weight", "valid"):
                one, other = getattr(found, name), getattr(s.reduction, name)
                assert (one is None) == (other is None), name
                assert one is None or (one.shape == other.shape and one.device.type == "meta"), name


def on_meta(held):
    return {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in held.items()}


# ---------------------------------------------------------------------- 5: an oracle that knows nothing of the library
@pytest.mark.parametrize(("method", "model"), TOWER_RUNS, ids=ids(TOWER_RUNS))
def test_a_tower_equals_the_oracle(method, model):
    """Picture by picture through an explicit loop; signals dense, methods asked with views made by hand."""
    tower, found = models.TOWERS[model], models.shared(model)
    pictures, methods = tower.pictures(2), made(method)
    with torch.no_grad():
        bare = tower.run(found, pictures)
        with vlmtok.compress(found, methods) as run:
            head, tokens = tower.run(found, pictures), tower.tokens(found, pictures)
        vision = oracle.vision_of(found)
        for i in range(len(pictures)):
            player = Player(methods, run.layout, {at: run.memory(at) for at in range(len(methods))})
            wanted = vision.tokens(oracle.run_tower(vision, pictures[i : i + 1], player).x[None])
            assert_equal(tokens[i : i + 1], wanted, what="tokens")
            assert_equal(head[i : i + 1], vision.head(wanted), what="output")
    assert_differs(head, bare)


STEPS = 3


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize(("method", "model"), LLAVA_RUNS, ids=ids(LLAVA_RUNS))
def test_generate_equals_the_oracle(method, model, cached):
    """5: four left-padded rows with one, two or no picture against each row alone, without cache or padding.

    Without a cache a host shows the whole row again at every step, what was generated included: methods that ask the
    text then decide anew.
    """
    subject = Subject(model)
    batch, methods = subject.batch, made(method)
    given = dict(
        **batch.inputs(),
        max_new_tokens=STEPS,
        do_sample=False,
        use_cache=cached,
        return_dict_in_generate=True,
        output_logits=True,
    )
    bare = torch.stack(subject.model.generate(**given).logits, 1)
    with vlmtok.compress(subject.model, methods) as run:
        found = subject.model.generate(**given)
    logits = torch.stack(found.logits, 1)
    reference = oracle.Llava(subject.model)
    memory = {at: run.memory(at) for at in range(len(methods))}
    for row in range(len(batch)) if cached else (0, 2):  # rows do not meet in either way
        ids, wanted = reference.generate(
            batch.rows[row],
            batch.pixels[row],
            lambda: Player(methods, run.layout, memory),
            STEPS,
            again=not cached,
            row=row,
        )
        assert found.sequences[row, -STEPS:].tolist() == ids.tolist(), f"row {row}"
        assert_equal(logits[row], wanted, what=f"logits of row {row}")
    assert_differs(logits, bare)


@pytest.mark.parametrize("method", [method for method, model in LLAVA_RUNS if model == "HF LLaVA"])
def test_beams_follow_the_oracle(method):
    """5: the winning beam of each row has the score that the oracle gives its tokens, cached or not."""
    subject = Subject("HF LLaVA")
    batch, methods = subject.batch, made(method)
    beams = {"num_beams": 2, "output_scores": True, "length_penalty": 0.0, "return_dict_in_generate": True}
    given = {**batch.inputs(), **beams, "max_new_tokens": 3, "do_sample": False}
    with vlmtok.compress(subject.model, methods) as run:
        found = {cached: subject.model.generate(**given, use_cache=cached) for cached in (True, False)}
    reference = oracle.Llava(subject.model)
    memory = {at: run.memory(at) for at in range(len(methods))}
    for cached, out in found.items():
        for row in range(len(batch)):
            tokens = out.sequences[row, -3:]
            _, logits = reference.generate(
                batch.rows[row],
                batch.pixels[row],
                lambda: Player(methods, run.layout, memory),
                3,
                again=not cached,
                row=row,
                given=tokens,
            )
            score = logits.log_softmax(-1)[torch.arange(3), tokens].sum()
            assert_equal(out.sequences_scores[row], score, what=f"score of row {row}, cached: {cached}")


# ---------------------------------------------------------------------- 6: counted as torch counts
@contextlib.contextmanager
def countable(model):
    """Torch definitions, no fused fast path, no leaf that wants a gradient: what torch's counter can follow."""
    fast, wanting = torch.backends.mha.get_fastpath_enabled(), [p for p in model.parameters() if p.requires_grad]
    torch.backends.mha.set_fastpath_enabled(False)
    model.requires_grad_(False)
    try:
        with torch.no_grad(), vlmtok.kernels.use("torch"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for parameter in wanting:
            parameter.requires_grad_(True)


WORDS = 12


def read(subject):
    """Calls the text tower of a dual encoder, which reports and estimates cover too."""
    call = getattr(subject.model, "encode_text", None) or getattr(subject.model, "get_text_features", None)
    if call is not None:
        call(torch.arange(1, 1 + WORDS)[None])


def first_input(subject):
    """What `estimate` is told of it."""
    if subject.tower is not None:
        height, width = subject.tower.size
        return {"visual_tokens": (height // models.PATCH) * (width // models.PATCH), "text_tokens": WORDS}
    before, after = 4, 5  # "^3I5"
    return {"text_tokens": (before, after), "logits": "all"}


@pytest.mark.parametrize(("method", "model"), RUNS, ids=ids(RUNS))
def test_the_report_counts_what_ran_and_the_estimate_agrees(method, model):
    """6: signals and the method's own cost included; `estimate` is told what stays where content decides."""
    subject = Subject(model)
    with countable(subject.model), vlmtok.compress(subject.model, made(method)) as run:
        with referee.counter() as counter:
            subject.out()
        whole = run.report()
        subject.out(row=0)
        read(subject)
        report = run.report()
        planned = vlmtok.estimate(subject.model, made(method), counts=run, **first_input(subject))
    assert whole.macs.after.fixed
    assert 2 * whole.macs.after.low == counter.get_total_flops()
    assert whole.macs.after.low < whole.macs.before + sum(line.after.low for line in whole.lines if not line.before)
    assert [(line.name, line.before, line.after) for line in planned.lines] == [
        (line.name, line.before, line.after) for line in report.lines
    ]


# ---------------------------------------------------------------------- 8: selection in fp32
@pytest.mark.parametrize(("method", "model"), RUNS, ids=ids(RUNS))
def test_selection_runs_in_fp32_whatever_surrounds_it(method, model):
    """8: autocast is off inside `reduce`, matrix products are exact, and half-precision models run."""
    subject = Subject(model)
    methods = made(method)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with (
            torch.no_grad(),
            torch.autocast("cpu", dtype=torch.bfloat16),
            watched(methods) as seen,
            vlmtok.compress(subject.model, methods),
        ):
            subject.out()
        assert torch.get_float32_matmul_precision() == "medium", "the user's precision was not put back"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert seen
    assert not any(s.autocast or s.grad for s in seen)
    assert {s.precision for s in seen} == {"highest"}
    for s in seen:
        if s.reduction is not None and s.reduction.keep_weight is not None:
            assert s.reduction.keep_weight.dtype == torch.float32


HALF = [cell for cell in RUNS if cell[1] in ("timm ViT", "timm EVA-02", "open_clip CLIP", "HF CLIP vision", "HF LLaVA")]


@pytest.mark.parametrize(("method", "model"), HALF, ids=ids(HALF))
def test_half_precision_models_run(method, model):
    half = copy.deepcopy(models.shared(model)).to(torch.bfloat16)
    methods = made(method)
    if model in models.TOWERS:
        tower = models.TOWERS[model]
        pictures = tower.pictures(2).to(torch.bfloat16)
        run_it = lambda: tower.tokens(half, pictures)  # noqa: E731
    else:
        run_it = Subject(model, half).out
    with torch.no_grad(), watched(methods) as seen, vlmtok.compress(half, methods):
        found = run_it()
    assert found.dtype == torch.bfloat16
    assert bool(found.isfinite().all())
    assert any(s.reduction is not None for s in seen)
    assert all(s.view.size is None or s.view.size.dtype == torch.float32 for s in seen)


PRUNERS = [name for name in vlmtok.list_methods() if vlmtok.method_class(name).__module__.startswith("vlmtok.pruners")]


@pytest.mark.parametrize("method", [name for name in PRUNERS if name != "random"])
def test_ties_go_to_the_lowest_index(method):
    """8: where all tokens are equal, the first ones stay."""
    for kept, n in everything_equal(method):
        assert kept == list(range(len(kept))), f"of {n} equal tokens {kept} were kept"


@pytest.mark.parametrize("method", PRUNERS)
def test_a_token_with_nan_is_not_kept(method):
    """8: NaN loses, wherever it comes from, as long as another token is left (a blind draw aside)."""
    if method == "random":
        return
    for kept, n in everything_equal(method, nan_at=0):
        assert 0 not in kept, f"of {n} tokens the first has NaN everywhere, and {kept} were kept"


def everything_equal(method, nan_at=None, n=12):
    """(kept tokens, n) at each site of a pruner that sees n equal tokens, one of them with NaN in all it has."""
    subject = Subject("HF LLaVA")
    methods = made(method)
    with torch.no_grad(), watched(methods) as seen, vlmtok.compress(subject.model, methods):
        subject.out(row=0)
    found = []
    state: dict = {}
    for s in seen:
        signals = {}
        length = n + 8
        for name, value in s.signals.items():
            if value is None:
                signals[name] = None
                continue
            # Every axis that had the view's tokens, or the row's, has the new numbers; values are one number.
            sizes = {s.view.tokens.shape[1]: n}
            plain = name.partition("@")[0]
            shape = [1 if at == 0 else sizes.get(size, size) for at, size in enumerate(value.shape)]
            if plain in ("transition", "attention_logits"):
                shape = (
                    [1, *value.shape[1:-1], length] if plain == "transition" else [1, value.shape[1], length, length]
                )
            made_up = torch.full(shape, 0.05)
            if nan_at is not None and plain != "text":
                axis = {"cls_attention": 2, "text_attention": 3, "last_attention": 2, "transition": 3}.get(plain, 1)
                if plain == "attention_logits":
                    axis = 3
                at = nan_at + (4 if plain in ("transition", "attention_logits") else 0)
                made_up.index_fill_(axis, torch.tensor([at]), float("nan"))
            signals[name] = made_up
        tokens = torch.full((1, n, 8), 0.5)
        if nan_at is not None:
            tokens[:, nan_at] = float("nan")
        if "text" in signals and signals["text"] is not None:
            signals["text"] = torch.full((1, 5, 8), 0.25)
        view = TokenView(
            tokens,
            s.view.site,
            depth=s.view.depth,
            entered=n,
            columns=torch.arange(4, 4 + n)[None],
            signals=signals,
            state=state,
            grid=(3, 4),
        )
        with torch.no_grad():
            reduction = s.method.reduce(view)
        if reduction is not None and reduction.slots < n:
            assert s.method.count(Counts(s.view.site, n, n, 0, s.view.depth)) in (None, reduction.slots)
            found.append((sorted(reduction.keep[0].tolist()), n))
    assert found, f"{method} cut nothing"
    return found
