"""What `pyproject.toml` puts into the wheel is all of the package: a checkout hides what it forgets."""

import re

from support.places import ROOT


def test_every_package_of_the_checkout_is_in_the_wheel():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    named = set(re.findall(r'"([\w.]+)"', re.search(r"^packages = \[(.*?)^\]", text, re.S | re.M)[1]))
    homes = {"vlmtok": ROOT / "vlmtok", "vlmtok.adapters": ROOT / "adapters"}
    found = {
        ".".join([name, *path.parent.relative_to(home).parts])
        for name, home in homes.items()
        for path in home.rglob("__init__.py")
    }
    assert named == found
