"""Which bases run packed rows: found out once per base, by running both ways on a few tokens."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.families import checkpoint, interface, own_attention
from softprompt.families.packed import PackedRows, Segment

Carrier = Literal["mask", "cache"]  # the argument of the forward that brings the rows to the attention
_WAYS: tuple[tuple[ModuleType, tuple[Carrier, ...]], ...] = ((own_attention, ("cache", "mask")), (interface, ("mask",)))
_PREFIX_IDS, _ROWS = (2, 7, 1), ((3, 1, 4, 1), (5, 9))


@dataclass(frozen=True)
class Packing:
    """How a base runs packed rows, or why it does not."""

    carrier: Carrier | None
    note: str


def find_packing(base: Base, run_packed: Any, run_plain: Any, is_close: Any) -> Packing:
    """Install what the base's family needs and check it against rows run one by one; on failure take it back.

    `run_packed(carrier, embeds [1, S, H], positions [1, S], rows)` and `run_plain(embeds [1, S, H])` give logits.
    """
    if any(hasattr(module, "_hf_hook") for module in base.model.modules()):
        return Packing(None, "rows run padded by length: the base is spread over devices")
    for room, carriers in _WAYS:
        if room.install(base.model):
            checkpoint.install(base.model)
            return _checked(base, room, carriers, run_packed, run_plain, is_close)
    return Packing(None, "rows run padded by length: this family's attention cannot be given packed rows")


def _checked(
    base: Base, room: ModuleType, carriers: tuple[Carrier, ...], run_packed: Any, run_plain: Any, is_close: Any
) -> Packing:
    failure = ""
    truth = torch.cat([run_plain(_embeds(base, _PREFIX_IDS + row))[len(_PREFIX_IDS) :] for row in _ROWS])
    for carrier in carriers:
        try:
            found = run_packed(carrier, *_probe(base))[len(_PREFIX_IDS) :]
        except Exception as error:  # whatever a model that nobody knew does with rows that it does not understand
            failure = f"{type(error).__name__}: {error}".split("\n")[0]
            continue
        if is_close(found, truth):
            return Packing(carrier, "rows run packed behind one pass of the soft prompt")
        failure = "its answers differ"
    room.remove(base.model)
    checkpoint.remove(base.model)
    return Packing(None, f"rows run padded by length: packed rows failed their check on this base ({failure})")


def _probe(base: Base) -> tuple[Tensor, Tensor, PackedRows]:
    num_before = len(_PREFIX_IDS)
    segments, positions = [Segment(0, num_before)], list(range(num_before))
    for row in _ROWS:
        segments.append(Segment(len(positions), len(row), (0, num_before)))
        positions += range(num_before, num_before + len(row))
    ids = _PREFIX_IDS + tuple(i for row in _ROWS for i in row)
    return _embeds(base, ids), torch.tensor([positions], device=base.device), PackedRows(tuple(segments))


def _embeds(base: Base, ids: tuple[int, ...]) -> Tensor:
    return base.embed(torch.tensor([[i % base.vocab_size for i in ids]]))
