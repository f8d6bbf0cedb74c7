"""The one place where soft prompts meet token embeddings, and where positions and targets are counted from.

A row is [soft prompt, BOS, text, answer]; positions count from the first virtual token. The layouts differ in how rows
lie side by side: concatenated and padded (`softprompt.splice.concatenate`), packed (`softprompt.splice.run`), or some
spans of them, for a forward over cached keys and values of the rest.

S tokens of a forward, W width of an input embedding, H width of a prompt, P prompt length, N targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.errors import DataError
from softprompt.types import Branch, Example


@dataclass(frozen=True)
class Row:
    """One sequence. `prompt` is an index into the prompts of the splice, None for the bare base."""

    ids: Sequence[int]
    prompt: int | None = None
    targets: Sequence[float] | None = None  # one per id: the weight of its loss; 0 or False where none is wanted
    branches: Sequence[Branch] | None = None  # of its label, each at a target, where the loss is among the labels
    num_before: int = 0  # ids in front of the virtual tokens; only an encoder has any
    source: Sequence[int] = ()  # of an encoder-decoder: what its encoder reads; `ids` are the decoder's, without start
    has_decoder_prompt: bool = False  # the prompt's second half stands in front of the decoder's tokens
    num_decoder_tokens: int | None = None  # vectors that are the decoder's, where they are not that half
    columns: Sequence[int] = ()  # of the ids, whose hidden states a head reads; -1 is the first virtual token
    labels: Sequence[int] = ()  # what the head should find there
    others: Sequence[Sequence[int]] = ()  # further texts under the same prompt, read alike (task "embed")
    num_first: int | None = None  # of two texts in one row: ids before the second, which may have another token type
    other_columns: Sequence[Sequence[int]] = ()  # of each of the others; empty: as `columns_of_others` finds them
    is_span: bool = False  # the two labels are the first and the last column of an answer

    def __post_init__(self) -> None:
        if self.prompt is None and not self.ids:
            raise DataError("an empty text has no token to continue from on the bare base; give at least one character")
        assert not self.targets or len(self.targets) == len(self.ids)
        is_predicted = self.prompt is not None or bool(self.source)
        assert is_predicted or not self.targets or not self.targets[0], "nothing predicts a bare first token"

    @classmethod
    def of(cls, example: Example, prompt: int | None, targets: Sequence[float], with_branches: bool = False) -> Row:
        """An example's row under a prompt."""
        return cls(
            example.ids, prompt, targets, example.branches if with_branches else None, example.num_before,
            example.source, example.has_decoder_prompt, example.num_decoder_tokens, example.columns, example.labels,
            example.others, example.num_first, example.other_columns, example.is_span,
        )  # fmt: skip

    @property
    def num_tokens(self) -> int:
        """Real tokens of all its texts, virtual ones not counted."""
        return len(self.ids) + len(self.source) + sum(map(len, self.others))

    @property
    def columns_of_others(self) -> list[Sequence[int]]:
        """The columns of each of its other texts: those given, or by the rule that the row's own columns show.

        The first token where the row's own is column 0 alone, the first virtual one where it is -1 alone, the last
        token where it is its last one alone; else all tokens of the text, for a mean, as where the row's own text is
        one token, which shows no rule.
        """
        if self.other_columns:
            return list(self.other_columns)
        columns, last = tuple(self.columns), len(self.ids) - 1
        if columns == (-1,) or (columns == (0,) and last > 0):
            return [columns for _ in self.others]
        is_last = columns == (last,) and last > 0
        return [(len(ids) - 1,) if is_last else tuple(range(len(ids))) for ids in self.others]


def embed_with_prompt(base: Base, pieces: Sequence[tuple[Tensor | None, Sequence[int]]]) -> Tensor:
    """Input embeddings [S, W] of pieces, one after the other: vectors of a soft prompt [P, H], if any, then token ids.

    The float32 prompt is cast to the base's dtype here and nowhere else (but for the probes of `families.exactness`).
    Gradients flow into the prompts only.
    """
    texts = base.token_inputs(torch.tensor([i for _, ids in pieces for i in ids], dtype=torch.long))
    if all(vectors is None for vectors, _ in pieces):
        return texts
    parts = []
    for (vectors, _), text in zip(pieces, texts.split([len(ids) for _, ids in pieces]), strict=True):
        if vectors is not None:
            parts.append(base.virtual_inputs(vectors))
        parts.append(text)
    return torch.cat(parts)


@dataclass(frozen=True)
class TokenSpan:
    """Consecutive positions of one row."""

    prompt: Tensor | None  # the whole soft prompt [P, H]
    ids: Sequence[int]  # of the whole row: text and answer
    first: int
    length: int


def embed_spans(base: Base, spans: Sequence[TokenSpan]) -> tuple[Tensor, Tensor]:
    """Input embeddings [S, W] and positions [S] of the spans, one after the other."""
    positions = [i for span in spans for i in range(span.first, span.first + span.length)]
    return embed_with_prompt(base, [_piece(span) for span in spans]), torch.tensor(positions, device=base.device)


def _piece(span: TokenSpan) -> tuple[Tensor | None, Sequence[int]]:
    """The vectors and the token ids that a span covers."""
    num_virtual = 0 if span.prompt is None else span.prompt.shape[0]
    end = span.first + span.length
    vectors = span.prompt[span.first : end] if span.prompt is not None and span.first < num_virtual else None
    return vectors, span.ids[max(span.first - num_virtual, 0) : max(end - num_virtual, 0)]


@dataclass(frozen=True)
class Targets:
    """Where a loss is wanted, in row order. All [N], int64 but for the weights, on the base's device."""

    ids: Tensor  # the token to predict
    slots: Tensor  # index of the hidden state that predicts it, among those of one forward
    rows: Tensor  # its row
    columns: Tensor  # its index among the row's ids
    weights: Tensor  # of its loss, float64


def rows_of_texts(rows: Sequence[Row]) -> tuple[list[Row], list[int]]:
    """A row for each text, a row's own before its others, and the number of the row that each belongs to."""
    texts, owners = [], []
    for number, row in enumerate(rows):
        others = zip(row.others, row.columns_of_others, strict=True)
        texts += [row, *(Row(ids, row.prompt, columns=own, num_before=row.num_before) for ids, own in others)]
        owners += [number] * (1 + len(row.others))
    return texts, owners


def find_columns(
    rows: Sequence[Row], first_slots: Sequence[int], virtual_slots: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The slots [N] of the rows' columns, and their rows [N], in row order.

    Given the slots of each row's first id, and of its first virtual token, which is column -1.
    """
    found = [
        (virtual if column < 0 else first + column, number)
        for number, (row, first, virtual) in enumerate(zip(rows, first_slots, virtual_slots, strict=True))
        for column in row.columns
    ]
    assert all(slot >= 0 for slot, _ in found), "a bare row has no virtual token"
    slots, owners = torch.tensor(found, dtype=torch.long, device=device).reshape(-1, 2).unbind(1)
    return slots, owners


def find_targets(
    rows: Sequence[Row], first_slots: Sequence[int], slots_before: Sequence[int], device: torch.device
) -> Targets:
    """The targets of rows, given the slot of each row's first id, and the slot of the hidden state that predicts it."""
    counted = [(number, row) for number, row in enumerate(rows) if row.targets is not None]
    weights = torch.tensor([weight for _, row in counted for weight in row.targets or ()], dtype=torch.float64)
    ids = torch.tensor([i for _, row in counted for i in row.ids], dtype=torch.long)
    lengths = torch.tensor([len(row.ids) for _, row in counted], dtype=torch.long)
    owners = torch.tensor([number for number, _ in counted], dtype=torch.long).repeat_interleave(lengths)
    columns = torch.arange(len(ids)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    wanted = weights.nonzero()[:, 0]
    ids, owners, columns, weights = ids[wanted], owners[wanted], columns[wanted], weights[wanted]
    first, before = (torch.tensor(slots, dtype=torch.long)[owners] for slots in (first_slots, slots_before))
    slots = torch.where(columns == 0, before, first + columns - 1)
    ids, slots, owners, columns = torch.stack([ids, slots, owners, columns]).to(device).unbind()
    return Targets(ids, slots, owners, columns, weights.to(device))
