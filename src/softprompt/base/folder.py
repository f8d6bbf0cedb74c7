"""The files of a base's folder, judged before transformers reads them, and named when it cannot.

Only small facts are read here: sizes, the JSON of settings, the heads of weight files. Nothing is run.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from softprompt.errors import BaseModelError
from softprompt.guard import cause_of, is_nested_deeper, lfs_pointer_problem

CONFIG_NAME = "config.json"
_SETTINGS = (CONFIG_NAME, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
_VOCABULARIES = ("tokenizer.json", "added_tokens.json", "vocab.json")
_OTHER_TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "merges.txt", "vocab.txt")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS = ("model.safetensors", _INDEXES[0], "pytorch_model.bin", _INDEXES[1])  # as transformers prefers them
_MAX_BYTES = {
    **dict.fromkeys(_SETTINGS, 16 * 2**20),  # a tokenizer's settings name its added tokens: megabytes, not more
    **dict.fromkeys(_VOCABULARIES, 512 * 2**20),
    **dict.fromkeys(_INDEXES, 64 * 2**20),
}
_DEEPEST = 64  # levels of lists and objects in settings


def check_files(folder: Path, base: str) -> None:
    """Raises BaseModelError for a file that is no JSON object, too large, too deep, empty, or a Git LFS pointer."""
    for name in (*_SETTINGS, *_VOCABULARIES, *_OTHER_TOKENIZER_FILES):
        _refuse_pointer(folder / name, base)
    for name, most in _MAX_BYTES.items():
        _check_size(folder / name, most, base)
    for name in _SETTINGS:
        read_settings(folder, name, base)
    for file in weight_files(folder, base):
        _refuse_pointer(file, base)
        if file.is_file() and file.stat().st_size == 0:
            raise BaseModelError(f"base {base!r} cannot be loaded: {file} is empty; copy or download it again")


def read_settings(folder: Path, name: str, base: str) -> dict[str, Any]:  # Any: whatever JSON holds
    """The JSON object in one of the folder's small files; empty where the file is not there. Raises BaseModelError."""
    file = folder / name
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(
            f"base {base!r} cannot be loaded: {file} cannot be read ({cause_of(error)}); copy it again"
        ) from error
    if not isinstance(value, dict):
        raise BaseModelError(
            f"base {base!r} cannot be loaded: {file} holds a JSON {type(value).__name__}; it must be an object"
        )
    if is_nested_deeper(value, _DEEPEST):
        raise BaseModelError(
            f"base {base!r} cannot be loaded: {file} is nested deeper than {_DEEPEST} levels; copy it again"
        )
    return value


def weight_files(folder: Path, base: str) -> list[Path]:
    """The files that transformers would read the weights from; none where the folder has none by the usual names."""
    for name in _WEIGHTS:
        if not (folder / name).is_file():
            continue
        if name not in _INDEXES:
            return [folder / name]
        _refuse_pointer(folder / name, base)
        shards = read_settings(folder, name, base).get("weight_map")
        return [folder / shard for shard in sorted(_texts(shards)) if Path(shard).name == shard]
    return []


def weights_bytes(folder: Path, base: str) -> int:
    """The size of its weight files, 0 where there are none by the usual names."""
    return sum(file.stat().st_size for file in weight_files(folder, base) if file.is_file())


def broken_weights(folder: Path, base: str) -> str | None:
    """Which of the weight files cannot be opened, and why; None where all can. For a base that did not load."""
    for file in weight_files(folder, base):
        if not file.is_file():
            return f"{file} is not there; copy it too"
        try:
            _open_weights(file)
        except BaseException as error:  # a Rust panic too
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"{file} is cut off or damaged ({cause_of(error)}); copy or download it again"
    return None


def _open_weights(file: Path) -> None:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt"):
            return
    if not zipfile.is_zipfile(file):
        torch.load(file, map_location="cpu", weights_only=True)  # of a release before 1.6, or broken
    else:
        torch.load(file, map_location="meta", weights_only=True)


def _refuse_pointer(file: Path, base: str) -> None:
    problem = lfs_pointer_problem(file)
    if problem is not None:
        raise BaseModelError(f"base {base!r} cannot be loaded: {problem}")


def _check_size(file: Path, most: int, base: str) -> None:
    try:
        size = file.stat().st_size
    except OSError:  # not there; or whoever reads it says why it cannot be read
        return
    if file.is_file() and size > most:
        raise BaseModelError(
            f"base {base!r} cannot be loaded: {file} has {size:,} bytes; the limit is {most:,}: is it the right file?"
        )
    if file.is_file() and size == 0:
        raise BaseModelError(f"base {base!r} cannot be loaded: {file} is empty; copy or download it again")


def _texts(value: Any) -> set[str]:
    return {item for item in value.values() if isinstance(item, str)} if isinstance(value, dict) else set()
