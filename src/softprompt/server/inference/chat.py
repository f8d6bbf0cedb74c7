"""/v1/chat/completions: a conversation, in the form that the prompt was trained on, continued."""

from __future__ import annotations

from typing import Any

from fastapi import Response

from softprompt.server.errors import ApiError
from softprompt.server.inference.chat_body import ChatBody, Message
from softprompt.server.inference.parts import Parts
from softprompt.server.inference.refused import refuse
from softprompt.server.inference.reports import ChatReporter
from softprompt.server.inference.room import check_room, num_left
from softprompt.server.inference.sampling import sampling_of
from softprompt.server.inference.serving import respond
from softprompt.server.inference.shape import Shape
from softprompt.server.inference.texts import read_messages


async def chat(body: ChatBody, parts: Parts) -> Response:
    """The assistant's next turn. Raises ApiError and SoftpromptError."""
    model = parts.model_of(body)
    num_tops = _num_tops(body)
    text = await read_messages(parts.reading(), model, [_message(message) for message in body.messages])
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if max_tokens is None:
        max_tokens = num_left(parts.base, model, len(text.ids))
    check_room(parts.base, model, len(text.ids), max_tokens)
    call = parts.call("chat", model, [parts.request(body, model, text.ids, sampling_of(body, max_tokens), num_tops)])
    return await respond(parts.asked(body), call, parts.writer(body, call, _shape(parts), num_tops is not None))


def _num_tops(body: ChatBody) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", "invalid_value", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _message(message: Message) -> dict[str, Any]:  # Any: a chat template's own
    refuse(message.model_extra)
    more = {"name": message.name, "tool_calls": message.tool_calls, "tool_call_id": message.tool_call_id}
    return {"role": message.role, "content": _words(message), **{key: value for key, value in more.items() if value}}


def _words(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    for part in message.content:
        if part.type != "text" or part.text is None:
            raise ApiError(400, f"a message has a part of type {part.type[:32]!r}; the base reads text only",
                           "unsupported_parameter", "messages")  # fmt: skip
    return "\n".join(part.text or "" for part in message.content)


def _shape(parts: Parts) -> Shape:
    return Shape(
        prefix="chatcmpl",
        kind="chat.completion",
        chunk_kind="chat.completion.chunk",
        whole=lambda index, text: {"message": {"role": "assistant", "content": text, "refusal": None}},
        piece=lambda index, text: {"delta": {"content": text} if text else {}},
        opening=lambda index: {"delta": {"role": "assistant", "content": ""}},
        reporter=lambda index: ChatReporter(parts.texts),
    )
