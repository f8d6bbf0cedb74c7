"""/v1/completions: raw text or token ids, continued."""

from __future__ import annotations

from dataclasses import replace

from fastapi import Response

from softprompt.engine import Request
from softprompt.server.errors import ApiError
from softprompt.server.inference.completion_body import CompletionBody
from softprompt.server.inference.parts import Parts
from softprompt.server.inference.reports import CompletionReporter, text_report
from softprompt.server.inference.room import check_num_answers, check_num_echoed, check_room
from softprompt.server.inference.sampling import reseeded, sampling_of
from softprompt.server.inference.serving import respond
from softprompt.server.inference.shape import Shape
from softprompt.server.inference.texts import Text, read_prompt
from softprompt.server.prompts.model import Model


async def complete(body: CompletionBody, parts: Parts) -> Response:
    """The answers to all of the body's texts. Raises ApiError and SoftpromptError."""
    model = parts.model_of(body)
    _check(body)
    texts = await _texts(body, parts, model)
    sampling = sampling_of(body, max(1, body.max_tokens))
    requests = [parts.request(body, model, text.ids, reseeded(body, sampling), body.logprobs) for text in texts]
    call = parts.call("completions", model, [_echoing(body, request) for request in requests])
    writer = parts.writer(body, call, _shape(body, parts, texts), body.logprobs is not None)
    return await respond(parts.asked(body), call, writer)


async def _texts(body: CompletionBody, parts: Parts, model: Model) -> list[Text]:
    """What the model reads; it fits, and so do the answers."""
    texts = await read_prompt(parts.reading(), body.prompt, body.add_special_tokens)
    check_num_answers(len(texts), body.n)
    for text in texts:
        check_room(parts.base, model, len(text.ids), max(1, body.max_tokens))
        _check_not_empty(text, model)
    if body.echo and body.logprobs is not None:
        check_num_echoed(sum(len(text.ids) for text in texts), body.n, body.logprobs)
    return texts


def _check(body: CompletionBody) -> None:
    if body.best_of is not None and body.best_of != body.n:
        raise ApiError(400, f"best_of is {body.best_of} and n is {body.n}; every answer is given back; leave best_of "
                            "out", "unsupported_parameter", "best_of")  # fmt: skip
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0; it must be at least 1, or echo must be true", "invalid_value",
                       "max_tokens")  # fmt: skip


def _check_not_empty(text: Text, model: Model) -> None:
    if not text.ids and model.prompt is None:
        raise ApiError(400, "an empty prompt has no token that the bare base could continue; give at least one "
                            "character", "invalid_value", "prompt")  # fmt: skip


def _echoing(body: CompletionBody, request: Request) -> Request:
    """The request with what `echo` wants of its text besides."""
    num_tops = request.num_log_probs if body.echo else None
    return replace(request, num_text_log_probs=num_tops, is_text_only=body.max_tokens == 0)


def _shape(body: CompletionBody, parts: Parts, texts: list[Text]) -> Shape:
    n = body.n
    echoes = [text.words if body.echo else "" for text in texts]
    return Shape(
        prefix="cmpl",
        kind="text_completion",
        chunk_kind="text_completion",
        whole=lambda index, text: {"text": echoes[index // n] + text},
        piece=lambda index, text: {"text": text},
        opening=lambda index: {"text": echoes[index // n]} if body.echo else None,
        reporter=lambda index: CompletionReporter(parts.texts, len(echoes[index // n])),
        echo=lambda number, log_probs: text_report(parts.texts, texts[number].ids, echoes[number], log_probs),
    )
