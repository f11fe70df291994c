"""What the README shows is what happens."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_first_block_prints_what_stands_below_it(capsys):
    code, shown = re.search(r"```python\n(.*?)```\s*```text\n(.*?)```", README, re.S).groups()
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    for line in shown.splitlines():
        assert line in printed


def test_every_name_it_uses_exists():
    import vlmtok

    for name in re.findall(r"vlmtok\.((?:kernels\.|viz\.)?\w+)\(", README):
        found = vlmtok
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found)


def test_every_file_it_links_is_there():
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
