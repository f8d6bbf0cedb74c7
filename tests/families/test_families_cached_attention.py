"""Cached rows: the package's own C, torch's products and a softmax written out give the same attention."""

from itertools import product

import pytest
import torch
from torch import nn

from softprompt.families import CrossBatch, KVBuffer, QueryChunk, cached_batch, has_native_attention, native
from softprompt.families.batch import Scoring
from softprompt.families.cached_attention import attend_cached, attend_cross

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(not has_native_attention(CPU, torch.float32), reason="there was no C compiler")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-2}
HEADS, CAPACITY = 6, 40
LENGTHS = (1, 7, 12, 33)  # positions of the rows before the step
NEW = (1, 1, 5, 1)


def values(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(has_native, scoring, num_key_heads, width, dtype, module=None, buffer=None):
    """One forward of four rows, three of them with one new token, behind positions that are cached already."""
    module, buffer = module or nn.Identity(), buffer or KVBuffer(len(NEW) + 1, CAPACITY)
    keys, cached = values(2, len(NEW) + 1, num_key_heads, CAPACITY, width, seed=1, dtype=dtype)
    buffer.tensors[module] = (keys.clone(), cached.clone())
    chunks = [
        QueryChunk(buffer, row, length, count) for row, (length, count) in enumerate(zip(LENGTHS, NEW, strict=True))
    ]
    rows = cached_batch(chunks, CPU, has_native)
    parts = (values(heads, sum(NEW), width, seed=seed, dtype=dtype) for seed, heads in
             ((2, HEADS), (3, num_key_heads), (4, num_key_heads)))  # fmt: skip
    with torch.inference_mode():
        return attend_cached(rows, module, *parts, scoring), buffer.tensors[module]


def slow(scoring, num_key_heads, width, cached):
    """Token by token, in float64, over what the buffer holds now."""
    query = values(HEADS, sum(NEW), width, seed=2).double()
    outs = []
    for row, (length, count) in enumerate(zip(LENGTHS, NEW, strict=True)):
        for pos, head in product(range(length, length + count), range(HEADS)):
            seen = slice(0 if scoring.window is None else max(0, pos + 1 - scoring.window), pos + 1)
            key, value = (part[row, head // (HEADS // num_key_heads), seen].double() for part in cached)
            raw = key @ query[head, len(outs) // HEADS] * scoring.scale
            raw = raw if scoring.softcap is None else torch.tanh(raw / scoring.softcap) * scoring.softcap
            raw = raw if scoring.position_bias is None else raw + scoring.position_bias[head, seen]
            if scoring.relative_bias is not None:
                raw = raw + scoring.relative_bias[head, scoring.relative_bias.shape[1] // 2 - pos :][seen]
            outs.append(torch.softmax(raw, dim=0) @ value)
    return torch.stack(outs).view(sum(NEW), HEADS, width)


SCORINGS = {
    "plain": Scoring(0.3),
    "window": Scoring(0.3, window=4),
    "softcap": Scoring(0.3, softcap=1.5),
    "bias": Scoring(0.3, position_bias=values(HEADS, CAPACITY + 3, seed=5)),
    "relative": Scoring(0.3, relative_bias=values(HEADS, 2 * CAPACITY - 1, seed=6)),
}


@pytest.mark.parametrize("has_native", [False, pytest.param(True, marks=needs_native)], ids=["torch", "native"])
@pytest.mark.parametrize("kind", SCORINGS)
@pytest.mark.parametrize(("num_key_heads", "width"), [(6, 64), (2, 64), (6, 8), (3, 20), (1, 80), (6, 128), (2, 3)])
def test_attention_of_torch_and_of_c_is_the_softmax_written_out(has_native, kind, num_key_heads, width):
    scoring = SCORINGS[kind]
    found, cached = step(has_native, scoring, num_key_heads, width, torch.float32)
    torch.testing.assert_close(found.double(), slow(scoring, num_key_heads, width, cached), rtol=1e-5, atol=5e-6)
    wrong = Scoring(0.3, window=3) if kind == "window" else Scoring(0.5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found.double(), slow(wrong, num_key_heads, width, cached), rtol=1e-3, atol=1e-3)


@needs_native
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", SCORINGS)
def test_attention_of_torch_and_of_c_agree_and_their_buffers_are_bit_equal(kind, dtype):
    ours, our_buffer = step(True, SCORINGS[kind], 2, 64, dtype)
    theirs, their_buffer = step(False, SCORINGS[kind], 2, 64, dtype)
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert all(torch.equal(one, other) for one, other in zip(our_buffer, their_buffer, strict=True))


@needs_native
@pytest.mark.parametrize("has_native", [False, pytest.param(True, marks=needs_native)], ids=["torch", "native"])
def test_attention_across_sees_all_of_its_own_row_and_writes_only_what_comes(has_native):
    """Two rows of three; the states of one come with the forward, and the other's are there."""
    module, buffer = nn.Identity(), KVBuffer(3, CAPACITY)
    there, coming, lengths = values(2, 1, 2, 9, 64, seed=1), values(2, 2, 5, 64, seed=2), (5, 9)
    buffer.tensors[module] = tuple(torch.cat([torch.zeros(1, 2, CAPACITY, 64)] * 3) for _ in range(2))
    buffer.write(2, {module: (there[0, 0], there[1, 0])}, 9)
    chunks = [
        QueryChunk(buffer, row, length - 1, count, is_cross=True) for row, length, count in ((0, 5, 3), (2, 9, 1))
    ]
    batch = CrossBatch(cached_batch(chunks, CPU, has_native), (QueryChunk(buffer, 0, 0, 5),))
    query = values(HEADS, 4, 64, seed=3)
    with torch.inference_mode():
        found = attend_cross(batch, module, query, *coming, Scoring(0.3))
    for token, row in enumerate((0, 0, 0, 2)):
        key, value = (part[row, :, : lengths[row > 0]] for part in buffer.tensors[module])
        raw = torch.einsum("hd,hkd->hk", query[:, token], key.repeat_interleave(3, 0)) * 0.3
        truth = torch.einsum("hk,hkd->hd", raw.softmax(-1), value.repeat_interleave(3, 0))
        torch.testing.assert_close(found[token], truth, rtol=1e-5, atol=5e-6)
    assert torch.equal(buffer.tensors[module][0][2, :, :9], there[0, 0])
    assert torch.equal(buffer.tensors[module][1][0, :, :5], coming[1])
    assert not buffer.tensors[module][0][1].any()


@needs_native
def test_a_row_of_nan_does_not_reach_another_row():
    module, buffer = nn.Identity(), KVBuffer(2, 16)
    rows = cached_batch([QueryChunk(buffer, 0, 0, 1), QueryChunk(buffer, 1, 0, 1)], CPU, True)
    key = values(1, 2, 8, seed=3)
    key[0, 1] = torch.nan
    with torch.inference_mode():
        out = attend_cached(rows, module, values(1, 2, 8, seed=2), key, values(1, 2, 8, seed=4), Scoring(1.0))
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


@needs_native
def test_a_softmax_of_distant_scores_neither_overflows_nor_loses_the_largest():
    bias = torch.full((1, 16), -200.0)
    bias[0, 3], bias[0, 5] = 300.0, 299.0
    module, buffer = nn.Identity(), KVBuffer(1, 16)
    buffer.tensors[module] = (
        torch.zeros(1, 1, 16, 8),
        torch.arange(16.0)[None, None, :, None].expand(1, 1, 16, 8).clone(),
    )
    rows = cached_batch([QueryChunk(buffer, 0, 9, 1)], CPU, True)
    nothing = torch.zeros(1, 1, 8)
    with torch.inference_mode():
        out = attend_cached(rows, module, nothing, nothing, nothing, Scoring(1.0, position_bias=bias))
    share = 1 / (1 + torch.tensor(-1.0).exp())
    torch.testing.assert_close(out, (3 * share + 5 * (1 - share)).expand(1, 1, 8), rtol=1e-6, atol=0)


def test_dtypes_and_devices_that_c_does_not_compute_use_torch():
    assert not has_native_attention(CPU, torch.float64)
    assert not has_native_attention(CPU, torch.float16)
    assert not has_native_attention(torch.device("cuda"), torch.bfloat16)


def test_a_missing_c_library_leaves_attention_to_torch(monkeypatch):
    monkeypatch.setattr(native, "LIBRARY", "softprompt.families._no_such_library")
    native.native_library.cache_clear()
    try:
        assert not has_native_attention(CPU, torch.float32)
    finally:
        monkeypatch.undo()
        native.native_library.cache_clear()


@needs_native
def test_a_c_library_of_another_version_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(native, "VERSION", 0)
    native.native_library.cache_clear()
    try:
        assert not has_native_attention(CPU, torch.float32)
    finally:
        monkeypatch.undo()
        native.native_library.cache_clear()
    assert "was compiled from another version" in caplog.text
    assert has_native_attention(CPU, torch.float32)
