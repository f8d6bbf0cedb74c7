"""Find out how an encoder runs on embeddings, and refuse it where it does not answer as its model does on token ids.

The truth is the model itself: its hidden states on its own token ids, on a soft prompt and a text as one plain run of
embeddings, and the logits of its own masked-LM head. Where rows of several lengths in one batch, pads masked, differ
from that, rows run alone; where even that differs, the base is refused in one sentence. Every encoder is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from softprompt.base import Base
from softprompt.errors import BaseModelError
from softprompt.families.batch import PackedBatch, Segment
from softprompt.families.forward import Forward, Packing
from softprompt.families.frozen_linear import FrozenLinearKernels
from softprompt.families.head import Head
from softprompt.families.masked_head import masked_head
from softprompt.families.packing_check import NOT_OURS, checked_packing, is_spread
from softprompt.families.patches import install_kernels
from softprompt.families.probes import NUM_VIRTUAL, first_positions, is_close, probe_ids, refused, some_prompt, why

_LENGTHS = (9, 4)  # of the rows of a probe
_ALONE = Packing(None, "rows run one at a time: in one batch they change each other's answers")
_PACKED = "rows run packed, each with its soft prompt, for an encoder's soft prompt sees the text"


def encoder_forward(base: Base) -> Forward:
    """The forward of an encoder, as far as it is exact for this base. Raises BaseModelError where it is not."""
    if getattr(base.model.config, "attention_type", None) == "block_sparse":  # only a long row would show it
        raise refused(base, "its long rows leave keys out by chance; set its attention_type to original_full")
    forward = _batched_or_alone(base, _like_own_ids(base))
    forward = replace(forward, head=masked_head(base, forward.head.kernels))
    _check_prompt(base, forward)
    return forward if forward.packing is _ALONE else replace(forward, packing=_packing(base, forward))


def _like_own_ids(base: Base) -> Forward:
    """Positions given, from where the model counts, or left to it: the first way that equals it on its own ids."""
    backbone, ids = base.model.base_model, probe_ids(base, _LENGTHS[0])
    truth: Tensor = backbone(input_ids=ids)[0][0]
    if not truth.isfinite().all():
        raise BaseModelError(f"base {base.name!r} computes NaN in {base.dtype}; load it in float32 or bfloat16")
    install_kernels(base.model)
    whole = Forward(backbone, Head(kernels=FrozenLinearKernels()), None, cache="none", is_causal=False)
    row, failure = base.token_inputs(ids)[0], "its states on the embeddings of a text are not those on its token ids"
    for first_position in first_positions(base, backbone):
        forward = replace(whole, first_position=first_position)
        try:
            if is_close(_states(forward, [row])[0], truth):
                return forward
        except Exception as error:  # another way may work
            failure = why(base.model, error)
    raise refused(base, failure)


def _batched_or_alone(base: Base, forward: Forward) -> Forward:
    """Rows of several lengths in one batch, or each alone where the batch changes their states."""
    texts = [base.token_inputs(probe_ids(base, length))[0] for length in _LENGTHS]
    spliced = [_spliced(base, text, seed) for seed, text in enumerate(texts)]
    truth = [forward.backbone(input_ids=probe_ids(base, length))[0][0] for length in _LENGTHS]
    truth += [forward.backbone(inputs_embeds=row[None])[0][0] for row in spliced]
    for way in (forward, replace(forward, max_batchable_length=0, packing=_ALONE)):
        batches = [[*texts, *spliced]] if way is forward else [[row] for row in (*texts, *spliced)]
        with suppress(Exception):  # the other way may work
            found = [states for batch in batches for states in _states(way, batch)]
            if all(map(is_close, found, truth)):
                return way
    raise refused(base, "its states behind a soft prompt are not those on one run of embeddings")


@torch.enable_grad()
def _check_prompt(base: Base, forward: Forward) -> None:
    text = base.token_inputs(probe_ids(base, _LENGTHS[0]))[0]
    row, other = (_spliced(base, text, seed) for seed in (1, 2))
    leaf = row.detach().requires_grad_(True)
    states, otherwise = (_states(forward, [each])[0][1 + NUM_VIRTUAL :] for each in (leaf, other))
    if torch.equal(states, otherwise):
        raise refused(base, "it answers alike whatever the soft prompt")
    (gradient,) = torch.autograd.grad(states.log_softmax(-1).amax(-1).sum(), leaf)
    own = gradient[1 : 1 + NUM_VIRTUAL]
    if not own.isfinite().all() or not own.any():
        raise refused(base, "no finite gradient reaches a soft prompt")


def _packing(base: Base, forward: Forward) -> Packing:
    rows = [_spliced(base, base.token_inputs(probe_ids(base, length))[0], length) for length in _LENGTHS]
    lengths = [len(row) for row in rows]
    segments = tuple(Segment(sum(lengths[:number]), length) for number, length in enumerate(lengths))
    positions = torch.cat([torch.arange(length, device=base.device) for length in lengths])
    batch = PackedBatch(segments, is_causal=False)

    def packed(packing: Packing) -> Tensor:
        return replace(forward, packing=packing).packed_hidden_states(torch.cat(rows), positions, batch)

    def alone() -> Tensor:
        return torch.cat([_states(forward, [row])[0] for row in rows])

    found = checked_packing(base, _PACKED, alone, packed)
    is_read = batch.made or is_spread(base)  # DeBERTa's attention, which is its own, reads no batch
    return found if is_read else NOT_OURS


def _spliced(base: Base, text: Tensor, seed: int) -> Tensor:
    """A text with some soft prompt behind its first token."""
    vectors = base.virtual_inputs(some_prompt(base, seed))
    return torch.cat([text[:1], vectors, text[1:]])


def _states(forward: Forward, rows: Sequence[Tensor]) -> list[Tensor]:
    """Hidden states [S, D] of each row [S, H] of a batch, pads behind the shorter ones as in `softprompt.splice`."""
    embeds = pad_sequence(list(rows), batch_first=True)
    slots = torch.arange(embeds.shape[1], device=embeds.device)
    is_real = torch.stack([slots < len(row) for row in rows])
    hidden = forward.hidden_states(embeds, is_real.long(), slots.where(is_real, 0))
    return [own[: len(row)] for own, row in zip(hidden, rows, strict=True)]
