"""What the model reads: a body's prompt or messages as token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool

from softprompt.base import Base
from softprompt.server.errors import ApiError
from softprompt.server.inference.room import context_error
from softprompt.server.inference.tool_turns import conversation_ids
from softprompt.server.prompts.catalogue import Model

MOST_TEXTS = 1024
_LONG = 10_000  # characters that are tokenised in the event loop
_SHAPES = "text, a list of texts, a list of token ids, or a list of such lists"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Text:
    """One input: its ids, BOS included, and the words they stand for."""

    ids: tuple[int, ...]
    words: str


async def read_prompt(base: Base, prompt: Any, adds_special: bool = True) -> list[Text]:  # Any: checked here
    """The texts of /v1/completions; ids are taken as they are. Raises ApiError 400 for anything else."""
    given = _as_list(prompt)
    if not 1 <= len(given) <= MOST_TEXTS:
        raise _refusal(f"prompt holds {len(given)} texts; give 1 to {MOST_TEXTS}")
    for number, item in enumerate(given):
        check_words(item, f"text {number}") if isinstance(item, str) else _check_ids(base, item, number)
    num_characters = sum(len(item) for item in given if isinstance(item, str))
    return await _read(num_characters, lambda: [_text(base, item, adds_special) for item in given])


async def read_messages(base: Base, model: Model, messages: Sequence[dict[str, Any]]) -> Text:  # Any: a template's own
    """The conversation in the form that the prompt was trained on. Raises ApiError 400 or DataError."""
    for number, message in enumerate(messages):
        calls = json.dumps(message.get("tool_calls", ""), ensure_ascii=False)
        for said in (message["content"], message.get("name", ""), message.get("tool_call_id", ""), calls):
            check_words(said, f"message {number}", "messages")
    form = None if model.prompt is None else model.prompt.record.form
    num_characters = sum(len(message["content"]) for message in messages)
    ids = await _read(num_characters, lambda: conversation_ids(base, form, messages))
    return Text(ids, "")


def check_words(words: str, what: str, param: str = "prompt") -> None:
    """Raises ApiError 400 where it is no Unicode text: half a surrogate pair, which JSON can spell."""
    try:
        words.encode()
    except UnicodeEncodeError as error:
        why = f"{what} has half a surrogate pair at character {error.start}; send valid Unicode"
        raise ApiError(400, why, "invalid_value", param) from None


async def _read(num_characters: int, read: Callable[[], Result]) -> Result:
    return await run_in_threadpool(read) if num_characters > _LONG else read()


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


def _text(base: Base, item: str | list[int], adds_special: bool) -> Text:
    if isinstance(item, str):
        return Text((base.bos_ids if adds_special else ()) + base.encode(item), item)
    return Text(tuple(item), base.decode(item))


def _short(number: int) -> str:
    return str(number) if abs(number) < 10**18 else "of more than 18 digits"


def _refusal(message: str) -> ApiError:
    return ApiError(400, message, "invalid_value", "prompt")
