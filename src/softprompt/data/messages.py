"""Chat messages as values: what makes a row a conversation, and which of its turns are learned.

OpenAI's `weight` on an assistant's message makes the turn learned (1, the default) or context only (0). Every other key
that would select what is learned, or define tools, is refused: none is ignored silently.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from softprompt.compute_share import yield_point
from softprompt.errors import DataError
from softprompt.types import FormKind

ROLES = ("system", "developer", "user", "assistant", "tool")

Message = Mapping[str, Any]  # Any: "role" and "content" are strings, other keys are passed to the chat template

# Allowed beside role, content and weight: keys that chat templates read, and metadata that changes nothing.
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_HARMLESS_KEYS = frozenset({
    "name", *_REASONING_KEYS, "id", "uuid", "index", "turn", "turn_identifier", "timestamp", "time", "date", "created",
    "created_at", "updated_at", "metadata", "meta", "author", "user", "model", "source", "language", "lang", "country",
    "state", "header", "hashed_ip", "redacted", "toxic", "num_tokens", "title", "url", "finish_reason",
})  # fmt: skip
_TOOL_KEYS = ("tools", "tool_calls", "functions", "function_call", "tool_choice", "parallel_tool_calls")
_SELECTING_KEYS = frozenset({
    "weight", "weights", "mask", "masks", "masked", "loss", "loss_mask", "loss_weight", "loss_weights", "label_mask",
    "train", "train_mask", "train_on_turn", "train_on_turns", "train_on_input", "train_on_inputs", "train_detail",
    "train_on_prompt", "train_on_responses", "training", "training_mask", "trainable", "is_trainable", "learn",
    "target_mask", "attention_mask", "sample_weight", "example_weight", "ignore", "skip",
})  # fmt: skip
_LEARNED_VALUES = ("", "1", "1.0", "true", "yes")  # as typed in a table: they select the default
_LONGEST_SHOWN = 60
MESSAGES_PER_YIELD = 100  # read between two yield points


def read_messages(cell: object, where: str, *, for_training: bool = True) -> tuple[Message, ...]:
    """A conversation from a cell or a request; keys without a value are dropped, and so is a weight of 1.

    Raises DataError, opening with `where`, for a message without a known role, with content that is not a string or
    with a key that would be ignored, and, for training, for tool calls and where there is no turn of the assistant.
    """
    if not isinstance(cell, Sequence) or isinstance(cell, (str, bytes)):
        raise DataError(f"{where}: messages must be a list of {{role, content}}, not a {type(cell).__name__}")
    messages = tuple(_read_messages(cell, where, for_training))
    if for_training and messages and all(message["role"] != "assistant" for message in messages):
        roles = ", ".join(message["role"] for message in messages[:5])
        more = f" and {len(messages) - 5:,} more" if len(messages) > 5 else ""
        raise DataError(f"{where}: no assistant turn to learn from (the roles are {roles}{more})")
    return messages


def is_learned(message: Message) -> bool:
    """Whether the message is a turn of the assistant that is a target, not only context."""
    return message["role"] == "assistant" and message.get("weight") != 0


def last_answer(messages: Sequence[Message]) -> int | None:
    """The position of the assistant's last learned turn with words in it, if a message precedes it."""
    found = [
        position
        for position, message in enumerate(messages)
        if position > 0 and is_learned(message) and message["content"].strip()
    ]
    return found[-1] if found else None


def reserved_columns(columns: Iterable[object], read: Collection[str]) -> list[Any]:
    """The columns not in `read` whose names are reserved: they would select what is learned, or define tools."""
    return [name for name in columns if name not in read and str(name).lower() in {*_SELECTING_KEYS, *_TOOL_KEYS}]


def check_row_keys(record: Mapping[str, Any], read: Collection[str], kind: FormKind, where: str) -> None:
    """Raises DataError, opening with `where`, for a column that would select what is learned or define tools.

    `read` are the columns that the form reads: those are text, whatever their name. Outside of chats a column called
    `weight` or `loss` may well be a measurement, so there only values that disable learning are refused.
    """
    for key in reserved_columns(record, read):
        value = record[key]
        if _is_absent(value):
            continue
        if str(key).lower() in _TOOL_KEYS:
            if kind == "chat":
                raise DataError(f"{where} has the key {key!r}: {_NO_TOOLS}")
        elif not _means_learned(value) and (kind == "chat" or _means_not_learned(value)):
            raise DataError(f"{where} has {key!r} = {_shown(value)}, which would select what is learned and is not "
                            f"supported; {_HINTS[kind == 'chat']}")  # fmt: skip


_NO_TOOLS = "tools and their calls are not supported; write them into the messages' content as text"
_HINTS = {
    True: 'give the turns that are only context "weight": 0, or leave the key out',
    False: "leave out the rows that must not be learned, and the column",
}


def _read_messages(cell: Sequence[object], where: str, for_training: bool) -> Iterator[Message]:
    for number, item in enumerate(cell, start=1):
        if number % MESSAGES_PER_YIELD == 0:
            yield_point()
        yield _read_message(item, f"{where}, message {number:,}", for_training)


def _read_message(item: object, where: str, for_training: bool) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"{where} must be an object with role and content, not a {type(item).__name__}")
    role, content = item.get("role"), item.get("content")
    if role is None:
        raise DataError(f"{where} has no role; its keys are {', '.join(map(str, item)) or 'none'}")
    if role not in ROLES:
        raise DataError(f"{where} has the role {role!r}; known are {', '.join(ROLES)}")
    message = {key: value for key, value in item.items() if not _is_absent(value)}
    if len(message) > 2:  # role and content
        _check_keys(message, f"{where} ({role})", for_training)
        message = _without_default_weight(message, f"{where} ({role})")
    if not isinstance(content, str):
        raise DataError(f"{where} ({role}) has content that is no string but a {type(content).__name__}")
    return message


def _check_keys(message: Message, where: str, for_training: bool) -> None:
    for key, value in message.items():
        name = str(key)
        if name in ("role", "content", "weight") or name in _HARMLESS_KEYS or name.endswith("_id"):
            continue
        if name == "tool_calls" and not for_training:  # for the template to write
            continue
        if name in _TOOL_KEYS:
            raise DataError(f"{where} has {name!r}: {_NO_TOOLS}")
        if name.lower() in _SELECTING_KEYS:
            raise DataError(f"{where} has {name!r} = {_shown(value)}, which is not supported; use \"weight\": 0 for a "
                            "turn of the assistant that is only context, 1 for one that is learned")  # fmt: skip
        raise DataError(f"{where} has the unknown key {_shown(name)}; a message holds role, content, name, weight and "
                        "reasoning_content; put anything else into metadata, or leave it out")  # fmt: skip


def _without_default_weight(message: dict[str, Any], where: str) -> dict[str, Any]:
    if "weight" not in message:
        return message
    weight = message["weight"]
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight not in (0, 1):
        raise DataError(f"{where} has the weight {_shown(weight)}; it must be 0 (context only) or 1 (learned)")
    if message["role"] != "assistant":
        raise DataError(f"{where} has a weight; only turns of the assistant are learned, so only they have one")
    del message["weight"]
    return message if weight else {**message, "weight": 0}


def _is_absent(value: object) -> bool:
    """How readers represent a missing key: None, NaN (in a table of numbers), an empty list or object."""
    if isinstance(value, (list, tuple, dict)):
        return not value
    return value is None or (isinstance(value, float) and value != value)


def _means_learned(value: object) -> bool:
    return value in (1, True) if isinstance(value, (int, float)) else str(value).strip().lower() in _LEARNED_VALUES


def _means_not_learned(value: object) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("0", "0.0", "false", "no")
    return not value or isinstance(value, (list, tuple, dict))


def _shown(value: object) -> str:
    try:
        shown = ascii(value)
    except ValueError:  # a number of more digits than Python writes
        shown = "a very large number"
    return shown if len(shown) <= _LONGEST_SHOWN else f"{shown[: _LONGEST_SHOWN - 3]}..."
