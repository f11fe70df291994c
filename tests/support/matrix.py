"""Which method runs on which model, and why not: the table behind `test_contract.py`.

`python -m support.matrix` writes the models of ``matrix.json`` anew from the registry; its families, which are as deep
as released ones, come from ``tools/matrix.py``. Look at the difference before you commit it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import vlmtok
from vlmtok.errors import VlmtokError

from . import models
from .checks import Subject, gap, watched
from .methods import on_caches

FILE = Path(__file__).parents[1] / "matrix.json"
FAMILIES = "families"
"""Where the families stand in the file, beside the models by method."""

COUNTED = (
    *("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v"),
    *("paddleocr_vl", "internvl", "smolvlm", "mistral3", "gemma3", "gemma4", "paligemma", "llama4", "aya_vision"),
    *("lfm2_vl", "blip-2"),
)
"""Families of which pairs are counted; others are siblings that behave alike."""

FLOOR = 634
"""Pairs of these families and the package's methods that attach, at least."""

SPECS = {
    "crossget": "crossget:rv=6",
    "tca": "tca:ratio=0.6:update=false",
    "todre": "todre:keep=0.5:tau=0.6",
    "sparsevlm": "sparsevlm:tokens=192",
    "evs": "evs:source=pictures",
    "snapkv": "snapkv:window=3",
    "streaming": "streaming:sinks=1",
    "ems_style": "ems_style:window=3",
    "vidcom2": "vidcom2:source=pictures",
}
"""Settings for methods whose defaults do nothing on small models without clips, or learn from what they see."""

LARGE = {"todre": "todre", "crossget": "crossget", "tca": "tca:update=false"}


def spec_of(method: str) -> str:
    return SPECS.get(method, method)


def outcome(method: str, model: str) -> str:
    """``runs``, or ``refused: ErrorClass: reason``.

    Raises:
        AssertionError: neither: it fails only once it runs, or does nothing.
    """
    subject = Subject(model, writes=on_caches(method))
    methods = vlmtok.parse_methods(spec_of(method))
    try:
        run = vlmtok.compress(subject.model, methods)
        skips = any(method.skip(run.layout) for method in methods)
    except VlmtokError as refusal:
        return f"refused: {type(refusal).__name__}: {reason(str(refusal))}"
    try:
        with torch.no_grad(), watched(methods) as seen:
            found = subject.out()
    except VlmtokError as late:
        raise AssertionError(f"{method} on {model} is refused only once it runs: {late}") from late
    finally:
        run.remove()
    with torch.no_grad():
        bare = subject.out()
    assert skips or any(s.reduction is not None for s in seen), f"{method} on {model} reduced nothing"
    assert gap(found, bare) > 1e-3, f"{method} on {model} changed nothing"
    return "runs"


def reason(message: str) -> str:
    """The first clause of a message; lists of what is possible change too often."""
    return message.partition(";")[0].partition(", and")[0].strip()


def cells() -> list[tuple[str, str]]:
    """Every method of the registry with every model."""
    return [(method, model) for method in vlmtok.list_methods() for model in models.BUILDERS]


def expected() -> dict[str, dict[str, str]]:
    """By method and model."""
    return {method: row for method, row in _read().items() if method != FAMILIES}


def expected_families() -> dict[str, dict[str, str]]:
    """By method and family at released depth."""
    return _read()[FAMILIES]


def _read() -> dict[str, dict]:
    with FILE.open() as file:
        return json.load(file)


def main() -> None:
    torch.set_num_threads(1)
    table: dict[str, dict[str, str]] = {}
    wrong = []
    for method, model in cells():
        try:
            table.setdefault(method, {})[model] = outcome(method, model)
        except Exception as problem:
            wrong.append(f"{method} on {model}: {type(problem).__name__}: {problem}")
    whole = {**table, FAMILIES: expected_families()}
    with FILE.open("w") as file:
        json.dump(whole, file, indent=1, sort_keys=True)
        file.write("\n")
    runs = sum(value == "runs" for row in table.values() for value in row.values())
    print(f"{len(table)} methods, {len(models.BUILDERS)} models, {runs} run")
    if wrong:
        sys.exit("neither runs nor is refused:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
