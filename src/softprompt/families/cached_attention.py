"""Attention of a forward's tokens over cached keys and values: exact softmax attention, no gradient.

Scores, position biases and softmax are float32 (float64 for a float64 base), products in the base's dtype. There are
two ways. Padded groups are matrix products over whole buffers, so that a product's shape stays from step to step;
positions that a query does not see have weight 0. For one query per row such products take several times as long as
reading the keys and values does: single tokens and small chunks are computed by this package's own C
(`cached_attention.c`), on a processor, where a C compiler was there when the package was installed.

h query heads, k key heads, d width of a head, S tokens of a forward, R rows of a buffer, C its capacity in positions; a
padded group has G rows of n queries.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from softprompt.families.batch import CachedBatch, CrossBatch, NativeTokens, PaddedGroup, Scoring, once
from softprompt.families.kv_buffer import KeysValues
from softprompt.families.native import native_library


def attend_cached(
    batch: CachedBatch, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> Tensor:
    """Attention output [S, h, d] of queries [h, S, d]; keys and values [k, S, d] are written to the buffers first."""
    query, key, value = (part.transpose(0, 1) for part in (query, key, value))
    return _attend(batch, module, query, key, value, scoring)


def attend_cross(
    batch: CrossBatch, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> Tensor:
    """Attention output [S, h, d] of queries [h, S, d] over cached keys and values, to which those of new states come.

    Keys and values [k, states, d] are written to the buffers first.
    """
    lengths = [chunk.num_tokens for chunk in batch.written]
    parts = (part.split(lengths, dim=1) for part in (key, value))
    for chunk, own_key, own_value in zip(batch.written, *parts, strict=True):
        chunk.buffer.write(chunk.row, {module: (own_key, own_value)}, chunk.num_tokens)
    return _attend(batch.queries, module, query.transpose(0, 1), None, None, scoring)


def _attend(
    batch: CachedBatch, module: nn.Module, query: Tensor, key: Tensor | None, value: Tensor | None, scoring: Scoring
) -> Tensor:
    """[S, h, d] of queries [S, h, d]; keys and values [S, k, d] are written first, None where all are there."""
    out = None
    for number, part in enumerate(batch.parts):
        cached = part.buffer.tensors[module] if key is None or value is None else part.buffer.of(module, key, value)
        keys, values = cached
        if out is None and not batch.is_one_group:
            out = query.new_empty(*query.shape[:2], values.shape[-1])
        if part.native is not None and out is not None:
            new = _present(part.native, query, cached) if key is None or value is None else (key, value)
            _attend_native(batch, part.native, (query, *new), cached, scoring, out)
        if part.padded is not None:
            if key is not None and value is not None:
                keys[part.padded.rows, :, part.padded.positions] = key[part.padded.tokens]
                values[part.padded.rows, :, part.padded.positions] = value[part.padded.tokens]
            for index, group in enumerate(part.padded.groups):
                bias = _bias(batch, (number, index), group, part.buffer.capacity, scoring, query)
                attended = _attend_group(group, query, keys[group.rows], values[group.rows], bias, scoring)
                if out is None:
                    return attended
                out[group.tokens] = attended[group.picks]
    assert out is not None
    return out


def _present(native: NativeTokens, query: Tensor, cached: KeysValues) -> KeysValues:
    """Keys and values [S, k, d] that are there already, for the C library to write once more."""
    found = []
    for part in cached:
        own = part.new_zeros(query.shape[0], part.shape[1], part.shape[3])
        own[native.tokens] = part[native.rows, :, native.positions]
        found.append(own)
    return found[0], found[1]


def _attend_group(
    group: PaddedGroup, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scoring: Scoring
) -> Tensor:
    """[G * n, h, d] of queries [S, h, d] over keys and values [G, k, C, d]."""
    count, num_queries = group.shape
    num_key_heads, capacity = keys.shape[1], keys.shape[2]
    queries = query[group.queries].view(count, num_queries, -1, query.shape[-1]).transpose(1, 2)
    shape = (count, num_key_heads, -1, query.shape[-1])  # the query heads of a key head, one behind the other
    probs = _probabilities(queries.reshape(shape), keys, bias, scoring)
    attended = torch.matmul(probs.to(values.dtype).view(count, num_key_heads, -1, capacity), values)
    per_head = attended.view(count, -1, num_queries, values.shape[-1])
    return per_head.transpose(1, 2).reshape(count * num_queries, -1, values.shape[-1])


def _probabilities(queries: Tensor, keys: Tensor, bias: Tensor, scoring: Scoring) -> Tensor:
    """Softmax of the scores, [G, h, n, C]."""
    if scoring.upcast:
        queries, keys = queries.to(bias.dtype), keys.to(bias.dtype)
    products = torch.matmul(queries, keys.transpose(-1, -2))
    products = products.view(bias.shape[0], -1, bias.shape[2], bias.shape[3])
    if scoring.softcap is None:
        return torch.softmax(torch.add(bias, products, alpha=scoring.scale), dim=-1)
    raw = products.to(bias.dtype) * (scoring.scale / scoring.softcap)
    return torch.softmax(torch.tanh(raw) * scoring.softcap + bias, dim=-1)


def _bias(
    batch: CachedBatch, group_key: tuple[int, int], group: PaddedGroup, capacity: int, scoring: Scoring, like: Tensor
) -> Tensor:
    """What is added to a group's scores, [G, 1 or h, n, C], made once per forward."""

    def make() -> Tensor:
        distance = group.positions_Gn[:, :, None] - torch.arange(capacity, device=like.device)
        hidden = distance < 0 if scoring.window is None else (distance < 0) | (distance >= scoring.window)
        wide = torch.promote_types(like.dtype, torch.float32)
        mask = torch.zeros(hidden.shape, dtype=wide, device=like.device).masked_fill(hidden, -torch.inf)[:, None]
        if scoring.relative_bias is not None:
            last = scoring.relative_bias.shape[-1] // 2  # M - 1
            return mask + scoring.relative_bias.to(wide)[:, (last - distance).clamp(0, 2 * last)].transpose(0, 1)
        if scoring.position_bias is None:
            return mask
        return mask + scoring.position_bias[:, :capacity].to(wide)[None, :, None]

    return once(batch, ("bias", group_key, scoring.window, scoring.position_bias is None, scoring.relative_bias), make)


def has_native_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the C library attends to tokens of a base on this device and in this dtype."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and native_library() is not None


def _attend_native(
    batch: CachedBatch,
    native: NativeTokens,
    tokens: tuple[Tensor, Tensor, Tensor],
    cached: KeysValues,
    scoring: Scoring,
    out: Tensor,
) -> None:
    """Write the keys and values of native tokens to a buffer, and their attention to `out` [S, h, d].

    `tokens` are queries [S, h, d], keys and values [S, k, d]; `cached` the buffer's keys and values [R, k, C, d].
    """
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in tokens)
    task = once(
        batch, ("task", id(native), query.shape, cached[0].shape, cached[1].shape), lambda: _task(native, query, cached)
    )
    bias = scoring.position_bias
    if bias is not None:
        bias = once(batch, "native bias", lambda: scoring.position_bias.float().contiguous())  # type: ignore[union-attr]
        task.bias, task.bias_head = bias.data_ptr(), bias.stride(0)
    task.scale, task.softcap, task.window = scoring.scale, scoring.softcap or 0.0, scoring.window or 0
    task.query_token, task.query_head = query.stride(0), query.stride(1)
    task.key_token, task.key_head = key.stride(0), key.stride(1)
    task.value_token, task.value_head = value.stride(0), value.stride(1)
    task.query, task.key, task.value = query.data_ptr(), key.data_ptr(), value.data_ptr()
    task.keys, task.values, task.out = cached[0].data_ptr(), cached[1].data_ptr(), out.data_ptr()
    if scoring.relative_bias is not None:
        _run_one_by_one(batch, task, native, scoring.relative_bias)
    else:
        _run_task(task)


def _run_one_by_one(batch: CachedBatch, task: _Task, native: NativeTokens, relative_bias: Tensor) -> None:
    """Each token with the part of the bias [h, 2M - 1] that begins at the distance of its row's first key."""
    bias = once(batch, ("native bias", relative_bias), lambda: relative_bias.float().contiguous())
    positions, num_tokens = once(batch, ("positions", id(native)), native.positions.tolist), task.num_tokens
    firsts = (task.tokens, task.rows, task.positions)
    task.bias_head, task.num_tokens = bias.stride(0), 1
    for number, position in enumerate(positions):
        task.tokens, task.rows, task.positions = (first + number * 8 for first in firsts)  # int64
        task.bias = bias.data_ptr() + (bias.shape[-1] // 2 - position) * 4  # float32
        _run_task(task)
    task.num_tokens, (task.tokens, task.rows, task.positions) = num_tokens, firsts


def _run_task(task: _Task) -> None:
    library = native_library()
    assert library is not None
    if library.softprompt_attend(ctypes.byref(task)):
        raise MemoryError("no memory for the scores of one head")


def _task(native: NativeTokens, query: Tensor, cached: KeysValues) -> _Task:
    """The fields that are the same in every layer of one shape."""
    keys, values = cached
    return _Task(
        is_bfloat16=query.dtype is torch.bfloat16,
        num_tokens=len(native.tokens),
        num_heads=query.shape[1],
        num_key_heads=keys.shape[1],
        width=keys.shape[3],
        value_width=values.shape[3],
        capacity=keys.shape[2],
        tokens=native.tokens.data_ptr(),
        rows=native.rows.data_ptr(),
        positions=native.positions.data_ptr(),
    )


class _Task(ctypes.Structure):
    """`Task` of cached_attention.c, field by field."""

    _fields_ = [
        (name, kind)
        for kind, names in (
            (ctypes.c_int64, "is_bfloat16 num_tokens num_heads num_key_heads width value_width capacity window"),
            (ctypes.c_int64, "query_token query_head key_token key_head value_token value_head bias_head"),
            (ctypes.c_float, "scale softcap"),
            (ctypes.c_void_p, "tokens rows positions query key value bias keys values out"),
        )
        for name in names.split()
    ]
