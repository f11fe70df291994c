"""The table of a sweep in its forms, and its plots, on answers written here."""

import csv
import io
import re

import matplotlib
import pytest

from vlmtok.core.spec import as_methods
from vlmtok.errors import MissingPackage, ParameterError
from vlmtok.evaluation import table
from vlmtok.evaluation.journal import Journal
from vlmtok.evaluation.plot import AXES, quality_plot
from vlmtok.evaluation.statistics import paired_difference
from vlmtok.evaluation.table import ALL, Evaluation
from vlmtok.evaluation.task import Item, Outcome
from vlmtok.evaluation.ways import CONVENTION, Way
from vlmtok.tabular import _LATEX

matplotlib.use("agg")

ITEMS = [Item(f"q{i}", kind) for i, kind in enumerate(["small print", "table & chart", "small print"])]
WAYS = [
    Way("none", "none"),
    Way("random", "random", "random:keep=0.25", 0.25, tuple(as_methods("random:keep=0.25"))),
    Way("scope", "scope", "scope:keep=0.25", 0.25, tuple(as_methods("scope:keep=0.25"))),
    Way("scope", "scope", "scope:keep=0.1", 0.1, tuple(as_methods("scope:keep=0.1"))),
    Way("fastv", "fastv", "fastv", 0.1, problem="100 % of _this_ | that\n<is> refused"),
]
QUALITY = {"none": [[1, 1, 1]], "random": [[1, 0, 0], [0, 0, 1]], "scope": [[1, 1, 0]]}
FIXED = {"seed": 3, "device": "cpu", "dtype": "float32", "vlmtok": "1", "torch": "2", "transformers": "5"}
FIXED |= {"timm": "1", "open_clip_torch": "3", "settings": "batch=8"}
COSTS = {"none": (576, 4e9, 9000), "random": (144, 1e9, 3000), "scope": (144, 1.25e9, 3000)}
CONTRACT = [
    "task",
    "model",
    "method",
    "asked",
    "spec",
    "keep",
    "kind",
    "questions",
    "repeats",
    "quality",
    "difference",
    "low",
    "high",
    "visual_tokens",
    "macs",
    "macs_ratio",
    "kv_bytes",
    "latency_ratio",
    "pruner_share",
    "convention",
    "seed",
    "device",
    "dtype",
    "vlmtok",
    "torch",
    "transformers",
    "timm",
    "open_clip_torch",
    "settings",
    "problem",
]


def made(folder, latency=False, measures=False):
    journal = Journal(folder / "journal.jsonl", {})
    for way in WAYS[:4]:
        for repeat, row in enumerate(QUALITY[way.name]):
            told = [Outcome(float(q), "", {"kl": q + 0.5} if measures else {}) for q in row]
            journal.add_answers(way.key, repeat, ITEMS, told)
        tokens, macs, cache = COSTS[way.name]
        for kind, factor in (("small print", 1), ("table & chart", 2)):
            cost = {"visual_tokens": tokens, "macs": factor * macs, "kv_bytes": cache, "pruner_share": 0.125}
            if latency and way.name != "none":
                cost["latency_ratio"] = {"random": 2.5, "scope": 3.0}[way.name]
            journal.add_cost(way.key, kind, cost)
    return Evaluation.of("tiny", "toy", ITEMS, WAYS, journal, FIXED, 2)


@pytest.fixture
def found(tmp_path):
    return made(tmp_path)


# ---------------------------------------------------------------------- CSV
def test_csv_has_the_columns_that_readers_expect(found):
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert list(rows[0]) == CONTRACT
    assert len(rows) == len(WAYS) * 3 and {row["kind"] for row in rows} == {"small print", "table & chart", ALL}
    by = {(row["asked"], row["keep"], row["kind"]): row for row in rows}
    short = by["random", "0.25", ALL]
    assert (short["questions"], short["repeats"], short["quality"], short["spec"]) == (
        "3",
        "2",
        "0.333333",
        "random:keep=0.25",
    )
    gap = paired_difference([[1, 0], [0, 0], [0, 1]], [[1], [1], [1]], seed=3)
    assert float(short["difference"]) == pytest.approx(gap.mean, abs=1e-6) == pytest.approx(-2 / 3)
    assert (float(short["low"]), float(short["high"])) == (
        pytest.approx(gap.low, abs=1e-6),
        pytest.approx(gap.high, abs=1e-6),
    )
    assert by["random", "0.25", "small print"]["quality"] == "0.5"
    assert by["none", "1", ALL]["difference"] == by["none", "1", ALL]["low"] == ""
    problem = by["fastv", "0.1", ALL]
    assert problem["problem"] == WAYS[4].problem
    assert not any(problem[name] for name in CONTRACT[8:19]) and problem["seed"] == "3"


def test_intervals_are_drawn_from_the_seed(tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(table, "paired_difference", lambda *g, seed: (seeds.append(seed), paired_difference(*g))[1])
    made(tmp_path)
    assert seeds == [3] * 3 * 3


def test_costs_over_all_kinds_are_means_over_questions(found):
    """Two questions of one kind and one of the other, which costs twice as much."""
    rows = {(row["method"], row["kind"]): row for row in found.to_records()}
    assert rows["random", "table & chart"]["macs"] == 2e9 and rows["random", "small print"]["macs"] == 1e9
    assert rows["random", ALL]["macs"] == pytest.approx(4e9 / 3, rel=1e-5) and rows["random", ALL]["macs_ratio"] == 4
    assert rows["scope", ALL]["macs_ratio"] == pytest.approx(3.2) and rows["none", ALL]["macs_ratio"] == 1
    assert rows["random", ALL]["kv_bytes"] == 3000 and rows["random", ALL]["latency_ratio"] is None


def test_further_figures_stand_in_the_table(tmp_path):
    found = made(tmp_path, measures=True)
    assert found.measures == ("kl",) and list(found.to_records()[0]) == [*CONTRACT[:13], "kl", *CONTRACT[13:]]
    assert found.table().head[6:] == ["difference", "kl", "MACs", "cache"] and found.table().rows[1][7] == "0.833"


# ---------------------------------------------------------------------- what people paste
def test_the_table(found):
    shown = found.table()
    kinds = ["small print", "table & chart", "all"]
    assert shown.head == ["method", "budget", "visual tokens", *kinds, "difference", "MACs", "cache"]
    assert shown.rows[0] == ["none", "", "576", *["100.0 %"] * 3, "", "5.333 G", "8.79 KiB"]
    assert shown.rows[1][:6] == ["random", "0.25", "144", "50.0 %", "0.0 %", "33.3 %"]
    assert shown.rows[1][6] == "-66.7 (-100.0 to +0.0)"
    assert [row[1] for row in shown.rows[2:4]] == ["0.25", "0.1"]
    assert shown.rows[4] == ["fastv", "0.1", "refused, see below", *[""] * 6]
    first, why = found.notes()
    assert "tiny on toy, 3 questions" in first and CONVENTION in first and "torch 2" in first
    assert why == "fastv at 0.1: 100 % of _this_ | that <is> refused"


def test_markdown_is_read_back(found):
    text = found.to_markdown()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert cells[0] == found.table().head and set(cells[1]) <= {"---", "---:"}
    assert cells[2:] == found.table().rows
    assert text.endswith("- fastv at 0.1: 100 % of _this_ | that <is> refused\n")


def test_latex_is_read_back(found):
    text = found.to_latex()
    comments = [line for line in text.splitlines() if line.startswith("%")]
    assert comments == [f"% {note}" for note in found.notes()]
    body = re.search(r"\\toprule\n(.*)\n\\midrule\n(.*)\n\\bottomrule", text, re.S)
    shown = found.table()

    def cells(line):
        assert line.endswith(r" \\")
        parts = re.split(r"(?<!\\) ?& ?", line[: -len(r" \\")])
        for letter, said in _LATEX.items():
            parts = [part.replace(said, letter) for part in parts] if letter != "\\" else parts
        return [part.strip() for part in parts]

    assert cells(body[1]) == shown.head
    assert [cells(line) for line in body[2].splitlines()] == shown.rows
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)[1]
    assert len(columns) == len(shown.head) and r"table \& chart" in text and r"100.0 \%" in text


def test_it_prints_and_is_a_frame(found):
    assert "refused, see below" in str(found) and "-66.7" in str(found)
    frame = found.to_pandas()
    assert list(frame.columns) == CONTRACT and len(frame) == len(found.to_records())


# ---------------------------------------------------------------------- plots
@pytest.mark.parametrize("cost", AXES)
def test_plots(tmp_path, cost):
    found = made(tmp_path, latency=True)
    axes = found.plot(cost, kind="small print")
    lines = {tuple(line.get_xdata()): [float(y) for y in line.get_ydata()] for line in axes.lines}
    rows = [row for row in found.to_records() if row["kind"] == "small print" and row[cost] is not None]
    scope = sorted((row[cost], 100 * row["quality"]) for row in rows if row["method"] == "scope")
    assert lines[tuple(x for x, _ in scope)] == [y for _, y in scope]
    assert axes.get_xlabel() == AXES[cost] and axes.get_ylabel() == "right answers, small print, %"
    names = {text.get_text() for text in axes.texts}
    assert names == ({"random", "scope"} if cost == "latency_ratio" else {"none", "random", "scope"})
    (best,) = (line for line in axes.lines if line.get_label() == "Pareto front")
    points = list(zip(best.get_xdata(), best.get_ydata()))
    sign = -1 if cost == "latency_ratio" else 1
    for row in rows:  # nothing is cheaper and better than the front
        assert any(sign * x <= sign * row[cost] and y >= 100 * row["quality"] for x, y in points)
    for x, y in points:  # and nothing beats what is on it
        assert not any(sign * row[cost] < sign * x and 100 * row["quality"] >= y for row in rows)
    axes.figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    matplotlib.pyplot.close(axes.figure)


def test_a_plot_on_given_axes(found):
    figure, axes = matplotlib.pyplot.subplots()
    assert found.plot(ax=axes) is axes and axes.get_ylabel() == "right answers, %"
    matplotlib.pyplot.close(figure)


def test_what_cannot_be_plotted(found, monkeypatch):
    with pytest.raises(ParameterError, match="no cost 'flops' to plot; one of macs, kv_bytes"):
        found.plot("flops")
    with pytest.raises(ParameterError, match="no kind 'maps' of question; there are small print, table & chart, all"):
        found.plot(kind="maps")
    with pytest.raises(ParameterError, match="fewer than two rows have 'latency_ratio'"):
        found.plot("latency_ratio")
    with pytest.raises(ParameterError, match="fewer than two rows"):
        quality_plot(found.to_records()[:3], "macs", ALL)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingPackage, match="matplotlib"):
        found.plot()
