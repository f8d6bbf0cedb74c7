"""Whether a text and its answer fit into the base's positions."""

from __future__ import annotations

from softprompt.base import Base
from softprompt.server.errors import ApiError
from softprompt.server.prompts.catalogue import Model

MOST_ANSWERS = 1024  # of one call
_MOST_ECHOED = 2**18  # log-probabilities of one call's texts, repeated before each answer


def num_left(base: Base, model: Model, num_ids: int) -> int:
    """New tokens that fit behind a soft prompt and a text. Raises ApiError 400 where none does."""
    num_virtual = 0 if model.prompt is None else model.prompt.num_virtual_tokens
    left = base.max_length - num_virtual - num_ids
    if left < 1:
        raise _too_long(f"{num_virtual} virtual tokens and {num_ids} of the text leave no room for an answer in the "
                        f"{base.max_length} positions of the base; shorten the text")  # fmt: skip
    return left


def check_room(base: Base, model: Model, num_ids: int, max_tokens: int) -> None:
    """Raises ApiError 400 where so many new tokens do not fit."""
    left = num_left(base, model, num_ids) if max_tokens else 0
    if max_tokens > left:
        wanted = max_tokens if max_tokens < 10**18 else "more than 10^18"
        raise _too_long(f"max_tokens is {wanted}, but virtual tokens and text leave {left} of the base's "
                        f"{base.max_length} positions; lower it or shorten the text")  # fmt: skip


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


def _too_long(message: str) -> ApiError:
    return ApiError(400, message, "context_length_exceeded")
