"""softprompt runs"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from softprompt.cli.charts import reason_against_charts
from softprompt.cli.command import Group
from softprompt.cli.console import print_json, print_list, print_table, print_words, say, warnings_as_lines
from softprompt.errors import SoftpromptError

if TYPE_CHECKING:
    from softprompt.cli.run_history import RunHistory


@click.group("runs", cls=Group)
def command() -> None:
    """List training runs, or show one with its curves."""


@command.command("list")
@click.argument("folder", type=click.Path(), default=".")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_runs(folder: str, as_json: bool) -> None:
    """Every run in FOLDER (default: here) and down to three levels below it; a broken one with its problem.

    An unfinished run is still going, or was killed; it is resumable from its last checkpoint.
    """
    from softprompt.cli.run_history import find_runs
    from softprompt.cli.run_report import LIST_COLUMNS, list_entry, list_row

    place = Path(folder)
    found = {str(path.relative_to(place)): _read(path) for path in find_runs(place)}
    if as_json:
        print_json([{"run": name, **list_entry(run)} for name, run in found.items()])
        return
    rows = [[name, *list_row(run)] for name, run in found.items()]
    print_list(
        f"{folder}: {len(rows)} run{'' if len(rows) == 1 else 's'}",
        LIST_COLUMNS,
        rows,
        whole=("steps", "state", "begun"),
    )
    for name, run in found.items():
        if isinstance(run, str):
            print_words(f"{name} is broken: {run}")


@command.command("show")
@click.argument("run", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(run: str, as_json: bool) -> None:
    """One run: its settings, checkpoints, candidates, and the curves of its training and validation loss.

    A run may be shown while it is going. Curves are drawn by plotext (pip install 'softprompt[plots]'); without it they
    are tables of numbers.
    """
    from softprompt.cli.run_history import read_history
    from softprompt.cli.run_report import facts, show_candidates, show_curves, to_json

    history = read_history(Path(run))
    if as_json:
        print_json(to_json(history))
        return
    print_table(run, ["fact", "value"], facts(history))
    for task, prompts in history.by_task.items():
        if len(prompts) > 1:
            show_candidates(task, prompts)
    reason = reason_against_charts()
    if reason is not None:
        say(reason)
    for task, prompts in history.by_task.items():
        show_curves(task, prompts)


def _read(path: Path) -> RunHistory | str:
    """A run, or what is wrong with it: files that do not read as a run's, or adapters that do not load."""
    from softprompt.cli.run_history import read_history
    from softprompt.storage import load_prompt

    try:
        history = read_history(path)
        with warnings_as_lines():
            for folder in history.kept_folders:
                load_prompt(folder)
    except SoftpromptError as error:
        return str(error)
    return history
