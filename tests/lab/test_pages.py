"""Pages that are made: one for each method, family, public name and command, with what the package says of it."""

import inspect
import json
import re
from dataclasses import dataclass

import pytest
import typer
from support.places import ROOT
from vlmtok.adapters.language.families import EXAMPLES, REFUSED, ROWS
from vlmtok.adapters.refused import REFUSED as REFUSED_CLASSES
from vlmtok.adapters.registry import ROWS as CLASSES

import vlmtok
from vlmtok import surface
from vlmtok.cli import app
from vlmtok.core import registry
from vlmtok.lab import catalogue, family_table, pages
from vlmtok.lab.pages import commands, families, measured, methods, names, root, section

RESULTS = ROOT / "benchmarks" / "results"
TOWERS = [name for name in family_table.ADAPTERS if name != "transformers-vlm"]


@pytest.fixture(scope="module")
def made():
    return pages.sections(RESULTS, inspect.getsource(surface), typer.main.get_command(app))


def parts(page):
    """Sections of a page by their headings, without the anchors that these name."""
    found = re.split(r"^#+ (.*?)(?: \{#[\w-]+\})?$", page, flags=re.M)
    return dict(zip(found[1::2], found[2::2]))


def rows(table):
    """Rows of all tables of a text, cells without their marks."""
    lines = [line for line in table.splitlines() if line.startswith("|") and not re.match(r"\|[ |:-]+$", line)]
    return [[cell.strip(" `") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def flat(text):
    return " ".join(text.split())


# ---------------------------------------------------------------------- methods
@pytest.mark.parametrize("name", vlmtok.list_methods())
def test_a_method_has_a_page_with_everything_about_it(made, name):
    page, cls = made["methods/"].pages[f"methods/{name}.md"], vlmtok.method_class(name)
    found = parts(page)
    assert page.startswith(f"# {cls.__name__}\n")
    assert inspect.getdoc(cls).splitlines()[0] in page and cls.paper in page
    assert f"https://arxiv.org/abs/{cls.arxiv})" in page if cls.arxiv else "arxiv.org" not in page
    assert f"[code]({cls.code})" in page if cls.code else "[code]" not in page
    assert cls.parity in page.replace("\\*", "*")
    steps = re.findall(r"^\d\. ", found["Algorithm"], re.M)
    assert 3 <= len(steps) == len({*steps}) and 3 <= len(found["Algorithm"].strip().splitlines()) <= 9
    parameters = {row[0]: row[1:] for row in rows(found["Parameters"])[1:]}
    assert list(parameters) == list(cls().settings())
    assert all(default and len(what) > 5 for default, what in parameters.values())
    assert all(f"- {one}\n" in found["Where it differs from the released code"] for one in cls.deviations)
    assert all(f"- {one}\n" in found["Where it does badly"] for one in cls.caveats)
    assert ("Where it does badly" in found) == bool(cls.caveats)
    assert bool(cls.deviations) == ("{#differs}" in page)
    presets = [row[0] for row in rows(found.get("Presets", ""))[1:]]
    assert presets == list(catalogue.entry(name).presets)
    for preset, spec in rows(found.get("Presets", ""))[1:]:
        assert str(vlmtok.create_method(name, preset=preset)) == spec


@pytest.mark.parametrize("name", vlmtok.list_methods())
def test_a_page_says_where_a_method_acts(made, name):
    acts = parts(made["methods/"].pages[f"methods/{name}.md"])["Where it acts"]
    runs = {row[0]: row[2] for row in rows(acts) if row[0] in catalogue.KINDS}
    assert list(runs) == list(catalogue.KINDS)
    fit = catalogue.kinds_of(name)
    assert all((said == "yes") == (kind in fit) and (said == "yes" or len(said) > 20) for kind, said in runs.items())
    site = vlmtok.create_method(name).sites(catalogue.KINDS["VLM, slots"].layout())[0]
    assert re.search(rf"^\| {site.stage}\b", acts, re.M)
    assert all(f"`{need}`" in acts for need in site.needs)


@pytest.mark.parametrize("name", vlmtok.list_methods())
def test_costs_are_those_of_the_estimate(made, name):
    saves = parts(made["methods/"].pages[f"methods/{name}.md"])["What it saves"]
    calls = re.findall(r'`vlmtok.estimate\("([\w.-]+)", "(\w+)"(?:, text_tokens=(\d+))?\)`', saves)
    assert calls and all(called == name for _, called, _ in calls)
    for shape, _, text in calls:
        report = vlmtok.estimate(shape, name, text_tokens=int(text) if text else None)
        counted = [line for line in report.to_markdown().splitlines() if line.startswith(("| total", "| vision"))]
        assert len(counted) >= 2 and all(line in saves for line in counted[:2])
    assert ("key-value cache" in saves) == any(shape.startswith("llava") for shape, *_ in calls)


def test_sites_that_differ_in_their_layer_alone_are_one_row():
    def site(layer, needs=("keys",)):
        return {"site": f"vision layer {layer} mid", "scope": "picture", "positions": "keep", "needs": list(needs)}

    plain = {**site(0), "site": "projected"}
    found = [row["site"] for row in methods.grouped([plain, *map(site, range(4)), site(9, ()), site(11, ())])]
    assert found == ["projected", "vision layers 0 to 3, mid", "vision layers 9, 11, mid"]
    assert [row["site"] for row in methods.grouped([site(3)])] == ["vision layer 3 mid"]


def test_every_measurement_stands_on_the_page_of_its_method(made):
    folder = measured.Measured.read(RESULTS)
    counted = 0
    for row in (*folder.answers, *folder.suite, *folder.towers):
        spec = row["spec"] if "spec" in row else row["method"]
        for method in vlmtok.parse_methods(spec) if spec else ():
            said = parts(made["methods/"].pages[f"methods/{method.spec_name()}.md"])["Measured"]
            lines = [line for line in said.splitlines() if f"| `{spec}` |" in line]
            figure = next(row[name] for name in ("layer_average_tokens", "speedup", "eager_ms") if name in row)
            shown = f"{figure:g}" if "right" in row else f"{figure:.2f}"
            assert any(f"| {shown} " in line for line in lines), (spec, shown)
            counted += 1
    assert counted > 140
    right = json.loads((RESULTS / "tiny_llava.json").read_text())["rows"]
    todre = next(row["right"]["all"] for row in right if row["spec"] == "todre:keep=0.25")
    assert f"| 36 | {100 * todre:.1f} % |" in made["methods/"].pages["methods/todre.md"]


def test_a_method_nobody_measured_says_so():
    nothing = measured.Measured((), (), ())
    assert nothing.section("tome") == "Nothing has been measured yet."


def test_results_that_are_not_there_are_an_error(tmp_path):
    with pytest.raises(measured.ResultsError, match="has no"):
        measured.Measured.read(tmp_path)


@pytest.fixture
def made_up():
    """A method of which the package knows nothing."""
    vlmtok.list_methods()  # so that what is built in stays
    known = dict(registry._METHODS)

    @vlmtok.register_method
    @dataclass(eq=False)
    class Sieve(vlmtok.Method):
        """Keeps every second token.

        Algorithm:
            1. Number the tokens.
            2. Drop the odd ones.

        Args:
            step: distance of two tokens that stay.
        """

        paper = "made up"
        deviations = ("It was never released.",)
        step: int = 2

        def sites(self, layout):
            layout.stage("projected", "Sieve")
            return [vlmtok.Site("projected")]

        def reduce(self, view):
            return None

    yield Sieve
    registry._METHODS.clear()
    registry._METHODS.update(known)
    for cached in (catalogue.kinds_of, catalogue.stages_of):
        cached.cache_clear()


def test_a_method_from_outside_gets_its_page(made_up):
    found = methods.method_pages(measured.Measured.read(RESULTS))
    page = parts(found.pages["methods/sieve.md"])
    assert "1. Number the tokens.\n2. Drop the odd ones." in page["Algorithm"]
    assert "| `step` | `2` | distance of two tokens that stay. |" in page["Parameters"]
    assert "| projected | picture |" in page["Where it acts"] and "It was never released." in str(page)
    assert "| total |" in page["What it saves"] and "Nothing has been measured yet." in page["Measured"]
    assert "[`sieve`](sieve.md)" in found.pages["methods/index.md"]
    assert {"Sieve": "methods/sieve.md"} in found.navigation
    assert "| [`sieve`](../methods/sieve.md) | projected |" in families.family_page("llava")
    assert "::: vlmtok.Sieve" in names.name_pages(inspect.getsource(surface)).pages["reference/methods.md"]


def test_a_method_without_its_algorithm_is_an_error(made_up):
    made_up.__doc__ = "Keeps every second token."
    with pytest.raises(methods.PageError, match="Sieve: its docstring has no section 'Algorithm:'"):
        methods.method_pages(measured.Measured.read(RESULTS))


# ---------------------------------------------------------------------- families
@pytest.mark.parametrize("name", ROWS)
def test_a_family_has_a_page_with_where_tokens_can_leave(made, name):
    page = made["families/"].pages[f"families/{name}.md"]
    offers = {row[0]: row[1] for row in rows(parts(page)["Where tokens can leave"])[1:]}
    (row,) = (row for row in family_table.families() if row["family"] == name)
    assert [stage for stage, said in offers.items() if said.startswith("yes")] == row["stages"]
    assert set(offers) == {"vision", "features", "projected", "decoder", "cache"}
    reasons = [said for said in offers.values() if said.startswith("no")]
    assert all(len(said) > 20 for said in reasons)
    spec = ROWS[name]
    for stage, why in (("vision", spec.whole if spec.tower_cut is None else None), ("decoder", spec.boundary)):
        assert why is None or offers[stage].startswith(f"no: {why}")
    assert f"`{EXAMPLES[name]}`" in page and all(f"- {note}" in page for note in family_table.notes(spec))


@pytest.mark.parametrize("name", ROWS)
def test_a_family_names_the_methods_that_attach(made, name):
    page = made["families/"].pages[f"families/{name}.md"]
    said = dict(rows(parts(page)["Methods"])[1:])
    layout = families.family_layout(name)
    assert list(said) == [f"[`{method}`](../methods/{method}.md)" for method in vlmtok.list_methods()]
    for method, (_, cell) in zip(vlmtok.list_methods(), said.items()):
        why = catalogue.refusal(vlmtok.create_method(method), layout)
        assert cell.startswith("no: ") == (why is not None), method
        assert why is None or why.startswith(cell.removeprefix("no: "))
    depth = layout.stages["decoder"].depth if layout.has("decoder") else None
    assert depth is None or f"yes; {depth} layers" in page


def test_pages_of_families_tell_the_difference(made):
    llava, qwen, linear, llama4 = (
        dict(rows(parts(made["families/"].pages[f"families/{name}.md"])["Methods"])[1:])
        for name in ("llava", "qwen2_5_vl", "qwen3_5", "llama4")
    )
    fastv = "[`fastv`](../methods/fastv.md)"
    assert llava[fastv] == "decoder layer 1 end"
    recoverable = "[`recoverable`](../methods/recoverable.md)"
    for cells in (llava, qwen):
        assert {method for method, cell in cells.items() if cell.startswith("no")} == {recoverable}
    assert "'relevance'" in llava[recoverable] and "a class token, which the tower" in qwen[recoverable]
    assert "tome" in str([method for method, cell in llama4.items() if cell.startswith("no: ToMe acts at")])
    assert linear[fastv] == "decoder layer 3 end" and llama4[fastv] == "decoder layer 1 end"


@pytest.mark.parametrize("name", TOWERS)
def test_an_adapter_of_towers_has_a_page(made, name):
    page = made["families/"].pages[f"families/{name}.md"]
    (row,) = (row for row in family_table.models() if row["adapter"] == name)
    assert all(f"`{one}`" in page for one in row["classes"]) and row["classes"]
    for kind in family_table.ADAPTERS[name]:
        assert catalogue.KINDS[kind].shape in page
    assert page.count("| [`tome`](../methods/tome.md) | vision layers 0 to ") == len(family_table.ADAPTERS[name])


def test_all_that_is_carried_or_refused_is_in_the_index(made):
    index = made["families/"].pages["families/index.md"]
    assert all(f"[`{name}`]({name}.md)" in index for name in ROWS)
    assert all(f"[{name}]({name}.md)" in index for name in TOWERS)
    assert all(f"| `{name}` | {why} |" in index for name, why in REFUSED.items())
    assert all(f" {name}` | {why} |" in index for (_, name), why in REFUSED_CLASSES.items())
    assert all(f" {name}`" in index for _, name in CLASSES)


def test_every_family_is_at_a_released_depth():
    """What is changed in default configurations is what a model cannot be made without, and still is."""
    for name, given in families.CONFIGURED.items():
        with pytest.raises((ValueError, TypeError, KeyError)):
            families.family_layout(name, {})
        layers = given.get("vision_config", {}).get("num_hidden_layers")
        assert layers is None or families.family_layout(name).stages["vision"].depth == layers


# ---------------------------------------------------------------------- names and commands
def test_every_public_name_is_on_one_page(made):
    shown = [
        name for page in made["reference/"].pages.values() for name in re.findall(r"^::: vlmtok\.(\w+)$", page, re.M)
    ]
    assert sorted(shown) == sorted(set(vlmtok.__all__) - {"__version__"})
    linked = re.findall(r"\[vlmtok\.(\w+)\]$", made["reference/"].pages["reference/index.md"], re.M)
    assert linked == shown


def test_groups_are_those_of_the_surface():
    groups = names.groups(inspect.getsource(surface))
    assert list(groups)[:4] == ["modules", "compress", "what it costs", "what to take"]
    assert list(groups)[4:] == ["try and show", "a method of one's own", "methods"]
    assert groups["what it costs"] == ["Report", "budget", "estimate"] and "kernels" in groups["modules"]


UNREADABLE = {
    "HOME = {}": "no table HOME",
    "HOME: dict = dict(a='b')": "no table HOME",
    "HOME: dict = {'a': '', 'b': ''}": "share a line",
}


@pytest.mark.parametrize(("source", "says"), UNREADABLE.items())
def test_a_surface_that_cannot_be_read_is_an_error(source, says):
    with pytest.raises(names.SurfaceError, match=says):
        names.groups(source)


def test_every_command_and_option_is_shown(made):
    group = typer.main.get_command(app)
    found = parts(made["reference/"].pages["reference/commands.md"])
    assert [name for name in found if name.startswith("vlmtok ")] == [f"vlmtok {name}" for name in group.commands]
    for name, command in group.commands.items():
        said = found[f"vlmtok {name}"]
        assert flat(command.help) in flat(said)
        for item in command.params:
            called = item.opts[0] if item.param_type_name == "option" else item.metavar or item.name
            assert re.search(rf"^\| `{re.escape(called)}\b.* \| .*\w", said, re.M | re.I), (name, called)
            if item.param_type_name == "option" and item.help:
                assert item.help.replace("*", "\\*").replace("|", "\\|") in said


def test_what_is_hidden_stays_so():
    hidden = typer.Typer()
    hidden.command("seen")(lambda: None)
    hidden.command("unseen", hidden=True)(lambda: None)
    page = commands.command_page(typer.main.get_command(hidden), "tool")
    assert "## tool seen" in page and "unseen" not in page


# ---------------------------------------------------------------------- the site
def leaves(navigation):
    for item in navigation:
        if isinstance(item, str):
            yield item
        else:
            for inner in item.values():
                yield from leaves([inner] if isinstance(inner, str) else inner)


def test_every_page_is_in_the_navigation_once(made):
    for folder, one in made.items():
        assert sorted(leaves(one.navigation)) == sorted(one.pages)
        assert all(page.startswith(folder) and text.startswith("# ") for page, text in one.pages.items())


def test_folders_in_the_navigation_become_their_pages():
    one = section.Section({}, ["a/index.md", {"B": "a/b.md"}])
    nav = section.filled([{"Home": "index.md"}, {"In": [{"A": "a/"}]}], {"a/": one})
    assert nav == [{"Home": "index.md"}, {"In": [{"A": ["a/index.md", {"B": "a/b.md"}]}]}]


def test_links_of_the_root_lead_to_pages_or_become_names():
    pages = {"docs/kernels.md#a": "kernels.md#a", "README.md#b": "index.md", "CHANGELOG.md": "changelog.md"}
    for link, page in pages.items():
        assert root.relinked(f"see [this]({link}).") == f"see [this]({page})."
    assert root.relinked("see [this](examples/my.py).") == "see this (`examples/my.py`)."
    assert root.relinked("see [`my.py`](my.py).") == "see `my.py`."
    for kept in ("[a](https://b.c/d.md)", "[e](#f)"):
        assert root.relinked(kept) == kept
    found = root.root_pages(ROOT)
    assert set(found) == set(root.COPIED.values()) and all("](docs/" not in page for page in found.values())
