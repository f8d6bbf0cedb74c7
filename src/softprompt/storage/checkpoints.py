"""The checkpoints of a run: `checkpoints/step-N/`, each whole or not there, with all that a run needs to go on.

A folder holds the prompt as an adapter (of several prompts trained together, one adapter each in a sub-folder),
`state.json` and `state.safetensors`. It knows files and nothing of what the state means.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from softprompt.errors import AdapterError, StorageError
from softprompt.prompt import SoftPrompt
from softprompt.storage.adapter import adapter_to_bytes
from softprompt.storage.atomic import remove_folder, write_folder
from softprompt.storage.files import dump_object, parse_object, read_file

STATE_NAME = "state.json"
STATE_TENSORS_NAME = "state.safetensors"
_MAX_STATE_BYTES = 256 * 2**20  # losses and validations of many prompts
_MAX_STATE_TENSORS_BYTES = 16 * 2**30
_STEP_FOLDER = re.compile(r"step-(\d+)")


class Checkpoint(NamedTuple):
    """One saved step of a run."""

    step: int  # optimiser steps done
    path: Path  # an adapter folder, or one with an adapter folder for each prompt trained


class SavedState(NamedTuple):
    """What `save_checkpoint` was given."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]


def save_checkpoint(
    folder: Path, step: int, prompts: Mapping[str | None, SoftPrompt], facts: Mapping[str, Any],
    tensors: Mapping[str, Tensor], *, keep: int,
) -> Path:  # fmt: skip
    """Write `folder/step-N`, then delete all but the latest `keep`; the same step again replaces it.

    `prompts` by name; None for the only one, whose adapter is the folder itself. Raises: StorageError.
    """
    assert step >= 0 and keep >= 1, (step, keep)
    place = folder / f"step-{step}"
    data = safetensors_torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    head = {"tensors_sha256": hashlib.sha256(data).hexdigest(), "state": facts}
    files = {STATE_TENSORS_NAME: data, STATE_NAME: dump_object(head)}
    for name, prompt in prompts.items():
        files |= {_within(name, file): content for file, content in adapter_to_bytes(prompt).items()}
    write_folder(place, files, replace=True)
    for old in list_checkpoints(folder)[:-keep]:
        remove_folder(old.path)
    return place


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Saved steps, earliest first."""
    items = folder.iterdir() if folder.is_dir() else ()
    found = ((_STEP_FOLDER.fullmatch(item.name), item) for item in items)
    return sorted(Checkpoint(int(match[1]), item) for match, item in found if match)


def load_latest(folder: Path) -> tuple[SavedState | None, tuple[str, ...]]:
    """The latest checkpoint that is sound, and a sentence for each later one that is not."""
    problems: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            return load_state(checkpoint.path), tuple(problems)
        except (AdapterError, StorageError) as error:
            problems.append(f"{error}; the checkpoint before it is taken")
    return None, tuple(problems)


def load_state(place: Path) -> SavedState:
    """Raises: StorageError or AdapterError for a folder that is not whole."""
    head = read_file(place, STATE_NAME, _MAX_STATE_BYTES)
    data = read_file(place, STATE_TENSORS_NAME, _MAX_STATE_TENSORS_BYTES)
    if head is None or data is None:
        raise StorageError(f"{place} has no {STATE_NAME if head is None else STATE_TENSORS_NAME}")
    known = parse_object(head, str(place / STATE_NAME))
    if hashlib.sha256(data).hexdigest() != known.get("tensors_sha256") or not isinstance(known.get("state"), dict):
        raise StorageError(f"{place}: {STATE_TENSORS_NAME} is not what {STATE_NAME} describes; it was changed or cut")
    try:
        return SavedState(known["state"], safetensors_torch.load(data))
    except SafetensorError as error:
        raise StorageError(f"{place / STATE_TENSORS_NAME} is no safetensors file ({error})") from error


def forget_after(folder: Path, step: int) -> None:
    """Delete checkpoints behind `step`, which a resumed run will make again."""
    for checkpoint in list_checkpoints(folder):
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.path, ignore_errors=True)


def _within(name: str | None, file: str) -> str:
    return file if name is None else f"{name}/{file}"
