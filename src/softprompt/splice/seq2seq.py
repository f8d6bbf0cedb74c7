"""Rows of an encoder-decoder: [soft prompt, text] for the encoder, [decoder's prompt, start, target] for the decoder.

A prompt for both sides is one tensor [2P, H], as PEFT lays it out: first the encoder's vectors, then the decoder's.

B rows, S slots (pads included), N targets, D hidden width, P prompt length, H embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from softprompt.base import Base
from softprompt.families import Forward
from softprompt.splice.embed import Row, Targets, embed_with_prompt, find_targets


def decoded_targets(
    base: Base, forward: Forward, rows: Sequence[Row], prompts: Sequence[Tensor], checkpoint: bool = False
) -> tuple[Tensor, Targets]:
    """The decoder's hidden states [N, D] that predict the rows' targets, and the targets.

    A row's `source` is what the encoder reads behind the prompt, its `ids` what the decoder is to write behind its
    start token. With `has_decoder_prompt` the first half of the vectors is the encoder's, the second the decoder's.
    """
    sides = [_sides(row, prompts) for row in rows]
    read = _padded(base, [(own.encoder, row.source) for own, row in zip(sides, rows, strict=True)])
    start = base.decoder_start_ids
    written = _padded(base, [(own.decoder, (*start, *row.ids[:-1])) for own, row in zip(sides, rows, strict=True)])
    encoder, decoder = base.model.get_encoder(), base.model.get_decoder()
    encoded = encoder(inputs_embeds=read.embeds_BSH, attention_mask=read.mask_BS).last_hidden_state
    hidden = decoder(
        inputs_embeds=written.embeds_BSH, encoder_hidden_states=encoded, encoder_attention_mask=read.mask_BS,
        use_cache=False,
    ).last_hidden_state.flatten(0, 1)  # fmt: skip
    num_slots = written.mask_BS.shape[1]
    first_slots = [
        number * num_slots + len(start) + (0 if own.decoder is None else len(own.decoder))
        for number, own in enumerate(sides)
    ]
    targets = find_targets(rows, first_slots, [slot - 1 for slot in first_slots], base.device)
    return hidden[targets.slots], targets


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


class _Padded(NamedTuple):
    """One side of a batch, pads behind the rows."""

    embeds_BSH: Tensor
    mask_BS: Tensor  # 0 at pads


def _padded(base: Base, pieces: Sequence[tuple[Tensor | None, Sequence[int]]]) -> _Padded:
    lengths = [len(ids) + (0 if vectors is None else len(vectors)) for vectors, ids in pieces]
    embeds = pad_sequence(list(embed_with_prompt(base, pieces).split(lengths)), batch_first=True)
    slots = torch.arange(max(lengths), device=base.device)
    return _Padded(embeds, (slots < torch.tensor(lengths, device=base.device)[:, None]).long())
