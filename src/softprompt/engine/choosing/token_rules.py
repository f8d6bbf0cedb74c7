"""The rules on tokens that a base's generation_config.json sets, laid over scores as transformers' processors do.

All rows of one base have the same rules; a row without any is never looked at here. N rows, W width of the scores.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softprompt.base import GenerationRules

if TYPE_CHECKING:
    from softprompt.engine.choosing.rows import ChoosingRow


class RowRules:
    """One answer under its base's rules: what may, must or would rather come next."""

    def __init__(self, rules: GenerationRules, text_ids: Iterable[int], max_new_tokens: int) -> None:
        self.rules = rules
        self._ids = list(text_ids)  # text and answer
        self._num_text = len(self._ids)
        self._max_new_tokens = max_new_tokens
        self._followers: dict[tuple[int, ...], list[int]] = defaultdict(list)  # of the beginnings of n-grams
        self._num_read = 0  # n-grams that are among them
        is_forced_first = rules.forced_bos_token_id is not None and self._num_text <= 1
        self._first = 1 if is_forced_first else 0  # the new token that `begin_suppress_tokens` is about

    def take(self, token: int) -> None:
        self._ids.append(token)

    def matters(self) -> bool:
        """Whether the next token may depend on the rules."""
        rules = self.rules
        always = rules.suppress_tokens or rules.bad_words_ids or rules.sequence_bias or rules.no_repeat_ngram_size
        return bool(always) or bool(self.forced()) or bool(self.never_here())

    def forced(self) -> tuple[int, ...]:
        """The ids of which one has to come now."""
        rules = self.rules
        if rules.forced_eos_token_id and self._num_new == self._max_new_tokens - 1:
            return rules.forced_eos_token_id
        return (rules.forced_bos_token_id,) if rules.forced_bos_token_id is not None and len(self._ids) == 1 else ()

    def never_here(self) -> tuple[int, ...]:
        """What must not come at this place of an answer."""
        return self.rules.begin_suppress_tokens if self._num_new == self._first else ()

    def never_next(self) -> Iterator[int]:
        """What must not come behind these ids: the ends of bad words, and of n-grams that are there."""
        yield from (word[-1] for word in self.rules.bad_words_ids if self._ends_with(word[:-1]))
        size = self.rules.no_repeat_ngram_size
        if 0 < size <= len(self._ids) + 1:
            self._read_ngrams(size)
            yield from self._followers.get(tuple(self._ids[len(self._ids) + 1 - size :]), ())

    def biases(self) -> Iterator[tuple[int, float]]:
        """(id, what is added to its logit) behind these ids."""
        yield from ((ids[-1], bias) for ids, bias in self.rules.sequence_bias if self._ends_with(ids[:-1]))

    @property
    def _num_new(self) -> int:
        return len(self._ids) - self._num_text

    def _ends_with(self, ids: Sequence[int]) -> bool:
        return len(ids) <= len(self._ids) and tuple(self._ids[len(self._ids) - len(ids) :]) == tuple(ids)

    def _read_ngrams(self, size: int) -> None:
        for start in range(self._num_read, len(self._ids) - size + 1):
            self._followers[tuple(self._ids[start : start + size - 1])].append(self._ids[start + size - 1])
        self._num_read = max(self._num_read, len(self._ids) - size + 1)


def add_sequence_biases(scores_NW: Tensor, rows: Sequence[ChoosingRow]) -> None:
    """Changes the scores in place; before the penalties, as in transformers."""
    for number, row in enumerate(rows):
        for token, bias in row.rules.biases() if row.rules is not None else ():
            scores_NW[number, token] += bias


def forbid(scores_NW: Tensor, rows: Sequence[ChoosingRow]) -> None:
    """Changes the scores in place: minus infinity for what must not come, or for all but what has to."""
    for number, row in enumerate(rows):
        if row.rules is None:
            continue
        forced = row.rules.forced() if row.guide is None else ()  # what a request asks for goes first
        if forced:
            scores_NW[number] = -torch.inf
            scores_NW[number, list(forced)] = 0.0
            continue
        never = [*row.rules.rules.suppress_tokens, *row.rules.never_here(), *row.rules.never_next()]
        if never:
            scores_NW[number, torch.tensor(never, device=scores_NW.device)] = -torch.inf
