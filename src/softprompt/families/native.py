"""Single tokens' attention on a processor by this package's own C (`held_attention.c`), where it was compiled.

torch's matrix products are made for many rows: for one query per row they take several times as long as reading the
keys and values does. The library is compiled when the package is installed, if there is a C compiler; without it torch
does the same sums.

S tokens of a forward, h query heads, k key heads, d width of a head, R rows of a store, C its capacity.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from softprompt.families.held import CachedBatch, NativeTokens
from softprompt.families.packed import KeysValues
from softprompt.families.scores import Scores

_NAME = "softprompt.families._held_attention"
_NUMBERS = ("is_bfloat16", "num_tokens", "num_heads", "num_key_heads", "width", "value_width", "capacity", "window")
_STRIDES = ("query_token", "query_head", "key_token", "key_head", "value_token", "value_head")


class _Task(ctypes.Structure):
    """`Task` of held_attention.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (*_NUMBERS, "bias_stride")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_void_p) for name in ("tokens", "rows", "positions", "query", "key", "value")),
        *((name, ctypes.c_int64) for name in _STRIDES),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "bias", "out")),
    ]


def has_native_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tokens of a base on this device and in this dtype can be attended to here."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and _library() is not None


def attend_native(
    rows: CachedBatch,
    light: NativeTokens,
    tokens: tuple[Tensor, Tensor, Tensor],
    held: KeysValues,
    scores: Scores,
    out: Tensor,
) -> None:
    """Put the keys and values of light tokens into a store, and their attention into `out` [S, h, d].

    `tokens` are queries [S, h, d], keys and values [S, k, d]; `held` the store's [R, k, C, d].
    """
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in tokens)
    task = rows.once(("task", id(light), query.shape, held[0].shape, held[1].shape), lambda: _task(light, query, held))
    bias = scores.position_bias
    if bias is not None:
        bias = rows.once("native bias", lambda: scores.position_bias.float().contiguous())  # type: ignore[union-attr]
        task.bias, task.bias_stride = bias.data_ptr(), bias.stride(0)
    task.scale, task.softcap, task.window = scores.scale, scores.softcap or 0.0, scores.window or 0
    task.query_token, task.query_head = query.stride(0), query.stride(1)
    task.key_token, task.key_head = key.stride(0), key.stride(1)
    task.value_token, task.value_head = value.stride(0), value.stride(1)
    task.query, task.key, task.value = query.data_ptr(), key.data_ptr(), value.data_ptr()
    task.keys, task.values, task.out = held[0].data_ptr(), held[1].data_ptr(), out.data_ptr()
    library = _library()
    assert library is not None
    if library.softprompt_attend(ctypes.byref(task)):
        raise MemoryError("no memory for the scores of one head")


def _task(light: NativeTokens, query: Tensor, held: KeysValues) -> _Task:
    """What stays the same in every layer of one shape."""
    keys, values = held
    return _Task(
        is_bfloat16=query.dtype is torch.bfloat16,
        num_tokens=len(light.tokens),
        num_heads=query.shape[1],
        num_key_heads=keys.shape[1],
        width=keys.shape[3],
        value_width=values.shape[3],
        capacity=keys.shape[2],
        tokens=light.tokens.data_ptr(),
        rows=light.rows.data_ptr(),
        positions=light.positions.data_ptr(),
    )


@cache
def _library() -> ctypes.CDLL | None:
    found = find_spec(_NAME)
    if found is None or found.origin is None:
        return None
    try:
        return ctypes.CDLL(found.origin)
    except OSError:  # compiled for another machine
        return None
