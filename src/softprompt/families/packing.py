"""Which bases run packed rows: found out once per base, by running both ways on a few tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.families import checkpoint, interface, own_attention
from softprompt.families.packed import Carrier, PackedBatch, Segment

RunPacked = Callable[[Carrier, Tensor, Tensor, PackedBatch], Tensor]  # embeds [1, S, H], positions [1, S] -> [S, V]
RunPlain = Callable[[Tensor], Tensor]  # embeds [1, S, H] -> [S, V]
IsClose = Callable[[Tensor, Tensor], bool]

_PREFIX_IDS, _ROWS = (2, 7, 1), ((3, 1, 4, 1), (5, 9))


@dataclass(frozen=True)
class Packing:
    """How a base runs packed rows, or why it does not."""

    carrier: Carrier | None
    note: str


def find_packing(base: Base, run_packed: RunPacked, run_plain: RunPlain, is_close: IsClose) -> Packing:
    """Install what the base's family needs and check it against rows run one by one; on failure take it back."""
    if any(hasattr(module, "_hf_hook") for module in base.model.modules()):
        return Packing(None, "rows run padded by length: the base is spread over devices")
    truth = _plain_rows(base, run_plain)
    for room in (own_attention, interface):
        carrier = room.install(base.model)
        if carrier is not None:
            checkpoint.install(base.model)
            return _checked(base, room, carrier, run_packed, run_plain, is_close, truth)
    return Packing(None, "rows run padded by length: this family's attention cannot be given packed rows")


def _checked(
    base: Base,
    room: ModuleType,
    carrier: Carrier,
    run_packed: RunPacked,
    run_plain: RunPlain,
    is_close: IsClose,
    truth: Tensor,
) -> Packing:
    failure = "its answers differ"
    try:
        if not torch.equal(_plain_rows(base, run_plain), truth):
            failure = "its plain answers changed"
        elif is_close(run_packed(carrier, *_probe(base))[len(_PREFIX_IDS) :], truth):
            return Packing(carrier, "rows run packed behind one pass of the soft prompt")
    except Exception as error:  # whatever a model that nobody knew does with rows that it does not understand
        failure = f"{type(error).__name__}: {error}".split("\n")[0]
    room.remove(base.model)
    checkpoint.remove(base.model)
    return Packing(None, f"rows run padded by length: packed rows failed their check on this base ({failure})")


def _plain_rows(base: Base, run_plain: RunPlain) -> Tensor:
    return torch.cat([run_plain(_embeds(base, _PREFIX_IDS + row))[len(_PREFIX_IDS) :] for row in _ROWS])


def _probe(base: Base) -> tuple[Tensor, Tensor, PackedBatch]:
    num_before = len(_PREFIX_IDS)
    segments, positions = [Segment(0, num_before)], list(range(num_before))
    for row in _ROWS:
        segments.append(Segment(len(positions), len(row), (0, num_before)))
        positions += range(num_before, num_before + len(row))
    ids = _PREFIX_IDS + tuple(i for row in _ROWS for i in row)
    return _embeds(base, ids), torch.tensor([positions], device=base.device), PackedBatch(tuple(segments))


def _embeds(base: Base, ids: tuple[int, ...]) -> Tensor:
    return base.token_inputs(torch.tensor([[i % base.vocab_size for i in ids]]))
