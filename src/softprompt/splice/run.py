"""Run rows behind their soft prompts: packed where the base can, else concatenated and padded.

Packed, the tokens of all rows are one sequence without pads, each row behind its soft prompt, which stands once. The
prompts lie in front of the rows in the same sequence, or were run in an earlier pass (`Prefix`) to whose keys and
values the rows attend. Positions restart at every row, behind its own prompt. A hidden state depends on its own row and
prompt alone: tests compare it with the concatenated layout, and change a neighbour's tokens as the control.

S packed tokens, E tokens of all prompts, H embedding width, D hidden width, K prompts, P prompt length (ragged), N
targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from softprompt.base import Base
from softprompt.errors import BaseModelError
from softprompt.families import Forward, KeysValues, PackedBatch, Segment
from softprompt.splice.concatenate import concatenate
from softprompt.splice.embed import Row, Targets, embed_with_prompt, find_columns, find_targets, rows_of_texts
from softprompt.splice.encoder import encoded_columns
from softprompt.splice.seq2seq import decoded_targets

Range = tuple[int, int]  # first, length


@dataclass(frozen=True)
class Prefix:
    """What rows need of the soft prompts that were run before them."""

    ranges: tuple[Range, ...]  # of each prompt among the E tokens
    states: dict[nn.Module, KeysValues]  # by attention module: [h, E, d] each
    last_hidden_KD: Tensor  # at each prompt's last vector, which predicts a row's first token


def run_prompts(base: Base, forward: Forward, prompts: Sequence[Tensor]) -> Prefix:
    """Run soft prompts [P, H] once for any number of rows; gradients flow through it."""
    ranges = _ranges([prompt.shape[0] for prompt in prompts], 0)
    segments = tuple(Segment(first, length) for first, length in ranges)
    states: dict[nn.Module, KeysValues] = {}
    hidden = forward.packed_hidden_states(
        embed_with_prompt(base, [(prompt, ()) for prompt in prompts]),
        _positions(segments, base.device),
        PackedBatch(segments, kept=states),
    )
    last = torch.tensor([first + length - 1 for first, length in ranges], device=hidden.device)
    return Prefix(ranges, states, hidden[last])


def target_states(
    base: Base,
    forward: Forward,
    rows: Sequence[Row],
    prompts: Sequence[Tensor],
    prefix: Prefix | None = None,
    checkpoint: bool = False,
) -> tuple[Tensor, Targets]:
    """The hidden states [N, D] that predict the rows' targets, and the targets."""
    if base.kind == "seq2seq":
        return decoded_targets(base, forward, rows, prompts, checkpoint)
    if _must_run_alone(forward, rows, prompts):
        return _targets_one_by_one(base, forward, rows, prompts)
    found = _run(base, forward, rows, prompts, prefix, checkpoint)
    targets = find_targets(rows, found.first_slots, found.slots_before, base.device)
    return found.hidden[targets.slots], targets


def column_states(
    base: Base, forward: Forward, rows: Sequence[Row], prompts: Sequence[Tensor], checkpoint: bool = False
) -> tuple[Tensor, Tensor]:
    """The hidden states [N, D] at the rows' columns, in row order, and the number of each one's row [N].

    A column is an index among the row's ids; -1 is the first virtual token. The states of a row are those of its own
    ids, then those of each of its `others`, at `Row.columns_of_others`. Gradients flow into the prompts.
    Raises BaseModelError for an encoder-decoder, whose hidden states no head reads.
    """
    if base.kind == "encoder":
        return encoded_columns(base, forward, rows, prompts, checkpoint)
    if base.kind == "seq2seq":
        raise BaseModelError(f"base {base.name!r} is an encoder-decoder; its hidden states are read by no head")
    texts, owners = rows_of_texts(rows)
    hidden_ND, numbers_N = _columns_of_texts(base, forward, texts, prompts, checkpoint)
    return hidden_ND, torch.tensor(owners, device=base.device)[numbers_N]


def _columns_of_texts(
    base: Base, forward: Forward, texts: Sequence[Row], prompts: Sequence[Tensor], checkpoint: bool
) -> tuple[Tensor, Tensor]:
    if _must_run_alone(forward, texts, prompts):
        parts = [_columns_of_texts(base, forward, [text], prompts, checkpoint) for text in texts]
        numbers = [torch.full_like(own, number) for number, (_, own) in enumerate(parts)]
        return torch.cat([hidden for hidden, _ in parts]), torch.cat(numbers)
    found = _run(base, forward, texts, prompts, None, checkpoint)
    slots, numbers_N = find_columns(texts, found.first_slots, found.virtual_slots, base.device)
    return found.hidden[slots], numbers_N


@dataclass(frozen=True)
class _Hidden:
    """The last hidden states of one forward, and where those of each row lie."""

    hidden: Tensor  # [slots, D]
    first_slots: list[int]  # of each row's first id
    slots_before: list[int]  # of the state that predicts it
    virtual_slots: list[int]  # of each row's first virtual token; -1 where there is none


def _run(
    base: Base,
    forward: Forward,
    rows: Sequence[Row],
    prompts: Sequence[Tensor],
    prefix: Prefix | None,
    checkpoint: bool,
) -> _Hidden:
    is_long = forward.max_batchable_length is not None and _longest(rows, prompts) > forward.max_batchable_length
    if forward.can_share_prefix and not is_long:
        return _packed(base, forward, rows, prompts, prefix, checkpoint)
    spliced = concatenate(base, rows, prompts, align="left")
    hidden = forward.hidden_states(spliced.embeds_BSH, spliced.mask_BS, spliced.positions_BS).flatten(0, 1)
    first_slots = list(spliced.text_slots)
    num_virtual = [0 if row.prompt is None else prompts[row.prompt].shape[0] for row in rows]
    virtual = [first - own if own else -1 for first, own in zip(first_slots, num_virtual, strict=True)]
    return _Hidden(hidden, first_slots, [slot - 1 for slot in first_slots], virtual)


def _must_run_alone(forward: Forward, rows: Sequence[Row], prompts: Sequence[Tensor]) -> bool:
    """Whether a long one would change the others (`Forward.max_batchable_length`)."""
    limit = forward.max_batchable_length
    return len(rows) > 1 and limit is not None and _longest(rows, prompts) > limit


def _longest(rows: Sequence[Row], prompts: Sequence[Tensor]) -> int:
    """Of the rows with their prompts, and of all prompts, which run in the same forward."""
    whole = [len(row.ids) + (0 if row.prompt is None else prompts[row.prompt].shape[0]) for row in rows]
    return max(whole + [prompt.shape[0] for prompt in prompts])


def _targets_one_by_one(
    base: Base, forward: Forward, rows: Sequence[Row], prompts: Sequence[Tensor]
) -> tuple[Tensor, Targets]:
    parts = [target_states(base, forward, [row], prompts) for row in rows]
    numbered = [replace(targets, rows=targets.rows + number) for number, (_, targets) in enumerate(parts)]
    joined = {item.name: torch.cat([getattr(targets, item.name) for targets in numbered]) for item in fields(Targets)}
    return torch.cat([hidden for hidden, _ in parts]), Targets(**joined)


def _packed(
    base: Base,
    forward: Forward,
    rows: Sequence[Row],
    prompts: Sequence[Tensor],
    prefix: Prefix | None,
    checkpoint: bool,
) -> _Hidden:
    """One packed sequence. Slots count the prefix's K last hidden states first."""
    in_front = () if prefix is not None else prompts
    ranges = _ranges([prompt.shape[0] for prompt in prompts], 0) if prefix is None else prefix.ranges
    own = _ranges([len(row.ids) for row in rows], sum(prompt.shape[0] for prompt in in_front))
    segments = [Segment(first, length) for first, length in ranges[: len(in_front)]]
    for (first, length), row in zip(own, rows, strict=True):
        segments.append(Segment(first, length, None if row.prompt is None else ranges[row.prompt]))
    batch = PackedBatch(
        tuple(segment for segment in segments if segment.length),
        prefixes=None if prefix is None else prefix.states,
        checkpoint=checkpoint,
    )
    parts = [] if prefix is None else [prefix.last_hidden_KD]
    if batch.segments:
        pieces = [*((prompt, ()) for prompt in in_front), (None, [i for row in rows for i in row.ids])]
        embeds_SH = embed_with_prompt(base, pieces)
        parts.append(forward.packed_hidden_states(embeds_SH, _positions(batch.segments, base.device), batch))
    ends = [sum(own) - 1 for own in ranges] if prefix is None else list(range(len(ranges)))
    num_before = 0 if prefix is None else len(ranges)
    return _Hidden(
        torch.cat(parts),
        first_slots=[num_before + first for first, _ in own],
        slots_before=[0 if row.prompt is None else ends[row.prompt] for row in rows],
        virtual_slots=[-1 if prefix is not None or row.prompt is None else ranges[row.prompt][0] for row in rows],
    )


def _ranges(lengths: Sequence[int], first: int) -> tuple[Range, ...]:
    return tuple(zip(accumulate(lengths, initial=first), lengths, strict=False))


def _positions(segments: Sequence[Segment], device: torch.device) -> Tensor:
    before = [segment.prefix[1] if segment.prefix is not None else 0 for segment in segments]
    parts = [torch.arange(start, start + s.length) for start, s in zip(before, segments, strict=True)]
    return torch.cat([torch.arange(0), *parts]).to(device)
