"""Inputs and prompts as they are named on a command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from softprompt.errors import ConfigError
from softprompt.settings import typed_text

if TYPE_CHECKING:
    from softprompt.base import Base


def parse_fields(fields: Sequence[str]) -> dict[str, str]:
    r"""`name=text` pairs as a mapping, with `\n` in a text a line break.

    Raises ConfigError for one without a name or given twice.
    """
    parsed: dict[str, str] = {}
    for item in fields:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise ConfigError(f"--field {item!r} is not of the form name=text")
        if name in parsed:
            raise ConfigError(f"--field {name!r} is given twice")
        parsed[name] = typed_text(text)
    return parsed


def parse_messages(messages: Sequence[str]) -> list[dict[str, str]]:
    """A conversation of `role=text` pairs; a text that opens with no role is the user's."""
    from softprompt.data.messages import ROLES

    parsed = []
    for item in messages:
        role, equals, text = item.partition("=")
        is_role = bool(equals) and role in ROLES
        parsed.append({"role": role, "content": text} if is_role else {"role": "user", "content": item})
    return parsed


def named_prompts(prompts: Sequence[str], library: str | None) -> dict[str, Path]:
    """Each prompt's folder under a name to show: the folder's own, or the whole path where two are called alike."""
    from softprompt.evaluation import BARE
    from softprompt.storage import resolve_prompt

    folders = [resolve_prompt(prompt, library) for prompt in prompts]
    places = [folder.resolve() for folder in folders]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise ConfigError(f"prompt {prompts[index]!r} is given twice; give each once")
    names = [place.name for place in places]
    return {
        name if names.count(name) == 1 and name != BARE else str(place): folder
        for name, place, folder in zip(names, places, folders, strict=True)
    }


def stop_notes(base: Base, stop: Sequence[str]) -> list[str]:
    """A note for each stop string that no answer of this base can have."""
    reasons = ((text, _why_never(base, text)) for text in stop)
    return [f"--stop {text!r} can never match: {reason}" for text, reason in reasons if reason is not None]


def _why_never(base: Base, text: str) -> str | None:
    control = next((token for token in base.tokenizer.all_special_tokens if token in text), None)
    if control is not None:
        token_id = base.tokenizer.convert_tokens_to_ids(control)
        return f"{control} is a control token, which answers leave out; --stop-ids {token_id} ends there"
    if text in base.decode(base.encode(text)):
        return None
    ids = range(min(len(base.tokenizer), base.vocab_size))  # read only where the text itself does not come back
    known = set(" ").union(*base.tokenizer.batch_decode([[token] for token in ids], skip_special_tokens=True))
    lacking = next((character for character in text if character not in known), None)
    return None if lacking is None else f"no token of the base writes {lacking!r}"
