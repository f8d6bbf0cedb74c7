"""Rows of an encoder-decoder: [soft prompt, text] for the encoder, [decoder's prompt, start, target] for the decoder.

A prompt for both sides is one tensor [2P, H], as PEFT lays it out: first the encoder's vectors, then the decoder's.

B rows, S slots (pads included), N targets, D hidden width, P prompt length, H embedding width.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from softprompt.base import Base
from softprompt.families import Forward, Seq2SeqForward, seq2seq_forward
from softprompt.splice.embed import Row, Targets, embed_with_prompt, find_targets

_Piece = tuple[Tensor | None, Sequence[int]]  # vectors of a soft prompt, if any, and the token ids behind them


def decoded_targets(
    base: Base, forward: Forward, rows: Sequence[Row], prompts: Sequence[Tensor], checkpoint: bool = False
) -> tuple[Tensor, Targets]:
    """The decoder's hidden states [N, D] that predict the rows' targets, and the targets.

    A row's `source` is what the encoder reads behind the prompt, its `ids` what the decoder is to write behind its
    start token. With `has_decoder_prompt` the first half of the vectors is the encoder's, the second the decoder's.
    """
    own, start = seq2seq_forward(forward), base.decoder_start_ids
    sides = [_sides(row, prompts) for row in rows]
    texts, numbers = _distinct([(row.prompt, tuple(row.source)) for row in rows])
    read = [(sides[text].encoder, rows[text].source) for text in texts]
    written = [(side.decoder, (*start, *row.ids[:-1])) for side, row in zip(sides, rows, strict=True)]
    if own.can_pack:
        hidden, starts = _packed(base, own, read, written, numbers, checkpoint)
    else:
        hidden, starts = _padded(base, own, read, written, numbers)
    first_slots = [
        first + len(start) + (0 if side.decoder is None else len(side.decoder))
        for first, side in zip(starts, sides, strict=True)
    ]
    targets = find_targets(rows, first_slots, [slot - 1 for slot in first_slots], base.device)
    return hidden[targets.slots], targets


def _distinct(keys: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """The positions of the distinct keys, and for each key its number among them: a text is encoded once."""
    first = {key: position for position, key in reversed(list(enumerate(keys)))}
    positions = sorted(first.values())
    return positions, [positions.index(first[key]) for key in keys]


class _Sides(NamedTuple):
    """The vectors of one row's prompt for each side; None for the bare base, and where the decoder has none."""

    encoder: Tensor | None
    decoder: Tensor | None


def _sides(row: Row, prompts: Sequence[Tensor]) -> _Sides:
    if row.prompt is None:
        return _Sides(None, None)
    vectors = prompts[row.prompt]
    if not row.has_decoder_prompt:
        return _Sides(vectors, None)
    count = len(vectors) // 2 if row.num_decoder_tokens is None else row.num_decoder_tokens
    return _Sides(vectors[: len(vectors) - count], vectors[len(vectors) - count :])


def _packed(
    base: Base, forward: Seq2SeqForward, read: Sequence[_Piece], written: Sequence[_Piece], numbers: Sequence[int],
    checkpoint: bool,
) -> tuple[Tensor, list[int]]:  # fmt: skip
    """The decoder's states [slots, D], and the slot where each row begins: all rows one behind the other."""
    num_written = _lengths(written)
    hidden = forward.packed_pairs(
        embed_with_prompt(base, read),
        _lengths(read),
        embed_with_prompt(base, written),
        num_written,
        numbers,
        checkpoint,
    )
    return hidden, list(accumulate(num_written, initial=0))[:-1]


def _padded(
    base: Base, forward: Seq2SeqForward, read: Sequence[_Piece], written: Sequence[_Piece], numbers: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """The same of rows with pads behind the shorter ones, on each side."""
    embeds_BSH, mask_BS = _side(base, read)
    states_BSD = forward.encode(embeds_BSH, mask_BS)
    embeds_BTH, mask_BT = _side(base, written)
    hidden_BTD = forward.decode(embeds_BTH, states_BSD[numbers], mask_BS[numbers])
    num_slots = mask_BT.shape[1]
    return hidden_BTD.flatten(0, 1), [number * num_slots for number in range(len(written))]


def _side(base: Base, pieces: Sequence[_Piece]) -> tuple[Tensor, Tensor]:
    """Embeddings [B, S, H] of one side of a batch, and a mask [B, S] that is 0 at pads."""
    lengths = _lengths(pieces)
    embeds = pad_sequence(list(embed_with_prompt(base, pieces).split(lengths)), batch_first=True)
    slots = torch.arange(max(lengths), device=base.device)
    return embeds, (slots < torch.tensor(lengths, device=base.device)[:, None]).long()


def _lengths(pieces: Sequence[_Piece]) -> list[int]:
    return [len(ids) + (0 if vectors is None else len(vectors)) for vectors, ids in pieces]
