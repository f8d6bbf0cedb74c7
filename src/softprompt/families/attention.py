"""Attention of a forward's tokens over the keys and values of their batch. Over packed rows it is exact softmax
attention, recomputed in the backward pass.

Products run in the base's dtype; scores, position biases and softmax in float32 (float64 for a float64 base). The
backward pass recomputes the probabilities, as FlashAttention does (2205.14135): nothing but queries, keys and values
is kept.

A row of a training set is short, so its scores are few and the calls around them cost more than they do: an
`AttentionPlan` pads similar rows into one `BlockBatch`, for the attention alone. A row too long for that is cut into
blocks of queries, each over the keys that it can see.

h query heads, k key heads, d width of a head, S packed tokens, E prefix tokens of an earlier pass, G blocks of a batch
of n queries and m keys, M most keys of any token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softprompt.compute_share import yield_point
from softprompt.families.batch import AttentionBatch, CachedBatch, CrossBatch, PackedBatch, Scoring, Segment, once
from softprompt.families.cached_attention import attend_cached, attend_cross

QUERY_BLOCK = 256  # queries of a long row that are worked on at once
MOST_SCORES = {"cpu": 2**15, "cuda": 2**22}  # of one head in a blocks: what fits the caches of a CPU
MOST_WASTE = 2**16  # of these over pads

Biases = tuple[Tensor, Tensor | None]  # who sees whom [G, 1, n, m], and a position bias [G, h, 1 or n, m]


def attend(
    batch: AttentionBatch, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> Tensor:
    """Attention output [S, h, d] of queries [h, S, d], keys and values [k, S, d], or [k, encoder's states, d]."""
    if isinstance(batch, CachedBatch):
        return attend_cached(batch, module, query, key, value, scoring)
    if isinstance(batch, CrossBatch):
        return attend_cross(batch, module, query, key, value, scoring)
    return attend_packed(batch, module, query, key, value, scoring)


def attend_packed(
    batch: PackedBatch, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> Tensor:
    """Attention output [S, h, d] of packed queries [h, S, d], keys and values [k, S, d]."""
    if batch.kept is not None:
        batch.kept[module] = (key, value)
    if batch.prefixes is not None:
        before_key, before_value = batch.prefixes[module]
        key, value = torch.cat([before_key, key], dim=1), torch.cat([before_value, value], dim=1)
    tokens = (part.transpose(0, 1) for part in (query, key, value))
    out: Tensor = _PackedAttention.apply(*tokens, batch, scoring)  # type: ignore[no-untyped-call]
    return out


class _PackedAttention(torch.autograd.Function):
    """Queries [S, h, d], keys and values [E + S, k, d]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, scoring: Scoring) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.batch, ctx.scoring = batch, scoring
        plan = _plan(batch, query, key)
        outs = []
        for number, blocks in enumerate(plan.batches):
            yield_point()
            queries, keys, values = _gathered(query, key, value, blocks)
            probs, _ = _probabilities(queries, keys, blocks, _biases(batch, number, blocks, scoring, query), scoring)
            outs.append(_per_token(torch.bmm(_by_key_head(probs.to(value.dtype), len(values)), values), blocks, query))
        return torch.cat(outs)[plan.query_index_S]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        plan = _plan(ctx.batch, query, key)
        wide = torch.promote_types(key.dtype, torch.float32)
        grad_query, grad_key, grad_value = [], torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        for number, blocks in enumerate(plan.batches):
            yield_point()
            biases = _biases(ctx.batch, number, blocks, ctx.scoring, query)
            parts = _gradients(grad_out, query, key, value, blocks, biases, ctx.scoring)
            grad_query.append(_per_token(parts[0], blocks, query))
            grad_key.index_add_(0, blocks.keys, _per_token(parts[1], blocks, key).to(wide))
            grad_value.index_add_(0, blocks.keys, _per_token(parts[2], blocks, value).to(wide))
        grads = torch.cat(grad_query)[plan.query_index_S]
        return grads, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _gradients(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, blocks: BlockBatch, biases: Biases, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, each per head of each block."""
    count = blocks.shape[0]
    queries, keys, values = _gathered(query, key, value, blocks)
    grad = _per_head(grad_out, blocks.queries, count).view(count, -1, *blocks.shape[1:2], grad_out.shape[-1])
    grad = _by_key_head((grad * blocks.is_real_Gn[:, None, :, None].to(grad.dtype)).flatten(0, 1), len(keys))
    probs, slopes = _probabilities(queries, keys, blocks, biases, scoring)
    grad_probs = torch.bmm(grad, values.transpose(1, 2)).view_as(probs).to(probs.dtype)
    grad_scores = torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
    grad_scores = (grad_scores if slopes is None else grad_scores.mul_(slopes)).mul_(scoring.scale)
    narrow = _by_key_head(grad_scores.to(key.dtype), len(keys))
    grad_value = torch.bmm(_by_key_head(probs.to(value.dtype), len(keys)).transpose(1, 2), grad)
    return torch.bmm(narrow, keys), torch.bmm(narrow.transpose(1, 2), queries), grad_value


def _gathered(query: Tensor, key: Tensor, value: Tensor, blocks: BlockBatch) -> tuple[Tensor, Tensor, Tensor]:
    """A batch's queries [G * k, h / k * n, d], keys and values [G * k, m, d]."""
    count = blocks.shape[0]
    keys, values = _per_head(key, blocks.keys, count), _per_head(value, blocks.keys, count)
    return _by_key_head(_per_head(query, blocks.queries, count), len(keys)), keys, values


def _probabilities(
    queries: Tensor, keys: Tensor, blocks: BlockBatch, biases: Biases, scoring: Scoring
) -> tuple[Tensor, Tensor | None]:
    """Softmax of the scores [G * h, n, m], and the slope of the capped scores where there is a cap."""
    count, num_queries, num_keys = blocks.shape
    mask, position_bias = biases
    if scoring.upcast:
        queries, keys = queries.to(mask.dtype), keys.to(mask.dtype)
    products = torch.bmm(queries, keys.transpose(1, 2))
    raw = products.to(mask.dtype).mul_(scoring.scale).view(count, -1, num_queries, num_keys)
    slopes = None
    if scoring.softcap is not None:
        bent = torch.tanh(raw / scoring.softcap)
        raw, slopes = bent * scoring.softcap, (1 - bent.square()).flatten(0, 1)
    if position_bias is not None:
        raw.add_(position_bias)
    return torch.softmax(raw.add_(mask), dim=-1).flatten(0, 1), slopes


def _plan(batch: PackedBatch, query: Tensor, key: Tensor) -> AttentionPlan:
    return once(batch, "plan", lambda: attention_plan(batch, key.shape[0] - query.shape[0], query.device))


def _biases(batch: PackedBatch, number: int, blocks: BlockBatch, scoring: Scoring, like: Tensor) -> Biases:
    """What is added to a batch's scores, made once per pass."""

    def make() -> Biases:
        distance = blocks.query_positions_Gn[:, :, None] - blocks.key_positions_Gm[:, None]
        if batch.is_causal:
            hidden = distance < 0
        else:  # pads are hidden; a window reaches as far ahead as back
            hidden = (blocks.key_positions_Gm >= blocks.shape[2])[:, None].expand_as(distance)
            distance = distance.abs()
        if scoring.window is not None:
            hidden = hidden | (distance >= scoring.window)
        wide = torch.promote_types(like.dtype, torch.float32)
        nothing = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
        mask = nothing.masked_fill(hidden, -torch.inf)[:, None]
        if scoring.relative_bias is not None:
            last = scoring.relative_bias.shape[-1] // 2  # M - 1
            index = blocks.key_positions_Gm[:, None] - blocks.query_positions_Gn[:, :, None] + last
            return mask, scoring.relative_bias[:, index.clamp(0, 2 * last)].transpose(0, 1)
        if scoring.position_bias is None:
            return mask, None
        known = blocks.key_positions_Gm.clamp(max=scoring.position_bias.shape[-1] - 1)
        return mask, scoring.position_bias[:, known].transpose(0, 1)[:, :, None]

    return once(batch, ("bias", number, scoring.window, scoring.position_bias is None, scoring.relative_bias), make)


def _per_head(tokens: Tensor, index: Tensor, count: int) -> Tensor:
    """[G * heads, length, d] of tokens [T, heads, d]."""
    taken = tokens[index].view(count, -1, *tokens.shape[1:])
    return taken.transpose(1, 2).flatten(0, 1)


def _per_token(per_head: Tensor, blocks: BlockBatch, like: Tensor) -> Tensor:
    """[G * length, heads, d] of what was worked out per head of each block; `like` has the heads."""
    split = per_head.view(blocks.shape[0], like.shape[1], -1, per_head.shape[-1])
    return split.transpose(1, 2).flatten(0, 1)


def _by_key_head(per_query_head: Tensor, num_key_heads: int) -> Tensor:
    """[G * h, n, x] as [G * k, h / k * n, x]: the query heads that share a key head, one behind the other."""
    return per_query_head.reshape(num_key_heads, -1, per_query_head.shape[-1])


@dataclass(frozen=True)
class QueryBlock:
    """Consecutive queries of one segment, and the keys that they see: its prefix, and its own up to the last query, or
    all of its own where attention is not causal, or none of its own where it is over other tokens."""

    first_query: int  # among the packed tokens
    num_queries: int
    first_position: int  # of the first query
    prefix: tuple[int, int]  # (first, length) among the keys; keys count the E prefix tokens first
    first_own: int  # among the keys
    num_keys: int  # those of the prefix included


@dataclass(frozen=True)
class BlockBatch:
    """Query blocks padded to one shape. Pads repeat a real token; no query sees them, and their results are dropped."""

    shape: tuple[int, int, int]  # G, n, m
    queries: Tensor  # [G * n] packed tokens
    keys: Tensor  # [G * m] keys
    is_real_Gn: Tensor  # False at the pads among the queries
    query_positions_Gn: Tensor
    key_positions_Gm: Tensor  # beyond every query's position at pads


@dataclass(frozen=True)
class AttentionPlan:
    """How the packed tokens of a pass are batched for attention."""

    batches: tuple[BlockBatch, ...]
    query_index_S: Tensor  # each packed token's index among the queries of all batches, one after the other


def attention_plan(batch: PackedBatch, num_prefix: int, device: torch.device) -> AttentionPlan:
    """The plan for rows behind E = `num_prefix` prefix tokens of an earlier pass."""
    blocks = sorted(_query_blocks(batch, num_prefix), key=lambda block: (block.num_keys, block.num_queries))
    similar = _similar(blocks, MOST_SCORES.get(device.type, MOST_SCORES["cuda"]))
    batches = tuple(_block_batch(members, device) for members in similar)
    index_S, offset = torch.empty(sum(segment.length for segment in batch.segments), dtype=torch.long), 0
    for members, padded in zip(similar, batches, strict=True):
        count, num_queries, _ = padded.shape
        for number, block in enumerate(members):
            first, own = offset + number * num_queries, slice(block.first_query, block.first_query + block.num_queries)
            index_S[own] = torch.arange(first, first + block.num_queries)
        offset += count * num_queries
    return AttentionPlan(batches, index_S.to(device))


def _query_blocks(batch: PackedBatch, num_prefix: int) -> Iterator[QueryBlock]:
    for segment in batch.segments:
        prefix = segment.prefix or (0, 0)
        for first in range(0, segment.length, QUERY_BLOCK):
            num_queries = min(QUERY_BLOCK, segment.length - first)
            yield QueryBlock(
                first_query=segment.first + first,
                num_queries=num_queries,
                first_position=prefix[1] + first,
                prefix=prefix,
                first_own=num_prefix + segment.first,
                num_keys=prefix[1] + _num_own_keys(batch, segment, first + num_queries),
            )


def _num_own_keys(batch: PackedBatch, segment: Segment, num_queries: int) -> int:
    """Keys that the queries of a segment up to that number see of it."""
    if batch.is_cross:
        return 0
    return num_queries if batch.is_causal else segment.length


def _similar(blocks: Sequence[QueryBlock], most_scores: int) -> list[list[QueryBlock]]:
    """Blocks of similar size together, as long as few scores are of pads; they come sorted."""
    batches: list[list[QueryBlock]] = []
    real = 0
    for block in blocks:
        scores = block.num_queries * block.num_keys
        if batches:
            longest = max(block.num_queries, max(other.num_queries for other in batches[-1]))
            padded = (len(batches[-1]) + 1) * longest * block.num_keys
            if padded <= most_scores and padded - real - scores <= MOST_WASTE:
                batches[-1].append(block)
                real += scores
                continue
        batches.append([block])
        real = scores
    return batches


def _block_batch(blocks: Sequence[QueryBlock], device: torch.device) -> BlockBatch:
    num_queries, num_keys = max(block.num_queries for block in blocks), max(block.num_keys for block in blocks)
    own_query, key = torch.arange(num_queries), torch.arange(num_keys)
    queries = [block.first_query + own_query.clamp(max=block.num_queries - 1) for block in blocks]
    query_positions = [block.first_position + own_query.clamp(max=block.num_queries - 1) for block in blocks]
    key_positions = [torch.where(key < block.num_keys, key, num_keys + QUERY_BLOCK) for block in blocks]
    return BlockBatch(
        shape=(len(blocks), num_queries, num_keys),
        queries=torch.cat(queries).to(device),
        keys=torch.cat([_keys(block, key) for block in blocks]).to(device),
        is_real_Gn=torch.stack([own_query < block.num_queries for block in blocks]).to(device),
        query_positions_Gn=torch.stack(query_positions).to(device),
        key_positions_Gm=torch.stack(key_positions).to(device),
    )


def _keys(block: QueryBlock, key: Tensor) -> Tensor:
    first_prefix, num_prefix = block.prefix
    key = key.clamp(max=block.num_keys - 1)
    return torch.where(key < num_prefix, first_prefix + key, block.first_own + key - num_prefix)
