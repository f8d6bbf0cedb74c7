"""Inputs and prompts as they are named on a command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from softprompt.errors import ConfigError
from softprompt.storage import resolve_prompt


def parse_fields(fields: Sequence[str]) -> dict[str, str]:
    """`name=text` pairs as a mapping. Raises ConfigError for one without a name or given twice."""
    parsed: dict[str, str] = {}
    for item in fields:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise ConfigError(f"--field {item!r} is not of the form name=text")
        if name in parsed:
            raise ConfigError(f"--field {name!r} is given twice")
        parsed[name] = text
    return parsed


def named_prompts(prompts: Sequence[str], library: str | None) -> dict[str, Path]:
    """Each prompt's folder under a name to show: the folder's own, or the whole path where two are called alike."""
    folders = [resolve_prompt(prompt, library) for prompt in prompts]
    if len(set(folders)) < len(folders):
        raise ConfigError(f"a prompt is given twice: {', '.join(prompts)}")
    names = [folder.resolve().name for folder in folders]
    return {
        name if names.count(name) == 1 and name != "base" else str(folder): folder
        for name, folder in zip(names, folders, strict=True)
    }
