"""The clock of methods: it counts calls and seconds of what really ran, and leaves nothing behind."""

import time

import pytest
import torch

import vlmtok
from vlmtok.lab.clock import Clock
from vlmtok.lab.prompts import encode_prompt
from vlmtok.loading import load, open_picture, samples


@pytest.fixture(scope="module")
def asked():
    loaded = load()
    sample = samples()[0]
    return loaded.model, encode_prompt(loaded, open_picture(sample.path), sample.question)


def slowed(monkeypatch, name, seconds):
    """A method whose decisions take so long."""
    kind = vlmtok.method_class(name)
    real = kind.reduce

    def reduce(self, view):
        time.sleep(seconds)
        return real(self, view)

    monkeypatch.setattr(kind, "reduce", reduce)


def test_seconds_are_those_inside_methods(asked, monkeypatch):
    model, inputs = asked
    slowed(monkeypatch, "divprune", 0.05)
    clock = Clock()
    with vlmtok.compress(model, "divprune:keep=16") as run, clock.watching(run):
        begun = time.perf_counter()
        first = model.generate(**inputs, max_new_tokens=3)
        whole = time.perf_counter() - begun
        assert clock.calls == 1 and 0.05 <= clock.seconds < whole
        model.generate(**inputs, max_new_tokens=3)
        assert clock.calls == 2 and clock.seconds >= 0.1
    with vlmtok.compress(model, "divprune:keep=16"):
        assert torch.equal(first, model.generate(**inputs, max_new_tokens=3))
    assert clock.calls == 2


def test_methods_go_back_to_what_they_were(asked):
    model, inputs = asked
    method = vlmtok.DivPrune(keep=16)
    clock = Clock()
    with vlmtok.compress(model, method) as run:
        with pytest.raises(ZeroDivisionError), clock.watching(run):
            assert "reduce" in vars(method)
            model.generate(**inputs, max_new_tokens=1)
            raise ZeroDivisionError
        assert "reduce" not in vars(method) and method.settings() == vlmtok.DivPrune(keep=16).settings()
        model.generate(**inputs, max_new_tokens=1)
        assert clock.calls == 1 and str(method) == "divprune:keep=16"


def test_every_method_of_a_chain_is_timed_at_every_site(asked):
    """Those too whose schedule was fitted to the model, so that the object is another one."""
    model, inputs = asked
    clock = Clock()
    with vlmtok.compress(model, "tome:r=4+sparsevlm") as run, clock.watching(run):
        model.generate(**inputs, max_new_tokens=1)
        assert clock.calls == sum(site.visits for site in run.report().sites) > 3
