"""`vlmtok doctor`: right on the libraries at hand, and whatever breaks in a host, or in us, is named and never `ok`."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json

import pytest
import torch
from typer.testing import CliRunner
from vlmtok.adapters import adapter_for, host_faults
from vlmtok.adapters.language import families

import vlmtok
from vlmtok import cli
from vlmtok.core.attachment import Attachment
from vlmtok.errors import ParameterError
from vlmtok.kernels import dispatch
from vlmtok.lab import catalogue, doctor
from vlmtok.lab.doctor import language, probes, replay
from vlmtok.lab.doctor.facts import BROKEN, NAMES, OK, REFUSED
from vlmtok.lab.doctor.language import Language
from vlmtok.lab.doctor.rows import QUICK, Case, cases, one_thread
from vlmtok.lab.doctor.towers import Vision
from vlmtok.lab.tiny.families import FAMILIES, TOWER_ONLY
from vlmtok.lab.tiny.towers import TOWERS

CPU = torch.device("cpu")
CARRIED = [name for name, case in cases().items() if case.build is not None]
REASONS = {*families.REFUSED.values(), "its adapter offers no cut there"}
for row in families.ROWS.values():
    REASONS |= {row.whole, row.boundary}


def command(*words):
    return CliRunner().invoke(cli.app, ["doctor", *words])


def row_of(name, change=None):
    """The row of a tiny model, after something was done to it."""
    case = cases()[name]

    def build(device):
        subject = case.build(device)
        if change is not None:
            change(subject.model)
        return subject

    with one_thread():
        return Case(case.name, case.library, build).run(CPU)


def broken(row):
    return {fact.name for fact in row.facts if fact.status == BROKEN}


# ---------------------------------------------------------------------- on the libraries at hand
def test_the_quick_set_is_right_here():
    """And its JSON is one object, nothing else, with all that an issue needs."""
    result = command("--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["ok"], [row["why"] for row in found["rows"] if row["status"] == BROKEN]
    assert set(found) == {"ok", "counts", "versions", "machine", "kernels", "seconds", "rows"}
    assert found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"]
    for package in ("python", "vlmtok", "torch", "transformers", "timm", "open_clip_torch", "numpy", "triton"):
        assert package in found["versions"]
    assert found["machine"]["device_type"] == "cpu" and found["kernels"]["path"] == "torch"
    assert [row["name"] for row in found["rows"]] == list(QUICK)
    for row in found["rows"]:
        assert set(row) == {"name", "library", "model", "adapter", "status", "why", "seconds", "facts"}
        check(row["name"], row["status"], {fact["fact"]: fact for fact in row["facts"]})
    assert found["counts"] == {
        status: sum(row["status"] == status for row in found["rows"]) for status in (OK, REFUSED, BROKEN)
    }


@pytest.mark.parametrize("name", [name for name in CARRIED if name not in QUICK])
def test_every_other_row_is_right_here(name):
    row = row_of(name)
    assert not broken(row), row.why
    check(name, row.status, {fact.name: fact.to_dict() for fact in row.facts})


def check(name, status, facts):
    """A row has every fact that its kind can have, and what is refused is refused for a reason that is written down."""
    assert list(facts) == [fact for fact in NAMES if fact in facts]
    known = host_faults.fault_of(name)
    if known is not None:
        assert status == REFUSED and facts["bare"]["why"] == known and len(facts) == 1
        return
    assert status == OK
    wanted = {"bare", "neutral", "tower"}
    if name in FAMILIES or name == "generic-vlm" or name in TOWER_ONLY:
        wanted |= {"input", "layer", "generate"}
    elif name in ("open_clip CLIP", "open_clip CustomTextCLIP", "open_clip TimmModel", "HF CLIPModel"):
        wanted |= {"text"}
    assert set(facts) == wanted
    for fact in facts.values():
        assert fact["status"] == OK or (fact["status"] == REFUSED and fact["why"] in REASONS), fact
    must = wanted - {"tower"} if name in FAMILIES or name == "generic-vlm" else wanted - {"input", "layer"}
    assert all(facts[fact]["status"] == OK for fact in must)


def test_every_family_adapter_and_class_has_a_row():
    table = cases()
    types = {family.make().config.model_type for family in TOWER_ONLY.values()} | set(FAMILIES)
    assert set(families.ROWS) <= types and set(families.ROWS) | set(families.REFUSED) <= set(table)
    assert set(QUICK) <= set(table) and set(TOWERS) <= set(table)
    models = [tower.build() for tower in TOWERS.values()]
    models += [model.visual for model in models if hasattr(model, "visual")]  # an adapter of its own carries it there
    assert {adapter_for(model).name for model in models} | {"transformers-vlm"} == set(catalogue.ADAPTERS)


# ---------------------------------------------------------------------- the command
def test_one_family_as_a_page():
    result = command("--family", "TIMM vit", "--family", "mllama")
    assert result.exit_code == 0 and not result.stderr.strip()
    for word in (f"torch {torch.__version__}"[:9], "kernels torch", "timm ViT", "cross-attention", "1 ok, 1 refused"):
        assert word in result.stdout
    assert "timm EVA" not in result.stdout


def test_a_library_is_all_its_towers():
    report = doctor.examine(["open_clip"])
    assert [row.name for row in report.rows] == [name for name in TOWERS if name.startswith("open_clip")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--family", "lava"), "no family or tower 'lava'; did you mean 'llava'"),
        (("--family", "llava", "--all"), "one of them"),
        (("--device", "abacus"), "device 'abacus' cannot be used here"),
        (("--adapter", "generic-vlm"), "none is given"),
        (("--model", "no/such folder"), "no model"),
    ],
)
def test_what_cannot_be_asked_is_one_line_and_exit_code_2(words, said):
    result = command(*words)
    assert result.exit_code == 2 and said in result.stderr and not result.stdout
    assert len(result.stderr.split("vlmtok: ")) == 2 and "\n" not in result.stderr.strip()


def test_something_broken_is_exit_code_1(monkeypatch):
    monkeypatch.setattr(language, "compress", lambda *given, **named: contextlib.nullcontext())
    result = command("--family", "llava", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and not found["ok"] and found["counts"][BROKEN] == 1
    page = command("--family", "llava")
    assert page.exit_code == 1 and "broken: llava, layer: nothing was cut" in page.stdout


def test_the_embedded_checkpoint():
    report = doctor.examine(model="tiny-llava")
    assert [row.name for row in report.rows] == ["tiny-llava"]
    assert {fact.name: fact.status for fact in report.rows[0].facts} == dict.fromkeys(
        ("bare", "neutral", "tower", "input", "layer", "generate"), OK
    )


# ---------------------------------------------------------------------- models of the user's
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm", "paligemma", "blip-2"])
def test_a_loaded_model_with_one_prompt(name):
    """The second row is made of the first: its last words are the same, and some before them are missing."""
    family = {**FAMILIES, **TOWER_ONLY}[name]
    model, pattern = family.build(family.attentions[0]), family.rows[0][:-1] + "6"
    inputs = family.batch(pattern).inputs()
    batch, rows = doctor.own.two_rows(model, inputs)
    assert batch["attention_mask"].sum(1).tolist() == [row["input_ids"].shape[1] for row in rows]
    assert batch["input_ids"][:, -1].tolist() == [inputs["input_ids"][0, -1]] * 2
    row = doctor.examine_model(model, inputs, name="mine")
    assert row.status == OK and row.name == "mine" and row.library == "transformers", row.why
    assert row.fact("generate").status == OK


def test_a_loaded_tower():
    tower = TOWERS["HF DINOv2"]
    row = doctor.examine_model(tower.build(), tower.pictures(2))
    assert row.status == OK and row.name == "Dinov2Model" and row.fact("tower").status == OK


def test_inputs_that_do_not_fit_are_refused():
    family = FAMILIES["llava"]
    model = family.build()
    for inputs, said in (
        (family.batch("2I6", "I6").inputs(), "one prompt"),
        (family.batch("I2").inputs(), "more than"),
        (family.batch("9").inputs(), "with a picture"),
    ):
        with pytest.raises(ParameterError, match=said):
            doctor.examine_model(model, inputs)
    with pytest.raises(ParameterError, match="B >= 2"):
        doctor.examine_model(TOWERS["timm ViT"].build(), torch.zeros(1, 3, 48, 48))


def test_a_model_that_nobody_carries_is_no_success():
    class Stranger(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.to_one = torch.nn.Linear(3, 1)

        def forward(self, pixels):
            return self.to_one(pixels.mean((2, 3)))

    row = doctor.examine_model(Stranger(), torch.rand(2, 3, 8, 8))
    assert row.status == BROKEN and row.fact("bare").status == OK and "no adapter carries" in row.fact("neutral").why


# ---------------------------------------------------------------------- played hosts
def played(modules, call, forward, renamed=()):
    """Makes modules of a class of its own: `call` stands in front of hooks, `forward` behind them.

    The signature tells of it: arguments in `renamed` have other names.
    """
    kind = type(modules[0])
    names = dict(renamed)

    def forward_(self, *given, **named):
        return forward(functools.partial(kind.forward, self), *given, **named)

    def call_(self, *given, **named):
        return call(functools.partial(kind.__call__, self), *given, **named)

    before = inspect.signature(kind.forward)
    after = [value.replace(name=names.get(name, name)) for name, value in before.parameters.items()]
    forward_.__signature__ = before.replace(parameters=after)
    made = type(kind.__name__, (kind,), {"__call__": call_, "forward": forward_, "__module__": kind.__module__})
    for module in modules:
        module.__class__ = made


def straight(run, *given, **named):
    return run(*given, **named)


def text_of(model):
    return model.model.language_model


def cache_name(module):
    names = inspect.signature(type(module).forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def rotary_in_one_tensor(model):
    """The layers' rotary pair comes as one tensor under another name."""

    def call(run, *given, position_embeddings, **named):
        return run(*given, turns=torch.stack(position_embeddings), **named)

    def forward(run, *given, turns, **named):
        return run(*given, position_embeddings=tuple(turns), **named)

    played(text_of(model).layers, call, forward, {"position_embeddings": "turns"})


def cache_in_a_box(model):
    """The text model gets the cache inside something that is none."""
    name = cache_name(text_of(model))

    class Box:
        def __init__(self, inside):
            self.inside = inside

    def call(run, *given, **named):
        return run(*given, memory=Box(named.pop(name, None)), **named)

    def forward(run, *given, memory, **named):
        return run(*given, **{name: memory.inside}, **named)

    played([text_of(model)], call, forward, {name: "memory"})


def cache_left_behind(model):
    """Layers keep their own cache; the one that is handed around stays empty."""
    name, own = cache_name(text_of(model)), {}

    def forward(run, *given, **named):
        handed = named.get(name)
        if handed is not None:
            kept = own.setdefault("of", handed)
            if kept is not handed and handed.get_seq_length() == 0:
                own["of"] = handed
            named[name] = type(handed)()
        return run(*given, **named)

    played(text_of(model).layers, straight, forward)


def mask_dropped(model):
    """Layers do not heed their mask."""

    def forward(run, *given, attention_mask=None, **named):
        return run(*given, attention_mask=None, **named)

    played(text_of(model).layers, straight, forward)


def layers_called_otherwise(model):
    """The forward of layers was renamed, and they run by that name: no hook of theirs is called."""
    without_hooks(text_of(model).layers)


def deepstack_renamed(model):
    """Features for the first layers come under another name."""

    def call(run, *given, deepstack_visual_embeds=None, **named):
        return run(*given, lower_features=deepstack_visual_embeds, **named)

    def forward(run, *given, lower_features=None, **named):
        return run(*given, deepstack_visual_embeds=lower_features, **named)

    played([text_of(model)], call, forward, {"deepstack_visual_embeds": "lower_features"})


def blocks_in_parallel(model):
    """Attention and MLP read the same input: nothing lies between them any more."""
    kind = type(model.blocks[0])

    def forward(self, x, *given, **named):
        x1 = self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + x1 + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    made = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    for block in model.blocks:
        block.__class__ = made


def blocks_called_otherwise(model):
    """The same for the blocks of a tower."""
    without_hooks(model.blocks)


def without_hooks(modules):
    """Calls go to `forward` at once."""
    kind = type(modules[0])
    call = {"__call__": lambda self, *given, **named: self.forward(*given, **named), "__module__": kind.__module__}
    made = type(kind.__name__, (kind,), call)
    for module in modules:
        module.__class__ = made


PLAYED = [
    ("llava", rotary_in_one_tensor, {"layer"}),
    ("qwen2_5_vl", rotary_in_one_tensor, {"layer"}),
    ("gemma3", rotary_in_one_tensor, {"layer"}),
    ("qwen2_5_vl", cache_in_a_box, {"generate"}),
    ("llava", cache_in_a_box, {"generate"}),
    ("llava", layers_called_otherwise, {"neutral", "layer"}),
    ("internvl", layers_called_otherwise, {"neutral", "layer"}),
    ("qwen3_vl", deepstack_renamed, {"input"}),
    ("timm ViT", blocks_in_parallel, {"tower"}),
    ("timm ViT", blocks_called_otherwise, {"neutral", "tower"}),
]


@pytest.mark.parametrize(
    ("name", "change", "facts"), PLAYED, ids=[f"{name}-{change.__name__}" for name, change, _ in PLAYED]
)
def test_a_host_that_changed_is_named(name, change, facts):
    """The host alone is right, and what we make of it is not; an adapter that refuses such a host breaks more facts."""
    row = row_of(name, change)
    assert row.status == BROKEN and row.fact("bare").status == OK, row
    assert broken(row) >= facts or row.fact("neutral").why.startswith("vlmtok refuses"), broken(row)
    assert all(fact.why for fact in row.facts if fact.status == BROKEN)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (mask_dropped, "logits of row 1 in a padded batch differ"),
        (cache_left_behind, "with a cache"),
    ],
)
def test_a_host_that_is_wrong_by_itself_is_told_apart(change, said):
    row = row_of("llava", change)
    assert row.status == BROKEN and [fact.name for fact in row.facts] == ["bare"]
    assert row.why.startswith("bare: the host fails bare: ") and said in row.why, row.why


def test_a_host_that_raises_says_where():
    def change(model):
        def forward(run, *given, **named):
            raise AttributeError("no such thing\nand more of it")

        played(text_of(model).layers[1:2], straight, forward)

    row = row_of("llava", change)
    assert "the host fails bare: AttributeError: no such thing (" in row.why and "test_doctor.py:" in row.why


def test_a_library_that_cannot_be_imported():
    def build(device):
        raise ModuleNotFoundError("No module named 'timm'")

    row = Case("timm ViT", "timm", build).run(CPU)
    assert row.status == BROKEN and row.why == (
        "bare: the host cannot build it: ModuleNotFoundError: No module named 'timm'"
    )


# ---------------------------------------------------------------------- faults of ours
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "blip-2", "open_clip CLIP", "timm EVA-02"])
def test_a_wrong_choice_shows(name, monkeypatch):
    """Other tokens stay than the oracle keeps, as many of them."""

    def reduce(self, view):
        batch, n, _ = view.tokens.shape
        kept = probes.some(n)
        return vlmtok.Reduction(((n - 1) - kept).sort().values.expand(batch, -1))

    monkeypatch.setattr(probes.Fixed, "reduce", reduce)
    row = row_of(name)
    wanted = {fact.name for fact in row.facts if fact.status != REFUSED} - {"bare", "neutral"}
    assert broken(row) == wanted and wanted, row
    assert all("the oracle's" in row.fact(fact).why for fact in wanted)


@pytest.mark.parametrize("name", ["llava", "timm ViT"])
def test_hooks_that_never_run_show(name, monkeypatch):
    monkeypatch.setattr(Attachment, "hook", lambda self, *given, **named: None)
    row = row_of(name)
    assert "methods were never asked at" in row.fact("neutral").why
    assert "nothing was cut" in row.fact("tower").why


@pytest.mark.parametrize("name", ["llava", "timm ViT"])
def test_one_bit_shows(name, monkeypatch):
    """A compression that cuts nothing and adds the smallest step to the output is not neutral."""
    from vlmtok.lab.doctor import towers

    @contextlib.contextmanager
    def compress(model, method, adapter=None):
        head = model.lm_head if hasattr(model, "lm_head") else model.head
        with vlmtok.compress(model, method, adapter=adapter):
            up = head.register_forward_hook(lambda m, x, out: torch.nextafter(out, out + 1))
            try:
                yield
            finally:
                up.remove()

    for module in (language, towers):
        monkeypatch.setattr(module, "compress", compress)
    assert broken(row_of(name)) == {"neutral"}


@pytest.mark.parametrize(("cached", "step", "said"), [(True, 2, "step 2, with a cache"), (False, 0, "without a cache")])
def test_wrong_decoding_shows(cached, step, said, monkeypatch):
    """With cuts in place, a later step on the cache is off, or the first one without."""
    cutting, generate = [], Language.generate

    @contextlib.contextmanager
    def compress(model, method, adapter=None):
        with vlmtok.compress(model, method, adapter=adapter):
            cutting.append(isinstance(method, list))
            yield
            cutting.pop()

    def off(self, with_cache=True):
        found = generate(self, with_cache)
        if with_cache is cached and any(cutting):
            found.logits[1, step] += 0.01
        return found

    monkeypatch.setattr(language, "compress", compress)
    monkeypatch.setattr(Language, "generate", lambda self, cached=True: off(self, cached))
    row = row_of("llava")
    assert broken(row) == {"generate"} and said in row.why and "row 1" in row.why, row.why


def test_a_hook_that_stays_shows(monkeypatch):
    """What a removed compression leaves behind is no longer the bare model."""

    @contextlib.contextmanager
    def compress(model, method, adapter=None):
        yield
        if isinstance(method, probes.Nothing):
            method.asked.update(map(str, method.sites(adapter_for(model).layout())))
            model.lm_head.register_forward_hook(lambda m, x, out: 2 * out)

    monkeypatch.setattr(language, "compress", compress)
    assert "logits after removal" in row_of("llava").fact("neutral").why


def test_a_cut_that_moves_nothing_proves_nothing():
    """An output that does not depend on visual tokens is no success, and is not called one."""

    def blind(model):
        with torch.no_grad():
            model.model.multi_modal_projector.linear_2.weight.zero_()
            model.model.multi_modal_projector.linear_2.bias.zero_()
            for layer in text_of(model).layers:
                layer.self_attn.v_proj.weight.zero_()

    row = row_of("llava", blind)
    assert row.fact("input").status == REFUSED and "proves nothing" in row.fact("input").why


def test_the_oracle_knows_when_it_does_not_know_the_call(monkeypatch):
    """With all tokens kept it must be the bare model; else its word is worth nothing, and it says so."""
    monkeypatch.setattr(replay.TextModel, "_windowed", lambda self, before, after, keep: dict.fromkeys(after))
    row = row_of("gemma3")
    assert "how it is called is not known" in row.fact("input").why


# ---------------------------------------------------------------------- faults of hosts
@pytest.fixture
def fault(monkeypatch):
    def put(family, first="0.1", last=None):
        row = host_faults.Fault(family, "transformers", first, last, "it trips over itself")
        monkeypatch.setattr(host_faults, "FAULTS", (row,))

    return put


def test_a_known_fault_of_a_host_is_refused_with_its_reason(fault):
    fault("llava")
    row = row_of("llava", mask_dropped)
    assert (
        row.status == REFUSED and row.why.startswith("bare: transformers 5.") and row.why.endswith("trips over itself")
    )
    assert not broken(row)


def test_a_known_fault_that_is_gone_is_said(fault):
    fault("llava")
    row = row_of("llava")
    assert row.fact("bare").status == BROKEN and "host_faults.py is outdated" in row.why


def test_a_fault_of_another_version_excuses_nothing(fault):
    fault("llava", "0.1", "4.99.9")
    assert row_of("llava", mask_dropped).status == BROKEN
    assert host_faults.fault_of("llava") is None


@pytest.mark.parametrize(
    ("first", "last", "version", "holds"),
    [
        ("5.24.0", None, "5.23.0", False),
        ("5.24.0", None, "5.24.0", True),
        ("5.24", None, "5.24.0", True),
        ("5.24.0", None, "5.100.1", True),
        ("5.24.0", "5.24.1", "5.24.1", True),
        ("5.24.0", "5.24.1", "5.24.2", False),
        ("5.24.0", "5.24.1", "5.25.0.dev0", False),
    ],
)
def test_versions_of_a_fault(first, last, version, holds):
    assert host_faults.Fault("x", "y", first, last, "").holds(version) is holds


def test_a_fault_of_a_library_that_is_not_here(monkeypatch):
    monkeypatch.setattr(host_faults, "FAULTS", (host_faults.Fault("llava", "no-such-library", "1", None, ""),))
    assert host_faults.fault_of("llava") is None


# ---------------------------------------------------------------------- the parts
def test_kernels_say_their_path(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETS", False)
    assert dispatch.explain(CPU)[0] == "torch"
    with dispatch.use("torch"):
        assert dispatch.explain(CPU) == ("torch", "the mode is 'torch'")
    with dispatch.use("triton"):
        assert dispatch.explain(CPU)[0] == "none" and "compiles for CUDA" in dispatch.explain(CPU)[1]
        monkeypatch.setattr(dispatch, "INTERPRETS", True)
        monkeypatch.setattr(dispatch, "HAS_TRITON", True)
        assert dispatch.explain(CPU)[0] == "triton"
    assert dispatch.explain(CPU)[0] == "torch"
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert dispatch.explain(CPU) == ("torch", "triton is not installed")


def test_a_cut_between_layers_by_the_oracle_is_a_cut_by_hand():
    """The host's run over the shorter row with hidden states put in, against its layers called one by one."""
    case = cases()["llava"].build(CPU)
    case.host()
    case.open()
    row, lm = case.rows[0], text_of(case.model)
    stays, wanted = case._oracle("layer", 0)
    assert 0 < len(stays) < row["input_ids"].shape[1]
    caught = []
    with replay.hooked(
        lm.layers[2].register_forward_pre_hook(lambda m, x, named: caught.append(x[0]), with_kwargs=True)
    ):
        case.forward(row)
    hidden = caught[0][:, stays]
    with torch.no_grad():
        turns = lm.rotary_emb(hidden, stays[None])
        causal = torch.full((len(stays), len(stays)), torch.finfo(hidden.dtype).min).triu(1)[None, None]
        for layer in lm.layers[2:]:
            hidden = layer(hidden, attention_mask=causal, position_embeddings=turns)
        logits = case.model.lm_head(lm.norm(hidden))[0]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


def test_a_window_counts_the_tokens_left():
    """Of what the oracle makes of a sliding mask: bool by bool from the definition."""
    case = cases()["gemma3"].build(CPU)
    case.host()
    case.open()
    length = case.rows[0]["input_ids"].shape[1]
    text = replay.TextModel(case.model, case.lm, case.visual(0), length)
    keep = case._oracle("input", 0)[0]
    seen, at = torch.ones(length, length, dtype=torch.bool).tril(), case.visual(0)
    seen[at[:, None], at] = True  # a picture sees itself both ways
    place, window = torch.arange(length), case.lm.config.sliding_window
    masks = {
        "full_attention": seen[None, None],
        "sliding_attention": (seen & (place[None] > place[:, None] - window))[None, None],
    }
    short = text._windowed(masks, replay.along(masks, {length: keep}), keep)["sliding_attention"][0, 0]
    left = seen[keep][:, keep]
    place = torch.arange(len(keep))
    assert torch.equal(short, left & (place[None] > place[:, None] - window))
    assert not torch.equal(short, masks["sliding_attention"][0, 0][keep][:, keep]), "the window matters here"


def test_the_choice_is_scattered_and_never_empty():
    for n in range(1, 40):
        kept = probes.scattered(n)
        assert kept == sorted(set(kept)) and kept[0] == 0 and kept[-1] < n
    assert len(probes.scattered(16)) == 10 and probes.some(5).tolist() == [0, 1, 3]


def test_rows_have_lengths_of_their_own():
    """Else an axis of tokens could not be told from one of channels."""
    for name in FAMILIES:
        subject = cases()[name].build(CPU)
        assert isinstance(subject, Language)
        sizes = {size for parameter in subject.model.parameters() for size in parameter.shape}
        lengths = [row["input_ids"].shape[1] for row in subject.rows]
        assert not sizes & set(lengths) and len(set(lengths)) == 2
        assert (subject.batch["attention_mask"].sum(1) < max(lengths)).any()


def test_examining_leaves_the_process_alone():
    state, threads, modes = torch.random.get_rng_state(), torch.get_num_threads(), dispatch.mode()
    doctor.examine(["timm ViT", "llava"])
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads and dispatch.mode() == modes


def test_a_vision_model_is_asked_with_two_pictures():
    tower = TOWERS["timm ViT"]
    subject = Vision(tower.build(), tower.run, tower.pictures(2))
    assert [fact.status for fact in subject.facts()] == [OK, OK, OK]
