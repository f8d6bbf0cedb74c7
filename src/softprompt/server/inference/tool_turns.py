"""Conversations in which tools were called: taken where the base's chat template writes them, else refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from softprompt.base import Base
from softprompt.data import input_ids
from softprompt.server.errors import ApiError
from softprompt.types import InputForm

Message = dict[str, Any]  # Any: a chat template's own


def conversation_ids(
    base: Base, form: InputForm | None, messages: Sequence[Message], max_ids: int | None = None
) -> tuple[int, ...]:
    """What the model reads of a conversation. A prompt that was not trained on chat reads no turn of a tool.

    Of one longer than `max_ids` more than so many are given, but maybe not all.

    Raises DataError where the template refuses it, and ApiError 400 where it leaves a tool's answer or call out.
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
