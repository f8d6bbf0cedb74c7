"""What the model reads: a body's prompt or messages as token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from softprompt.base import Base
from softprompt.data import input_ids
from softprompt.server.errors import ApiError
from softprompt.server.inference.reading import Reading
from softprompt.server.inference.room import context_error
from softprompt.server.inference.tool_turns import conversation_ids
from softprompt.server.prompts.model import Model

MOST_TEXTS = 1024
_MESSAGE = 100  # characters that are read in about the time that one message takes by itself
_CALLS = 10_000  # calls of tools may be anything: they are looked at beside the event loop
_SHAPES = "text, a list of texts, a list of token ids, or a list of such lists"


@dataclass(frozen=True)
class Text:
    """One input: its ids, BOS included, and the words they stand for."""

    ids: tuple[int, ...]
    words: str


async def read_prompt(reading: Reading, prompt: Any, adds_special: bool = True) -> list[Text]:  # Any: checked here
    """The texts of /v1/completions; ids are taken as they are. Raises ApiError 400 for anything else, and for a text
    that is longer than the base's positions, without reading the rest of it.
    """
    given = _as_list(prompt)
    if not 1 <= len(given) <= MOST_TEXTS:
        raise _refusal(f"prompt holds {len(given)} texts; give 1 to {MOST_TEXTS}")
    for item in given:
        if isinstance(item, str):
            _check_length(reading.base, len(item), reading.readers.max_characters)
    size = sum(len(item) for item in given if isinstance(item, (str, list)))
    return await reading.read(size, lambda: _texts(reading.base, given, adds_special))


async def read_messages(reading: Reading, model: Model, messages: Sequence[dict[str, Any]]) -> Text:  # Any: as above
    """The conversation in the form that the prompt was trained on. Raises ApiError 400 or DataError."""
    form = None if model.prompt is None else model.prompt.record.form
    read = (
        messages if form is None or form.kind == "chat" else [each for each in messages if each["role"] == "user"][-1:]
    )
    num_characters = sum(len(value) for message in read for value in message.values() if isinstance(value, str))
    _check_length(reading.base, num_characters, reading.readers.max_chat_characters)
    calls = _CALLS if any(message.get("tool_calls") for message in messages) else 0

    def work() -> Text:
        for number, message in enumerate(messages):
            _check_message(message, number)
        ids = conversation_ids(reading.base, form, messages, reading.base.max_length)
        return Text(_fitting(reading.base, ids), "")

    return await reading.read(num_characters + calls + _MESSAGE * len(messages), work)


def _check_message(message: dict[str, Any], number: int) -> None:  # Any: a template's own
    calls = json.dumps(message.get("tool_calls", ""), ensure_ascii=False)
    for said in (message["content"], message.get("name", ""), message.get("tool_call_id", ""), calls):
        check_words(said, f"message {number}", "messages")


def _check_length(base: Base, num_characters: int, most: int) -> None:
    """Raises ApiError 400 for what is certain to be too long, before any of it is read."""
    if num_characters > most:
        raise context_error(base, f"sent {num_characters:,} characters, which take more tokens than that; shorten it")


def _fitting(base: Base, ids: tuple[int, ...]) -> tuple[int, ...]:
    """The ids. Raises ApiError 400 where there are too many; of a long text the rest was not read."""
    if len(ids) > base.max_length:
        raise context_error(base, f"sent a text of at least {len(ids)} tokens; shorten it")
    return ids


def check_words(words: str, what: str, param: str = "prompt") -> None:
    """Raises ApiError 400 where it is no Unicode text: half a surrogate pair, which JSON can spell."""
    try:
        words.encode()
    except UnicodeEncodeError as error:
        why = f"{what} has half a surrogate pair at character {error.start}; send valid Unicode"
        raise ApiError(400, why, "invalid_value", param) from None


def _as_list(prompt: Any) -> list[Any]:
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise _refusal(f"prompt is a {type(prompt).__name__}; it must be {_SHAPES}")
    return [prompt] if prompt and type(prompt[0]) is int else prompt


def _check_ids(base: Base, ids: Any, number: int) -> None:
    if not isinstance(ids, list):
        raise _refusal(f"item {number} of prompt is a {type(ids).__name__}; prompt must be {_SHAPES}")
    if len(ids) > base.max_length:
        raise context_error(base, f"sent text {number} with {len(ids)} token ids; shorten it")
    num_known = base.vocab_size
    for place, token in enumerate(ids):
        if type(token) is not int:  # True is an int too
            raise _refusal(f"text {number} has a {type(token).__name__} at place {place}; token ids are whole numbers")
        if not 0 <= token < num_known:
            raise _refusal(f"text {number} has token id {_short(token)}; the base's are 0 to {num_known - 1}")


def _texts(base: Base, given: Sequence[Any], adds_special: bool) -> list[Text]:  # Any: checked here
    for number, item in enumerate(given):
        check_words(item, f"text {number}") if isinstance(item, str) else _check_ids(base, item, number)
    return [_text(base, item, adds_special) for item in given]


def _text(base: Base, item: str | list[int], adds_special: bool) -> Text:
    if not isinstance(item, str):
        return Text(tuple(item), base.decode(item))
    ids = input_ids(base, text=item, max_ids=base.max_length)
    return Text(_fitting(base, ids if adds_special else ids[len(base.bos_ids) :]), item)


def _short(number: int) -> str:
    return str(number) if abs(number) < 10**18 else "of more than 18 digits"


def _refusal(message: str) -> ApiError:
    return ApiError(400, message, "invalid_value", "prompt")
