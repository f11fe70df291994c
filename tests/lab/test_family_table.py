"""The table of families: generated from the rows, complete, and markdown."""

import re

from vlmtok.adapters.language.families import EXAMPLES, REFUSED, ROWS

from vlmtok.lab import family_table


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def tables():
    """Both tables, without their heads."""
    carried, refused = family_table.family_table().split("\n\n")
    return [[cells(line) for line in table.splitlines()[2:]] for table in (carried, refused)]


def test_every_family_stands_there_once():
    carried, refused = tables()
    assert [row[0] for row in carried] == [f"[`{name}`]({name}.md)" for name in ROWS]
    assert [row[0].strip("`") for row in refused] == list(REFUSED)
    assert set(EXAMPLES) == set(ROWS) and not set(ROWS) & set(REFUSED)
    for table in family_table.family_table().split("\n\n"):
        lines = table.splitlines()
        assert len({line.count("|") for line in lines}) == 1 and re.fullmatch(r"\|(---\|)+", lines[1])


def test_what_is_refused_says_why():
    carried, refused = tables()
    for (name, _, tower, language, positions, _), spec in zip(carried, ROWS.values()):
        assert tower.startswith("no: ") == (spec.tower_cut is None), name
        assert language.startswith("no: ") == (spec.boundary is not None) == (not positions), name
        for cell in (tower, language):
            assert "None" not in cell and (not cell.startswith("no") or len(cell) > 20), name
    assert all(why == REFUSED[name.strip("`")] for name, why in refused)


def test_stages_are_those_that_layouts_offer():
    """The table agrees with the adapter, asked with a tiny model of each family."""
    from families.build import FAMILIES, TOWER_ONLY, shared
    from vlmtok.adapters.language.hf_vlm import HFVLM

    said = {row["family"]: set(row["stages"]) for row in family_table.families()}
    for name, family in {**FAMILIES, **TOWER_ONLY}.items():
        model = shared(name, family.attentions[0])
        layout = HFVLM(model).layout()
        kind = model.config.model_type
        assert set(filter(layout.has, layout.stages)) == said[kind], name
        # whatever is missing has its reason
        missing = {"vision", "projected", "decoder"} - said[kind]
        told = {stage for stage, offered in layout.stages.items() if offered.whole}
        assert missing <= set(layout.without) | told, name
