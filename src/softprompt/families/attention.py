"""Attention over packed rows: exact softmax attention, recomputed in the backward pass.

Products run in the base's dtype; scores, position biases and softmax in float32 (float64 for a float64 base). The
backward pass recomputes the probabilities, as FlashAttention does (2205.14135): nothing but queries, keys and values
is kept.

h query heads, k key heads, d width of a head, S packed tokens, E prefix tokens of an earlier pass, G runs of a group of
n queries and m keys (`softprompt.families.grouping`), M most keys of any token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from softprompt.compute_share import yield_point
from softprompt.families.grouping import Group, Grouping, grouping_of
from softprompt.families.packed import PackedBatch
from softprompt.families.scores import Scores

Biases = tuple[Tensor, Tensor | None]  # who sees whom [G, 1, n, m], and a position bias [G, h, 1, m]


def attend_packed(
    rows: PackedBatch, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scores: Scores
) -> Tensor:
    """Attention output [S, h, d] of packed queries [h, S, d], keys and values [k, S, d]."""
    if rows.kept is not None:
        rows.kept[module] = (key, value)
    if rows.prefixes is not None:
        before_key, before_value = rows.prefixes[module]
        key, value = torch.cat([before_key, key], dim=1), torch.cat([before_value, value], dim=1)
    tokens = (part.transpose(0, 1) for part in (query, key, value))
    out: Tensor = _PackedAttention.apply(*tokens, rows, scores)  # type: ignore[no-untyped-call]
    return out


class _PackedAttention(torch.autograd.Function):
    """Queries [S, h, d], keys and values [E + S, k, d]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: PackedBatch, scores: Scores) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.rows, ctx.scores = rows, scores
        grouping = _grouping(rows, query, key)
        outs = []
        for number, group in enumerate(grouping.groups):
            yield_point()
            queries, keys, values = _gathered(query, key, value, group)
            shares, _ = _shares(queries, keys, group, _biases(rows, number, group, scores, query), scores)
            outs.append(_give(torch.bmm(_by_key_head(shares.to(value.dtype), len(values)), values), group, query))
        return torch.cat(outs)[grouping.places_S]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        grouping = _grouping(ctx.rows, query, key)
        wide = torch.promote_types(key.dtype, torch.float32)
        grad_query, grad_key, grad_value = [], torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        for number, group in enumerate(grouping.groups):
            yield_point()
            biases = _biases(ctx.rows, number, group, ctx.scores, query)
            parts = _group_gradients(grad_out, query, key, value, group, biases, ctx.scores)
            grad_query.append(_give(parts[0], group, query))
            grad_key.index_add_(0, group.keys, _give(parts[1], group, key).to(wide))
            grad_value.index_add_(0, group.keys, _give(parts[2], group, value).to(wide))
        grads = torch.cat(grad_query)[grouping.places_S]
        return grads, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _group_gradients(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, group: Group, biases: Biases, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, each per head of each run."""
    count = group.shape[0]
    queries, keys, values = _gathered(query, key, value, group)
    grad = _take(grad_out, group.queries, count).view(count, -1, *group.shape[1:2], grad_out.shape[-1])
    grad = _by_key_head((grad * group.is_real_Gn[:, None, :, None].to(grad.dtype)).flatten(0, 1), len(keys))
    shares, slopes = _shares(queries, keys, group, biases, scores)
    grad_shares = torch.bmm(grad, values.transpose(1, 2)).view_as(shares).to(shares.dtype)
    grad_scores = torch.ops.aten._softmax_backward_data(grad_shares, shares, -1, shares.dtype)
    grad_scores = (grad_scores if slopes is None else grad_scores.mul_(slopes)).mul_(scores.scale)
    narrow = _by_key_head(grad_scores.to(key.dtype), len(keys))
    grad_value = torch.bmm(_by_key_head(shares.to(value.dtype), len(keys)).transpose(1, 2), grad)
    return torch.bmm(narrow, keys), torch.bmm(narrow.transpose(1, 2), queries), grad_value


def _gathered(query: Tensor, key: Tensor, value: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """A group's queries [G * k, h / k * n, d], keys and values [G * k, m, d]."""
    count = group.shape[0]
    keys, values = _take(key, group.keys, count), _take(value, group.keys, count)
    return _by_key_head(_take(query, group.queries, count), len(keys)), keys, values


def _shares(
    queries: Tensor, keys: Tensor, group: Group, biases: Biases, scores: Scores
) -> tuple[Tensor, Tensor | None]:
    """Softmax of the scores [G * h, n, m], and the slope of the capped scores where there is a cap."""
    count, num_queries, num_keys = group.shape
    mask, position_bias = biases
    if scores.upcast:
        queries, keys = queries.to(mask.dtype), keys.to(mask.dtype)
    products = torch.bmm(queries, keys.transpose(1, 2))
    raw = products.to(mask.dtype).mul_(scores.scale).view(count, -1, num_queries, num_keys)
    slopes = None
    if scores.softcap is not None:
        bent = torch.tanh(raw / scores.softcap)
        raw, slopes = bent * scores.softcap, (1 - bent.square()).flatten(0, 1)
    if position_bias is not None:
        raw.add_(position_bias)
    return torch.softmax(raw.add_(mask), dim=-1).flatten(0, 1), slopes


def _grouping(rows: PackedBatch, query: Tensor, key: Tensor) -> Grouping:
    return rows.once("grouping", lambda: grouping_of(rows, key.shape[0] - query.shape[0], query.device))


def _biases(rows: PackedBatch, number: int, group: Group, scores: Scores, like: Tensor) -> Biases:
    """What is added to a group's scores, made once per pass."""

    def make() -> Biases:
        distance = group.query_positions_Gn[:, :, None] - group.key_positions_Gm[:, None]
        hidden = distance < 0 if scores.window is None else (distance < 0) | (distance >= scores.window)
        wide = torch.promote_types(like.dtype, torch.float32)
        nothing = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
        mask = nothing.masked_fill(hidden, -torch.inf)[:, None]
        if scores.position_bias is None:
            return mask, None
        known = group.key_positions_Gm.clamp(max=scores.position_bias.shape[-1] - 1)
        return mask, scores.position_bias[:, known].transpose(0, 1)[:, :, None]

    return rows.once(("bias", number, scores.window, scores.position_bias is None), make)


def _take(tokens: Tensor, index: Tensor, count: int) -> Tensor:
    """[G * heads, length, d] of tokens [T, heads, d]."""
    taken = tokens[index].view(count, -1, *tokens.shape[1:])
    return taken.transpose(1, 2).flatten(0, 1)


def _give(per_head: Tensor, group: Group, like: Tensor) -> Tensor:
    """[G * length, heads, d] of what was worked out per head of each run; `like` has the heads."""
    split = per_head.view(group.shape[0], like.shape[1], -1, per_head.shape[-1])
    return split.transpose(1, 2).flatten(0, 1)


def _by_key_head(per_query_head: Tensor, num_key_heads: int) -> Tensor:
    """[G * h, n, x] as [G * k, h / k * n, x]: the query heads that share a key head, one behind the other."""
    return per_query_head.reshape(num_key_heads, -1, per_query_head.shape[-1])
