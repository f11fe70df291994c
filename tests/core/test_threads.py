"""Several threads call one compressed model: every answer is the right one, the books add up, nothing piles up."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families.build import FAMILIES
from support import models
from torch import nn

import vlmtok
from vlmtok.errors import PassError

METHODS = ("divprune:keep=0.4", "fastv:K=2:keep=0.5", "visionzip:keep=0.5", "pitome:ratio=0.8+todre:keep=0.5:tau=none")


def together(work: list[Callable[[], Any]]) -> list[Any]:
    """Runs each in a thread of its own, all at once; what one raises is its result."""
    found: list[Any] = [None] * len(work)
    start = threading.Barrier(len(work))

    def run(at: int) -> None:
        start.wait()
        try:
            found[at] = work[at]()
        except BaseException as problem:
            found[at] = problem

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def held(module: nn.Module, name: str) -> tuple[threading.Event, threading.Event, Any]:
    """Holds the thread of that name inside a module, once."""
    inside, go = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        if threading.current_thread().name == name and not inside.is_set():
            inside.set()
            go.wait(60)

    return inside, go, module.register_forward_pre_hook(hold)


def ask(model: nn.Module, given: dict[str, Any], steps: int = 4) -> list[int]:
    with torch.no_grad():
        out = model.generate(**given, max_new_tokens=steps, do_sample=False)
    return out[:, given["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", [0, 2, 5])
def test_a_thread_is_held_inside_a_layer_while_another_asks(method: str, layer: int) -> None:
    model = models.llava(depth=6)
    one, other = (models.Batch.of("^3I5", seed=seed).inputs() for seed in (1, 2))
    with vlmtok.compress(model, method):
        wanted = ask(model, one), ask(model, other)
        inside, go, hook = held(model.model.language_model.layers[layer].self_attn, "held")
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(ask(model, other)), name="held")
        thread.start()
        assert inside.wait(60)
        mine = ask(model, one)
        go.set()
        thread.join()
        hook.remove()
    assert (mine, found[0]) == wanted


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl", "smolvlm"])
def test_many_threads_ask_different_things(name: str) -> None:
    """Shapes and counts differ, so that a mixed-up state would fail or change tokens."""
    family = FAMILIES[name]
    model = family.build("sdpa")
    given = [family.batch(*family.rows, seed=seed).inputs() for seed in range(3)] + [family.batch("7").inputs()]
    methods = "divprune:keep=0.5+fastv:K=2:keep=0.5"
    with vlmtok.compress(model, methods) as run:
        wanted = [ask(model, one) for one in given]
        before = run.report(total=True).passes
        found = together([lambda one=one: [ask(model, one) for _ in range(3)] for one in given])
        after = run.report(total=True).passes
    assert found == [[one] * 3 for one in wanted]
    assert all(after[stage] == 4 * count for stage, count in before.items()), "the books of all threads"


@pytest.mark.parametrize(
    "method", ["tome:r=3", "pitome:ratio=0.8", "tome:r=3:prop_attn=false", "crossget:guidance=cls"]
)
@pytest.mark.parametrize("path", ["blocks.0", "blocks.0.attn", "blocks.2.attn", "blocks.3.norm2", "blocks.3.mlp"])
def test_a_thread_is_held_inside_a_block_of_a_tower(method: str, path: str) -> None:
    tower = models.TOWERS["timm ViT"]
    model, x, y = tower.build(), tower.pictures(2, 1), tower.pictures(3, 2)
    with torch.no_grad(), vlmtok.compress(model, method):
        wanted = tower.run(model, x), tower.run(model, y)
        inside, go, hook = held(model.get_submodule(path), "held")
        found: list[Any] = []

        def work() -> None:
            with torch.no_grad():
                found.append(tower.run(model, y))

        thread = threading.Thread(target=work, name="held")
        thread.start()
        assert inside.wait(60)
        mine = tower.run(model, x)
        go.set()
        thread.join()
        hook.remove()
    assert torch.equal(mine, wanted[0]) and torch.equal(found[0], wanted[1])


def test_eight_threads_and_two_hundred_answers_leave_nothing_behind() -> None:
    model = models.llava(depth=4)
    given = [models.Batch.of("^3I5", seed=seed).inputs() for seed in range(8)]

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    with vlmtok.compress(model, "divprune:keep=0.5+fastv:K=1:keep=0.5") as run:
        wanted = [ask(model, one, 2) for one in given]
        together([lambda one=one: ask(model, one, 2) for one in given])
        before = tensors()
        found = together([lambda one=one: [ask(model, one, 2) for _ in range(25)] for one in given])
        after = tensors()
        assert found == [[one] * 25 for one in wanted]
        assert run.report(total=True).passes["decoder"] == 8 + 8 + 200
    assert after <= before + 16, f"{after - before} tensors more after 200 answers"


def test_training_in_two_threads_is_training_in_turns() -> None:
    tower = models.TOWERS["timm ViT"]
    model, x = tower.build(), [tower.pictures(2, seed) for seed in (1, 2)]

    def gradient(at: int) -> torch.Tensor:
        pixels = x[at].clone().requires_grad_()
        tower.run(model, pixels).square().sum().backward()
        return pixels.grad

    with vlmtok.compress(model, "tome:r=3"):
        wanted = [gradient(at) for at in (0, 1)]
        found = together([lambda at=at: gradient(at) for at in (0, 1)])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted))


def test_a_report_and_a_trace_can_be_asked_for_from_outside() -> None:
    model = models.llava(depth=4)
    given = models.Batch.of("^3I5").inputs()
    with vlmtok.compress(model, "divprune:keep=0.5", trace=True) as run:
        (answer,) = together([lambda: ask(model, given)])
        assert isinstance(answer, list)
        report, trace = run.report(), run.trace()
    assert report.problem is None and report.layers and trace[0].kept == models.PLACEHOLDERS // 2


def test_a_pass_that_changes_threads_is_refused() -> None:
    tower = models.TOWERS["timm ViT"]
    model, x = tower.build(), tower.pictures(1)
    with torch.no_grad(), vlmtok.compress(model, "tome:r=3"):
        tower.run(model, x)
        (found,) = together([lambda: model.blocks[2](torch.zeros(1, 37, 32))])
    assert isinstance(found, PassError) and "thread" in str(found)
