"""The losses and outputs of tasks that read hidden states at columns: cloze, classify, tag, answer and embed.

cloze      the base's own logits of the label words at the mask; a label's is the mean over its words' tokens
classify   the head's logits of the row's pooled state, which is the mean over the states at its columns
tag        the head's logits at each column; a column without a label (NO_LABEL) has no loss
answer     where the span begins and ends: two distributions over the columns, and the mean of their two losses, as in
           transformers; a row's two labels are numbers of columns
embed      the mean over the states at each text's columns, of length 1; in-batch negatives: cross-entropy of a text to
           its positive among the others of all rows (arXiv 1705.00652; MultipleNegativesRankingLoss of
           sentence-transformers, with its scale of 20)

Logits and losses are float32, of a float64 base float64.

B rows, N columns of all rows, D hidden width, C classes, U label-word tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from softprompt.base import Base
from softprompt.errors import BaseModelError, ConfigError, EncodingError
from softprompt.families import Forward
from softprompt.families.task_head import TaskHead, task_head
from softprompt.prompt import SoftPrompt
from softprompt.splice import Row, column_states
from softprompt.types import Example, InputForm

NO_LABEL = -100  # of a column that has none, as in transformers
EMBED_SCALE = 20.0  # of cosines
SLOTS_PER_BATCH = 4_096  # pads included


@dataclass(frozen=True)
class Objective:
    """What rows of one form are trained for."""

    base: Base
    forward: Forward
    form: InputForm
    head: TaskHead | None  # None for cloze, which has the model's own, and embed

    @property
    def is_joint(self) -> bool:
        """Whether a row's loss depends on the other rows of its step (embed: they are its negatives)."""
        return self.form.task == "embed"

    def row_nats(
        self, states_ND: Tensor, owners_N: Tensor, rows: Sequence[Row], weights: Mapping[str, Tensor]
    ) -> Tensor:
        """The loss of each row [B], differentiable, summed over what `num_targets` counts.

        `states_ND` are the states at the rows' columns, in row order, `owners_N` the number of each one's row,
        `weights` those of the head.
        """
        if self.form.task == "embed":
            return _ranking_nats(_text_vectors(states_ND, owners_N, rows), rows)
        logits = self._logits(states_ND, owners_N, len(rows), weights)
        if self.form.task == "answer":
            return _span_nats(logits, owners_N, rows)
        labels = torch.tensor([label for row in rows for label in row.labels], device=logits.device)
        nats = functional.cross_entropy(logits, labels, reduction="none", ignore_index=NO_LABEL)
        if self.form.task == "tag":
            return nats.new_zeros(len(rows)).index_add(0, owners_N, nats)
        return nats

    def outputs(
        self, states_ND: Tensor, owners_N: Tensor, rows: Sequence[Row], weights: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """What each row gives, in row order; arguments as of `row_nats`.

        Logits [C] of the labels (cloze, classify), of each column [columns, C] (tag), of each column as the span's
        start and its end [columns, 2] (answer), or a vector [D] of length 1 (embed), of the row's own text.
        """
        if self.form.task == "embed":
            return [own[0] for own in _text_vectors(states_ND, owners_N, rows)]
        logits = self._logits(states_ND, owners_N, len(rows), weights)
        if self.form.task in ("tag", "answer"):
            return list(logits.split(torch.bincount(owners_N, minlength=len(rows)).tolist()))
        return list(logits.unbind())

    def nats_of(
        self,
        own: Sequence[int],
        states_ND: Tensor,
        owners_N: Tensor,
        rows: Sequence[Row],
        weights: Mapping[str, Tensor],
    ) -> Tensor:
        """The loss of some of the rows of a forward, those of the numbers in `own`; as `row_nats`."""
        own_states, own_owners = states_of(own, states_ND, owners_N, len(rows))
        return self.row_nats(own_states, own_owners, [rows[number] for number in own], weights)

    def head_states(self, states_ND: Tensor, owners_N: Tensor, rows: Sequence[Row]) -> Tensor:
        """What the head reads: the pooled state of each row [B, D] (classify), or the states at its columns [N, D]."""
        return self._head_states(states_ND, owners_N, len(rows))

    def _head_states(self, states_ND: Tensor, owners_N: Tensor, num_rows: int) -> Tensor:
        return _means(states_ND, owners_N, num_rows) if self.form.task == "classify" else states_ND

    @cached_property
    def word_ids(self) -> tuple[tuple[int, ...], ...]:
        """Task "cloze": for each label the tokens of its words. Raises ConfigError; see `label_word_ids`."""
        return label_word_ids(self.base, self.form)

    def _logits(self, states_ND: Tensor, owners_N: Tensor, num_rows: int, weights: Mapping[str, Tensor]) -> Tensor:
        """[B, C] of cloze and classify, [N, C] of tag and answer."""
        if self.form.task == "cloze":
            return self._label_logits(states_ND)
        assert self.head is not None
        return self.head.logits(weights, self._head_states(states_ND, owners_N, num_rows))

    def _label_logits(self, states_BD: Tensor) -> Tensor:
        ids_U = torch.tensor([i for ids in self.word_ids for i in ids], device=states_BD.device)
        logits_BU = self.forward.head.logits_of(states_BD, ids_U)
        parts = logits_BU.split([len(ids) for ids in self.word_ids], dim=1)
        return torch.stack([part.mean(dim=1) for part in parts], dim=1)


def states_of(own: Sequence[int], states_ND: Tensor, owners_N: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The states of some of the rows of a forward, and the number of each one's row among those."""
    number_of = torch.full((num_rows,), -1, device=owners_N.device)
    number_of[torch.tensor(own, device=owners_N.device)] = torch.arange(len(own), device=owners_N.device)
    is_own = number_of[owners_N] >= 0
    return states_ND[is_own], number_of[owners_N[is_own]]


class ObjectiveWeights(NamedTuple):
    """An objective with the weights of its head, which are none where it has no head."""

    objective: Objective
    weights: Mapping[str, Tensor]


def num_labels(row: Row | Example) -> int:
    """What the loss of a row with columns is counted over: the words of a tagged text that have a tag, else one."""
    if row.is_span or len(row.labels) != len(row.columns):
        return 1
    return sum(label != NO_LABEL for label in row.labels)


def objective(base: Base, forward: Forward, form: InputForm) -> Objective | None:
    """The objective of the form's task; None for "generate", whose loss is on tokens.

    Raises BaseModelError where the base cannot do the task, ConfigError for label words that it cannot tell apart.
    """
    if form.task == "generate":
        return None
    if base.kind == "seq2seq":
        raise BaseModelError(
            f"base {base.name!r} is an encoder-decoder, which has no head for the task {form.task}; give a causal base "
            "or an encoder, or train it to write the answer (generate)"
        )
    if base.kind == "causal" and forward.head.linear is None:
        raise BaseModelError(
            f"base {base.name!r} runs as a whole, so its last hidden states are not known; the task {form.task} needs "
            "them: give a base of another family"
        )
    found = Objective(base, forward, form, task_head(base, form))
    if form.task == "cloze":
        _ = found.word_ids
    return found


@torch.no_grad()
def head_outputs(
    base: Base,
    forward: Forward,
    examples: Sequence[Example | Row],
    prompt: SoftPrompt | None,
    max_slots: int = SLOTS_PER_BATCH,
    form: InputForm | None = None,
) -> list[Tensor]:
    """What each example or row gives under the prompt, in order, as `Objective.outputs`, on the CPU.

    They run in batches by length, of at most `max_slots` tokens, pads and virtual tokens included, or of one row. The
    rows' own `prompt` is not read, and of their texts only the first. Without a prompt the bare base answers in `form`,
    for cloze and embed, which need no head.
    """
    form = form if prompt is None else prompt.record.form
    assert form is not None, "a prompt or a form"
    found = objective(base, forward, form)
    if found is None:
        raise ConfigError("the prompt was trained to generate text; it has no head, and no logits of labels")
    weights, num_virtual = (prompt.head, prompt.num_virtual_tokens) if prompt is not None else ({}, 0)
    if found.head is not None:
        found.head.check(weights, "the soft prompt's head")
    own = None if prompt is None else 0
    rows = [
        Row(each.ids, own, num_before=each.num_before, columns=each.columns, num_first=each.num_first)
        for each in examples
    ]
    result: list[Tensor | None] = [None] * len(rows)
    for batch in by_length([len(row.ids) + num_virtual for row in rows], max_slots):
        some = [rows[number] for number in batch]
        states_ND, owners_N = column_states(base, forward, some, [] if prompt is None else [prompt.tensor])
        for number, output in zip(batch, found.outputs(states_ND, owners_N, some, weights), strict=True):
            result[number] = output.cpu()
    return [output for output in result if output is not None]


def by_length(lengths: Sequence[int], max_slots: int = SLOTS_PER_BATCH) -> list[list[int]]:
    """The numbers of rows in batches of like length, longest first, of at most `max_slots` with pads, or of one row."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_slots:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def label_word_ids(base: Base, form: InputForm) -> tuple[tuple[int, ...], ...]:
    """For each label the tokens of its words, as they stand behind what the template has before the mask.

    Raises ConfigError for a label without words or tokens, with an unknown one, or with those of another label.
    """
    before = _before_mask(base, form)
    found: list[tuple[int, ...]] = []
    for label, words in zip(form.labels, form.label_words, strict=True):
        ids = tuple(i for word in words for i in _word_ids(base, word, before))
        unknown = base.tokenizer.unk_token_id
        if not ids or unknown in ids:
            raise ConfigError(
                f"label {label!r} has the words {', '.join(map(repr, words)) or 'none'}, which the tokenizer of base "
                f"{base.name!r} does not know; give others (label_words {label}=WORD)",
                param="label_words",
            )
        if ids in found:
            raise ConfigError(
                f"labels {form.labels[found.index(ids)]!r} and {label!r} have the same tokens at the mask; give them "
                f"different words (label_words {label}=WORD)",
                param="label_words",
            )
        found.append(ids)
    return tuple(found)


_MASKS = ("[MASK]", "<mask>")  # as templates write it, besides the tokenizer's own
_A_WORD = "a"


def _before_mask(base: Base, form: InputForm) -> str:
    """The character before the mask, a space for any white one; empty where the mask begins the text."""
    template = form.template or ""
    for mask in (base.tokenizer.mask_token, *_MASKS):
        before, found, _ = template.partition(mask) if isinstance(mask, str) else ("", "", "")
        if found:
            return " " if before[-1:].isspace() else before[-1:]
    return " "


def _word_ids(base: Base, word: str, before: str) -> tuple[int, ...]:
    """The tokens of a word behind a character: what they add to a text that ends there."""
    plain = base.encode(word)
    front = _A_WORD if before == " " else before
    if not front:
        return plain
    try:
        known, whole = base.encode(front), base.encode(f"{_A_WORD} {word}" if before == " " else f"{front}{word}")
    except EncodingError:  # a tokenizer of words that does not know ours
        return plain
    is_apart = bool(known) and whole[: len(known)] == known and len(whole) > len(known)
    return whole[len(known) :] if is_apart else plain


def _means(states_ND: Tensor, owners_N: Tensor, num_rows: int) -> Tensor:
    """The mean state of each row [B, D]; where each has one, the states themselves."""
    if len(states_ND) == num_rows:
        return states_ND
    wide = states_ND.to(torch.promote_types(states_ND.dtype, torch.float32))
    counts_B = torch.bincount(owners_N, minlength=num_rows).to(wide)
    return wide.new_zeros(num_rows, wide.shape[1]).index_add(0, owners_N, wide) / counts_B[:, None]


def _span_nats(logits_N2: Tensor, owners_N: Tensor, rows: Sequence[Row]) -> Tensor:
    """The mean of the losses of start and end [B]; zero for one whose label is NO_LABEL."""
    found = []
    for own, row in zip(logits_N2.split(torch.bincount(owners_N, minlength=len(rows)).tolist()), rows, strict=True):
        labels = torch.tensor(row.labels, device=own.device)
        nats = functional.cross_entropy(own.T, labels, reduction="none", ignore_index=NO_LABEL)
        found.append(nats.mean())
    return torch.stack(found)


def _text_vectors(states_ND: Tensor, owners_N: Tensor, rows: Sequence[Row]) -> list[Tensor]:
    """For each row the vectors of its texts [texts, D], its own first, each of length 1."""
    wide = states_ND.to(torch.promote_types(states_ND.dtype, torch.float32))
    found = []
    for own, row in zip(wide.split(torch.bincount(owners_N, minlength=len(rows)).tolist()), rows, strict=True):
        texts = own.split([len(row.columns), *map(len, row.columns_of_others)])
        found.append(functional.normalize(torch.stack([text.mean(dim=0) for text in texts]), dim=1))
    return found


def _ranking_nats(vectors: Sequence[Tensor], rows: Sequence[Row]) -> Tensor:
    """Cross-entropy of each row's own text to its positive, among the positives and then the negatives of all [B]."""
    assert all(row.others for row in rows), "a row to train has a positive text"
    anchors_BD = torch.stack([own[0] for own in vectors])
    candidates = torch.cat([torch.stack([own[1] for own in vectors]), *(own[2:] for own in vectors)])
    scores = EMBED_SCALE * anchors_BD @ candidates.T
    return functional.cross_entropy(scores, torch.arange(len(rows), device=scores.device), reduction="none")
