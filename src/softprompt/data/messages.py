"""Chat messages as values: what a row must hold to be a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from softprompt.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")

Message = Mapping[str, Any]  # Any: "role" and "content" are strings, other keys are the chat template's own business


def read_messages(cell: object, where: str, *, for_training: bool = True) -> tuple[Message, ...]:
    """A conversation from a cell or a request; keys without a value are dropped.

    Raises DataError, opening with `where`, for a message without a known role or with content that is no string, and,
    for training, where the assistant never speaks.
    """
    if not isinstance(cell, Sequence) or isinstance(cell, (str, bytes)):
        raise DataError(f"{where}: messages must be a list of {{role, content}}, not a {type(cell).__name__}")
    messages = tuple(_read_message(item, f"{where}, message {number}") for number, item in enumerate(cell, start=1))
    if for_training and messages and all(message["role"] != "assistant" for message in messages):
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"{where}: no assistant turn to learn from (the roles are {roles})")
    return messages


def _read_message(item: object, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"{where} must be an object with role and content, not a {type(item).__name__}")
    role, content = item.get("role"), item.get("content")
    if role is None:
        raise DataError(f"{where} has no role; its keys are {', '.join(map(str, item)) or 'none'}")
    if role not in ROLES:
        raise DataError(f"{where} has the role {role!r}; known are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"{where} ({role}) has content that is no string but a {type(content).__name__}")
    return {key: value for key, value in item.items() if value is not None}
