"""Write docs/cli.md from the commands' own help texts: `python tools/cli_reference.py`. A test holds it up to date."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from softprompt.cli.main import commands

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
WIDTH = 110


def reference() -> str:
    """The whole page."""
    parts = ["# Command line", "Made by `tools/cli_reference.py` from the commands' help texts."]
    for name, help_text in pages(commands, "softprompt"):
        parts.append(f"## {name}\n\n```text\n{help_text}\n```")
    return "\n\n".join(parts) + "\n"


def pages(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[tuple[str, str]]:
    """Each command and sub-command with its help text."""
    context = click.Context(
        command, info_name=name.split()[-1], parent=parent, terminal_width=WIDTH, **command.context_settings
    )
    lines = command.get_help(context).splitlines()
    yield name, "\n".join(line.rstrip() for line in lines)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None, child
            yield from pages(found, f"{name} {child}", context)


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
