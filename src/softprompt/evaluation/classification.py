"""Accuracy on labelled rows: by the likelihood of each label, and by what is generated.

A label's likelihood is the sum over its tokens, EOS excluded, in the context that training gave it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from softprompt.base import Base
from softprompt.config import SamplingConfig
from softprompt.data import Rows, label_ids, write_rows
from softprompt.data.rows import Written
from softprompt.engine import Request, generate
from softprompt.errors import DataError
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


def accuracies(
    base: Base, forward: Forward, prompts: Mapping[str, SoftPrompt], sets: Mapping[str, Rows]
) -> list[Accuracy]:
    """The bare base and each prompt on each set that has labels; sets without are left out."""
    labelled = {name: rows for name, rows in sets.items() if rows.form.labels}
    contenders: list[tuple[str | None, SoftPrompt | None]] = [(None, None), *prompts.items()]
    return [
        accuracy(base, forward, set_name, rows, name, prompt)
        for set_name, rows in labelled.items()
        for name, prompt in contenders
    ]


def accuracy(
    base: Base, forward: Forward, set_name: str, rows: Rows, name: str | None, prompt: SoftPrompt | None
) -> Accuracy:
    """One contender on one labelled set. Raises DataError for a row whose completion is none of the form's labels."""
    written = write_rows(rows)
    true = [_label_number(rows, position, row) for position, row in enumerate(written)]
    found = likeliest_labels(base, forward, [row.prompt for row in written], rows.form.labels, prompt)
    hits = [a == b for a, b in zip(found, true, strict=True)]
    said = _generated_labels(base, forward, [row.prompt for row in written], rows.form.labels, prompt)
    wilson = stats.binomtest(sum(hits), len(hits)).proportion_ci(CONFIDENCE, method="wilson")
    return Accuracy(
        held_out=set_name,
        prompt=name,
        num_rows=len(hits),
        by_likelihood=sum(hits) / len(hits),
        interval=Interval(float(wilson.low), float(wilson.high)),
        generated=sum(a == b for a, b in zip(said, true, strict=True)) / len(hits),
        wrong_rows=tuple(index for index, hit in zip(rows.indices, hits, strict=True) if not hit),
    )


def likeliest_labels(
    base: Base, forward: Forward, texts: Sequence[str], labels: Sequence[str], prompt: SoftPrompt | None
) -> list[int]:
    """For each text, the number of the label with the highest summed log-likelihood after it."""
    rows = [_label_row(base, text, label, prompt) for text in texts for label in labels]
    losses = target_nlls(base, forward, rows, [prompt.tensor] if prompt is not None else [])
    nats = [sum(loss.values()) for loss in losses]
    per_text = [nats[first : first + len(labels)] for first in range(0, len(nats), len(labels))]
    return [scores.index(min(scores)) for scores in per_text]


def _label_row(base: Base, text: str, label: str, prompt: SoftPrompt | None) -> Row:
    before = base.bos_ids + base.encode(text)
    own = label_ids(base, text, label)
    return Row(before + own, None if prompt is None else 0, (False,) * len(before) + (True,) * len(own))


def _label_number(rows: Rows, position: int, row: Written) -> int:
    if row.text not in rows.form.labels:
        raise DataError(f"{rows.where(position)}: {row.text!r} is none of the labels {', '.join(rows.form.labels)}")
    return rows.form.labels.index(row.text)


def _generated_labels(
    base: Base, forward: Forward, texts: Sequence[str], labels: Sequence[str], prompt: SoftPrompt | None
) -> list[int | None]:
    longest = max(len(label_ids(base, texts[0], label)) for label in labels)
    sampling = SamplingConfig(max_new_tokens=longest + 1)
    requests = [Request(base.bos_ids + base.encode(text), prompt) for text in texts]
    batches = [requests[i : i + _ROWS_PER_GENERATION] for i in range(0, len(requests), _ROWS_PER_GENERATION)]
    answers = [answer for batch in batches for answer in generate(base, batch, sampling, forward=forward)]
    return [_named_label(answer.text, labels) for answer in answers]


def _named_label(text: str, labels: Sequence[str]) -> int | None:
    """The longest label that the answer begins with, spaces around it aside."""
    said = text.strip()
    fits = [label for label in labels if said.startswith(label.strip())]
    return labels.index(max(fits, key=len)) if fits else None
