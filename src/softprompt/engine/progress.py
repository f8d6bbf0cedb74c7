"""One more token of an answer: what can be printed of it, and whether it ends there."""

from __future__ import annotations

from softprompt.base import Base
from softprompt.engine.choosing import Chosen
from softprompt.engine.requests import Answer, FinishReason, TokenLogProb, Tokens
from softprompt.engine.rows import Row


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
