"""`vlmtok.sweep`: a row for each method, in order, beside one bare answer; and what it says where one fails."""

import csv
import io
import sys

import pytest
from PIL import Image
from support.checkpoints import picture, vit
from support.comparing import QUESTION, compare
from support.tables import cells

import vlmtok
from vlmtok import loading
from vlmtok.core.hooks import hooks_of
from vlmtok.cost.units import binary, si
from vlmtok.errors import InternalError, MissingPackage, ParameterError, PassError, SiteError, UnknownMethod
from vlmtok.lab import compare as comparing
from vlmtok.lab import plots
from vlmtok.lab.runners import Speaker

KEEP = "random:keep=0.1,0.25,0.5"


def sweep(model, methods, prompt=QUESTION, **more):
    return vlmtok.sweep(model, picture(), methods, prompt, **{"rounds": 0, "max_new_tokens": 4, **more})


@pytest.fixture(scope="module")
def found(speaker):
    return sweep(speaker, [KEEP, vlmtok.FastV(K=2, keep=0.25)])


# ---------------------------------------------------------------------- rows
def test_rows_are_those_of_single_comparisons_in_order(speaker, found):
    specs = ["random:keep=0.1", "random:keep=0.25", "random:keep=0.5", "fastv:keep=0.25"]
    records = found.to_records()
    assert [row["method"] for row in records] == ["bare", *specs[:2], "random:keep=0.5", specs[3]]
    assert [row.method for row in found] == specs and len(found) == 4
    for record, spec in zip(records[1:], specs):
        one = compare(speaker, picture(), QUESTION, spec)
        assert record["answer"] == one.compressed.text and record["same"] == one.loyalty.same
        assert record["divergence"] == pytest.approx(one.loyalty.divergence, abs=1e-6)
        assert record["total_macs"] == one.report.macs.after.high
        assert record["kv_bytes"] == one.report.cache.after.high
        assert record["visual_tokens_mean"] == one.tokens.mean and record["problem"] is None
    bare = records[0]
    assert bare["answer"] == one.bare.text and bare["total_macs"] == one.report.macs.before
    assert (bare["same"], bare["divergence"], bare["visual_tokens"]) == (True, 0.0, 144)
    assert not list(hooks_of(speaker.model))


def test_two_swept_fields_are_every_pair(speaker):
    rows = sweep(speaker, "fastv:K=2,4:keep=0.5,0.25").rows
    assert [row.method for row in rows] == [f"fastv:K={k}:keep={share}" for k in (2, 4) for share in (0.5, 0.25)]


def test_the_bare_model_answers_once(speaker, monkeypatch):
    asked = []
    whole = Speaker.answer

    def answer(self):
        asked.append(bool(list(hooks_of(speaker.model))))
        return whole(self)

    monkeypatch.setattr(Speaker, "answer", answer)
    sweep(speaker, KEEP)
    assert sorted(asked) == [False, True, True, True]


def test_speed_is_a_column_for_each_stage(speaker):
    records = sweep(speaker, "random:keep=0.1,0.5", rounds=1, limit=0).to_records()
    assert all(record["speed_prefill"] > 0 and record["speed_answer"] > 0 for record in records)
    assert records[0]["speed_prefill"] == 1.0


def test_a_tower(tmp_path):
    model = loading.load(str(vit(tmp_path)))
    found = sweep(model, "tome:r=1,3", None)
    bare, one, three = found.to_records()
    assert (bare["cosine"], bare["kv_bytes"]) == (1.0, None) and three["visual_tokens_mean"] < one["visual_tokens_mean"]
    assert found.to_csv().splitlines()[1].startswith(f"bare,{bare['answer']},True,0,1,36,36,")
    axes = found.plot()
    assert axes.get_ylabel() == "cosine with bare"
    with pytest.raises(ParameterError, match="nothing to plot: no row besides the bare model has 'kv_bytes'"):
        found.plot("kv_bytes")


# ---------------------------------------------------------------------- forms
def test_the_table_has_answers_agreement_tokens_macs_and_cache(found):
    table, records = found.table(), found.to_records()
    assert table.head[:4] == ["method", "answer", "agreement", "visual tokens a layer"]
    for row, record in zip(table.rows, records):
        assert row[:2] == [record["method"], record["answer"]]
        assert row[2].startswith("same" if record["same"] else "different") and "KL" in row[2]
        assert row[4:6] == [si(record["total_macs"]), binary(record["kv_bytes"])]
    assert [row[3] for row in table.rows] == ["144", "14", "36", "72", "49.5"]  # (2 x 144 + 14 x 36) / 16


def test_every_form_holds_every_row(found):
    forms = [str(found), found._repr_html_(), found.to_markdown(), found.to_latex(), found.to_csv()]
    for text in forms:
        assert all(method in text for method in ("random:keep=0.1", "random:keep=0.25", "fastv:keep=0.25"))
    assert cells(found._repr_html_())[6] == "bare"
    rows = list(csv.DictReader(io.StringIO(found.to_csv(), newline="")))
    assert rows[1]["visual_tokens"] == "14" and rows[1]["total_macs"].isdigit() and rows[1]["problem"] == ""
    assert repr(found) == "<Sweep of random:keep=0.1, random:keep=0.25, random:keep=0.5, fastv:keep=0.25>"


def test_to_pandas_of_a_sweep(found):
    frame = found.to_pandas()
    assert frame["method"].tolist()[0] == "bare" and frame["total_macs"].dtype == "int64" and len(frame) == 5


# ---------------------------------------------------------------------- failing
def test_what_does_not_fit_is_refused_before_anything_answers(speaker, monkeypatch):
    monkeypatch.setattr(Speaker, "answer", None)
    for methods, error, words in (
        (["random:keep=0.5", "fastv:K=99"], SiteError, "layer 99|layer 98"),
        (["random:keep=0.5", "nope"], UnknownMethod, "no method 'nope'"),
        ("random:keep=1,1.0", ParameterError, "mean different things"),
        ([], ParameterError, "at least one method"),
    ):
        with pytest.raises(error, match=words):
            sweep(speaker, methods)
        assert not list(hooks_of(speaker.model))


@pytest.fixture
def failing(monkeypatch):
    """Makes comparisons fail for one method."""
    whole = comparing.Comparing.with_method

    def at(spec, problem):
        def with_method(self, method, **how):
            if str(method) == spec:
                raise problem
            return whole(self, method, **how)

        monkeypatch.setattr(comparing.Comparing, "with_method", with_method)

    return at


def test_a_method_that_fails_in_the_middle_has_a_row_that_says_so(speaker, failing):
    failing("random:keep=0.25", PassError("no <site> fired"))
    found = sweep(speaker, KEEP)
    assert [row.method for row in found.failed] == ["random:keep=0.25"]
    assert [row.method for row in found] == ["random:keep=0.1", "random:keep=0.5"] and len(found) == 3
    records = found.to_records()
    assert [record["problem"] for record in records] == [None, None, "no <site> fired", None]
    assert records[2]["method"] == "random:keep=0.25" and records[2]["total_macs"] is None
    assert "random:keep=0.25 failed: no <site> fired" in str(found).splitlines()
    assert "failed: no &lt;site&gt; fired" in found._repr_html_() and "failed, see below" in found.to_markdown()
    assert len(found.plot().texts) == 2
    assert not list(hooks_of(speaker.model))


def test_where_all_fail_the_error_is_raised(speaker, failing):
    failing("random:keep=0.5", PassError("no site fired"))
    with pytest.raises(PassError, match="no site fired"):
        sweep(speaker, "random:keep=0.5")


@pytest.mark.internal_error
def test_faults_are_no_rows(speaker, failing):
    failing("random:keep=0.25", InternalError("KeyError", "x", "vlmtok.lab:1"))
    with pytest.raises(InternalError):
        sweep(speaker, KEEP)


# ---------------------------------------------------------------------- plots
def test_the_plot_shows_each_row_and_the_front(found, tmp_path):
    axes = found.plot()
    records = found.to_records()
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {"bare", "random", "fastv", "Pareto front"}
    drawn = sorted(zip(*lines["random"].get_data()))
    assert drawn == sorted((r["total_macs"], r["divergence"]) for r in records if r["method"].startswith("random"))
    assert sorted(text.get_text() for text in axes.texts) == ["keep=0.1", "keep=0.25", "keep=0.25", "keep=0.5"]
    low, high = axes.get_ylim()
    assert low > high, "agreement rises upwards"
    assert all(tick >= 0 for tick in axes.get_yticks())
    axes.figure.savefig(tmp_path / "sweep.png")
    with Image.open(tmp_path / "sweep.png") as image:
        assert image.size == (800, 500) and len(image.convert("RGB").getcolors(1 << 20)) > 50
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]), "labels lie on each other"


def test_other_costs_and_axes_of_ones_own(found):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    assert found.plot("kv_bytes", axes) is axes and axes.get_xlabel() == "key-value cache"
    assert "iB" in axes.xaxis.get_major_formatter()(3 << 20, 0)
    assert found.plot("visual_tokens_mean").get_xlabel() == "visual tokens a layer, mean"
    with pytest.raises(ParameterError, match="no cost 'time' to plot; one of total_macs, kv_bytes, visual_tokens_mean"):
        found.plot("time")


def test_a_missing_matplotlib_is_named_with_its_extra(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingPackage, match=r"plot\(\) needs matplotlib: pip install 'vlmtok\[notebooks\]'"):
        found.plot()


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ([(1, 5), (2, 3), (3, 4), (4, 1)], [0, 1, 3]),
        ([(4, 1), (1, 5), (1, 4)], [2, 0]),
        ([(1, 1), (1, 1)], [0]),
        ([(2, 0)], [0]),
    ],
)
def test_the_front_has_what_nothing_beats(points, best):
    assert plots.front(points) == best


def test_names_and_settings_of_rows():
    row = {"method": "tome:r=4+fastv:K=2:keep=0.5"}
    assert plots.name_of(row) == "tome+fastv" and plots.settings_of(row) == "r=4, K=2, keep=0.5"
    assert plots.settings_of({"method": "fastv"}) == ""
