"""Rows of `vlmtok doctor` of models that something was done to, and hosts that play another release."""

from __future__ import annotations

import functools
import inspect

import torch

from vlmtok.lab.doctor.facts import BROKEN
from vlmtok.lab.doctor.rows import Case, cases, one_thread

CPU = torch.device("cpu")


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


def mask_dropped(model):
    """Layers do not heed their mask."""

    def forward(run, *given, attention_mask=None, **named):
        return run(*given, attention_mask=None, **named)

    played(text_of(model).layers, straight, forward)
