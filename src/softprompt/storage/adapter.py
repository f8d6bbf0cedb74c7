"""A soft prompt as a folder, exactly as PEFT writes prompt-tuning adapters, with our record beside.

A folder from outside is data: JSON and one tensor, checked before use. Nothing in it is ever run.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from softprompt.errors import AdapterError, ExistsError, PromptError, WrongBaseError
from softprompt.prompt import SoftPrompt
from softprompt.storage.atomic import write_files, write_folder
from softprompt.storage.card import model_card
from softprompt.storage.files import (
    ADAPTER_FILES,
    CARD_NAME,
    CONFIG_NAME,
    MAX_RECORD_BYTES,
    MAX_TEXT_BYTES,
    MAX_WEIGHTS_BYTES,
    PICKLE_NAME,
    RECORD_NAME,
    SAFETENSORS_NAME,
    dump_object,
    parse_object,
    read_file,
)
from softprompt.storage.peft_config import TASK_TYPE, check_kind, check_shape, check_task, config_for
from softprompt.storage.record import StoredRecord, record_from_bytes, record_to_bytes
from softprompt.storage.weights import tensor_from_bytes, tensor_to_bytes
from softprompt.types import PromptRecord

if TYPE_CHECKING:
    from softprompt.base import Base

_MAY_BE_REPLACED = {*ADAPTER_FILES, PICKLE_NAME, ".gitattributes"}  # the Hub adds the last


class UnknownBaseWarning(UserWarning):
    """An adapter does not say which base it was trained on; only its width could be checked."""


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """The bytes of an adapter folder, size-checked and not yet believed."""

    where: str  # for messages: the folder or the repository
    weights_name: str  # SAFETENSORS_NAME or PICKLE_NAME
    weights: bytes
    config: bytes | None
    record: bytes | None


def save_prompt(
    prompt: SoftPrompt, folder: str | os.PathLike[str], *, overwrite: bool = False, base: Base | None = None
) -> Path:
    """Write an adapter folder that PEFT and `load_prompt` read, whole or not at all; gives back its path.

    `base` adds its name, fingerprint and layer counts where the prompt's record has none.
    Overwriting replaces an adapter folder only, and only if nothing else lies in it.

    Raises: ExistsError, StorageError; WrongBaseError where the record names another base than `base`.
    """
    place = Path(folder)
    check_free(place, overwrite=overwrite)
    write_folder(place, adapter_to_bytes(prompt, base), replace=overwrite)
    return place


def save_prompt_into(prompt: SoftPrompt, folder: Path, *, base: Base | None = None) -> Path:
    """Write or replace an adapter's files in a folder that keeps its other files (a run's).

    Raises: StorageError; WrongBaseError.
    """
    write_files(folder, adapter_to_bytes(prompt, base))
    return folder


def load_prompt(
    folder: str | os.PathLike[str],
    base: Base | None = None,
    *,
    force: bool = False,
    task_type: str | None = None,
    base_name: str | None = None,
) -> SoftPrompt:
    """The soft prompt [P, H] of an adapter folder, ours or PEFT's; any stored float dtype becomes float32.

    With `base`, the width and the fingerprint are checked; a folder without a fingerprint (PEFT's own) gives one
    UnknownBaseWarning. `force` loads a prompt of another base of the same width. `task_type` and `base_name` say what
    the folder does not: with task_type "CAUSAL_LM" even a missing adapter_config.json is forgiven.

    Raises: AdapterError for a folder that is refused, WrongBaseError for a prompt of another base.
    """
    files = read_adapter(Path(folder))
    return parse_adapter(files, base, force=force, task_type=task_type, base_name=base_name)


def check_free(place: Path, *, overwrite: bool) -> None:
    """A new adapter may go to `place`: nothing is there, or an empty folder, or an adapter that may be replaced.

    Raises: ExistsError.
    """
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        raise ExistsError(f"{place} is a file; an adapter is a folder: choose another name")
    names = sorted(entry.name for entry in place.iterdir())
    if names and not overwrite:
        raise ExistsError(f"{place} exists and is not empty; overwrite it on purpose, or choose another folder")
    others = [name for name in names if name not in _MAY_BE_REPLACED]
    if others or (names and CONFIG_NAME not in names and RECORD_NAME not in names):
        raise ExistsError(
            f"{place} holds {', '.join(others[:5] or names[:5])} and so is not just an adapter; "
            "it is not overwritten: choose another folder"
        )


def adapter_to_bytes(prompt: SoftPrompt, base: Base | None = None) -> dict[str, bytes]:
    """The files of an adapter folder by name, in the order in which they are put in place.

    Raises: WrongBaseError.
    """
    known = prompt if base is None else _with_base(prompt, base)
    contents = {
        SAFETENSORS_NAME: tensor_to_bytes(known.tensor),
        RECORD_NAME: record_to_bytes(known),
        CARD_NAME: model_card(known).encode(),
        CONFIG_NAME: dump_object(config_for(known, base)),
    }
    return {name: contents[name] for name in ADAPTER_FILES}


def read_adapter(folder: Path, *, where: str | None = None, follow_links: bool = False) -> AdapterFiles:
    """The folder's files as bytes; safetensors where both kinds of weights are there.

    Raises: AdapterError where the folder or its weights are missing, or a file may not be read.
    """
    said = str(folder) if where is None else where
    if not folder.is_dir():
        raise AdapterError(f"{said} is {'a file' if folder.exists() else 'not there'}; give an adapter's folder")
    config = read_file(folder, CONFIG_NAME, MAX_TEXT_BYTES, follow_links=follow_links)
    for name in (SAFETENSORS_NAME, PICKLE_NAME):
        weights = read_file(folder, name, MAX_WEIGHTS_BYTES, follow_links=follow_links)
        if weights is not None:
            record = read_file(folder, RECORD_NAME, MAX_RECORD_BYTES, follow_links=follow_links)
            return AdapterFiles(where=said, weights_name=name, weights=weights, config=config, record=record)
    if config is None:
        raise AdapterError(f"{said} has no {CONFIG_NAME} and no {SAFETENSORS_NAME}{_nested_hint(folder)}")
    _check_config_bytes(config, said)  # an adapter of another kind is best told so
    raise AdapterError(f"{said} has a {CONFIG_NAME} but neither {SAFETENSORS_NAME} nor {PICKLE_NAME}; copy them too")


def parse_adapter(
    files: AdapterFiles,
    base: Base | None = None,
    *,
    force: bool = False,
    task_type: str | None = None,
    base_name: str | None = None,
) -> SoftPrompt:
    """See `load_prompt`."""
    config = None if files.config is None else _check_config_bytes(files.config, files.where, task_type)
    tensor = tensor_from_bytes(files.weights_name, files.weights, f"{files.where}/{files.weights_name}")
    if config is None:
        _check_unstated(list(tensor.shape), task_type, files.where)
    else:
        check_shape(config, tensor, f"{files.where}/{CONFIG_NAME}")
    stored = stored_record(files)
    try:
        prompt = SoftPrompt(tensor, _record(stored, config or {}, base_name, files.where))
    except PromptError as error:
        raise AdapterError(f"{files.where}/{files.weights_name}: {error}") from error
    _check_content(prompt, stored, files.where)
    if base is not None:
        check_base(prompt, base, force=force, where=files.where)
    return prompt


def stored_record(files: AdapterFiles) -> StoredRecord | None:
    """What our record says; None for a folder that PEFT wrote.

    Raises: AdapterError.
    """
    return None if files.record is None else record_from_bytes(files.record, f"{files.where}/{RECORD_NAME}")


def check_base(prompt: SoftPrompt, base: Base, *, force: bool = False, where: str = "the soft prompt") -> None:
    """The prompt fits `base` and was trained on it.

    Raises: AdapterError for another width, WrongBaseError for another base.
    """
    shape, made_for = list(prompt.tensor.shape), prompt.record.base_name
    if prompt.hidden_size != base.hidden_size:
        raise AdapterError(
            f"{where} is {shape}, made for {made_for or 'an unknown base'}; the input embeddings of {base.name} are "
            f"[{base.vocab_size}, {base.hidden_size}]: load it on the base that it was trained on"
        )
    _check_range(prompt, base, where)
    if force:
        return
    if prompt.record.base_fingerprint is None:
        named = "names no base" if made_for is None else f"names its base {made_for!r} without a fingerprint"
        warnings.warn(
            f"{where} {named}; its width {prompt.hidden_size} fits {base.name!r}, more could not be checked",
            UnknownBaseWarning,
            stacklevel=4,
        )
    elif prompt.record.base_fingerprint != base.fingerprint:
        raise WrongBaseError(_other_base(prompt.record, base, where))


def _check_range(prompt: SoftPrompt, base: Base, where: str) -> None:
    """float16, which a base on a GPU may have, ends at 65,504."""
    largest = float(prompt.tensor.abs().max())
    if largest > torch.finfo(base.dtype).max:
        raise AdapterError(
            f"{where} has values up to {largest:.3g}, beyond the {str(base.dtype).removeprefix('torch.')} of "
            f"{base.name}; load the base in another dtype"
        )


def _other_base(record: PromptRecord, base: Base, where: str) -> str:
    assert record.base_fingerprint is not None
    return (
        f"{where} was trained on {record.base_name!r} (fingerprint {record.base_fingerprint[:12]}), "
        f"not on {base.name!r} (fingerprint {base.fingerprint[:12]}); "
        "take its own base, or force it if you know that both compute the same"
    )


def _with_base(prompt: SoftPrompt, base: Base) -> SoftPrompt:
    record = prompt.record
    if record.base_fingerprint is not None and record.base_fingerprint != base.fingerprint:
        raise WrongBaseError(_other_base(record, base, "the soft prompt"))
    name = base.name if record.base_name is None else record.base_name
    return SoftPrompt(prompt.tensor, replace(record, base_name=name, base_fingerprint=base.fingerprint))


def _check_config_bytes(data: bytes, where: str, task_type: str | None = None) -> dict[str, Any]:
    said = f"{where}/{CONFIG_NAME}"
    config = parse_object(data, said)
    check_kind(config, task_type, said)
    return config


def _check_unstated(shape: list[int], task_type: str | None, where: str) -> None:
    if task_type is None:
        raise AdapterError(
            f"{where} has no {CONFIG_NAME}, so its kind, task and base are unknown; its weights are {shape}. If they "
            f"are a soft prompt of a causal language model, say so: task_type={TASK_TYPE!r} (--task-type {TASK_TYPE})"
        )
    check_task(task_type, where)


def _record(stored: StoredRecord | None, config: dict[str, Any], base_name: str | None, where: str) -> PromptRecord:
    record = PromptRecord() if stored is None else stored.record
    named = record.base_name or config.get("base_model_name_or_path") or None
    if named is not None and not isinstance(named, str):
        raise AdapterError(f"{where}/{CONFIG_NAME}: base_model_name_or_path is {named!r}; it must be text")
    if named is not None and base_name is not None and named != base_name:
        raise AdapterError(f"{where} names its base {named!r} and {base_name!r} was given; leave the name out")
    return replace(record, base_name=base_name if named is None else named)


def _check_content(prompt: SoftPrompt, stored: StoredRecord | None, where: str) -> None:
    """PEFT saving into our folder replaces the weights and leaves our record, which then tells of other vectors."""
    if stored is not None and stored.content_hash != prompt.content_hash:
        raise AdapterError(
            f"{where}: the weights ({prompt.content_hash[:12]}) are not those that {RECORD_NAME} describes "
            f"({stored.content_hash[:12]}); they were changed later: delete {RECORD_NAME} to load the rest as PEFT's"
        )


def _nested_hint(folder: Path) -> str:
    """PEFT puts an adapter that is not called "default" into a sub-folder; an unfinished run has checkpoints."""
    configs = [*folder.glob(f"*/{CONFIG_NAME}"), *folder.glob(f"checkpoints/*/{CONFIG_NAME}")]
    nested = sorted(str(config.parent.relative_to(folder)) for config in configs)
    if not nested:
        return "; it is not an adapter: give the folder that PEFT or softprompt wrote"
    if len(nested) == 1:
        return f", but {nested[0]!r} below it has: give {folder / nested[0]}"
    return f", but these folders below it have: {', '.join(nested[:5])}; give one of them"
