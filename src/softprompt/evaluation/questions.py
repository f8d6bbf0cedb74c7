"""Rows as questions with a known answer, and the greedy answers that a base gives under a prompt.

The answer is the row's completion, or the last turn of the assistant in a chat; plain text has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from softprompt.base import Base
from softprompt.config import SamplingConfig
from softprompt.data import Rows, Written, chat_prompt_ids, completion_ids, write_rows
from softprompt.data.messages import is_learned
from softprompt.engine import Request, generate
from softprompt.evaluation.fit import room_for_text, without_start
from softprompt.families import Forward
from softprompt.prompt import SoftPrompt


@dataclass(frozen=True)
class Question:
    """One row to be answered."""

    ids: tuple[int, ...]  # what stands before the answer, BOS included, of any length
    reference: str
    num_reference_tokens: int
    index: int  # in the source


@dataclass(frozen=True)
class Questions:
    """The first rows of a set that have an answer."""

    asked: tuple[Question, ...]
    num_available: int  # rows of the set that have an answer, asked or not


def ask(base: Base, rows: Rows, max_rows: int | None = None) -> Questions:
    """The rows that have an answer, the first `max_rows` of them; none where the set is plain text.

    Raises DataError, naming the row, for one that cannot be written.
    """
    written = write_rows(rows) if rows.form.kind != "plain" else []
    available = [(position, row) for position, row in enumerate(written) if _has_answer(row)]
    asked = [_question(base, rows, position, row) for position, row in available[:max_rows]]
    return Questions(tuple(asked), len(available))


def greedy_answers(
    base: Base,
    forward: Forward,
    questions: Sequence[Question],
    prompt: SoftPrompt | None,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
) -> list[str]:
    """One answer per question, ended by EOS or after as many tokens as the longest reference has and one more.

    `max_new_tokens` lowers that limit, and so does the room there is: `max_length` tokens with the question, which
    loses its start, as in training, only where it and its own reference do not fit.
    """
    room = room_for_text(base, prompt, max_length)
    longest = 1 + max((question.num_reference_tokens for question in questions), default=0)
    cap = longest if max_new_tokens is None else min(longest, max_new_tokens)
    requests = []
    for question in questions:
        ids = without_start(base, question.ids, room - _reserved(base, question, room, cap))
        requests.append(Request(ids, prompt, SamplingConfig(max_new_tokens=min(cap, room - len(ids)))))
    return [answer.text for answer in generate(base, requests, forward=forward)]


def _reserved(base: Base, question: Question, room: int, cap: int) -> int:
    """Tokens kept free for the answer: what its reference takes, if that leaves one token of the question."""
    return max(1, min(question.num_reference_tokens + 1, cap, room - len(base.bos_ids) - 1))


class _Turn(NamedTuple):
    position: int  # among the messages
    text: str


def _last_turn(row: Written) -> _Turn | None:
    """The assistant's last words that are learned, if something was said before them."""
    spoken = [
        _Turn(position, message["content"])
        for position, message in enumerate(row.messages)
        if position > 0 and is_learned(message) and message["content"].strip()
    ]
    return spoken[-1] if spoken else None


def _has_answer(row: Written) -> bool:
    return not row.is_empty and (not row.messages or _last_turn(row) is not None)


def _question(base: Base, rows: Rows, position: int, row: Written) -> Question:
    turn = _last_turn(row)
    if turn is None:
        ids, reference = base.bos_ids + base.encode(row.prompt), row.text
        num_tokens = len(completion_ids(base, row.prompt, row.text))
    else:
        ids = chat_prompt_ids(base, row.messages[: turn.position], rows.where(position))
        reference, num_tokens = turn.text, len(base.encode(turn.text))
    return Question(ids, reference, num_tokens, rows.indices[position])
