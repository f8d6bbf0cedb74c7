"""Logits that a row's settings change one id at a time: bias, penalties, and no end before the minimum.

Only the ids concerned are read and written. N rows, E ids that a row's settings touch, W width of the scores, whose
columns behind the vocabulary take what is padded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softprompt.config import SamplingConfig

if TYPE_CHECKING:
    from softprompt.engine.choosing.rows import ChoosingRow

_BIAS, _SEEN, _COUNT, _STOP = range(
    4
)  # facts of an id: what is added; text or answer has it; times in the answer; ends it
_ROOM = 16


class Touched:
    """The ids whose logits one row's settings change, with what is known of each; it grows with the answer."""

    def __init__(
        self, sampling: SamplingConfig, text_ids: Iterable[int], stop_ids: Iterable[int], min_new_tokens: int
    ) -> None:
        self.min_new_tokens = min_new_tokens  # the request's or the base's, whichever is more
        self._repeats = sampling.repetition_penalty != 1.0
        self._counts = self._repeats or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        self._places: dict[int, int] = {}
        self._ids = np.zeros(_ROOM, dtype=np.int64)
        self._facts = np.zeros((4, _ROOM), dtype=np.float32)
        for token in set(stop_ids) if min_new_tokens > 0 else ():
            self._add(token, _STOP, 1)
        self._num_early = len(self._places)  # ids that matter only as long as the answer must not end
        for token, bias in sampling.logit_bias:
            self._add(token, _BIAS, bias)
        for token in set(text_ids) if self._repeats else ():
            self._add(token, _SEEN, 1)
        self._is_lasting = bool(sampling.logit_bias) or len(self._places) > self._num_early

    def __len__(self) -> int:
        return len(self._places)

    def take(self, token: int) -> None:
        if self._counts:
            self._add(token, _SEEN, 1)
            self._add(token, _COUNT, 1)
            self._is_lasting = True

    def matters(self, num_new: int) -> bool:
        """Whether any logit changes behind so many new tokens."""
        return self._is_lasting or (num_new < self.min_new_tokens and len(self) > 0)

    def copy_into(self, ids_E: NDArray[np.int64], facts_4E: NDArray[np.float32]) -> None:
        ids_E[: len(self)] = self._ids[: len(self)]
        facts_4E[:, : len(self)] = self._facts[:, : len(self)]

    def _add(self, token: int, fact: int, amount: float) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._facts = np.concatenate([self._facts, np.zeros_like(self._facts)], axis=1)
        self._ids[place] = token
        self._facts[fact, place] += amount


def penalise(scores_NW: Tensor, rows: Sequence[ChoosingRow], vocab_size: int) -> None:
    """Changes the scores in place, in the order: bias, repetition, presence and frequency, no early end.

    Column `vocab_size` must be there; what it holds afterwards means nothing.
    """
    ids_NE, facts_4NE = _packed(rows, vocab_size)
    ids = torch.from_numpy(ids_NE).to(scores_NW.device)
    bias, seen, count, stop = torch.from_numpy(facts_4NE).to(scores_NW.device)
    repetition, presence, frequency, early = torch.from_numpy(_settings(rows)).to(scores_NW.device)
    values = scores_NW.gather(1, ids) + bias
    repeated = torch.where(values < 0, values * repetition, values / repetition)
    values = torch.where(seen > 0, repeated, values) - (presence * (count > 0) + frequency * count)
    values.masked_fill_(stop * early > 0, -torch.inf)
    scores_NW.scatter_(1, ids, values)


def _packed(rows: Sequence[ChoosingRow], vocab_size: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids [N, E] and facts [4, N, E]; the pads, and ids that the logits do not reach, are column `vocab_size`."""
    width = max(len(row.touched) for row in rows)
    ids_NE = np.full((len(rows), width), vocab_size, dtype=np.int64)
    facts_4NE = np.zeros((4, len(rows), width), dtype=np.float32)
    for position, row in enumerate(rows):
        row.touched.copy_into(ids_NE[position], facts_4NE[:, position])
    return np.minimum(ids_NE, vocab_size, out=ids_NE), facts_4NE


def _settings(rows: Sequence[ChoosingRow]) -> NDArray[np.float32]:
    """[4, N, 1]: repetition, presence and frequency penalties, and whether the answer must not end yet."""
    settings = [
        (
            row.sampling.repetition_penalty,
            row.sampling.presence_penalty,
            row.sampling.frequency_penalty,
            len(row.new_ids) < row.touched.min_new_tokens,
        )
        for row in rows
    ]
    return np.ascontiguousarray(np.array(settings, dtype=np.float32).T[:, :, None])
