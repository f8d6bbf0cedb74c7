"""`softprompt.json`: a prompt's record beside PEFT's two files. PEFT ignores it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from softprompt.errors import AdapterError, StorageError
from softprompt.prompt import SoftPrompt
from softprompt.storage.files import MAX_RECORD_BYTES, dump_object, parse_object
from softprompt.types import PromptRecord

FORMAT_VERSION = 1
PLAIN_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,79}")  # a setting or a version; no path, no sentence
_TEXT_FIELDS = ("base_name", "base_source", "base_fingerprint", "parent", "created")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


@dataclass(frozen=True, kw_only=True)
class StoredRecord:
    """What `softprompt.json` says."""

    record: PromptRecord
    content_hash: str  # of the tensor that it was written with
    created: str | None  # when the folder was written, ISO 8601 in UTC


def record_to_bytes(prompt: SoftPrompt) -> bytes:
    """The file's content; raises StorageError where the record is larger than it may be to be read again."""
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


def publishable_record(data: bytes, where: str) -> bytes:
    """The same record for strangers: of its run only numbers and plain words, no path and no text of the data.

    Raises: AdapterError.
    """
    value = parse_object(data, where)
    source = value.get("base_source")
    known = source if isinstance(source, str) and is_hub_id(source) else None
    return dump_object({**value, "base_source": known, "run": _plain(value.get("run") or {})})


def is_hub_id(name: str) -> bool:
    """Whether a base's name can be one of the Hub's, and is no path of this machine."""
    return _HUB_ID.fullmatch(name) is not None


def record_from_bytes(data: bytes, where: str) -> StoredRecord:
    """Raises: AdapterError for a record that is malformed or of a newer release."""
    value = parse_object(data, where)
    version = value.get("format_version")
    if type(version) is not int or version < 1:
        raise AdapterError(f"{where} has the format_version {version!r}; it must be from 1 to {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise AdapterError(
            f"{where} has the format_version {version}; this release reads up to {FORMAT_VERSION}: upgrade softprompt"
        )
    _check_texts(value, where)
    try:
        record = PromptRecord.from_json(value)
    except (TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{where} is malformed ({error}); delete it to load the folder as a PEFT adapter") from error
    return StoredRecord(record=record, content_hash=value["content_hash"], created=value.get("created"))


def _check_texts(value: dict[str, Any], where: str) -> None:
    if not isinstance(value.get("content_hash"), str):
        raise AdapterError(f"{where} has no content_hash; delete it to load the folder as a PEFT adapter")
    for name in _TEXT_FIELDS:
        if not isinstance(value.get(name), str | None):
            raise AdapterError(f"{where}: {name} is {value[name]!r}; it must be text or null")


def _plain(value: Any) -> Any:  # Any: whatever JSON holds
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items() if _is_plain(item)}
    return [_plain(item) for item in value if _is_plain(item)] if isinstance(value, list) else value


def _is_plain(value: Any) -> bool:
    return PLAIN_WORD.fullmatch(value) is not None if isinstance(value, str) else True
