"""What goes into an engine and what comes out of it: values only, the same for every engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from softprompt.base import Base
from softprompt.config import SamplingConfig
from softprompt.errors import ConfigError, DataError, LengthError, PromptError
from softprompt.prompt import SoftPrompt
from softprompt.types import brief_repr

FinishReason = Literal["stop", "length"]
AbortReason = Literal["asked", "deadline"]


@dataclass(frozen=True)
class Request:
    """One generation asked for: the text's token ids (BOS included) and the soft prompt to put before them."""

    __repr__ = brief_repr

    ids: tuple[int, ...]
    prompt: SoftPrompt | None = None
    sampling: SamplingConfig | None = None  # None: what `generate` is given, or SamplingConfig's defaults
    num_choices: int = 1  # answers wanted; number i draws with seed + i
    num_log_probs: int | None = None  # alternatives reported beside each token's log-probability; None: no report
    num_text_log_probs: int | None = None  # the same for the text's own tokens: one `TextRead` tells them
    is_text_only: bool = False  # its text is read and nothing answered: for `num_text_log_probs`
    client: str | None = None  # whose it is: clients take turns
    cache_salt: str | None = None  # only requests with the same one reuse each other's cached texts and guides
    priority: int = 0  # lower is served first
    timeout_s: float | None = None  # aborted when this many seconds have passed since it was added


@dataclass(frozen=True)
class TokenLogProb:
    """Nats under the raw distribution, before penalties and temperature."""

    id: int
    log_prob: float
    alternatives: tuple[tuple[int, float], ...] = ()  # (id, nats) of the likeliest, best first


@dataclass(frozen=True)
class Answer:
    """What came out. `log_probs` are nats under the raw distribution, before penalties and temperature."""

    __repr__ = brief_repr

    ids: tuple[int, ...]  # without the token that ended it
    text: str
    finish_reason: FinishReason
    log_probs: tuple[float, ...] = ()  # one per id, where they were asked for
    stopped_by: str | int | None = None  # the stop string or token id that ended it
    end_log_prob: TokenLogProb | None = None  # of that token, where log-probabilities were asked for

    def __str__(self) -> str:
        return self.text

    @property
    def num_generated(self) -> int:
        """Tokens that the base generated: `ids`, and the token that ended it."""
        return len(self.ids) + isinstance(self.stopped_by, int)


@dataclass(frozen=True)
class Tokens:
    """New tokens of one choice, with the text that can be printed now: no half character, no begun stop string."""

    __repr__ = brief_repr

    request: int
    choice: int
    ids: tuple[int, ...]
    text: str
    log_probs: tuple[TokenLogProb, ...] = ()
    end: Answer | None = None  # the whole answer, where the choice ends with these

    @property
    def num_generated(self) -> int:
        """How many there are, a token that ends the choice included."""
        return len(self.ids) + (self.end is not None and isinstance(self.end.stopped_by, int))

    @property
    def generated_log_probs(self) -> tuple[TokenLogProb, ...]:
        """The log-probabilities of all of them, that of the ending token last."""
        ending = None if self.end is None else self.end.end_log_prob
        return self.log_probs if ending is None else (*self.log_probs, ending)


@dataclass(frozen=True)
class TextRead:
    """The text has been read whose log-probabilities were asked for. It comes once, before the request's tokens."""

    __repr__ = brief_repr

    request: int
    log_probs: tuple[TokenLogProb | None, ...]  # one per id; None for a first one that nothing stands before


@dataclass(frozen=True)
class Finished:
    """The end of a request that was answered."""

    __repr__ = brief_repr

    request: int
    answers: tuple[Answer, ...]  # one per choice
    num_prompt_tokens: int  # of the text
    num_virtual_tokens: int
    num_cached_tokens: int = 0  # of the text's, taken from the prefix cache


@dataclass(frozen=True)
class Aborted:
    """The end of a request that was given up."""

    request: int
    reason: AbortReason


@dataclass(frozen=True)
class Failed:
    """The end of a request that could not be answered."""

    request: int
    why: str
    is_request_fault: bool = False  # what was asked for cannot be done: a grammar that grew too large


Terminal = Finished | Aborted | Failed
Event = Tokens | TextRead | Terminal


# --

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
