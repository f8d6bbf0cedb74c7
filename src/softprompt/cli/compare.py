"""softprompt compare"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.command import TYPED_TEXT, Command, config_of, given_flags, options_of
from softprompt.cli.console import load, print_json, print_table, print_words, say, warnings_as_lines
from softprompt.config import BaseConfig, DataConfig, SamplingConfig, ScoreConfig
from softprompt.errors import ConfigError
from softprompt.types import InputForm

if TYPE_CHECKING:
    from softprompt.data import Rows
    from softprompt.evaluation import Comparison
    from softprompt.prompt import SoftPrompt

_SECTIONS = {
    "Prompts": ("prompts", "sets", "library", "force"),
    "Inputs": ("texts", "fields", "raw"),
    "Held-out figures": (
        *(item.name for item in dataclasses.fields(DataConfig)),
        *(item.name for item in dataclasses.fields(ScoreConfig)),
    ),
    "Answers": SamplingConfig,
    "Base": BaseConfig,
}
_EXAMPLES = (
    'softprompt compare --base embedded --prompt prompts/coach --prompt prompts/quotes --input "Be kind to"',
    "softprompt compare --base BASE --prompt prompts/reviews --data heldout.csv --markdown report.md",
)


def _lacking(given: Collection[str]) -> list[str]:
    return [] if {"prompts", "sets"} & set(given) else ["'--prompt' or '--ensemble'"]


@click.command("compare", cls=Command, sections=_SECTIONS, examples=_EXAMPLES, lacking=_lacking)
@options_of(BaseConfig)
@options_of(SamplingConfig)
@options_of(DataConfig, optional=True, leave_out=("validation", "test"))
@options_of(ScoreConfig, leave_out=("score_tokens",))
@click.option("--prompt", "prompts", multiple=True, help="Adapter folder or name; may be repeated.")
@click.option("--ensemble", "sets", multiple=True, metavar="SET",
              help="Folder or name of a set of voting prompts, saved by --ensemble; may be repeated.")  # fmt: skip
@click.option("--library", type=click.Path(), help="Folder of adapters that names refer to.")
@click.option("--input", "texts", multiple=True, type=TYPED_TEXT, help="A text to answer; may be repeated.")
@click.option("--field", "fields", multiple=True, metavar="NAME=TEXT", help="A field of the prompts' template.")
@click.option("--raw", is_flag=True, help="Continue each --input as it is, without template or chat.")
@click.option("--force", is_flag=True, help="Use prompts that were trained on another base of the same width.")
@click.option("--markdown", type=click.Path(dir_okay=False), help="Also write the comparison to this Markdown file.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def command(
    prompts: tuple[str, ...], sets: tuple[str, ...], library: str | None, texts: tuple[str, ...],
    fields: tuple[str, ...], raw: bool, force: bool, markdown: str | None, as_json: bool, **flags: Any,
) -> None:  # fmt: skip
    """Answer the same inputs with the bare base and each prompt, and show held-out figures.

    Each prompt gets an input in the form of its training rows: in its template, where that has one field, or as a chat
    message. The bare base gets the same as the first prompt. With --raw all continue the text itself.

    Held-out rows are those that each prompt's training set aside; --data names another set.

    A prompt with a head, or with label words at a mask, answers by them, and is measured by the scores of its task: of
    labels, whole entities, answers or neighbours.

    --score scores greedy answers, as long as the longest completion unless --max-new-tokens is less; each score is a
    mean over rows from 0 to 1. exact_match and f1 (of words) are SQuAD's, which leave out case, punctuation and
    articles; rouge_l is the F-measure of the longest common subsequence of words; chrf the F2 of character n-grams.
    """
    sampling, scoring = config_of(SamplingConfig, flags), _scoring(flags)
    base_config = config_of(BaseConfig, flags)
    from softprompt.cli.inputs import named_prompts, parse_fields, say_judgements, stop_notes
    from softprompt.evaluation import compare, to_markdown
    from softprompt.storage import load_prompt, load_set
    from softprompt.storage.atomic import write_file

    folders = named_prompts(prompts, library)
    set_folders = _beside(folders, named_prompts(sets, library))
    inputs: list[str | dict[str, str]] = [*texts, *([parse_fields(fields)] if fields else [])]
    base = load(base_config)
    with warnings_as_lines():
        loaded = {name: load_prompt(folder, base, force=force) for name, folder in folders.items()}
        ensembles = {name: load_set(folder, base, force=force) for name, folder in set_folders.items()}
    say_judgements(loaded)
    for note in stop_notes(base, sampling.stop if inputs else ()):
        say(f"note: {note}")
    voters = {f"{name}/{own}": each for name, members in ensembles.items() for own, each in members.items()}
    held_out = _held_out({**loaded, **voters}, flags, sampling.seed, base_config.offline)
    if not inputs and not held_out:
        raise ConfigError("nothing to compare: give --input, --field or --data")
    found = compare(
        base, loaded, inputs, held_out=held_out, ensembles=ensembles, sampling=sampling, scoring=scoring, raw=raw,
    )  # fmt: skip
    _say_cut_sets(found)
    if markdown is not None:
        write_file(Path(markdown), to_markdown(found).encode())
        say(f"written to {markdown}")
    print_json(found.to_json()) if as_json else show(found)


def show(found: Comparison) -> None:
    """The comparison as tables on stdout."""
    show_answers(found)
    show_figures(found)


def show_answers(found: Comparison) -> None:
    """Each input's answers, the bare base's first."""
    from softprompt.evaluation import answer_tables

    for table in answer_tables(found):
        print_table(table.title, table.columns, [[name, text.strip("\n")] for name, text in table.rows], lines=True)


def show_figures(found: Comparison) -> None:
    """Held-out losses, accuracies, classes, task scores and memory."""
    from softprompt.evaluation import (
        accuracy_tables,
        class_tables,
        confusion_tables,
        ensemble_tables,
        is_small,
        loss_tables,
        memory_line,
        score_tables,
        verdict_lines,
    )

    matrices = confusion_tables(found)
    small = [table for table in matrices if is_small(table)]
    for table in accuracy_tables(found):
        print_table(*table, figures=True)
    for line in verdict_lines(found):
        print_words(line)
    before = (ensemble_tables, loss_tables, class_tables)
    for table in [*(table for of in before for table in of(found)), *small, *score_tables(found)]:
        print_table(*table, figures=True)
    if len(small) < len(matrices):
        click.echo("Confusion matrices that are too large to show here are in --markdown and --json.")
    click.echo(memory_line(found))


def _beside(prompts: Collection[str], sets: Mapping[str, Path]) -> dict[str, Path]:
    """The sets by name; one that has the name of a compared prompt is marked as a vote."""
    return {f"{name} (vote)" if name in prompts else name: folder for name, folder in sets.items()}


def _scoring(flags: Mapping[str, Any]) -> ScoreConfig:
    """--max-new-tokens, where it was typed, limits scored answers too."""
    config = config_of(ScoreConfig, flags)
    return replace(config, score_tokens=flags["max_new_tokens"]) if "max_new_tokens" in given_flags() else config


def _say_cut_sets(found: Comparison) -> None:
    for name in dict.fromkeys(item.held_out for item in found.scores if item.num_rows < item.num_available):
        item = next(score for score in found.scores if score.held_out == name)
        say(f"note: the first {item.num_rows:,} of {item.num_available:,} rows of {name} are scored (--score-rows)")


def _held_out(prompts: Mapping[str, SoftPrompt], flags: Mapping[str, Any], seed: int, offline: bool) -> dict[str, Rows]:
    from softprompt.cli.inputs import recorded_sets

    if flags["data"] is None:
        return recorded_sets(prompts, offline=offline)
    return _given_set(flags, [prompt.record.form for prompt in prompts.values()], seed, offline)


def _given_set(flags: Mapping[str, Any], forms: Sequence[InputForm], seed: int, offline: bool) -> dict[str, Rows]:
    """The set of --data, with the prompts' labels, and in their own template unless another form is requested."""
    from softprompt.data import read_rows
    from softprompt.data.rows import with_labels

    form = next((form for form in forms if form.kind == "template"), forms[0] if forms else None)
    rows = with_labels(read_rows(config_of(DataConfig, flags), seed=seed, offline=offline, form=form))
    for note in rows.notes:
        say(f"note: {rows.source}: {note}")
    same = (form for form in forms if replace(form, labels=()) == replace(rows.form, labels=()))
    return {Path(rows.source).name: replace(rows, form=next(same, rows.form))}
