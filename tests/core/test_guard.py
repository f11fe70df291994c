"""The error budget: what reaches a caller is an error that is meant, or somebody else's; a fault of ours says so."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from families.build import FAMILIES
from families.build import shared as family_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import models
from support.checks import assert_same
from test_dtypes import SPECS

import vlmtok
from vlmtok import Method, Reduction, Site
from vlmtok.core import grouping
from vlmtok.errors import InternalError, PassError, VlmtokError, VlmtokWarning
from vlmtok.guard import guarded, told


def _llava() -> tuple[Any, dict[str, Any]]:
    return models.llava(depth=4), models.Batch.of("^3I5", "2I2", "^2I1I4").inputs()


# ---------------------------------------------------------------------- whose fault it is
def code_of(package: str) -> Any:
    """A function of a package, which calls what it is given."""
    space: dict[str, Any] = {"__name__": package}
    exec("def go(call):\n    return call()", space)
    return space["go"]


def caught(call: Any) -> Exception:
    try:
        call()
    except Exception as problem:
        return problem
    raise AssertionError("nothing was raised")


OURS = code_of("vlmtok.somewhere")


@pytest.mark.internal_error
def test_an_error_that_starts_in_our_code_is_ours() -> None:
    fault = told(caught(functools.partial(OURS, int.__add__)))
    assert isinstance(fault, InternalError) and fault.kind == "TypeError" and fault.place == "vlmtok.somewhere:2"
    assert all(word in str(fault) for word in ("fault of vlmtok", "report", "vlmtok.somewhere:2", "run.paused()"))


@pytest.mark.internal_error
@pytest.mark.parametrize("library", ["torch.nn.functional", "numpy.core", "functools"])
def test_libraries_do_what_their_caller_says(library: str) -> None:
    inner = code_of(library)
    assert told(caught(functools.partial(OURS, functools.partial(inner, int.__add__)))) is not None
    assert told(caught(functools.partial(inner, int.__add__))) is None, "nothing of ours ran"


@pytest.mark.parametrize("stranger", ["transformers.models.llava", "timm.layers", "__main__", "my_methods"])
def test_what_starts_in_a_host_or_in_a_users_code_is_theirs(stranger: str) -> None:
    inner = code_of(stranger)
    assert told(caught(functools.partial(OURS, functools.partial(inner, int.__add__)))) is None
    assert (
        told(caught(functools.partial(OURS, functools.partial(inner, functools.partial(OURS, int.__add__))))) is None
    ), "a user who misuses our helpers"


STOP = torch.utils.checkpoint._StopRecomputationError()
"""By which checkpointing ends a forward that runs again, from inside what is run."""


@pytest.mark.internal_error
@pytest.mark.parametrize(
    "problem",
    [STOP, PassError("meant"), VlmtokWarning("meant"), MemoryError(), torch.OutOfMemoryError("full"), RecursionError()],
    ids=lambda problem: type(problem).__name__,
)
def test_what_is_meant_and_what_the_machine_says_passes(problem: Exception) -> None:
    assert told(caught(functools.partial(OURS, functools.partial(_thrower(), problem)))) is None
    assert told(caught(functools.partial(OURS, functools.partial(_thrower(), ValueError())))) is not None


def _thrower() -> Any:
    """Raises what it is given, from C: a generator that has not begun leaves the frame of its own code alone."""
    space: dict[str, Any] = {"__name__": "torch"}
    exec("made = (lambda: (yield))()", space)
    return space["made"].throw


# ---------------------------------------------------------------------- hooks and entry points
@pytest.mark.internal_error
def test_a_fault_in_a_pass_is_named_and_the_pass_ends_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = _llava()
    with torch.no_grad(), vlmtok.compress(model, "divprune:keep=0.5") as run:
        wanted = model(**inputs).logits
        with monkeypatch.context() as broken:
            broken.setattr(grouping, "_grid", None)
            at = r"fault of vlmtok: TypeError at vlmtok\.core\.grouping:\d+"
            with pytest.raises(InternalError, match=at) as fault:
                model(**inputs)
        assert isinstance(fault.value.__cause__, TypeError)
        assert_same(model(**inputs).logits, wanted)
        run.report()


@dataclass(eq=False)
class Wrong(Method):
    """A method of a user, with a slip."""

    def sites(self, layout: Any) -> list[Site]:
        return [Site("projected")]

    def reduce(self, view: Any) -> Reduction:
        return Reduction(view.tokens.nothing)

    def count(self, counts: Any) -> int:
        return counts.n


def test_slips_of_a_users_method_and_signal_pass_unchanged() -> None:
    model, inputs = _llava()
    with vlmtok.compress(model, Wrong()), pytest.raises(AttributeError, match="nothing") as problem:
        model(**inputs)
    assert problem.value.__cause__ is None

    def slip(view: Any) -> Any:
        return view.tokens.nothing

    with (
        vlmtok.compress(model, "divprune:keep=0.5", signals={"attention": slip}),
        vlmtok.compress(model, "fastv:K=1:keep=0.5", signals={"last_attention": slip}),
        pytest.raises(AttributeError, match="nothing"),
    ):
        model(**inputs)


def test_errors_of_the_host_pass_unchanged() -> None:
    model, inputs = _llava()
    inputs["pixel_values"] = inputs["pixel_values"][:, :2]
    bare = caught(lambda: model(**inputs))
    with vlmtok.compress(model, "divprune:keep=0.5"):
        found = caught(lambda: model(**inputs))
    assert (type(found), str(found)) == (type(bare), str(bare))


PLAIN = {"keep_count", "list_methods", "method_class", "register_method"}
"""Public functions that look something up and run nothing."""


def test_every_public_function_is_guarded() -> None:
    functions = {name for name in dir(vlmtok) if inspect.isfunction(getattr(vlmtok, name)) and name in vlmtok._HOME}
    assert {name for name in functions if not hasattr(getattr(vlmtok, name), "__wrapped__")} == PLAIN
    for name in ("report", "trace", "remove", "row"):
        assert hasattr(getattr(vlmtok.Compression, name), "__wrapped__")


@pytest.mark.internal_error
def test_an_entry_point_names_a_fault_and_keeps_its_signature() -> None:
    space: dict[str, Any] = {"__name__": "vlmtok.somewhere"}
    exec("def go(a, *, b=1):\n    return a + b", space)
    go = guarded(space["go"])
    assert go(1, b=2) == 3 and str(inspect.signature(go)) == "(a, *, b=1)"
    with pytest.raises(InternalError, match=r"TypeError at vlmtok\.somewhere:2") as fault:
        go(None)
    assert isinstance(fault.value.__cause__, TypeError)
    with pytest.raises(TypeError, match="missing 1 required"):
        go()


# ---------------------------------------------------------------------- bad inputs
TARGETS = ("timm ViT", "HF ViT", "open_clip CLIP", "HF LLaVA", "llava_onevision", "qwen2_vl", "gemma4")


def target_of(name: str) -> tuple[Any, dict[str, Any]]:
    """A model, and what it is called with by name."""
    if name == "HF LLaVA":
        return _llava()
    if name in FAMILIES:
        family = FAMILIES[name]
        return family_model(name, family.attentions[0]), family.batch(*family.rows).inputs()
    model, pictures = models.shared(name), models.TOWERS[name].pictures(2)
    return model, {"pixel_values" if name.startswith("HF") else "image" if "clip" in name else "x": pictures}


DAMAGE: dict[str, Any] = {
    "double": lambda x: x.double(),
    "half": lambda x: x.half(),
    "integers": lambda x: x.long(),
    "booleans": lambda x: x.bool(),
    "complex": lambda x: x.to(torch.complex64),
    "meta": lambda x: x.to("meta"),
    "nan": lambda x: torch.full_like(x, float("nan")) if x.is_floating_point() else torch.full_like(x, -1),
    "empty batch": lambda x: x[:0],
    "one row": lambda x: x[:1],
    "one more axis": lambda x: x[None],
    "one axis less": lambda x: x[0],
    "last axis cut": lambda x: x[..., :-1],
    "last axis gone": lambda x: x[..., :0],
    "turned": lambda x: x.transpose(-1, -2),
    "scalar": lambda x: x.flatten()[0],
    "flat": lambda x: x.flatten(),
    "list": lambda x: x.tolist(),
    "array": lambda x: x.numpy(),
    "text": lambda x: "a picture",
    "none": lambda x: None,
    "large": lambda x: x * 1000 + 1000,
}
EXTRA: dict[str, Any] = {
    "none": {},
    "unknown": {"frobnicate": 1},
    "attentions": {"output_attentions": True},
    "states": {"output_hidden_states": True},
    "tuple": {"return_dict": False},
    "no cache": {"use_cache": False},
    "strange cache": {"past_key_values": 7},
    "strange positions": {"position_ids": torch.zeros(1)},
    "positions of text": {"position_ids": "here"},
    "strange mask": {"attention_mask": torch.ones(2)},
    "mask of text": {"attention_mask": "all"},
    "strange features": {"mm_encoder_outputs": {"image": 3}},
    "list of features": {"mm_encoder_outputs": [1]},
    "embeddings too": {"inputs_embeds": torch.zeros(1, 2)},
    "strange layer": {"vision_feature_layer": 99},
    "strange logits": {"logits_to_keep": "all"},
    "strange types": {"mm_token_type_ids": 5},
}


def answer(model: Any, name: str, inputs: dict[str, Any]) -> Any:
    """What a call gives, as one tensor."""
    with torch.no_grad():
        if name == "open_clip CLIP":
            return model.encode_image(**inputs)
        found = model(**inputs)
    return found if isinstance(found, torch.Tensor) else found[0]


@pytest.mark.parametrize("name", TARGETS)
def test_bad_inputs_bring_errors_that_are_meant_or_the_hosts_own(name: str) -> None:
    """`conftest` fails this test for any fault of ours; behind it a good call gives what it gave before."""
    model, good = target_of(name)
    # Pictures that should be frames must be alike, and those of the prompt need not be.
    fitting = [spec for spec in SPECS.values() if "source=pictures" not in spec and _fits(model, spec)]
    assert fitting

    @settings(max_examples=15)
    @given(
        st.sampled_from(fitting), st.sampled_from(sorted(good)), st.sampled_from([*DAMAGE]), st.sampled_from([*EXTRA])
    )
    @example(fitting[0], sorted(good)[0], "meta", "none")
    def tried(spec: str, argument: str, damage: str, extra: str) -> None:
        try:
            bad = {**good, argument: DAMAGE[damage](good[argument]), **EXTRA[extra]}
        except (TypeError, IndexError, RuntimeError):
            return  # nothing of that kind can be made of this argument
        with vlmtok.compress(model, spec) as run:
            wanted = answer(model, name, good)
            try:
                answer(model, name, bad)
            except VlmtokError as problem:
                assert not isinstance(problem, InternalError), problem
            except Exception as problem:
                assert told(problem) is None
            assert_same(answer(model, name, good), wanted)
            run.report()

    tried()


def _fits(model: Any, spec: str) -> bool:
    try:
        vlmtok.compress(model, spec).remove()
    except VlmtokError:
        return False
    return True
