"""Every Python block of the pages runs, in the order of its page, and prints what stands below it.

Models are opened by the names that users write, from a Hugging Face cache of small stand-ins (`support/hub.py`).
"""

from __future__ import annotations

import pytest
from support import hub
from support.pages import blocks_of, differs, run
from support.places import ROOT

PAGES = {
    str(path.relative_to(ROOT)): blocks_of(path.read_text(encoding="utf-8"))
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
RUNNING = [name for name, blocks in PAGES.items() if any(block.runs for block in blocks)]


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Hugging Face's folder."""
    folder = tmp_path_factory.mktemp("huggingface")
    hub.fill(folder)
    return folder


@pytest.mark.parametrize("name", RUNNING)
def test_a_page_does_what_it_says(name, home, tmp_path):
    hub.pictures(tmp_path)
    blocks = [block for block in PAGES[name] if block.runs]
    printed = run(blocks, name, tmp_path, home, ROOT, timeout=600)
    for block, found in zip(blocks, printed, strict=True):
        if block.shown is not None:
            problem = differs(block.shown, found)
            assert problem is None, f"{name}, block at line {block.line}: {problem}; printed was:\n{found}"


def test_the_pages_are_found():
    assert "README.md" in RUNNING and "docs/tutorials/wrap.md" in RUNNING
    assert len(RUNNING) >= 12


@pytest.mark.parametrize(
    "shown, printed, fine",
    [
        ("a\nb\n", "a\nb\n", True),
        ("a\n", "b\n", False),
        ("a\n", "a\nb\n", False),
        ("a\nb\n", "a\n", False),
        ("...\nb\n", "x\ny\nb\n", True),
        ("a\n...\n", "a\n", True),
        ("a\n...\nz\n", "a\nb\nz\nz\n", True),
        ("a\n...\nz\n", "a\nb\nz\ny\n", False),
        ("took ... s\n", "took 3.1 s\n", True),
        ("took ... s\n", "took 3.1 ms!\n", False),
        ("a + b\n", "a   b\n", False),
    ],
)
def test_what_is_shown_is_compared_line_by_line(shown, printed, fine):
    assert (differs(shown, printed) is None) == fine


def test_a_block_is_read_with_the_text_behind_it():
    page = "x\n```python\na = 1\n```\n\n```text\n1\n```\n"
    page += "```python no-run\n# not run: wants CUDA\nb\n```\ny\n```text\nz\n```\n"
    first, second = blocks_of(page)
    assert (first.line, first.code, first.runs, first.shown) == (2, "a = 1\n", True, "1\n")
    assert not second.runs and second.shown is None
    with pytest.raises(ValueError, match="says why"):
        blocks_of("```python no-run\nb\n```\n")
    with pytest.raises(ValueError, match="not 'skip'"):
        blocks_of("```python skip\nb\n```\n")


def test_a_failing_block_fails_its_page(home, tmp_path):
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run(blocks_of("```python\n1 / 0\n```\n"), "a page", tmp_path, home, ROOT, timeout=60)
