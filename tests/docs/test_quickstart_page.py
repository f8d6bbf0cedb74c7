"""docs/quickstart.md: its commands exist with their flags; they were run on SmolLM2, which takes minutes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click

from softprompt.cli.main import commands

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")


def lines() -> list[str]:
    blocks = re.findall(r"^```shell\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def test_every_command_and_flag_of_the_page_exists() -> None:
    ours = [shlex.split(line) for line in lines() if line.startswith("softprompt ")]
    assert len(ours) >= 5
    for _, name, *arguments in ours:
        command = commands.get_command(click.Context(commands), name)
        assert command is not None, name
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in arguments if word.startswith("--")} <= known, arguments


def test_its_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {line.split()[1] for line in lines() if line.startswith("make ")} <= targets
