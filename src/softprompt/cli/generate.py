"""softprompt generate"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.command import TYPED_TEXT, Command, config_of, given_flags, options_of
from softprompt.cli.console import load, print_json, say, warnings_as_lines
from softprompt.config import BaseConfig, EngineConfig, SamplingConfig
from softprompt.errors import ConfigError

if TYPE_CHECKING:
    from softprompt.base import Base
    from softprompt.data import Input
    from softprompt.prompt import SoftPrompt

_SECTIONS = {
    "Prompt and input": ("prompt", "library", "force", "fields", "messages", "raw"),
    "Answer": SamplingConfig,
    "Base": BaseConfig,
    "Engine": ("weights",),
}
_SERVER_ONLY = tuple(name for name in EngineConfig.__dataclass_fields__ if name != "weights")
_EXAMPLES = (
    'softprompt generate --base embedded "Once upon a time"',
    'softprompt generate --base BASE --prompt prompts/reviews "The lid is broken."',
    'softprompt generate --base BASE --prompt prompts/pairs --field "first=A man sleeps." --field "second=He rests."',
    'softprompt generate --base BASE --prompt prompts/support --message system="Be brief." --message "Where is it?"',
)


def _lacking(given: Collection[str]) -> list[str]:
    return [] if {"texts", "fields", "messages"} & set(given) else ["TEXTS, '--field' or '--message'"]


@click.command("generate", cls=Command, sections=_SECTIONS, examples=_EXAMPLES, lacking=_lacking)
@click.argument("texts", nargs=-1, type=TYPED_TEXT)
@options_of(BaseConfig)
@options_of(SamplingConfig)
@options_of(EngineConfig, leave_out=_SERVER_ONLY)
@click.option("--prompt", help="Adapter: a folder with a separator in it, or a name in --library. Default: bare base.")
@click.option("--library", type=click.Path(), help="Folder of adapters that names refer to.")
@click.option("--field", "fields", multiple=True, metavar="NAME=TEXT",
              help="A field of the prompt's template, where it has several; may be repeated.")  # fmt: skip
@click.option("--message", "messages", multiple=True, type=TYPED_TEXT, metavar="MESSAGE",
              help="A message of the user, or ROLE=TEXT; several make one conversation.")  # fmt: skip
@click.option("--raw", is_flag=True, help="Continue TEXTS as they are: no template, no chat, no labels.")
@click.option("--force", is_flag=True, help="Use a prompt that was trained on another base of the same width.")
@click.option("--json", "as_json", is_flag=True, help="Print answers with token ids and log-probabilities.")
def command(
    texts: tuple[str, ...], prompt: str | None, library: str | None, fields: tuple[str, ...],
    messages: tuple[str, ...], raw: bool, force: bool, as_json: bool, **flags: Any,
) -> None:  # fmt: skip
    """Answer TEXTS, with a soft prompt or bare.

    Each text is written in the form of the prompt's training rows: in its template, where that has one field, or as a
    chat message. A prompt that was trained with labels answers with the likeliest of them, unless --choice or
    --json-schema is given. --raw turns both off. The bare base continues the text.
    """
    sampling, inputs = config_of(SamplingConfig, flags), _inputs(texts, fields, messages, raw)
    base_config = config_of(BaseConfig, flags)
    from softprompt.cli.inputs import stop_notes
    from softprompt.engine import int8_note
    from softprompt.storage import load_prompt, resolve_prompt

    base = load(base_config)
    with warnings_as_lines():
        soft = load_prompt(resolve_prompt(prompt, library), base, force=force) if prompt is not None else None
    if soft is not None:
        _refuse_head(str(prompt), soft)
    for note in stop_notes(base, sampling.stop):
        say(f"note: {note}")
    config = config_of(EngineConfig, flags)
    if soft is not None and _is_among_labels(soft, sampling, raw):
        answers = _label_answers(base, soft, inputs)
    else:
        answers = _generated(base, soft, inputs, sampling, raw, config)
        if config.weights == "int8":
            say(f"note: {int8_note(base)}")
    if as_json:
        print_json(answers)
        return
    for item in answers:
        click.echo(item["text"])


def _inputs(texts: Sequence[str], fields: Sequence[str], messages: Sequence[str], raw: bool) -> list[Input]:
    """Raises ConfigError for inputs of more than one kind, and for --raw beside --field or --message."""
    from softprompt.cli.inputs import parse_fields, parse_messages

    given = [name for name, items in (("texts", texts), ("--field", fields), ("--message", messages)) if items]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other; give one kind of input")
    if raw and not texts:
        raise ConfigError(f"--raw continues texts as they are, and {given[0]} fills a form; leave one of them out")
    if fields:
        return [parse_fields(fields)]
    return [parse_messages(messages)] if messages else list(texts)


def _refuse_head(name: str, soft: SoftPrompt) -> None:
    """Raises ConfigError for a prompt that writes no text."""
    task = soft.record.form.task
    if task != "generate":
        raise ConfigError(
            f"prompt {name} was trained for task {task}, which writes no text; softprompt predict answers rows with it"
        )


def _is_among_labels(soft: SoftPrompt, sampling: SamplingConfig, raw: bool) -> bool:
    return bool(soft.record.form.labels) and not raw and not sampling.is_guided


def _generated(
    base: Base,
    soft: SoftPrompt | None,
    inputs: Sequence[Input],
    sampling: SamplingConfig,
    raw: bool,
    config: EngineConfig,
) -> list[Mapping[str, Any]]:
    from softprompt.data import form_ids
    from softprompt.engine import Request, generate

    form = soft.record.form if soft is not None and not raw else None
    requests = [Request(form_ids(base, form, item), soft) for item in inputs]
    answers = generate(base, requests, sampling, config=config)
    return [
        {"text": a.text, "finish_reason": a.finish_reason, "ids": list(a.ids), "log_probs": list(a.log_probs),
         "weights": config.weights}
        for a in answers
    ]  # fmt: skip


def _label_answers(base: Base, soft: SoftPrompt, inputs: Sequence[Input]) -> list[Mapping[str, Any]]:
    """The likeliest labels, computed as in `compare`."""
    from softprompt.data import template_text
    from softprompt.evaluation import label_answers

    idle = sorted(given_flags() & {*SamplingConfig.__dataclass_fields__, "weights"})
    if idle:
        say(f"note: --{idle[0].replace('_', '-')} has no effect on an answer among labels; --raw generates freely")
    form = soft.record.form
    found = label_answers(base, [template_text(form, item) for item in inputs], form.labels, soft)
    return [
        {
            "text": item.label.strip() or item.label, "finish_reason": "stop", "ids": list(item.ids),
            "log_probs": list(item.log_probs), "labels": dict(item.log_likelihoods),
        }
        for item in found
    ]  # fmt: skip
