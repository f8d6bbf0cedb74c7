"""What a command shows: words on stderr, results on stdout, a progress line, warnings in one line each."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from softprompt.base import Base, load_base
from softprompt.base.load import describe
from softprompt.config import BaseConfig
from softprompt.storage import UnknownBaseWarning

words = Console(stderr=True, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """One line for the human, on stderr."""
    words.print(Text(line))


def print_json(value: Any) -> None:  # Any: whatever JSON holds
    """One JSON document for a machine, on stdout."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout, cells wrapped to the terminal. Text is shown as it is, never read as markup."""
    table = Table(title=Text(title), title_justify="left", show_lines=len(columns) == 2)
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(highlight=False).print(table)


def load(config: BaseConfig) -> Base:
    """Load a base and say what was loaded, with `auto` resolved."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    base = load_base(config)
    say(describe(base))
    return base


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Our own warnings become one line each; those of other libraries are theirs to fix and stay silent."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UnknownBaseWarning)
        yield
    for warning in caught:
        say(f"warning: {warning.message}")
