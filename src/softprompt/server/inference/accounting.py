"""What surrounds every call that asks for answers: may it start, and what is noted at its end."""

from __future__ import annotations

from fastapi import Request

from softprompt.server.clients.rate_limits import RateLimiter
from softprompt.server.dependencies import dependency_if_any
from softprompt.server.inference.call import Call
from softprompt.server.telemetry.request_log import RequestLog


def admit(http: Request, call: Call) -> None:
    """Before its requests go to the engine. Raises ApiError 429 where the client is over its limits."""
    limiter = dependency_if_any(http.app, RateLimiter)
    if limiter is not None:
        limiter.admit(call.client, num_answers=_num_answers(call), num_tokens=call.num_prompt_tokens)


def ended(http: Request, call: Call, notes: RequestLog) -> None:
    """Exactly once for each call that was admitted, however it ended; `call.outcome` says how."""
    limiter = dependency_if_any(http.app, RateLimiter)
    if limiter is not None:
        limiter.ended(call.client, num_answers=_num_answers(call), num_tokens=call.num_new_tokens)
    notes.model = call.model.id
    notes.num_prompt_tokens = call.num_prompt_tokens
    notes.num_new_tokens = call.num_new_tokens


def _num_answers(call: Call) -> int:
    return len(call.requests) * call.num_choices
