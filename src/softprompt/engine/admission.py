"""What a request must be before an engine takes it."""

from __future__ import annotations

from softprompt.base import Base
from softprompt.config import SamplingConfig
from softprompt.engine.requests import Request
from softprompt.errors import ConfigError, DataError, LengthError, PromptError

_MOST_CHOICES = 128  # of one request, as OpenAI's


def check_request(base: Base, request: Request, sampling: SamplingConfig) -> None:
    """Raises PromptError, DataError, LengthError or ConfigError, with what was wrong."""
    prompt = request.prompt
    if prompt is not None and prompt.hidden_size != base.hidden_size:
        raise PromptError(
            f"the soft prompt has width {prompt.hidden_size}; base {base.name!r} takes {base.hidden_size}"
        )
    if prompt is None and not request.ids:
        raise DataError("an empty text has no token to continue from on the bare base; give at least one character")
    if not 1 <= request.num_choices <= _MOST_CHOICES:
        raise ConfigError(f"num_choices is {request.num_choices}; it must be between 1 and {_MOST_CHOICES}")
    for name in ("num_log_probs", "num_text_log_probs"):
        num_log_probs: int | None = getattr(request, name)
        if num_log_probs is not None and not 0 <= num_log_probs <= base.vocab_size:
            raise ConfigError(f"{name} is {num_log_probs}; it must be between 0 and {base.vocab_size}")
    _check_ids(base, request.ids, "the text has token id")
    _check_ids(base, [token for token, _ in sampling.logit_bias], "logit_bias has token id")
    _check_length(base, request, 0 if prompt is None else prompt.num_virtual_tokens, sampling.max_new_tokens)


def _check_ids(base: Base, ids: tuple[int, ...] | list[int], what: str) -> None:
    wrong = next((token for token in ids if not 0 <= token < base.vocab_size), None)
    if wrong is not None:
        raise DataError(f"{what} {wrong}; those of base {base.name!r} are 0 to {base.vocab_size - 1}")


def _check_length(base: Base, request: Request, num_virtual: int, max_new_tokens: int) -> None:
    wanted = num_virtual + len(request.ids) + max_new_tokens
    if wanted > base.max_length:
        raise LengthError(
            f"{num_virtual} virtual tokens, {len(request.ids)} of the input and {max_new_tokens} new ones are "
            f"{wanted}, more than the {base.max_length} positions of base {base.name!r}; shorten the input or "
            "lower --max-new-tokens"
        )
