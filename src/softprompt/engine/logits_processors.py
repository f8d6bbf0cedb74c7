"""Logits processors: bias, penalties, no end before the minimum, and the base's rules on tokens.

Bias and penalties read and write only the ids that they change. N rows, E ids that a row's settings change, W width of
the scores; padding is written to the columns behind the vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softprompt.base import Base, GenerationRules
from softprompt.config import SamplingConfig
from softprompt.engine.guided_decoding import Guide

# Of an id: what is added to its logit; text or answer has it; times in the answer; it ends the answer
_BIAS, _SEEN, _COUNT, _STOP = range(4)
_INITIAL_SIZE = 16


class LogitEdits:
    """The ids whose logits one row's settings change, and how; it grows with the answer."""

    def __init__(
        self, sampling: SamplingConfig, text_ids: Iterable[int], stop_ids: Iterable[int], min_new_tokens: int
    ) -> None:
        self.min_new_tokens = min_new_tokens  # the request's or the base's, whichever is more
        self._repeats = sampling.repetition_penalty != 1.0
        self._counts = self._repeats or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        self._index_of: dict[int, int] = {}
        self._ids = np.zeros(_INITIAL_SIZE, dtype=np.int64)
        self._edits = np.zeros((4, _INITIAL_SIZE), dtype=np.float32)
        for token in set(stop_ids) if min_new_tokens > 0 else ():
            self._add(token, _STOP, 1)
        self._num_early = len(self._index_of)  # ids that matter only as long as the answer must not end
        for token, bias in sampling.logit_bias:
            self._add(token, _BIAS, bias)
        for token in set(text_ids) if self._repeats else ():
            self._add(token, _SEEN, 1)
        self._is_lasting = bool(sampling.logit_bias) or len(self._index_of) > self._num_early

    def __len__(self) -> int:
        return len(self._index_of)

    def append(self, token: int) -> None:
        if self._counts:
            self._add(token, _SEEN, 1)
            self._add(token, _COUNT, 1)
            self._is_lasting = True

    def apply_at(self, num_new: int) -> bool:
        """Whether any logit changes after so many new tokens."""
        return self._is_lasting or (num_new < self.min_new_tokens and len(self) > 0)

    def copy_into(self, ids_E: NDArray[np.int64], edits_4E: NDArray[np.float32]) -> None:
        ids_E[: len(self)] = self._ids[: len(self)]
        edits_4E[:, : len(self)] = self._edits[:, : len(self)]

    def _add(self, token: int, kind: int, amount: float) -> None:
        index = self._index_of.setdefault(token, len(self._index_of))
        if index == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._edits = np.concatenate([self._edits, np.zeros_like(self._edits)], axis=1)
        self._ids[index] = token
        self._edits[kind, index] += amount


def apply_penalties(scores_NW: Tensor, rows: Sequence[SamplingState], vocab_size: int) -> None:
    """Changes the scores in place, in the order: bias, repetition, presence and frequency, no early end.

    Column `vocab_size` must be there; what it holds afterwards means nothing.
    """
    ids_NE, edits_4NE = _packed(rows, vocab_size)
    ids = torch.from_numpy(ids_NE).to(scores_NW.device)
    bias, seen, count, stop = torch.from_numpy(edits_4NE).to(scores_NW.device)
    repetition, presence, frequency, early = torch.from_numpy(_settings(rows)).to(scores_NW.device)
    values = scores_NW.gather(1, ids) + bias
    repeated = torch.where(values < 0, values * repetition, values / repetition)
    values = torch.where(seen > 0, repeated, values) - (presence * (count > 0) + frequency * count)
    values.masked_fill_(stop * early > 0, -torch.inf)
    scores_NW.scatter_(1, ids, values)


def _packed(rows: Sequence[SamplingState], vocab_size: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids [N, E] and edits [4, N, E]; the pads, and ids that the logits do not reach, are column `vocab_size`."""
    width = max(len(row.edits) for row in rows)
    ids_NE = np.full((len(rows), width), vocab_size, dtype=np.int64)
    edits_4NE = np.zeros((4, len(rows), width), dtype=np.float32)
    for position, row in enumerate(rows):
        row.edits.copy_into(ids_NE[position], edits_4NE[:, position])
    return np.minimum(ids_NE, vocab_size, out=ids_NE), edits_4NE


def _settings(rows: Sequence[SamplingState]) -> NDArray[np.float32]:
    """[4, N, 1]: repetition, presence and frequency penalties, and whether the answer must not end yet."""
    settings = [
        (
            row.sampling.repetition_penalty,
            row.sampling.presence_penalty,
            row.sampling.frequency_penalty,
            len(row.new_ids) < row.edits.min_new_tokens,
        )
        for row in rows
    ]
    return np.ascontiguousarray(np.array(settings, dtype=np.float32).T[:, :, None])


class TokenRules:
    """The rules of a base's generation_config.json for one answer, as transformers' processors apply them."""

    def __init__(self, rules: GenerationRules, text_ids: Iterable[int], max_new_tokens: int) -> None:
        self.rules = rules
        self._ids = list(text_ids)  # text and answer
        self._num_text = len(self._ids)
        self._max_new_tokens = max_new_tokens
        self._followers: dict[tuple[int, ...], list[int]] = defaultdict(list)  # of the beginnings of n-grams
        self._num_read = 0  # n-grams that are among them
        is_forced_first = rules.forced_bos_token_id is not None and self._num_text <= 1
        self._first = 1 if is_forced_first else 0  # the new token that `begin_suppress_tokens` is about

    def append(self, token: int) -> None:
        self._ids.append(token)

    def apply_now(self) -> bool:
        """Whether the next token may depend on the rules."""
        rules = self.rules
        always = rules.suppress_tokens or rules.bad_words_ids or rules.sequence_bias or rules.no_repeat_ngram_size
        return bool(always) or bool(self.forced()) or bool(self.suppressed_here())

    def forced(self) -> tuple[int, ...]:
        """The ids of which one must come next."""
        rules = self.rules
        if rules.forced_eos_token_id and self._num_new == self._max_new_tokens - 1:
            return rules.forced_eos_token_id
        return (rules.forced_bos_token_id,) if rules.forced_bos_token_id is not None and len(self._ids) == 1 else ()

    def suppressed_here(self) -> tuple[int, ...]:
        """Ids that must not begin an answer, where it begins."""
        return self.rules.begin_suppress_tokens if self._num_new == self._first else ()

    def suppressed_next(self) -> Iterator[int]:
        """Ids that must not follow these: the ends of bad words, and of n-grams that are repeated."""
        yield from (word[-1] for word in self.rules.bad_words_ids if self._ends_with(word[:-1]))
        size = self.rules.no_repeat_ngram_size
        if 0 < size <= len(self._ids) + 1:
            self._read_ngrams(size)
            yield from self._followers.get(tuple(self._ids[len(self._ids) + 1 - size :]), ())

    def biases(self) -> Iterator[tuple[int, float]]:
        """(id, what is added to its logit) after these ids."""
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


def add_sequence_biases(scores_NW: Tensor, rows: Sequence[SamplingState]) -> None:
    """Changes the scores in place; before the penalties, as in transformers."""
    for number, row in enumerate(rows):
        for token, bias in row.rules.biases() if row.rules is not None else ():
            scores_NW[number, token] += bias


def forbid_tokens(scores_NW: Tensor, rows: Sequence[SamplingState]) -> None:
    """Changes the scores in place: minus infinity for tokens that must not come, or for all but the forced ones."""
    for number, row in enumerate(rows):
        if row.rules is None:
            continue
        forced = row.rules.forced() if row.guide is None else ()  # a request's guide takes precedence
        if forced:
            scores_NW[number] = -torch.inf
            scores_NW[number, list(forced)] = 0.0
            continue
        suppressed = [*row.rules.rules.suppress_tokens, *row.rules.suppressed_here(), *row.rules.suppressed_next()]
        if suppressed:
            scores_NW[number, torch.tensor(suppressed, device=scores_NW.device)] = -torch.inf


@dataclass
class SamplingState:
    """What sampling needs of one answer. Only `append` changes it, so a new one with the same ids continues alike."""

    sampling: SamplingConfig
    seed: int  # of this answer alone
    ending_ids: tuple[int, ...]
    edits: LogitEdits
    guide: Guide | None = None
    rules: TokenRules | None = None  # None where the base's generation settings have none
    new_ids: list[int] = field(default_factory=list)

    def append(self, token: int) -> None:
        self.new_ids.append(token)
        self.edits.append(token)
        if self.rules is not None:
            self.rules.append(token)
        if self.guide is not None:
            self.guide.append(token)

    @property
    def is_complete(self) -> bool:
        """Whether its guide is satisfied and allows no more: the answer ends without an ending token."""
        return self.guide is not None and self.guide.is_complete

    @property
    def problem(self) -> str | None:
        """Why its guide allows no token; None where it does, or there is none."""
        return None if self.guide is None else self.guide.problem

    @property
    def is_plain(self) -> bool:
        """Whether the next token is the likeliest of the unchanged logits."""
        is_bare = self.guide is None and (self.rules is None or not self.rules.apply_now())
        return is_bare and self.sampling.temperature == 0 and not self.has_edits

    @property
    def has_edits(self) -> bool:
        return self.edits.apply_at(len(self.new_ids))


def ending_ids(base: Base, sampling: SamplingConfig) -> tuple[int, ...]:
    """The ids that end an answer under these settings."""
    ids = {*(() if sampling.ignore_eos else base.stop_ids), *sampling.stop_ids}
    return tuple(sorted(token for token in ids if token >= 0))
