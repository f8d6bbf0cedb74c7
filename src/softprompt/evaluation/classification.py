"""Accuracy on labelled rows: by the likelihood of each label, and by what is generated.

A label's likelihood is the sum over its tokens, EOS excluded, in the context that training gave it. A context that is
longer than the base allows loses its start, as in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from softprompt.base import Base
from softprompt.config import SamplingConfig
from softprompt.data import Rows, label_ids, write_rows
from softprompt.engine import Request, generate
from softprompt.errors import DataError, LengthError
from softprompt.evaluation.heldout import CONFIDENCE, Interval
from softprompt.families import Forward
from softprompt.loss import target_nlls
from softprompt.prompt import SoftPrompt
from softprompt.splice import Row

_ROWS_PER_GENERATION = 64


@dataclass(frozen=True)
class Accuracy:
    """One prompt (or, with `prompt` None, the bare base) on one labelled held-out set."""

    held_out: str
    prompt: str | None
    num_rows: int
    by_likelihood: float  # share of rows whose own label is the likeliest
    interval: Interval  # of `by_likelihood` (Wilson), at 95 %
    generated: float  # share of rows whose greedy answer is the label
    wrong_rows: tuple[int, ...]  # source indices, by likelihood


@dataclass(frozen=True)
class _Labelled:
    """The rows of a set that have a label; empty ones are left out, as they are from a loss."""

    texts: tuple[str, ...]  # what stands before the label
    own: tuple[int, ...]  # the number of each row's own label
    indices: tuple[int, ...]  # in the source
    labels: tuple[str, ...]


def accuracies(
    base: Base, forward: Forward, prompts: Mapping[str, SoftPrompt], sets: Mapping[str, Rows], max_length: int
) -> list[Accuracy]:
    """The bare base and each prompt on each set that has labels; sets without are left out.

    `max_length` (tokens, virtual ones not counted) is one for all: they read the same. Raises as `accuracy` does.
    """
    labelled = {name: rows for name, rows in sets.items() if rows.form.labels}
    contenders: list[tuple[str | None, SoftPrompt | None]] = [(None, None), *prompts.items()]
    return [
        accuracy(base, forward, set_name, rows, name, prompt, max_length)
        for set_name, rows in labelled.items()
        for name, prompt in contenders
    ]


def accuracy(
    base: Base,
    forward: Forward,
    set_name: str,
    rows: Rows,
    name: str | None,
    prompt: SoftPrompt | None,
    max_length: int | None = None,
) -> Accuracy:
    """One contender on one labelled set. Raises DataError for a row whose completion is none of the form's labels."""
    known = _labelled(rows)
    limit = _limit(base, prompt, max_length)
    hits = _hits(base, forward, known, prompt, limit)
    said = _generated_labels(base, forward, known, prompt, limit)
    num_rows = len(hits)
    wilson = stats.binomtest(sum(hits), num_rows).proportion_ci(CONFIDENCE, method="wilson")
    return Accuracy(
        held_out=set_name,
        prompt=name,
        num_rows=num_rows,
        by_likelihood=sum(hits) / num_rows,
        interval=Interval(float(wilson.low), float(wilson.high)),
        generated=sum(a == b for a, b in zip(said, known.own, strict=True)) / num_rows,
        wrong_rows=tuple(index for index, hit in zip(known.indices, hits, strict=True) if not hit),
    )


def accuracy_by_likelihood(base: Base, forward: Forward, rows: Rows, prompt: SoftPrompt | None) -> float:
    """Share of rows whose own label is the likeliest. Raises as `accuracy` does."""
    hits = _hits(base, forward, _labelled(rows), prompt, _limit(base, prompt, None))
    return sum(hits) / len(hits)


def likeliest_labels(
    base: Base,
    forward: Forward,
    texts: Sequence[str],
    labels: Sequence[str],
    prompt: SoftPrompt | None,
    max_length: int | None = None,
) -> list[int]:
    """For each text, the number of the label with the highest summed log-likelihood after it."""
    limit = _limit(base, prompt, max_length)
    rows = [_label_row(base, text, label, prompt, limit) for text in texts for label in labels]
    losses = target_nlls(base, forward, rows, [prompt.tensor] if prompt is not None else [])
    nats = [sum(loss.values()) for loss in losses]
    per_text = [nats[first : first + len(labels)] for first in range(0, len(nats), len(labels))]
    return [scores.index(min(scores)) for scores in per_text]


def _labelled(rows: Rows) -> _Labelled:
    labels = rows.form.labels
    kept = [(position, row) for position, row in enumerate(write_rows(rows)) if not row.is_empty]
    for position, row in kept:
        if row.text not in labels:
            raise DataError(
                f"{rows.where(position)}: {row.text!r} is none of the labels {', '.join(map(repr, labels))}"
            )
    if not kept:
        raise DataError(f"{rows.source}: all {len(rows):,} rows are empty; there is nothing to classify")
    return _Labelled(
        texts=tuple(row.prompt for _, row in kept),
        own=tuple(labels.index(row.text) for _, row in kept),
        indices=tuple(rows.indices[position] for position, _ in kept),
        labels=labels,
    )


def _hits(base: Base, forward: Forward, known: _Labelled, prompt: SoftPrompt | None, limit: int) -> list[bool]:
    found = likeliest_labels(base, forward, known.texts, known.labels, prompt, limit)
    return [a == b for a, b in zip(found, known.own, strict=True)]


def _limit(base: Base, prompt: SoftPrompt | None, max_length: int | None) -> int:
    """Tokens of text that fit, special ones included."""
    own = base.max_length - (prompt.num_virtual_tokens if prompt is not None else 0)
    return own if max_length is None else min(own, max_length)


def _context(base: Base, text: str, room: int) -> tuple[int, ...]:
    """BOS and the end of the text, `room` ids at most."""
    ids = base.encode(text)
    kept = room - len(base.bos_ids)
    if kept < 1:
        raise LengthError(f"{room} tokens leave no room for a text before its label; use fewer virtual tokens")
    return base.bos_ids + ids[-kept:]


def _label_row(base: Base, text: str, label: str, prompt: SoftPrompt | None, limit: int) -> Row:
    own = label_ids(base, text, label)
    before = _context(base, text, limit - len(own))
    return Row(before + own, None if prompt is None else 0, (False,) * len(before) + (True,) * len(own))


def _generated_labels(
    base: Base, forward: Forward, known: _Labelled, prompt: SoftPrompt | None, limit: int
) -> list[int | None]:
    longest = 1 + max(len(label_ids(base, known.texts[0], label)) for label in known.labels)
    requests = [Request(_context(base, text, limit - longest), prompt) for text in known.texts]
    batches = [requests[i : i + _ROWS_PER_GENERATION] for i in range(0, len(requests), _ROWS_PER_GENERATION)]
    sampling = SamplingConfig(max_new_tokens=longest)
    answers = [answer for batch in batches for answer in generate(base, batch, sampling, forward=forward)]
    return [_named_label(answer.text, known.labels) for answer in answers]


def _named_label(text: str, labels: Sequence[str]) -> int | None:
    """The longest label that the answer begins with, spaces around it aside."""
    said = text.strip()
    fits = [label for label in labels if said.startswith(label.strip())]
    return labels.index(max(fits, key=len)) if fits else None
