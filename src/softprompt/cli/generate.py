"""softprompt generate"""

from __future__ import annotations

from typing import Any

import click

from softprompt.cli.console import load, print_json, warnings_as_lines
from softprompt.cli.inputs import parse_fields
from softprompt.cli.options import TYPED_TEXT, config_of, options_of
from softprompt.config import BaseConfig, SamplingConfig
from softprompt.data import input_ids
from softprompt.engine import Request, generate
from softprompt.errors import ConfigError
from softprompt.storage import load_prompt, resolve_prompt


@click.command("generate")
@click.argument("texts", nargs=-1, type=TYPED_TEXT)
@options_of(BaseConfig)
@options_of(SamplingConfig)
@click.option("--prompt", help="Adapter: a folder with a separator in it, or a name in --library. Default: bare base.")
@click.option("--library", type=click.Path(), help="Folder of adapters that names refer to.")
@click.option("--field", "fields", multiple=True, metavar="NAME=TEXT", help="A field of the prompt's own template.")
@click.option("--force", is_flag=True, help="Use a prompt that was trained on another base of the same width.")
@click.option("--json", "as_json", is_flag=True, help="Print answers with token ids and log-probabilities.")
def command(
    texts: tuple[str, ...], prompt: str | None, library: str | None, fields: tuple[str, ...], force: bool,
    as_json: bool, **flags: Any,
) -> None:  # fmt: skip
    """Answer TEXTS, with a soft prompt or bare."""
    if bool(texts) == bool(fields):
        raise ConfigError("give either one or more texts, or --field name=text for the prompt's template")
    sampling = config_of(SamplingConfig, flags)
    filled = parse_fields(fields) if fields else None
    base = load(config_of(BaseConfig, flags))
    with warnings_as_lines():
        soft = load_prompt(resolve_prompt(prompt, library), base, force=force) if prompt is not None else None
    form = soft.record.form if soft is not None else None
    inputs = [input_ids(base, form, fields=filled)] if filled else [input_ids(base, form, text=text) for text in texts]
    answers = generate(base, [Request(ids, soft) for ids in inputs], sampling)
    if as_json:
        print_json(
            [
                {"text": a.text, "finish_reason": a.finish_reason, "ids": list(a.ids), "log_probs": list(a.log_probs)}
                for a in answers
            ]
        )
        return
    for answer in answers:
        click.echo(answer.text)
