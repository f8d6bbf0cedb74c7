"""Attention of a forward's tokens over keys and values held in memory: exact softmax attention, no gradient.

Light tokens are attended to by `families.native` where it is there. Products run in the base's dtype; scores, position
biases and softmax in float32 (float64 for a float64 base). Every product reads whole stores, so that its shape stays
from step to step; positions that a query does not see weigh 0.

h query heads, k key heads, d width of a head, S tokens; a group has G rows of n queries over C positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softprompt.families.held import CachedBatch, Group
from softprompt.families.native import attend_native
from softprompt.families.packed import KeysValues
from softprompt.families.scores import Scores


def attend_held(
    rows: CachedBatch, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scores: Scores
) -> Tensor:
    """Attention output [S, h, d] of queries [h, S, d]; keys and values [k, S, d] are put into memory first."""
    query, key, value = (part.transpose(0, 1) for part in (query, key, value))
    out = None if rows.is_one_group else query.new_empty(*query.shape[:2], value.shape[-1])
    for number, part in enumerate(rows.parts):
        held = part.store.of(module, key, value)
        if part.light is not None and out is not None:
            attend_native(rows, part.light, (query, key, value), held, scores, out)
        if part.heavy is not None:
            keys, values = held
            keys[part.heavy.rows, :, part.heavy.positions] = key[part.heavy.tokens]
            values[part.heavy.rows, :, part.heavy.positions] = value[part.heavy.tokens]
            for place, group in enumerate(part.heavy.groups):
                mixed = _mixed(rows, (number, place), group, query, (keys[group.rows], values[group.rows]), scores)
                if out is None:
                    return mixed
                out[group.tokens] = mixed[group.picks]
    assert out is not None
    return out


def _mixed(
    rows: CachedBatch, place: tuple[int, int], group: Group, query: Tensor, held: KeysValues, scores: Scores
) -> Tensor:
    """[G * n, h, d] of one group."""
    keys, values = held
    count, num_queries = group.shape
    num_key_heads, capacity = keys.shape[1], keys.shape[2]
    queries = query[group.queries].view(count, num_queries, -1, query.shape[-1]).transpose(1, 2)
    shape = (count, num_key_heads, -1, query.shape[-1])  # the query heads of a key head, one behind the other
    bias = _bias(rows, place, group, capacity, scores, query)
    shares = _shares(queries.reshape(shape), keys, bias, scores)
    mixed = torch.matmul(shares.to(values.dtype).view(count, num_key_heads, -1, capacity), values)
    per_head = mixed.view(count, -1, num_queries, values.shape[-1])
    return per_head.transpose(1, 2).reshape(count * num_queries, -1, values.shape[-1])


def _shares(queries: Tensor, keys: Tensor, bias: Tensor, scores: Scores) -> Tensor:
    """Softmax of the scores, [G, h, n, C]."""
    if scores.upcast:
        queries, keys = queries.to(bias.dtype), keys.to(bias.dtype)
    products = torch.matmul(queries, keys.transpose(-1, -2))
    products = products.view(bias.shape[0], -1, bias.shape[2], bias.shape[3])
    if scores.softcap is None:
        return torch.softmax(torch.add(bias, products, alpha=scores.scale), dim=-1)
    raw = products.to(bias.dtype) * (scores.scale / scores.softcap)
    return torch.softmax(torch.tanh(raw) * scores.softcap + bias, dim=-1)


def _bias(
    rows: CachedBatch, place: tuple[int, int], group: Group, capacity: int, scores: Scores, like: Tensor
) -> Tensor:
    """What is added to a group's scores, [G, 1 or h, n, C], made once per forward."""

    def make() -> Tensor:
        distance = group.positions_Gn[:, :, None] - torch.arange(capacity, device=like.device)
        hidden = distance < 0 if scores.window is None else (distance < 0) | (distance >= scores.window)
        wide = torch.promote_types(like.dtype, torch.float32)
        mask = torch.zeros(hidden.shape, dtype=wide, device=like.device).masked_fill(hidden, -torch.inf)[:, None]
        if scores.position_bias is None:
            return mask
        return mask + scores.position_bias[:, :capacity].to(wide)[None, :, None]

    return rows.once(("bias", place, scores.window, scores.position_bias is None), make)
