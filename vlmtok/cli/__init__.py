"""The command line: ``vlmtok run | list | show | estimate | eval | recommend | bench | doctor``. It parses only.

Whatever is wrong with the input is one line on standard error and exit code 2. With ``--json`` one JSON object goes to
standard output, and nothing else. Libraries are imported when a command needs them.
"""

from . import bench, doctor, estimate, evaluate, recommend, run, show  # noqa: F401  each adds its command
from .application import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the ``vlmtok`` command."""
    app()
