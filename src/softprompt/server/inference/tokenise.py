"""Prompts and conversations as token ids, in the prompt's own form.

Long inputs are tokenised in threads beside the event loop: a few in all, one at a time for each client.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from softprompt.base import Base
from softprompt.compute_share import interrupted_by
from softprompt.data import input_ids
from softprompt.errors import shortened
from softprompt.server.errors import ApiError
from softprompt.server.inference.schema import MOST_TEXTS
from softprompt.types import InputForm

Message = dict[str, Any]  # Any: a chat template's own
Result = TypeVar("Result")

_NUM_THREADS = 2
_MOST_OF_ONE_CLIENT = 64  # inputs that are tokenised or wait for it
LONG = 10_000  # characters; longer inputs are tokenised in the pool
_SHRINKING = 16  # characters that may become one, where a tokenizer drops or joins some, and a template whole messages
_MESSAGE = 100  # characters that take as long to tokenise as one message's overhead
_CALLS = 10_000  # tool calls may be anything, so conversations with some are tokenised beside the event loop
_SHAPES = "text, a list of texts, a list of token ids, or a list of such lists"


class TokeniserPool:
    """The threads of one app that tokenise, and the longest inputs that are tokenised at all."""

    def __init__(self, base: Base) -> None:
        self.max_characters, self.max_chat_characters = _max_characters(base)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="tokeniser")
        self._locks: dict[str, asyncio.Lock] = {}
        self._num_inputs: Counter[str] = Counter()

    async def run(self, client: str, work: Callable[[], Result]) -> Result:
        """The result of the work. Raises ApiError 429 if too many of the client's inputs wait.

        If this is cancelled, so is the work, and this returns when it has stopped.
        """
        async with self._turn(client):
            is_cancelled = threading.Event()
            future = self._threads.submit(_run, work, is_cancelled)
            try:
                return await asyncio.wrap_future(future)
            except asyncio.CancelledError:
                is_cancelled.set()
                await _end_of(future)
                raise

    @asynccontextmanager
    async def _turn(self, client: str) -> AsyncIterator[None]:
        if self._num_inputs[client] >= _MOST_OF_ONE_CLIENT:
            raise ApiError(429, f"{_MOST_OF_ONE_CLIENT} long inputs of this key are waiting to be read; try again",
                           "rate_limit_exceeded", retry_after_s=1.0)  # fmt: skip
        self._num_inputs[client] += 1
        try:
            async with self._locks.setdefault(client, asyncio.Lock()):
                yield
        finally:
            self._num_inputs[client] -= 1
            if not self._num_inputs[client]:
                del self._num_inputs[client], self._locks[client]


def prompt_items(prompt: Any, base: Base, max_characters: int) -> list[Any]:  # Any: checked here and in `prompt_ids`
    """The texts, or lists of ids, of /v1/completions. Raises ApiError 400 for others, and for too many characters."""
    return _items(prompt, "prompt", (str,), base, max_characters)


def input_items(given: Any, base: Base, max_characters: int) -> list[Any]:  # Any: checked here and in `checked_ids`
    """The texts, fields by name, or lists of ids, of a pooling request's `input`. Raises ApiError 400 likewise."""
    items = _items(given, "input", (str, dict), base, max_characters)
    for number, item in enumerate(items):
        _check_input(item, number)
    return items


def _items(
    given: Any,  # Any: as above
    name: str,
    single: tuple[type, ...],
    base: Base,
    max_characters: int,
) -> list[Any]:
    if isinstance(given, single):
        given = [given]
    if not isinstance(given, list):
        raise _refusal(f"{name} is a {type(given).__name__}; it must be {_SHAPES}", name)
    items: list[Any] = [given] if given and type(given[0]) is int else given
    if not 1 <= len(items) <= MOST_TEXTS:
        raise _refusal(f"{name} holds {len(items)} texts; give 1 to {MOST_TEXTS}", name)
    for item in items:
        if isinstance(item, str | dict):
            _check_characters(base, num_characters_of([item]), max_characters)
    return items


def _check_input(item: Any, number: int) -> None:  # Any: as above
    if isinstance(item, str):
        _check_unicode(item, f"text {number}", "input")
        return
    if not isinstance(item, dict):
        return  # `checked_ids` judges it
    for name, value in item.items():
        if not isinstance(value, str):
            what = f"a {type(value).__name__} in the field {shortened(name)}"
            raise _refusal(f"item {number} of input has {what}; it must be text", "input")
        _check_unicode(name + value, f"text {number}", "input")


def num_characters_of(items: Sequence[Any]) -> int:
    """Characters, or ids, of the texts of one request."""
    texts = [item for item in items if isinstance(item, (str, list))]
    fields = [value for item in items if isinstance(item, dict) for value in item.values() if isinstance(value, str)]
    return sum(map(len, texts)) + sum(map(len, fields))


def prompt_ids(base: Base, item: Any, number: int, adds_special: bool) -> tuple[int, ...]:  # Any: checked here
    """The ids of a request's text `number`. Raises ApiError 400; of a text that is too long the rest is not read."""
    if isinstance(item, str):
        _check_unicode(item, f"text {number}", "prompt")
        ids = input_ids(base, text=item, max_ids=base.max_length)
        return check_length(base, ids if adds_special else ids[len(base.bos_ids) : len(ids) - len(base.end_ids)])
    return checked_ids(base, item, number, "prompt")


def checked_ids(base: Base, item: Any, number: int, name: str) -> tuple[int, ...]:  # Any: checked here
    """The ids that item `number` of a field is. Raises ApiError 400 where it is no list of ids, or too long a one."""
    if not isinstance(item, list):
        raise _refusal(f"item {number} of {name} is a {type(item).__name__}; {name} must be {_SHAPES}", name)
    if len(item) > base.max_length:
        raise context_error(base, f"sent text {number} with {len(item)} token ids; shorten it")
    for index, token in enumerate(item):
        if type(token) is not int:  # True is an int too
            kind = type(token).__name__
            raise _refusal(f"text {number} has a {kind} at index {index}; token ids are whole numbers", name)
    return tuple(item)


def chat_size(base: Base, form: InputForm | None, messages: Sequence[Message], max_characters: int) -> int:
    """Characters of a conversation, its overheads included. Raises ApiError 400 if it is certain to be too long."""
    is_chat = form is None or form.kind == "chat"
    read = messages if is_chat else [each for each in messages if each["role"] == "user"][-1:]
    num_characters = sum(len(value) for message in read for value in message.values() if isinstance(value, str))
    _check_characters(base, num_characters, max_characters)
    calls = _CALLS if any(message.get("tool_calls") for message in messages) else 0
    return num_characters + calls + _MESSAGE * len(messages)


def chat_ids(base: Base, form: InputForm | None, messages: Sequence[Message]) -> tuple[int, ...]:
    """The ids of a conversation in the form that the prompt was trained on. Raises ApiError 400 or DataError."""
    for number, message in enumerate(messages):
        calls = json.dumps(message.get("tool_calls", ""), ensure_ascii=False)
        for text in (message["content"], message.get("name", ""), message.get("tool_call_id", ""), calls):
            _check_unicode(text, f"message {number}", "messages")
    return check_length(base, conversation_ids(base, form, messages, base.max_length))


def conversation_ids(
    base: Base, form: InputForm | None, messages: Sequence[Message], max_ids: int | None = None
) -> tuple[int, ...]:
    """The ids of a conversation. A prompt that was not trained on chat reads no turn of a tool.

    Of a conversation longer than `max_ids`, more than that many ids are returned, but maybe not all.

    Raises DataError if the template refuses it, and ApiError 400 if it leaves out a tool's answer or a tool call.
    """
    ids = input_ids(base, form, messages=messages, max_ids=max_ids)
    is_whole = max_ids is None or len(ids) <= max_ids
    if is_whole and (form is None or form.kind == "chat"):
        for name, blanked in _BLANKED.items():
            without = [blanked(message) for message in messages]
            if without != list(messages) and input_ids(base, form, messages=without) == ids:
                raise ApiError(400, f"{name} cannot be read: the base's chat template leaves them out; write them into "
                                    "a user's message", "unsupported_parameter", "messages")  # fmt: skip
    return ids


def _without_answer(message: Message) -> Message:
    return {**message, "content": ""} if message["role"] == "tool" else message


def _without_calls(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "tool_calls"}


_BLANKED: dict[str, Callable[[Message], Message]] = {
    "messages of the role 'tool'": _without_answer,
    "tool_calls": _without_calls,
}


def _check_characters(base: Base, num_characters: int, most: int) -> None:
    if num_characters > most:
        raise context_error(base, f"sent {num_characters:,} characters, which take more tokens than that; shorten it")


def check_length(base: Base, ids: tuple[int, ...]) -> tuple[int, ...]:
    """The ids of a text that was tokenised only as far as this can tell. Raises ApiError 400 for too many."""
    if len(ids) > base.max_length:
        raise context_error(base, f"sent a text of at least {len(ids)} tokens; shorten it")
    return ids


def context_error(base: Base, problem: str) -> ApiError:
    """For a text that was not tokenised to its end; opens, as the engine's own refusal does, with OpenAI's words."""
    message = f"This model's maximum context length is {base.max_length} tokens. However, you {problem}."
    return ApiError(400, message, "context_length_exceeded")


def _check_unicode(text: str, what: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        why = f"{what} has half a surrogate pair at character {error.start}; send valid Unicode"
        raise ApiError(400, why, "invalid_value", param) from None


def _refusal(message: str, name: str) -> ApiError:
    return ApiError(400, message, "invalid_value", name)


def _run(work: Callable[[], Result], is_cancelled: threading.Event) -> Result:
    def check() -> None:
        if is_cancelled.is_set():
            raise asyncio.CancelledError

    with interrupted_by(check):
        return work()


async def _end_of(future: Future[Result]) -> None:
    while not future.done():
        await asyncio.sleep(0.01)


def _max_characters(base: Base) -> tuple[int, int]:
    """Characters of a text and of a conversation that are certain to be more tokens than the base has positions.

    No token stands for more characters than its own name has, if the tokenizer keeps all characters as they are.
    """
    longest = max(map(len, base.tokenizer.get_vocab()), default=1)
    most = base.max_length * longest
    backend = getattr(base.tokenizer, "backend_tokenizer", None)
    pre_tokenizer = repr(getattr(backend, "pre_tokenizer", None))
    keeps_all = (
        backend is not None
        and backend.normalizer is None
        and "ByteLevel" in pre_tokenizer
        and "Removed" not in pre_tokenizer
    )
    return most if keeps_all else most * _SHRINKING, most * _SHRINKING
