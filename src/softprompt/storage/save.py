"""A soft prompt written as a folder: exactly what PEFT writes for prompt tuning, with our record and a card beside."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from softprompt.base import Base
from softprompt.errors import ExistsError, StorageError, WrongBaseError
from softprompt.prompt import SoftPrompt
from softprompt.storage.adapter import FORMAT_VERSION, other_base_problem
from softprompt.storage.atomic import write_files, write_folder
from softprompt.storage.card import model_card
from softprompt.storage.files import (
    ADAPTER_FILES,
    CARD_NAME,
    CONFIG_NAME,
    MAX_RECORD_BYTES,
    PICKLE_NAME,
    RECORD_NAME,
    SAFETENSORS_NAME,
    dump_object,
)
from softprompt.storage.peft_config import config_of
from softprompt.storage.weights import weights_to_bytes

_MAY_BE_REPLACED = {*ADAPTER_FILES, PICKLE_NAME, ".gitattributes"}  # the Hub adds the last


def save_prompt(
    prompt: SoftPrompt, folder: str | os.PathLike[str], *, overwrite: bool = False, base: Base | None = None
) -> Path:
    """Write an adapter folder that PEFT and `load_prompt` read, whole or not at all, and return its path.

    `base` adds its name, kind, fingerprint and layer counts where the prompt's record has none.
    Overwriting replaces an adapter folder only, and only if nothing else lies in it.

    Raises: ExistsError, StorageError; WrongBaseError where the record names another base than `base`.
    """
    path = Path(folder)
    check_free(path, overwrite=overwrite)
    write_folder(path, adapter_to_bytes(prompt, base), replace=overwrite)
    return path


def save_prompt_into(prompt: SoftPrompt, folder: Path, *, base: Base | None = None) -> Path:
    """Write or replace an adapter's files in a folder that keeps its other files (a run's).

    Raises: StorageError; WrongBaseError.
    """
    write_files(folder, adapter_to_bytes(prompt, base))
    return folder


def check_free(path: Path, *, overwrite: bool) -> None:
    """Check that an adapter may be written to `path`: it is missing, an empty folder or an adapter to replace.

    Raises: ExistsError.
    """
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise ExistsError(f"{path} is a file; an adapter is a folder: choose another name")
    names = sorted(entry.name for entry in path.iterdir())
    if names and not overwrite:
        raise ExistsError(f"{path} exists and is not empty; overwrite it on purpose, or choose another folder")
    others = [name for name in names if name not in _MAY_BE_REPLACED]
    if others or (names and CONFIG_NAME not in names and RECORD_NAME not in names):
        raise ExistsError(
            f"{path} holds {', '.join(others[:5] or names[:5])} and so is not just an adapter; "
            "it is not overwritten: choose another folder"
        )


def adapter_to_bytes(prompt: SoftPrompt, base: Base | None = None) -> dict[str, bytes]:
    """The files of an adapter folder by name, in the order in which they are renamed.

    Raises: WrongBaseError.
    """
    named = prompt if base is None else _with_base(prompt, base)
    contents = {
        SAFETENSORS_NAME: weights_to_bytes(named.tensor, named.head),
        RECORD_NAME: record_to_bytes(named),
        CARD_NAME: model_card(named).encode(),
        CONFIG_NAME: dump_object(config_of(named, base)),
    }
    return {name: contents[name] for name in ADAPTER_FILES}


def record_to_bytes(prompt: SoftPrompt) -> bytes:
    """The content of softprompt.json. Raises StorageError where it is larger than the limit for reading it again."""
    head = {
        "format_version": FORMAT_VERSION,
        "content_hash": prompt.content_hash,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    data = dump_object({**head, **prompt.record.to_json()})
    if len(data) > MAX_RECORD_BYTES:
        raise StorageError(
            f"the prompt's record has {len(data):,} bytes; the limit is {MAX_RECORD_BYTES:,}: shorten run"
        )
    return data


def _with_base(prompt: SoftPrompt, base: Base) -> SoftPrompt:
    record = prompt.record
    if record.base_fingerprint is not None and record.base_fingerprint != base.fingerprint:
        raise WrongBaseError(other_base_problem(record, base, "the soft prompt"))
    name = base.name if record.base_name is None else record.base_name
    known = replace(record, base_name=name, base_fingerprint=base.fingerprint, base_kind=base.kind)
    return replace(prompt, record=known)
