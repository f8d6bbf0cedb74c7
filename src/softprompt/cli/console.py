"""Output of commands: messages on stderr, results on stdout, one line for each warning."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from softprompt.config import BaseConfig
from softprompt.openmp import load_warning
from softprompt.types import finite

if TYPE_CHECKING:
    from softprompt.base import Base

_PIPED_WIDTH = 120  # columns, where stdout is not a terminal
_NARROWEST = 80  # columns; figures are not wrapped to fit into fewer
_NARROWEST_CUT = 6  # columns of a cell that is cut
_NARROWEST_NAME = 10  # columns of a name before figures
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline

words = Console(stderr=True, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """One line for the human, on stderr."""
    words.print(_text(line.replace("\n", "\\n")))


def print_json(value: Any) -> None:  # Any: whatever JSON holds
    """One JSON document on stdout, in ASCII unless stdout is UTF-8; NaN and infinity become null."""
    click.echo(json.dumps(finite(value), ensure_ascii=not stdout_is_unicode(), allow_nan=False, indent=2))


def stdout_is_unicode() -> bool:
    """Whether stdout can encode every character: box-drawing ones, those of any answer."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")


def print_words(sentence: str) -> None:
    """A sentence of a result on stdout, wrapped between words; control characters are escaped."""
    _results().print(_text(sentence.replace("\n", "\\n")))


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, lines: bool = False, figures: bool = False
) -> None:
    """A table on stdout, cells wrapped to the terminal, none of them cut.

    `lines` separates rows whose cells have many lines; `figures` keeps all columns but the first unwrapped. Text is
    never read as markup, and control characters are escaped.
    """
    table = Table(title=_text(title) if title else None, title_justify="left", show_lines=lines, box=box.ROUNDED)
    if figures:
        table.box, table.padding, table.pad_edge = box.SIMPLE_HEAD, (0, 1, 0, 0), False
    for index, column in enumerate(columns):
        if figures and index > 0:
            table.add_column(_text(column.replace("/", "/\n")), justify="right", no_wrap=True, overflow="fold")
        else:
            table.add_column(_text(column), overflow="fold", min_width=_NARROWEST_NAME if figures else None)
    for row in rows:
        table.add_row(*(_text(cell) for cell in row))
    _results().print(table)


def print_list(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, whole: Sequence[str] = ()) -> None:
    """A table with one line per row, no wider than the terminal: the longest cells are cut, those of `whole` last."""
    console = _results()
    table = [[cell.replace("\n", "\\n") for cell in row] for row in (columns, *rows)]
    widths = [max(map(cell_len, column)) for column in zip(*table, strict=True)]
    available = console.width - 3 * len(columns) - 1  # borders and padding
    widths = _shrunk(widths, available, [column not in whole for column in columns])
    widths = _shrunk(widths, available, [True] * len(columns))
    heads, *cut = [[_cut(cell, width) for cell, width in zip(row, widths, strict=True)] for row in table]
    console.print(_text(_cut(title, console.width)))
    print_table("", heads, cut)


def _shrunk(widths: Sequence[int], width: int, may_shrink: Sequence[bool]) -> list[int]:
    """The widths, with the widest reduced until all fit; the first column, the name, counts half."""
    found = list(widths)
    while sum(found) > width:
        shrinkable = [index for index, each in enumerate(found) if may_shrink[index] and each > _NARROWEST_CUT]
        if not shrinkable:
            break
        found[max(shrinkable, key=lambda index: found[index] / (1 if index else 2))] -= 1
    return found


def _cut(text: str, width: int) -> str:
    if cell_len(text) <= width:
        return text
    ellipsis = "…" if stdout_is_unicode() else "..."
    return set_cell_size(text, max(width - len(ellipsis), 0)).rstrip() + ellipsis


def results_width() -> int:
    """Width of stdout in columns."""
    return _results().width


def load(config: BaseConfig, *, training: bool = False, measure: bool = True) -> Base:
    """Load a base and print what was loaded, with `auto` resolved.

    Its matrix kernels are measured if they never were on this machine, those that `training` needs too,
    unless `measure` is off.
    """
    from transformers.utils import logging

    from softprompt.base import load_base
    from softprompt.base.load import describe
    from softprompt.families import kernel_table

    logging.disable_progress_bar()
    base = load_base(config)
    say(describe(base))
    if base.rules.note is not None:
        say(f"note: {base.rules.note}")
    if measure:
        kernel_table(base, training=training, say=say)
    warning = load_warning()
    if warning is not None:
        say(f"warning: {warning}")
    return base


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print each of our own warnings in one line; those of other libraries are ignored."""
    from softprompt.storage import UnknownBaseWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UnknownBaseWarning)
        yield
    for warning in caught:
        say(f"warning: {warning.message}")


def _results() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED_WIDTH
    console.width = max(console.width, _NARROWEST)
    return console


def _text(shown: str) -> Text:
    return Text(_CONTROLS.sub(lambda match: repr(match[0])[1:-1], shown))
