"""Results of lmms-eval in the form of the papers' tables: blocks are budgets, rows methods, the last column is a mean.

    python benchmarks/paper_table.py [FOLDER ...] [--page docs/paper-table.md]

reads every ``*_results.json`` below the folders (by default `benchmarks/results/lmms_eval/`) that the model ``vlmtok``
made, and writes the page. A run belongs to the budget that it reached: visual tokens, mean over the language model's
layers and over the requests, as a share of the bare model's, within 3 % of the budget's. Of two runs of one task under
one setting the later counts. Runs that reach no budget of the tables, and those with ``--limit``, are named and left
out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vlmtok
from vlmtok.errors import VlmtokError
from vlmtok.forecast.estimate import attach, shape_of
from vlmtok.tabular import Table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "lmms_eval"
PAGE = ROOT / "docs" / "paper-table.md"
WITHIN = 0.03
"""How far from its budget a run may be, as a share of it."""
MISSING = "not run here"
DEFAULT_ROW = "none"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: as papers call it.
        task: of lmms-eval.
        metrics: its metrics, which are summed.
        scale: what they are multiplied by.
    """

    title: str
    task: str
    metrics: tuple[str, ...]
    scale: float = 100.0


@dataclass(frozen=True)
class Model:
    """A table.

    Attributes:
        title: of the model.
        preset: of `vlmtok.estimate`.
        checkpoint: hub id.
        budgets: heading of each block, and its share of the bare model's visual tokens.
        columns: tasks.
    """

    title: str
    preset: str
    checkpoint: str
    budgets: tuple[tuple[str, float], ...]
    columns: tuple[Column, ...]


MME = Column("MME", "mme", ("mme_perception_score", "mme_cognition_score"), 1.0)
MMB = Column("MMB", "mmbench_en_dev", ("gpt_eval_score",), 1.0)
MMB_CN = Column("MMB-CN", "mmbench_cn_dev", ("gpt_eval_score",), 1.0)
POPE = Column("POPE", "pope", ("pope_f1_score",))
GQA = Column("GQA", "gqa", ("exact_match",))
SQA = Column("SQA-IMG", "scienceqa_img", ("exact_match",))
TEXTVQA = Column("TextVQA", "textvqa_val", ("exact_match",))
LLAVA = (
    Column("VQAv2", "vqav2_val", ("exact_match",)),
    GQA,
    Column("VizWiz", "vizwiz_vqa_val", ("exact_match",)),
    SQA,
    TEXTVQA,
    POPE,
    MME,
    MMB,
    MMB_CN,
)
QWEN = (
    GQA,
    SQA,
    TEXTVQA,
    POPE,
    MME,
    MMB,
    Column("AI2D", "ai2d", ("exact_match",)),
    Column("ChartQA", "chartqa", ("relaxed_overall",)),
    Column("DocVQA", "docvqa_val", ("anls",)),
    Column("OCRBench", "ocrbench", ("ocrbench_accuracy",)),
    Column("MMStar", "mmstar", ("average",)),
)


def shares(counts: Sequence[int], bare: int) -> tuple[tuple[str, float], ...]:
    """Budgets by counts."""
    return tuple((f"{count} of {bare:,} tokens ({count / bare:.1%})", count / bare) for count in counts)


MODELS = (
    Model("LLaVA-1.5-7B", "llava-1.5-7b", "llava-hf/llava-1.5-7b-hf", shares((192, 128, 64), 576), LLAVA),
    Model(
        "LLaVA-NeXT-7B",
        "llava-next-7b",
        "llava-hf/llava-v1.6-vicuna-7b-hf",
        shares((640, 320, 160), 2880),
        LLAVA,
    ),
    Model(
        "Qwen2.5-VL-7B",
        "qwen2.5-vl-7b",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        (("25 % of the tokens", 0.25), ("10 % of the tokens", 0.1)),
        QWEN,
    ),
)


# ---------------------------------------------------------------------- reading
@dataclass(frozen=True)
class Run:
    """What one file of results holds.

    Attributes:
        path: of the file.
        date: by which runs are ordered.
        checkpoint: hub id or folder.
        method: the spec, in its canonical form, or ``none``.
        share: visual tokens by those of the bare model.
        scores: metrics by task.
        figures: what the run cost.
    """

    path: Path
    date: str
    checkpoint: str
    method: str
    share: float
    scores: Mapping[str, Mapping[str, float]]
    figures: Mapping[str, float]


def arguments(text: str) -> dict[str, str]:
    """``model_args`` by name; commas inside quotes and brackets do not part them."""
    pieces = re.findall(r"""(\w+)=((?:'[^']*'|"[^"]*"|\{[^}]*\}|\[[^\]]*\]|[^,'"\[\{])*)""", text)
    return {name: value.strip().strip("'\"") for name, value in pieces}


def read(path: Path) -> Run | str:
    """A run, or why it is none.

    Args:
        path: of a file that lmms-eval wrote.
    """
    found = json.loads(path.read_text("utf-8"))
    config = found["config"]
    if config["model"] != "vlmtok":
        return f"made by the model {config['model']!r}"
    if config.get("limit"):
        return f"it asked {config['limit']:g} documents of each task (--limit)"
    asked = arguments(config["model_args"])
    method = asked["method"].strip()
    bare = method.lower() == DEFAULT_ROW
    name = DEFAULT_ROW if bare else "+".join(map(str, vlmtok.parse_methods(method)))
    figures = {key.removeprefix("avg_"): value for key, value in found.get("throughput", {}).items()}
    if not bare and "visual_tokens" not in figures:
        return "it has no figures: answers came from a response cache, or figures=false was set"
    share = 1.0 if bare else figures["visual_tokens"] / figures["visual_tokens_bare"]
    scores = {
        task: {key.partition(",")[0]: value for key, value in row.items() if isinstance(value, (int, float))}
        for task, row in found["results"].items()
    }
    return Run(path, found["date"], asked["pretrained"], name, share, scores, figures)


def score(runs: Iterable[Run], column: Column) -> float | None:
    """What a column shows of runs under one setting: the latest that has it."""
    found = None
    for run in sorted(runs, key=lambda run: run.date):
        row = run.scores.get(column.task, {})
        if all(name in row for name in column.metrics):
            found = column.scale * sum(row[name] for name in column.metrics)
    return found


# ---------------------------------------------------------------------- the tables
def venue(name: str) -> str:
    """A method as papers write it."""
    kind = vlmtok.method_class(name)
    told = re.search(r"\(([^()]*)\)$", kind.paper)
    return f"{kind.__name__} ({told[1]})" if told and kind.arxiv and "baseline" not in kind.paper else kind.__name__


def rows_of(model: Model) -> list[str]:
    """Names of methods that let tokens of this model leave before or inside the language model; the baseline first."""
    shape, found = shape_of(model.preset), []
    for name in vlmtok.list_methods():
        try:
            entries = attach(shape, name).entries
        except VlmtokError:
            continue
        tower_shortens = "features" in shape.layout.stages  # elsewhere every patch gets a copy back
        if tower_shortens or any(entry.site.stage != "vision" for entry in entries):
            found.append(name)
    return sorted(found, key=lambda name: (name != "random", name))


def cost(figures: Mapping[str, float] | None) -> list[str]:
    """Cells of what a run cost."""
    if figures is None:
        return [MISSING] * 4
    forms = {
        "visual_tokens": "{:.0f}".format,
        "macs": lambda value: f"{value / 1e12:.2f}",
        "kv_bytes": lambda value: f"{value / 2**20:.0f}",
        "pruner_time_share": lambda value: f"{100 * value:.1f}",
    }
    return [form(figures[name]) if name in figures else MISSING for name, form in forms.items()]


def line(title: str, runs: Sequence[Run], columns: Sequence[Column], full: Sequence[float | None]) -> list[str]:
    """A row: its scores, what they are of the bare model's, and what they cost."""
    found = [score(runs, column) for column in columns]
    pairs = [(one, bare) for one, bare in zip(found, full) if one is not None and bare]
    mean = MISSING
    if pairs:
        value = 100 * sum(one / bare for one, bare in pairs) / len(pairs)
        mean = f"{value:.1f}" + ("" if len(pairs) == len(columns) else f" ({len(pairs)} of {len(columns)})")
    cells = [MISSING if one is None else f"{one:.1f}" for one in found]
    last = max(runs, key=lambda run: run.date).figures if runs else None
    return [title, *cells, *cost(last), mean]


def table(model: Model, runs: Sequence[Run]) -> tuple[str, list[Run]]:
    """A model's section, and its runs that reach none of its budgets.

    Args:
        model: of the section.
        runs: of its checkpoint.
    """
    head = ["method", *(column.title for column in model.columns)]
    head += ["tokens a layer", "TMACs", "KV MiB", "pruner, % of time", "Avg % of full"]
    bare = [run for run in runs if run.method == DEFAULT_ROW]
    full = [score(bare, column) for column in model.columns]
    parts = [f"## {model.title}\n\n`{model.checkpoint}`", "### All tokens"]
    parts.append(Table(head, [line("none", bare, model.columns, full)]).markdown())
    left = [run for run in runs if run.method != DEFAULT_ROW]
    names = rows_of(model)
    for title, share in model.budgets:
        here = [run for run in left if abs(run.share - share) <= WITHIN * share]
        left = [run for run in left if run not in here]
        rows = []
        for name in names:
            own = sorted({run.method for run in here if run.method.partition(":")[0] == name and "+" not in run.method})
            for spec in own or [name]:
                label = venue(name) + (f", {spec}" if own else "")
                rows.append(line(label, [run for run in here if run.method == spec], model.columns, full))
        placed = {run.method for run in here if "+" not in run.method and run.method.partition(":")[0] in names}
        others = sorted({run.method for run in here} - placed)
        rows += [line(spec, [run for run in here if run.method == spec], model.columns, full) for spec in others]
        parts += [f"### {title}", Table(head, rows).markdown()]
    return "\n\n".join(parts), left


HEAD = """\
# The papers' tables

Made by `benchmarks/paper_table.py` of results that lmms-eval wrote with the model `vlmtok`
([how](howto/lmms-eval.md)). **"{missing}" means that nobody has run it for this page; nothing is copied from papers.**
All rows of a table come from one checkpoint through one code, the bare model's too.

- The budget is the mean number of visual tokens over the language model's layers, as a share of the bare model's, as
  measured on the benchmark; a run is shown where it lies within {within:.0%} of one. Papers that count otherwise (for
  FastV the tokens behind the last layer) differ. Methods that cut late in the language model cannot reach each budget.
- LLaVA-NeXT's 2,880 tokens are those of a square picture of 672 pixels, without newlines. As transformers runs it,
  pictures have numbers of their own, so that these budgets are shares too.
- VQAv2 and VizWiz are the validation sets, MMBench the development sets: the papers' test sets are scored by submission
  servers. MME is the sum of perception and cognition. TextVQA's prompt has no OCR text, unlike LLaVA's own evaluation.
- "Avg % of full" is the mean over columns of the score by the bare model's; in brackets, over how many of them.
- MACs are those of tower, projector and prefill, deciding included, and bytes those of the cache behind it, a request;
  the pruner's time is a share of that in `generate`.
"""


def page(folders: Iterable[Path]) -> tuple[str, list[str]]:
    """The page, and what was left out, with the reasons.

    Args:
        folders: of results; all files below them count.
    """
    runs, said = [], []
    for path in sorted({path for folder in folders for path in folder.rglob("*_results.json")}):
        found = read(path)
        if isinstance(found, str):
            said.append(f"{path}: {found}")
        else:
            runs.append(found)
    parts = [HEAD.format(missing=MISSING, within=WITHIN)]
    known = {model.checkpoint for model in MODELS}
    said += [f"{run.path}: no table of {run.checkpoint}" for run in runs if run.checkpoint not in known]
    for model in MODELS:
        section, left = table(model, [run for run in runs if run.checkpoint == model.checkpoint])
        parts.append(section)
        said += [f"{run.path}: {run.method} leaves {run.share:.1%}, which is no budget of its table" for run in left]
    return "\n\n".join(part.strip() for part in parts) + "\n", said


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[RESULTS])
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(words)
    text, said = page(options.folders)
    options.page.write_text(text, "utf-8")
    for one in said:
        print(f"left out: {one}", file=sys.stderr)
    return {"page": options.page, "left_out": said}


if __name__ == "__main__":
    main()
