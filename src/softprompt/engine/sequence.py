"""One row object per answer that is being generated, and one object per request that owns its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from softprompt.base import Base
from softprompt.engine.detokenizer import AnswerText
from softprompt.engine.kv_cache import Place
from softprompt.engine.logits_processors import ChoosingRow
from softprompt.engine.prefix_cache import Key, Prefix
from softprompt.engine.request import Answer, FinishReason, Request, TokenLogProb, Tokens
from softprompt.engine.sampler import Chosen
from softprompt.families import ModelCache


@dataclass(eq=False)
class Row:
    """One answer on its way. Its positions are [soft prompt, text, answer so far]."""

    owner: Admitted
    choice: int
    runner: Runner
    choosing: ChoosingRow
    text: AnswerText
    ids: list[int]  # of the text and the answer
    keys: list[tuple[int, Key]] = field(default_factory=list)  # beginnings that may be shared: positions and key
    computed: int = 0  # positions whose keys and values are held
    num_cached: int | None = None  # of them when it first started: from the prefix cache
    place: Place | None = None
    cache: ModelCache | None = None
    prefix: Prefix | None = None  # pinned: what it came from
    promises: list[tuple[int, Key]] = field(default_factory=list)  # beginnings that it will leave to others
    log_probs: list[TokenLogProb] = field(default_factory=list)
    text_log_probs: list[TokenLogProb | None] | None = None  # of the text so far, until told; None: not asked for
    answer: Answer | None = None  # when it has ended

    @property
    def request(self) -> Request:
        return self.owner.request

    @property
    def num_virtual(self) -> int:
        prompt = self.request.prompt
        return 0 if prompt is None else prompt.num_virtual_tokens

    @property
    def length(self) -> int:
        """Positions it has so far."""
        return self.num_virtual + len(self.ids)

    @property
    def longest(self) -> int:
        """Positions it may come to have."""
        return self.num_virtual + len(self.request.ids) + self.choosing.sampling.max_new_tokens

    @property
    def new_ids(self) -> list[int]:
        return self.ids[len(self.request.ids) :]

    @property
    def remaining(self) -> int:
        """Positions to run before its next token can be chosen."""
        return self.length - self.computed

    @property
    def is_answering(self) -> bool:
        """Only its newest token is left to run."""
        return self.remaining == 1 and len(self.ids) > len(self.request.ids)

    @property
    def is_reporting(self) -> bool:
        """Whether log-probabilities of its text are still to be found."""
        return self.text_log_probs is not None and len(self.text_log_probs) < len(self.request.ids)

    @property
    def is_behind_report(self) -> bool:
        """Whether another choice's row has yet to report on their text."""
        return self.choice > 0 and self.owner.rows[0].text_log_probs is not None

    @property
    def most_taken(self) -> int:
        """Positions that it may take from others; it runs those that tell of a token itself."""
        return self._first_telling if self.is_reporting else self.length - 1

    def telling(self, count: int) -> slice:
        """Which of the next `count` positions tell of the text's next tokens, where it is reporting."""
        behind_text = self.num_virtual + len(self.request.ids) - 1
        return slice(self._first_telling - self.computed, max(0, min(count, behind_text - self.computed)))

    @property
    def _first_telling(self) -> int:
        """The position before the first token of the text that was not reported on."""
        assert self.text_log_probs is not None
        return self.num_virtual + len(self.text_log_probs) - 1


@dataclass(eq=False)
class Admitted:
    """One request from its admission to its one terminal event."""

    id: int  # rises with every admission
    request: Request
    deadline: float | None  # by the engine's clock
    rows: list[Row] = field(default_factory=list)

    @property
    def is_answered(self) -> bool:
        return all(row.answer is not None for row in self.rows)


class Ran(NamedTuple):
    """Hidden states that a step gave."""

    last: Tensor  # [pieces, D]: of the last position of each
    telling: list[tuple[Row, Tensor]]  # [N, D]: of what `Row.telling` names, for rows that report on their texts


class Runner(Protocol):
    """How rows run: together over held keys and values, or one at a time through plain transformers."""

    reads_in_pieces: bool  # whether a text may be read over several steps

    def can_ever_hold(self, length: int) -> bool:
        """Whether a row of that many positions fits into the memory at all."""
        ...

    def is_worth_waiting(self, row: Row) -> bool:
        """Whether what the row begins with is just being computed by another."""
        ...

    def start(self, row: Row) -> bool:
        """Memory for the positions that a row has and one more; False where there is none now."""
        ...

    def make_room(self, row: Row) -> bool:
        """Memory for one more position; False where there is none now."""
        ...

    def stop(self, row: Row) -> None:
        """Give back all that `start` gave."""
        ...

    def run(self, pieces: Sequence[tuple[Row, int]]) -> Ran:
        """Run so many positions of each row."""
        ...


# --


def take_token(base: Base, row: Row, chosen: Chosen) -> Tokens:
    """Grow the row by a token, or end it; what there is to tell of it."""
    if row.request.is_text_only:
        return _end(row, "length", (), "", None)
    log_prob = None if chosen.log_prob is None else TokenLogProb(chosen.id, chosen.log_prob, chosen.alternatives)
    if _is_stop(base, row, chosen.id):
        row.choosing.take(chosen.id)
        return _end(row, "stop", (), row.text.finish(), chosen.id, log_prob)
    row.choosing.take(chosen.id)
    row.ids.append(chosen.id)
    piece = row.text.add(chosen.id)
    if log_prob is not None:
        row.log_probs.append(log_prob)
    if row.text.stopped_by is not None:
        return _end(row, "stop", (chosen.id,), piece, row.text.stopped_by)
    if row.choosing.is_complete:
        return _end(row, "stop", (chosen.id,), piece + row.text.finish(), None)
    if len(row.new_ids) == row.choosing.sampling.max_new_tokens:
        return _end(row, "length", (chosen.id,), piece + row.text.finish(), None)
    return _tokens(row, (chosen.id,), piece)


def _is_stop(base: Base, row: Row, token: int) -> bool:
    sampling = row.choosing.sampling
    return token in sampling.stop_ids or (token in base.stop_ids and not sampling.ignore_eos)


def _end(
    row: Row,
    reason: FinishReason,
    ids: tuple[int, ...],
    piece: str,
    stopped_by: str | int | None,
    end_log_prob: TokenLogProb | None = None,
) -> Tokens:
    log_probs = tuple(token.log_prob for token in row.log_probs)
    row.answer = Answer(tuple(row.new_ids), row.text.text, reason, log_probs, stopped_by, end_log_prob)
    return _tokens(row, ids, piece)


def _tokens(row: Row, ids: tuple[int, ...], piece: str) -> Tokens:
    log_probs = (row.log_probs[-1],) if ids and row.log_probs else ()
    return Tokens(row.owner.id, row.choice, ids, piece, log_probs, row.answer)
