"""Releases of host libraries and their wheels, asked of pip, so that the index that it is set to is the one asked."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

AT_ONCE = 2
"""Downloads that run side by side."""


class WheelError(RuntimeError):
    """pip knows no such release, or cannot fetch it."""


@dataclass(frozen=True)
class Tracked:
    """A host library and the releases that are looked at.

    Attributes:
        package: name on the index.
        module: name of its top package.
        since: first minor.
        digits: how many numbers of a version make a minor; timm counts in the third.
    """

    package: str
    module: str
    since: str
    digits: int


TRACKED: tuple[Tracked, ...] = (
    Tracked("transformers", "transformers", "5.18", 2),
    Tracked("timm", "timm", "1.0.20", 3),
    Tracked("open_clip_torch", "open_clip", "3.0", 2),
)


def number(version: str) -> tuple[int, ...]:
    """A version as numbers, for order."""
    return tuple(int(part) for part in version.split("."))


def minors(versions: Sequence[str], since: str, digits: int) -> list[str]:
    """The last patch of every minor, oldest first.

    Args:
        versions: in any order; pre-releases and post-releases are left out.
        since: first minor.
        digits: how many numbers make a minor.
    """
    last: dict[tuple[int, ...], str] = {}
    for version in sorted((v for v in versions if re.fullmatch(r"\d+(\.\d+)*", v)), key=number):
        minor = number(version)[:digits]
        if minor >= number(since)[:digits]:
            last[minor] = version
    return [last[minor] for minor in sorted(last)]


def published(package: str) -> list[str]:
    """All final releases that pip finds.

    Raises:
        WheelError: pip finds none.
    """
    said = _pip("index", "versions", package, "--ignore-requires-python")
    found = re.search(r"^Available versions: (.+)$", said, re.M)
    if found is None:
        raise WheelError(f"pip index versions {package} lists no versions; it said: {said.strip() or 'nothing'}")
    return [version.strip() for version in found[1].split(",")]


def installed(tracked: Tracked) -> tuple[str, Path]:
    """Version and folder of the library that this environment would import.

    Raises:
        WheelError: it has none.
    """
    found = importlib.util.find_spec(tracked.module)  # finds a top package without running it
    if found is None or not found.submodule_search_locations:
        raise WheelError(f"{tracked.package} is not installed here")
    return importlib.metadata.version(tracked.package), Path(found.submodule_search_locations[0])


def cache_folder() -> Path:
    """Where wheels lie by default, below the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "vlmtok" / "wheels"


def fetch(package: str, versions: Sequence[str], folder: Path) -> dict[str, Path]:
    """Wheels of some releases, downloaded where the folder does not hold them.

    Args:
        package: name on the index.
        versions: exact.
        folder: of wheels; made if it is missing.

    Returns:
        By version.

    Raises:
        WheelError: pip cannot fetch one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(versions, pool.map(lambda version: _fetch(package, version, folder), versions)))


def _fetch(package: str, version: str, folder: Path) -> Path:
    pattern = f"{re.sub('[-_.]+', '_', package)}-{version}-*.whl"
    held = sorted(folder.glob(pattern))
    if held:
        return held[0]
    # A wheel that came only in part must not lie under its name.
    with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as room:
        options = ("--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--quiet", "--dest", room)
        _pip("download", *options, f"{package}=={version}")
        (wheel,) = Path(room).glob("*.whl")
        return wheel.replace(folder / wheel.name)


def _pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise WheelError(f"pip {' '.join(arguments)} failed: {' '.join(lines) or done.stderr.strip()}")
    return done.stdout
