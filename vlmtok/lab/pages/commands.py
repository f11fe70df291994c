"""Reference of the command line, read off its commands."""

from __future__ import annotations

from typing import Any

from ..tables import table


def command_page(group: Any, program: str = "vlmtok") -> str:
    """Every command with its arguments and options.

    Args:
        group: commands, as `typer.main.get_command` gives them.
        program: what is typed.
    """
    parts = ["# Command line", *_command(group, program)]
    for name, command in group.commands.items():
        if not command.hidden:
            parts += [f"## {program} {name}", *_command(command, f"{program} {name}")]
    return "\n\n".join(part for part in parts if part) + "\n"


def _command(command: Any, called: str) -> list[str]:
    """What ``--help`` prints, as markdown."""
    context = command.context_class(command, info_name=called)
    usage = command.get_usage(context).removeprefix("Usage: ")
    records = [item.get_help_record(context) for item in command.get_params(context)]
    rows = [(f"`{name}`", said.replace("*", "\\*")) for name, said in filter(None, records)]
    return [command.help or "", f"```text\n{usage}\n```", table(("argument or option", "meaning"), rows)]
