"""What goes into an engine and what comes out of it, and which requests are refused. An engine is their only judge.

An error's `param` is the field of OpenAI's API that it is about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from softprompt.base import Base
from softprompt.config import SamplingConfig
from softprompt.errors import ConfigError, DataError, LengthError, PromptError, shortened
from softprompt.prompt import SoftPrompt
from softprompt.types import brief_repr

FinishReason = Literal["stop", "length"]
AbortReason = Literal["asked", "deadline"]
DEFAULT_SAMPLING = SamplingConfig()


@dataclass(frozen=True)
class Request:
    """One generation: the token ids of a text (BOS included) and the soft prompt before them."""

    __repr__ = brief_repr

    ids: tuple[int, ...]
    prompt: SoftPrompt | None = None
    sampling: SamplingConfig | None = None  # None: what `generate` is given, or SamplingConfig's defaults
    num_choices: int = 1  # number i draws with seed + i
    num_log_probs: int | None = None  # alternatives beside each token's log-probability; None: no log-probabilities
    num_text_log_probs: int | None = None  # the same for the text's own tokens, in one `PromptLogprobs`
    is_text_only: bool = False  # nothing is generated: for `num_text_log_probs`
    client: str | None = None  # clients share the engine fairly
    cache_salt: str | None = None  # only requests with the same one reuse each other's cached texts and guides
    priority: int = 0  # lower is served first
    timeout_s: float | None = None  # aborted this many seconds after it was added

    @property
    def num_virtual(self) -> int:
        """Virtual tokens before its text."""
        return 0 if self.prompt is None else self.prompt.num_virtual_tokens

    @property
    def num_virtual_of_decoder(self) -> int:
        """Virtual tokens in front of an encoder-decoder's answer."""
        return 0 if self.prompt is None else self.prompt.num_decoder_tokens

    @property
    def num_encoded(self) -> int:
        """Positions that the encoder of an encoder-decoder reads."""
        return self.num_virtual + len(self.ids)

    @property
    def max_length(self) -> int:
        """Positions that one of its answers may take: soft prompt, text and new tokens."""
        return self.num_virtual + len(self.ids) + (self.sampling or DEFAULT_SAMPLING).max_new_tokens


@dataclass(frozen=True)
class TokenLogProb:
    """Nats under the raw distribution, before penalties and temperature."""

    id: int
    log_prob: float
    alternatives: tuple[tuple[int, float], ...] = ()  # (id, nats) of the likeliest, best first


@dataclass(frozen=True)
class Answer:
    """One choice's answer. `log_probs` are nats under the raw distribution, before penalties and temperature."""

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
    """New tokens of one choice, and the text that can be printed now: no half character, no partial stop string."""

    __repr__ = brief_repr

    request: int
    choice: int
    ids: tuple[int, ...]
    text: str
    log_probs: tuple[TokenLogProb, ...] = ()
    end: Answer | None = None  # the whole answer, where the choice ends with these

    @property
    def num_generated(self) -> int:
        """How many, including a token that ends the choice."""
        return len(self.ids) + (self.end is not None and isinstance(self.end.stopped_by, int))

    @property
    def generated_log_probs(self) -> tuple[TokenLogProb, ...]:
        """Of all of them, that of the ending token last."""
        ending = None if self.end is None else self.end.end_log_prob
        return self.log_probs if ending is None else (*self.log_probs, ending)


@dataclass(frozen=True)
class PromptLogprobs:
    """The log-probabilities of the request's own text. Comes once, before the request's tokens."""

    __repr__ = brief_repr

    request: int
    log_probs: tuple[TokenLogProb | None, ...]  # one per id; None for a first one that nothing stands before


@dataclass(frozen=True)
class Finished:
    """A request was answered."""

    __repr__ = brief_repr

    request: int
    answers: tuple[Answer, ...]  # one per choice
    num_prompt_tokens: int  # of the text
    num_virtual_tokens: int
    num_cached_tokens: int = 0  # of the text's, taken from the prefix cache


@dataclass(frozen=True)
class Pooled:
    """A pooling request was answered (`softprompt.engine.pooling`)."""

    __repr__ = brief_repr

    request: int
    values: tuple[float, ...]  # one score per label, before a softmax; or the numbers of a vector
    num_prompt_tokens: int  # of the text
    num_virtual_tokens: int


@dataclass(frozen=True)
class Aborted:
    """A request was aborted."""

    request: int
    reason: AbortReason


@dataclass(frozen=True)
class Failed:
    """A request could not be answered."""

    request: int
    why: str
    is_request_fault: bool = False  # the request asks for the impossible: a grammar that grew too large


Terminal = Finished | Pooled | Aborted | Failed
Event = Tokens | PromptLogprobs | Terminal


_MAX_CHOICES = 128  # of one request, as OpenAI's
_LONGEST_NUMBER = 10**18  # a larger one is not printed


def check_request(base: Base, request: Request) -> None:
    """Raises PromptError, DataError, LengthError or ConfigError for a request that the base cannot answer."""
    sampling = request.sampling or DEFAULT_SAMPLING
    if base.kind == "encoder":
        raise ConfigError(
            f"base {base.name!r} is an encoder, which generates nothing; it classifies and embeds", param="model"
        )
    check_width(base, request.prompt)
    if request.prompt is None and not request.ids:
        raise DataError(
            "an empty text has no token to continue from on the bare base; give at least one character", param="prompt"
        )
    if not 1 <= request.num_choices <= _MAX_CHOICES:
        raise ConfigError(f"num_choices is {request.num_choices}; it must be between 1 and {_MAX_CHOICES}", param="n")
    for name in ("num_log_probs", "num_text_log_probs"):
        num_log_probs: int | None = getattr(request, name)
        if num_log_probs is not None and not 0 <= num_log_probs <= base.vocab_size:
            raise ConfigError(
                f"{name} is {shortened(num_log_probs)}; it must be between 0 and {base.vocab_size}", param="logprobs"
            )
    check_ids(base, request.ids, "the text has token id", "prompt")
    check_ids(base, [token for token, _ in sampling.logit_bias], "logit_bias has token id", "logit_bias")
    check_ids(base, sampling.stop_ids, "stop_ids has token id", "stop_token_ids")
    if base.kind == "seq2seq":
        _check_of_seq2seq(base, request, sampling.max_new_tokens)
    else:
        _check_length(base, request.max_length, _parts(request), sampling.max_new_tokens)


def check_width(base: Base, prompt: SoftPrompt | None) -> None:
    """Raises PromptError for a soft prompt of another width than the base's."""
    if prompt is not None and prompt.hidden_size != base.hidden_size:
        raise PromptError(
            f"the soft prompt has width {prompt.hidden_size}; base {base.name!r} takes {base.hidden_size}",
            param="model",
        )


def check_ids(base: Base, ids: Sequence[int], what: str, param: str) -> None:
    """Raises DataError for an id that the base does not embed; `what` opens the message."""
    wrong = next((token for token in ids if not 0 <= token < base.vocab_size), None)
    if wrong is not None:
        raise DataError(
            f"{what} {shortened(wrong)}; those of base {base.name!r} are 0 to {base.vocab_size - 1}", param=param
        )


def _check_of_seq2seq(base: Base, request: Request, max_new_tokens: int) -> None:
    """The encoder's text and the decoder's answer are limited each by itself."""
    if request.num_text_log_probs is not None or request.is_text_only:
        raise ConfigError(
            f"base {base.name!r} is an encoder-decoder, whose encoder reads the text and predicts none of it; log-"
            "probabilities are those of answers alone",
            param="echo",
        )
    _check_length(base, request.num_encoded, _parts(request), 0)
    num_start = request.num_virtual_of_decoder + len(base.decoder_start_ids)
    _check_length(base, num_start + max_new_tokens, f"{num_start} before the answer", max_new_tokens)


def _parts(request: Request) -> str:
    soft = f", {request.num_virtual} in the soft prompt" if request.num_virtual else ""
    return f"{len(request.ids)} in the text{soft}"


def _check_length(base: Base, num_positions: int, parts: str, max_new_tokens: int) -> None:
    """The message opens with OpenAI's words, by which gateways know that a model with a longer context could answer."""
    if num_positions <= base.max_length:
        return
    new = f", {_number(max_new_tokens)} in the completion" if max_new_tokens else ""
    advice = "shorten the text or ask for fewer new tokens" if max_new_tokens else "shorten the text"
    raise LengthError(
        f"This model's maximum context length is {base.max_length} tokens. However, you requested "
        f"{_number(num_positions)} tokens ({parts}{new}); {advice}",
        param="max_tokens",
    )


def _number(value: int) -> str:
    return str(value) if value < _LONGEST_NUMBER else "more than 10^18"


def nan_message(base: Base) -> str:
    """Why a request failed whose numbers are none."""
    return f"base {base.name!r} computes NaN in {base.dtype}; load it in float32 or bfloat16"
