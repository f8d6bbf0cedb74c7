"""The names of an adapter's files, and reading files and JSON from outside.

A file is read only if it is a regular file inside its folder and no larger than its limit.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softprompt.errors import AdapterError
from softprompt.guard import is_lfs_pointer, is_nested_deeper, lfs_pointer_sentence
from softprompt.types import finite

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"  # what PEFT wrote before 0.7; read, never written
RECORD_NAME = "softprompt.json"
CARD_NAME = "README.md"

# In the order in which they are renamed: a folder becomes an adapter for readers when its config is there.
ADAPTER_FILES = (SAFETENSORS_NAME, RECORD_NAME, CARD_NAME, CONFIG_NAME)

MAX_WEIGHTS_BYTES = 256 * 2**20
MAX_TEXT_BYTES = 2**20  # a config or a card
_DEEPEST = 100  # levels of lists and objects
MAX_RECORD_BYTES = 16 * 2**20  # a record or a plan: a loss for each of half a million steps


def read_file(folder: Path, name: str, max_bytes: int, *, follow_links: bool = False) -> bytes | None:
    """The file's bytes, or None where there is no such file. `follow_links` is for folders that this process made.

    Raises: AdapterError for links that leave the folder, anything but a regular file, and files over the limit.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    try:
        return _read_regular(_inside(folder, path, follow_links), path, max_bytes)
    except AdapterError:
        raise
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror or error}") from error


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object that can be written again.

    Raises: AdapterError for bytes that are none, for half a character and for what is nested too deeply.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if is_lfs_pointer(data):
            raise AdapterError(lfs_pointer_sentence(where)) from error
        raise AdapterError(f"{where} is not valid JSON ({error}); write it again, or take another copy") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{where} holds a JSON {type(value).__name__}; it must be an object")
    if data.count(b"[") + data.count(b"{") > _DEEPEST and is_nested_deeper(value, _DEEPEST):
        raise AdapterError(f"{where} is nested deeper than {_DEEPEST} levels; write it again, or take another copy")
    if b"\\u" in data:
        _refuse_half_characters(value, where)
    return value


def _refuse_half_characters(value: dict[str, Any], where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise AdapterError(f"{where} holds half a character ({error.reason}); write it again") from error


def dump_object(value: Mapping[str, Any], *, indent: int | None = 2) -> bytes:
    """Strict JSON in UTF-8: NaN and infinity, which JSON lacks, become null."""
    return json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False).encode()


def _inside(folder: Path, path: Path, follow_links: bool) -> Path:
    target = Path(os.path.realpath(path))
    if not follow_links and not target.is_relative_to(os.path.realpath(folder)):
        raise AdapterError(
            f"{path} is a link to {target}, outside of its folder; copy the files themselves into the folder (cp -rL)"
        )
    return target


def _read_regular(target: Path, path: Path, max_bytes: int) -> bytes:
    descriptor = os.open(target, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:  # O_NONBLOCK: a FIFO must not hang us
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise AdapterError(f"{path} is not a regular file; an adapter is made of plain files")
        if status.st_size > max_bytes:
            raise AdapterError(f"{path} has {status.st_size:,} bytes; the limit is {max_bytes:,}: is it an adapter?")
        return file.read(max_bytes)
