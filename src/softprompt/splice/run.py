"""Run spliced rows through a base: packed where the base can, else concatenated and padded.

N targets, D hidden width, K prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.families import Forward
from softprompt.splice.concatenate import concatenate
from softprompt.splice.pack import Prefix, pack, pack_prompts
from softprompt.splice.rows import Row
from softprompt.splice.targets import Targets


def run_prompts(base: Base, forward: Forward, prompts: Sequence[Tensor]) -> Prefix:
    """One pass of the soft prompts [P, H]: what any number of rows need of them. Gradients flow through it."""
    packed, ranges = pack_prompts(base, prompts)
    hidden = forward.packed_hidden_states(packed.embeds_SH, packed.positions_S, packed.rows)
    last = torch.tensor([first + length - 1 for first, length in ranges], device=hidden.device)
    assert packed.rows.kept is not None
    return Prefix(ranges, packed.rows.kept, hidden[last])


def target_states(
    base: Base,
    forward: Forward,
    rows: Sequence[Row],
    prompts: Sequence[Tensor],
    prefix: Prefix | None = None,
    checkpoint: bool = False,
) -> tuple[Tensor, Targets]:
    """The hidden states [N, D] that predict the rows' targets, and the targets."""
    is_long = forward.max_batchable_length is not None and _longest(rows, prompts) > forward.max_batchable_length
    if is_long and len(rows) > 1:
        return _one_by_one(base, forward, rows, prompts)
    if is_long or not forward.can_share_prefix:
        spliced = concatenate(base, rows, prompts, align="left")
        hidden = forward.hidden_states(spliced.embeds_BSH, spliced.mask_BS, spliced.positions_BS).flatten(0, 1)
        return hidden[spliced.targets.slots], spliced.targets
    packed = pack(base, rows, prompts, prefix, checkpoint)
    parts = [prefix.last_hidden_KD] if prefix is not None else []
    if len(packed.embeds_SH):
        parts.append(forward.packed_hidden_states(packed.embeds_SH, packed.positions_S, packed.rows))
    return torch.cat(parts)[packed.targets.slots], packed.targets


def _longest(rows: Sequence[Row], prompts: Sequence[Tensor]) -> int:
    """Of the rows with their prompts, and of all prompts, which run in the same forward."""
    whole = [len(row.ids) + (0 if row.prompt is None else prompts[row.prompt].shape[0]) for row in rows]
    return max(whole + [prompt.shape[0] for prompt in prompts])


def _one_by_one(base: Base, forward: Forward, rows: Sequence[Row], prompts: Sequence[Tensor]) -> tuple[Tensor, Targets]:
    """Where a long row would change its company (`Forward.max_batchable_length`)."""
    parts = [target_states(base, forward, [row], prompts) for row in rows]
    numbered = [replace(targets, rows=targets.rows + number) for number, (_, targets) in enumerate(parts)]
    joined = {item.name: torch.cat([getattr(targets, item.name) for targets in numbered]) for item in fields(Targets)}
    return torch.cat([hidden for hidden, _ in parts]), Targets(**joined)
