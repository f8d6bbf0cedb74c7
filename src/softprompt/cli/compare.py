"""softprompt compare"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import click

from softprompt.cli.console import load, print_json, print_table, say, warnings_as_lines
from softprompt.cli.inputs import named_prompts, parse_fields
from softprompt.cli.options import config_of, options_of
from softprompt.config import BaseConfig, DataConfig, SamplingConfig
from softprompt.data import Rows, held_out_record, read_rows, split_rows
from softprompt.errors import ConfigError, DataError, SoftpromptError
from softprompt.evaluation import Comparison, compare, to_markdown
from softprompt.evaluation.markdown import accuracy_cells, accuracy_columns, loss_cells, loss_columns, memory_line
from softprompt.prompt import SoftPrompt
from softprompt.storage import load_prompt
from softprompt.storage.atomic import write_file


@click.command("compare")
@options_of(BaseConfig)
@options_of(SamplingConfig)
@options_of(DataConfig, optional=True, leave_out=("validation", "test"))
@click.option("--prompt", "prompts", multiple=True, required=True, help="Adapter folder or name; may be repeated.")
@click.option("--library", type=click.Path(), help="Folder of adapters that names refer to.")
@click.option("--input", "texts", multiple=True, help="A text to continue; may be repeated.")
@click.option("--field", "fields", multiple=True, metavar="NAME=TEXT", help="A field of the prompts' template.")
@click.option("--force", is_flag=True, help="Use prompts that were trained on another base of the same width.")
@click.option("--markdown", type=click.Path(dir_okay=False), help="Also write the comparison to this Markdown file.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def command(
    prompts: tuple[str, ...], library: str | None, texts: tuple[str, ...], fields: tuple[str, ...], force: bool,
    markdown: str | None, as_json: bool, **flags: Any,
) -> None:  # fmt: skip
    """Answer the same inputs with the bare base and each prompt, and show held-out figures.

    Held-out rows are those that each prompt's training set aside; --data names another set to read instead.
    """
    sampling = config_of(SamplingConfig, flags)
    folders = named_prompts(prompts, library)
    inputs: list[str | dict[str, str]] = [*texts, *([parse_fields(fields)] if fields else [])]
    base = load(config_of(BaseConfig, flags))
    with warnings_as_lines():
        loaded = {name: load_prompt(folder, base, force=force) for name, folder in folders.items()}
    held_out = _given_set(flags) if flags["data"] is not None else _recorded_sets(loaded)
    if not inputs and not held_out:
        raise ConfigError("nothing to compare: give --input, --field or --data")
    found = compare(base, loaded, inputs, held_out=held_out, sampling=sampling)
    if markdown is not None:
        write_file(Path(markdown), to_markdown(found).encode())
        say(f"written to {markdown}")
    print_json(found.to_json()) if as_json else show(found)


def show(found: Comparison) -> None:
    """The comparison as tables on stdout."""
    for item in found.answered:
        rows = [[name or "base", text.strip("\n")] for name, text in item.answers.items()]
        print_table(f"Input: {item.input}", ["prompt", "answer"], rows)
    if found.losses:
        print_table("Held-out loss (text tokens only)", loss_columns(), [loss_cells(loss) for loss in found.losses])
    if found.accuracies:
        print_table("Accuracy", accuracy_columns(), [accuracy_cells(item) for item in found.accuracies])
    click.echo(memory_line(found))


def _given_set(flags: Mapping[str, Any]) -> dict[str, Rows]:
    rows = read_rows(config_of(DataConfig, flags))
    return {Path(rows.source).name: rows}


def _recorded_sets(prompts: Mapping[str, SoftPrompt]) -> dict[str, Rows]:
    """The rows that each prompt's training set aside, read again and checked against the recorded hash."""
    sets: dict[str, Rows] = {}
    for name, prompt in prompts.items():
        run = prompt.record.run
        if not run.get("test"):
            say(f"note: {name} has no record of held-out rows; give --data for a held-out loss")
            continue
        try:
            sets[name] = _recorded_set(run)
        except SoftpromptError as error:
            say(f"note: the held-out rows of {name} cannot be read: {error}")
    return sets


def _recorded_set(run: Mapping[str, Any]) -> Rows:
    known = {item.name for item in dataclass_fields(DataConfig)}
    settings = {key: value for key, value in run["data"].items() if key in known}
    for key in ("data", "test", "validation"):
        settings[key] = _found_again(settings[key], run["data"].get("folder"))
    split = split_rows(DataConfig(**settings), seed=run["plan"]["config"]["seed"])
    if split.test is None or held_out_record(split.test)["hash"] != run["test"]["hash"]:
        raise DataError(f"{settings['data']} has changed since the training")
    return split.test


def _found_again(path: str | None, folder: str | None) -> str | None:
    """A relative path of the training, seen from where the training ran, unless it leads somewhere from here."""
    if path is None or folder is None or os.path.exists(path):
        return path
    there = os.path.join(folder, path)
    return there if os.path.exists(there) else path
