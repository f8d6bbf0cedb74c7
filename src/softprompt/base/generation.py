"""The rules of a base's generation_config.json on the tokens of answers: those that are followed, and the others.

Followed, as in transformers' `generate`: tokens that are forbidden or forced. Not followed, and listed in `note`:
defaults of sampling and of lengths, which each request sets for itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from softprompt.errors import BaseModelError, shortened

TokenIds = tuple[int, ...]
# Settings that do not affect an answer's tokens, or are read elsewhere (the ids that end one).
_IRRELEVANT = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version",
    "_from_model_config", "_commit_hash", "use_cache", "cache_implementation", "cache_config", "max_cache_len",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "compile_config", "disable_compile", "low_memory", "prefill_chunk_size", "trust_remote_code", "use_mtp",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
    "max_matching_ngram_size", "prompt_lookup_num_tokens", "speculation_type",
}  # fmt: skip
_NEUTRAL: dict[str, Any] = {  # values that change nothing; Any: whatever JSON holds
    "do_sample": False, "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "early_stopping": False,
    "temperature": 1.0, "top_p": 1.0, "typical_p": 1.0, "min_p": 0.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "length_penalty": 1.0, "diversity_penalty": 0.0,
    "encoder_no_repeat_ngram_size": 0, "guidance_scale": 1, "renormalize_logits": False, "token_healing": False,
    "remove_invalid_values": False, "max_length": 20, "top_k": 50,
}  # fmt: skip
_LONGEST_VALUE = 40  # characters of one in a message


@dataclass(frozen=True, kw_only=True)
class GenerationRules:
    """The rules on tokens, under transformers' names; ids that the base does not have are left out."""

    suppress_tokens: TokenIds = ()  # never
    begin_suppress_tokens: TokenIds = ()  # never first
    bad_words_ids: tuple[TokenIds, ...] = ()  # the last of each never behind the others
    sequence_bias: tuple[tuple[TokenIds, float], ...] = ()  # added to the last one's logit behind the others
    no_repeat_ngram_size: int = 0  # no run of so many tokens twice, text included
    min_length: int = 0  # no end before so many tokens, text included
    min_new_tokens: int = 0  # no end before so many new tokens
    forced_bos_token_id: int | None = None  # the second token, where the text is one token
    forced_eos_token_id: TokenIds = ()  # the last token that the length allows
    ignored: tuple[str, ...] = ()  # settings that are not followed, with their values

    def min_new(self, num_text: int) -> int:
        """The least number of new tokens in an answer to a text of `num_text` tokens."""
        return max(self.min_new_tokens, self.min_length - num_text)

    @property
    def has_token_rules(self) -> bool:
        """Whether there is any rule but a minimum length."""
        return any(getattr(self, rule.name) not in ((), 0, None) for rule in fields(self) if rule.name in _TOKEN_RULES)

    @property
    def note(self) -> str | None:
        """One sentence on the settings that are not followed."""
        if not self.ignored:
            return None
        return (
            f"generation_config.json also sets {', '.join(self.ignored)}; such defaults are not followed, "
            "each request gives its own"
        )


_TOKEN_RULES = (
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "no_repeat_ngram_size",
    "forced_bos_token_id", "forced_eos_token_id",
)  # fmt: skip
FOLLOWED = (*_TOKEN_RULES, "min_length", "min_new_tokens")


def rules_of(config: Any, name: str, vocab_size: int) -> GenerationRules:  # Any: a GenerationConfig, or None
    """The rules of base `name`. Raises BaseModelError for an invalid value."""
    if config is None:
        return GenerationRules()
    read = _RuleParser(config, name, vocab_size)
    return GenerationRules(
        suppress_tokens=read.ids("suppress_tokens"),
        begin_suppress_tokens=read.ids("begin_suppress_tokens"),
        bad_words_ids=tuple(read.bad_words()),
        sequence_bias=tuple(read.biases()),
        no_repeat_ngram_size=read.count("no_repeat_ngram_size"),
        min_length=read.count("min_length"),
        min_new_tokens=read.count("min_new_tokens"),
        forced_bos_token_id=next(iter(read.ids("forced_bos_token_id")), None),
        forced_eos_token_id=read.ids("forced_eos_token_id"),
        ignored=tuple(_ignored(config)),
    )


def eos_ids_of(config: Any, name: str) -> TokenIds:  # Any: a GenerationConfig, or None
    """The ids that end an answer by the generation settings. Raises BaseModelError for other values."""
    value = getattr(config, "eos_token_id", None)
    ids = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
    if not all(type(i) is int for i in ids):
        raise _invalid(name, "eos_token_id", value, "a token id or a list of them")
    return tuple(ids)


class _RuleParser:
    def __init__(self, config: Any, name: str, vocab_size: int) -> None:  # Any: a GenerationConfig
        self._config, self._name, self._vocab_size = config, name, vocab_size

    def ids(self, key: str) -> TokenIds:
        value = getattr(self._config, key, None)
        ids = [value] if type(value) is int else [] if value is None else value
        if not _are_ids(ids):
            raise _invalid(self._name, key, value, "a list of token ids")
        return tuple(dict.fromkeys(i for i in ids if 0 <= i < self._vocab_size))

    def count(self, key: str) -> int:
        value = getattr(self._config, key, None)
        if value is not None and (type(value) is not int or not 0 <= value < 2**31):
            raise _invalid(self._name, key, value, "a whole number")
        return value or 0

    def bad_words(self) -> Iterator[TokenIds]:
        """A stop id alone is never a bad word: an answer has to be able to end."""
        value = getattr(self._config, "bad_words_ids", None)
        if value is None:
            return
        if not isinstance(value, list) or not all(_are_ids(ids) and ids for ids in value):
            raise _invalid(self._name, "bad_words_ids", value, "a list of lists of token ids")
        ends = {(i,) for i in eos_ids_of(self._config, self._name)}
        yield from (tuple(ids) for ids in value if self._can_come(ids) and tuple(ids) not in ends)

    def biases(self) -> Iterator[tuple[TokenIds, float]]:
        value = getattr(self._config, "sequence_bias", None)
        pairs = list(value.items()) if isinstance(value, dict) else [] if value is None else value
        if not isinstance(pairs, list) or not all(_is_bias(pair) for pair in pairs):
            raise _invalid(self._name, "sequence_bias", value, "a list of [token ids, number]")
        yield from ((tuple(ids), float(bias)) for ids, bias in pairs if self._can_come(ids))

    def _can_come(self, ids: Any) -> bool:
        return all(0 <= i < self._vocab_size for i in ids)


def _are_ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(i) is int for i in value)


def _is_bias(pair: Any) -> bool:
    is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2
    return is_pair and _are_ids(pair[0]) and len(pair[0]) > 0 and type(pair[1]) in (int, float) and pair[1] == pair[1]


def _ignored(config: Any) -> Iterator[str]:
    for key, value in config.to_diff_dict().items():
        if key in FOLLOWED or key in _IRRELEVANT or value is None or value == _NEUTRAL.get(key):
            continue
        yield f"{key[:_LONGEST_VALUE]} = {shortened(value, _LONGEST_VALUE)}"


def _invalid(name: str, key: str, value: Any, meant: str) -> BaseModelError:
    return BaseModelError(
        f"base {name!r}: generation_config.json: {key} is {shortened(value, _LONGEST_VALUE)}; it must be {meant}"
    )
