"""Rows of an encoder: [CLS], soft prompt, text, [SEP] with the prompt behind [CLS] (the default), or in front of it.

Every token sees every other one of its row, the virtual ones too, so what a soft prompt computes depends on the text
and cannot be shared between rows. Positions count from the first token, virtual ones included. Rows run packed into
one sequence, each seeing itself alone, or padded, pads masked; a row has the same states either way.

N columns, D hidden width, P prompt length, H embedding width, S tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from softprompt.base import Base
from softprompt.families import Forward, PackedBatch, Segment
from softprompt.splice.embed import Row, embed_with_prompt, rows_of_texts


def encoded_columns(
    base: Base, forward: Forward, rows: Sequence[Row], prompts: Sequence[Tensor], checkpoint: bool = False
) -> tuple[Tensor, Tensor]:
    """The hidden states [N, D] at the rows' columns, in row order, and the number of each one's row [N].

    A column is an index among the row's ids; -1 is the first virtual token. The states of a row are those of its own
    ids, then those of each of its `others`, at `Row.columns_of_others`. Gradients flow into the prompts.
    """
    texts, owners = rows_of_texts(rows)
    num_virtual = [0 if text.prompt is None else prompts[text.prompt].shape[0] for text in texts]
    lengths = [len(text.ids) + own for text, own in zip(texts, num_virtual, strict=True)]
    embeds_SH = _embeds(base, texts, prompts)
    hidden = _hidden(forward, embeds_SH, _token_types(base, texts, num_virtual), lengths, checkpoint)
    firsts = accumulate(lengths, initial=0)
    found = [
        (first + _slot(text, column, own), owner)
        for text, owner, first, own in zip(texts, owners, firsts, num_virtual, strict=False)
        for column in text.columns
    ]
    slots_N, owners_N = torch.tensor(found, dtype=torch.long, device=base.device).reshape(-1, 2).unbind(1)
    return hidden[slots_N], owners_N


def _embeds(base: Base, texts: Sequence[Row], prompts: Sequence[Tensor]) -> Tensor:
    """[S, H], one row after the other."""
    pieces: list[tuple[Tensor | None, Sequence[int]]] = []
    for text in texts:
        pieces += [(None, text.ids[: text.num_before])] if text.num_before else []
        pieces.append((None if text.prompt is None else prompts[text.prompt], text.ids[text.num_before :]))
    return embed_with_prompt(base, pieces)


def _slot(text: Row, column: int, num_virtual: int) -> int:
    """The slot of a column among those of its text."""
    if column < 0:
        assert num_virtual, "a bare row has no virtual token"
        return text.num_before
    return column if column < text.num_before else column + num_virtual


def _token_types(base: Base, texts: Sequence[Row], num_virtual: Sequence[int]) -> Tensor | None:
    """[S]: 0, also at virtual tokens, as in PEFT, but for the second of two texts in a row; None where all are 0."""
    if not base.second_type or all(text.num_first is None for text in texts):
        return None
    types: list[int] = []
    for text, own in zip(texts, num_virtual, strict=True):
        first = len(text.ids) if text.num_first is None else text.num_first
        types += [0] * (own + first) + [base.second_type] * (len(text.ids) - first)
    return torch.tensor(types, device=base.device)


def _hidden(
    forward: Forward, embeds_SH: Tensor, types_S: Tensor | None, lengths: Sequence[int], checkpoint: bool
) -> Tensor:
    """[S, D] of rows that lie one after the other."""
    limit = forward.max_batchable_length
    if limit is not None and len(lengths) > 1 and max(lengths) > limit:
        ends = list(accumulate(lengths))
        rows = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        own_types = [None if types_S is None else types_S[row] for row in rows]
        parts = zip(rows, own_types, lengths, strict=True)
        return torch.cat([_hidden(forward, embeds_SH[row], own, [length], checkpoint) for row, own, length in parts])
    if not forward.can_pack:
        return _padded(forward, embeds_SH, types_S, lengths)
    firsts = accumulate(lengths, initial=0)
    segments = tuple(Segment(first, length) for first, length in zip(firsts, lengths, strict=False))
    positions_S = torch.cat([torch.arange(length) for length in lengths]).to(embeds_SH.device)
    batch = PackedBatch(segments, checkpoint=checkpoint, is_causal=False)
    return forward.packed_hidden_states(embeds_SH, positions_S, batch, types_S)


def _padded(forward: Forward, embeds_SH: Tensor, types_S: Tensor | None, lengths: Sequence[int]) -> Tensor:
    embeds = pad_sequence(list(embeds_SH.split(list(lengths))), batch_first=True)
    types = None if types_S is None else pad_sequence(list(types_S.split(list(lengths))), batch_first=True)
    slots = torch.arange(max(lengths), device=embeds.device)
    is_real = slots < torch.tensor(lengths, device=embeds.device)[:, None]
    return forward.hidden_states(embeds, is_real.long(), slots.where(is_real, 0), token_types_BS=types)[is_real]
