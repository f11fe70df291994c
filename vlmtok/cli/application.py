"""The group of commands: one line for what the user can mend, exit code 2, and the version."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
import typer.core

from .words import enter, say_in_options

USAGE_ERROR, FAILED = 2, 1
"""Exit codes: the input is wrong; the input was fine, and what was asked did not happen."""


class OneLine(typer.core.TyperGroup):
    """A group of commands whose errors are one line each."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Runs a command and exits."""
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except Exception as problem:
            from ..guard import told

            # What the command line itself refuses passes through `Once`, and is no fault of ours.
            fault = None if hasattr(problem, "format_message") else told(problem)
            if fault is not None:
                raise fault from problem
            line = _line_of(problem)
            if line is None:
                raise
            if line:  # help was asked for by giving nothing
                print(f"vlmtok: {line}", file=sys.stderr)
            from ..errors import PassError

            code = FAILED if isinstance(problem, PassError) else USAGE_ERROR
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


class Once(typer.core.TyperCommand):
    """A command that takes each option once, unless it may be repeated, and refuses in the words of the command line.

    Of an option given twice the last one would win in silence.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses the words of the command.

        Raises:
            ParameterError: an option is given twice.
        """
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for param in order:
            if param.param_type_name == "option" and not param.multiple and order.count(param) > 1:
                from ..errors import ParameterError

                raise ParameterError(f"{param.opts[0]} is given {order.count(param)} times; once is all it takes")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; what it refuses is said in its own words."""
        enter(self)
        try:
            return super().invoke(ctx)
        except Exception as problem:
            from ..errors import VlmtokError

            if isinstance(problem, VlmtokError):
                say_in_options(problem)
            raise


def _line_of(problem: Exception) -> str | None:
    """An error that the user can mend, on one line; None for ours."""
    from ..errors import InternalError, VlmtokError

    if isinstance(problem, InternalError):
        return None
    if isinstance(problem, VlmtokError):
        text = str(problem)
    elif hasattr(problem, "format_message"):  # of the command line itself: no such option, no such command
        text = problem.format_message()
    elif isinstance(problem, OSError):  # a file that could not be written
        text = f"{problem.strerror or problem}: {problem.filename}" if problem.filename else str(problem)
    elif type(problem).__name__ == "OutOfMemoryError":
        text = f"out of memory: {problem}"
    else:
        return None
    return " ".join(text.split())


app = typer.Typer(
    cls=OneLine,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Prune and merge the visual tokens of vision-language models that already exist.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from ..version import __version__

        print(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of all commands."""
