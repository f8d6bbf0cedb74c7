"""Whether a text and its answer fit into the base's positions.

A refusal opens with OpenAI's words, by which gateways know that a model with more room could answer.
"""

from __future__ import annotations

from softprompt.base import Base
from softprompt.server.errors import ApiError
from softprompt.server.prompts.model import Model

MOST_ANSWERS = 1024  # of one call
_MOST_ECHOED = 2**18  # log-probabilities of one call's texts, repeated before each answer


def num_left(base: Base, model: Model, num_ids: int) -> int:
    """New tokens that fit behind a soft prompt and a text. Raises ApiError 400 where none does."""
    num_virtual = 0 if model.prompt is None else model.prompt.num_virtual_tokens
    left = base.max_length - num_virtual - num_ids
    if left < 1:
        asked = _requested(num_virtual, num_ids, "1")
        raise context_error(base, f"{asked}; that leaves no room for an answer; shorten the text")
    return left


def check_room(base: Base, model: Model, num_ids: int, max_tokens: int) -> None:
    """Raises ApiError 400 where so many new tokens do not fit."""
    left = num_left(base, model, num_ids) if max_tokens else 0
    if max_tokens > left:
        num_virtual = base.max_length - num_ids - left
        wanted = str(max_tokens) if max_tokens < 10**18 else "more than 10^18"
        asked = _requested(num_virtual, num_ids, wanted)
        raise context_error(base, f"{asked}; {left} are left for an answer; lower max_tokens or shorten the text")


def check_num_answers(num_texts: int, n: int) -> None:
    """Raises ApiError 400 where one call asks for too many answers."""
    if num_texts * n > MOST_ANSWERS:
        raise ApiError(400, f"{num_texts} texts with n = {n} are {num_texts * n} answers; one request may ask for "
                            f"{MOST_ANSWERS}", "invalid_value", "n")  # fmt: skip


def check_num_echoed(num_ids: int, n: int, num_tops: int) -> None:
    """Raises ApiError 400 where the log-probabilities of one call's texts would be too many to write at once."""
    wanted = num_ids * n * (1 + num_tops)
    if wanted > _MOST_ECHOED:
        raise ApiError(400, f"echo with {num_ids} tokens, n = {n} and logprobs = {num_tops} is {wanted} "
                            f"log-probabilities; one request may ask for {_MOST_ECHOED}; send fewer texts at once",
                       "invalid_value", "echo")  # fmt: skip


def context_error(base: Base, what: str) -> ApiError:
    """A refusal of what is longer than the base's positions; `what` goes on behind "However, you "."""
    message = f"This model's maximum context length is {base.max_length} tokens. However, you {what}."
    return ApiError(400, message, "context_length_exceeded")


def _requested(num_virtual: int, num_ids: int, max_tokens: str) -> str:
    total = f"{num_virtual + num_ids + int(max_tokens)} tokens" if max_tokens.isdecimal() else "far more"
    soft = f", {num_virtual} in the soft prompt" if num_virtual else ""
    return f"requested {total} ({num_ids} in the text{soft}, {max_tokens} in the completion)"
