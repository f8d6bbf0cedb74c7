"""How the sequences of an encoder-decoder run: the encoder reads [soft prompt, text] once, in a sequence's first step;
then every step runs the decoder's new positions over its own cached keys and values and those of the encoder's states.

A preempted sequence frees both, and reads its text again. Nothing is shared between sequences: what the encoder makes
of a soft prompt depends on the text behind it.

S encoder positions, D hidden width, H embedding width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from itertools import accumulate
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from softprompt.base import Base, free_bytes
from softprompt.config import EngineConfig
from softprompt.engine.kv_cache import KVCache
from softprompt.engine.model_runner import (
    BATCHED,
    KV_SHARE,
    MemoryCost,
    RunnerKind,
    Runners,
    ends_of_chunks,
    step_limits,
    weights_note,
)
from softprompt.engine.prefix_cache import PrefixCache
from softprompt.engine.request import DEFAULT_SAMPLING, Request
from softprompt.engine.scheduler import Plan
from softprompt.engine.sequence import RunnerOutput, Sequence
from softprompt.families import (
    CachedBatch,
    CrossBatch,
    Forward,
    KVBuffer,
    PackedBatch,
    QueryChunk,
    Segment,
    Seq2SeqForward,
    batch_order,
    cached_batch,
    has_native_attention,
    is_close,
    seq2seq_forward,
)
from softprompt.splice import TokenSpan, embed_spans

_LOG = logging.getLogger(__name__)
_NUM_MEASURED = 4  # positions of each side whose cache is measured


def make_seq2seq_runners(
    base: Base, forward: Forward, config: EngineConfig, prepack: bool, kind: RunnerKind
) -> Runners:
    """As `make_runners`, of an encoder-decoder."""
    own = seq2seq_forward(forward)
    notes = weights_note(base, forward, prepack)
    limits = step_limits(base, config)
    kv_bytes = config.kv_bytes or int(free_bytes(base.device) * KV_SHARE)
    cost = _memory_cost(base, own)
    problem = "answers run one at a time, as the engine was asked to run them" if kind == "eager" else cost.problem
    kv_cache = KVCache(kv_bytes, cost.bytes_per_position, base.max_length)
    cross_cache = KVCache(kv_bytes, cost.bytes_per_position, base.max_length, partner=kv_cache)
    if problem is None and prepack:
        for cache, sample in zip((kv_cache, cross_cache), _sample_buffers(base, own), strict=True):
            cache.preallocate(sample, limits.max_sequences)
    return Runners(
        batched=BatchedSeq2SeqRunner(base, own, kv_cache, cross_cache, compiled=kind != "torch"),
        eager=EagerSeq2SeqRunner(base, own, kv_bytes, cost),
        kv_cache=kv_cache,
        prefix_cache=PrefixCache(0),
        is_batchable=problem is None,
        max_batchable_length=math.inf if own.max_batchable_length is None else own.max_batchable_length,
        limits=limits,
        notes=(BATCHED if problem is None else problem, *notes),
    )


_COSTS: WeakKeyDictionary[Seq2SeqForward, MemoryCost] = WeakKeyDictionary()  # measured once per base


def _memory_cost(base: Base, forward: Seq2SeqForward) -> MemoryCost:
    """What a position of an answer or of a text takes, and why sequences cannot be batched, if they cannot."""
    if forward not in _COSTS:
        problem = why_not_batched(base, forward)
        if problem is None:
            _COSTS[forward] = MemoryCost(max(sample.num_bytes() for sample in _sample_buffers(base, forward)))
        else:
            _LOG.warning("base %r: answers run one row at a time, which is slow: %s", base.name, problem)
            _COSTS[forward] = MemoryCost(_bytes_per_position(base, forward), problem=problem)
    return _COSTS[forward]


class BatchedSeq2SeqRunner:
    """Sequences of any soft prompts and texts in one forward: those that start are encoded, packed, and all of them are
    decoded over two KV caches, their own and that of the encoder's states."""

    supports_chunked_prefill = False

    def __init__(
        self, base: Base, forward: Seq2SeqForward, kv_cache: KVCache, cross_cache: KVCache, compiled: bool = True
    ) -> None:
        self.base = base
        self.forward = forward
        self.kv_cache = kv_cache
        self.cross_cache = cross_cache
        self._is_compiled = compiled and has_native_attention(base.device, base.dtype)

    def can_ever_fit(self, request: Request) -> bool:
        return self.kv_cache.can_ever_fit(_num_written(self.base, request), request.num_encoded)

    def should_wait_for_prefix(self, sequence: Sequence) -> bool:
        return False

    def start(self, sequence: Sequence) -> bool:
        slot = self.kv_cache.allocate(sequence.length + 1)
        if slot is None:
            return False
        cross_slot = self.cross_cache.allocate(sequence.request.num_encoded)
        if cross_slot is None:
            self.kv_cache.free(slot)
            return False
        sequence.slot, sequence.cross_slot = slot, cross_slot
        return True

    def grow(self, sequence: Sequence) -> bool:
        assert sequence.slot is not None
        return self.kv_cache.grow(sequence.slot, sequence.length + 1)

    def stop(self, sequence: Sequence) -> None:
        assert sequence.slot is not None and sequence.cross_slot is not None
        self.kv_cache.free(sequence.slot)
        self.cross_cache.free(sequence.cross_slot)
        sequence.slot, sequence.cross_slot, sequence.computed = None, None, 0
        sequence.num_to_encode = sequence.request.num_encoded

    def run(self, plan: Plan) -> RunnerOutput:
        chunks = [_own_chunk(sequence, count) for sequence, count in plan]
        order = batch_order(chunks)
        ordered = [plan[number] for number in order]
        new = [sequence for sequence, _ in ordered if sequence.num_to_encode]
        embeds_TH, positions_T = embed_spans(self.base, [answer_span(*pair) for pair in ordered])
        hidden = self.forward.decode_packed(
            embeds_TH,
            positions_T,
            self._cached_batch([chunks[number] for number in order]),
            self._encoded_once(new),
            CrossBatch(
                self._cached_batch([_cross_chunk(sequence, count) for sequence, count in ordered]),
                written=tuple(_written_chunk(sequence) for sequence in new),
            ),
        )
        for sequence, count in plan:
            assert sequence.slot is not None and sequence.cross_slot is not None
            sequence.computed += count
            sequence.slot.length, sequence.cross_slot.length = sequence.computed, sequence.request.num_encoded
            sequence.num_to_encode = 0
        return RunnerOutput(hidden[ends_of_chunks(chunks, order).to(hidden.device)], [])

    def _encoded_once(self, new: SequenceOf[Sequence]) -> Tensor:
        """The encoder's states [S, D] of sequences, one behind the other; choices of one request have the same."""
        owners = list(dict.fromkeys(sequence.owner for sequence in new))
        states_SD = encoded(self.base, self.forward, [text_span(owner.request) for owner in owners])
        if len(owners) == len(new):
            return states_SD
        parts = dict(zip(owners, states_SD.split([owner.request.num_encoded for owner in owners]), strict=True))
        return torch.cat([parts[sequence.owner] for sequence in new])

    def _cached_batch(self, chunks: SequenceOf[QueryChunk]) -> CachedBatch:
        return cached_batch(chunks, self.base.device, self._is_compiled)

    def check_integrity(self, running: SequenceOf[Sequence]) -> None:
        """Slots of both caches are those of the running sequences."""
        for cache, slots in (
            (self.kv_cache, [each.slot for each in running]),
            (self.cross_cache, [each.cross_slot for each in running]),
        ):
            cache.check_integrity()
            assert {id(slot) for slot in cache.slots} == set(map(id, slots))
        assert all(each.slot is not None and each.slot.length == each.computed for each in running)


def _own_chunk(sequence: Sequence, count: int) -> QueryChunk:
    slot = sequence.slot
    assert slot is not None
    return QueryChunk(slot.bucket.buffer, slot.row, sequence.computed, count)


def _cross_chunk(sequence: Sequence, count: int) -> QueryChunk:
    slot = sequence.cross_slot
    assert slot is not None
    return QueryChunk(slot.bucket.buffer, slot.row, sequence.request.num_encoded - 1, count, is_cross=True)


def _written_chunk(sequence: Sequence) -> QueryChunk:
    slot = sequence.cross_slot
    assert slot is not None
    return QueryChunk(slot.bucket.buffer, slot.row, 0, sequence.request.num_encoded)


def encoded(base: Base, forward: Seq2SeqForward, spans: SequenceOf[TokenSpan]) -> Tensor:
    """The encoder's states [S, D] of whole rows, one behind the other; none of no row."""
    if not spans:
        return torch.zeros(0, forward.state_width, dtype=base.dtype, device=base.device)
    embeds_SH, positions_S = embed_spans(base, spans)
    firsts = accumulate((span.length for span in spans), initial=0)
    segments = tuple(Segment(first, span.length) for first, span in zip(firsts, spans, strict=False))
    return forward.encode_packed(embeds_SH, positions_S, PackedBatch(segments, is_causal=False))


class EagerSeq2SeqRunner:
    """One sequence at a time through transformers' own encoder, decoder and cache: slow, and right for every base."""

    supports_chunked_prefill = False

    def __init__(self, base: Base, forward: Seq2SeqForward, budget_bytes: int, cost: MemoryCost) -> None:
        self.base = base
        self.forward = forward
        self.budget_bytes = budget_bytes
        self.cost = cost
        self.num_bytes = 0

    def can_ever_fit(self, request: Request) -> bool:
        return self.cost.of(_num_written(self.base, request) + request.num_encoded) <= self.budget_bytes

    def should_wait_for_prefix(self, sequence: Sequence) -> bool:
        return False

    def start(self, sequence: Sequence) -> bool:
        needed = self._cost_of(sequence)
        if self.num_bytes + needed > self.budget_bytes:
            return False
        self.num_bytes += needed
        sequence.model_cache = self.forward.new_cache()
        return True

    def grow(self, sequence: Sequence) -> bool:
        return True

    def stop(self, sequence: Sequence) -> None:
        self.num_bytes -= self._cost_of(sequence)
        sequence.model_cache, sequence.encoded, sequence.computed = None, None, 0
        sequence.num_to_encode = sequence.request.num_encoded

    def run(self, plan: Plan) -> RunnerOutput:
        return RunnerOutput(torch.stack([self._run_one(sequence, count) for sequence, count in plan]), [])

    def check_integrity(self, running: SequenceOf[Sequence]) -> None:
        """Memory is that of the running sequences."""
        assert self.num_bytes == sum(map(self._cost_of, running))

    def _cost_of(self, sequence: Sequence) -> int:
        return self.cost.of(sequence.request.num_encoded + sequence.max_length)

    def _run_one(self, sequence: Sequence, count: int) -> Tensor:
        """The last hidden state [D]."""
        if sequence.encoded is None:
            sequence.encoded = _encoded_alone(self.base, self.forward, text_span(sequence.request))
            sequence.num_to_encode = 0
        embeds_TH, _ = embed_spans(self.base, [answer_span(sequence, count)])
        sequence.computed += count
        states_BSD = sequence.encoded[None]
        mask_BS = torch.ones(states_BSD.shape[:2], dtype=torch.long, device=states_BSD.device)
        return self.forward.decode(embeds_TH[None], states_BSD, mask_BS, sequence.model_cache)[0, -1]


def _num_written(base: Base, request: Request) -> int:
    """Positions that the decoder may come to have."""
    num_new = (request.sampling or DEFAULT_SAMPLING).max_new_tokens
    return request.num_virtual_of_decoder + len(base.decoder_start_ids) + num_new


def text_span(request: Request) -> TokenSpan:
    """What the encoder reads: the soft prompt and the text."""
    prompt = request.prompt
    vectors = None if prompt is None else prompt.tensor[: prompt.num_virtual_tokens]
    return TokenSpan(vectors, request.ids, 0, request.num_encoded)


def answer_span(sequence: Sequence, count: int) -> TokenSpan:
    """The next positions of what the decoder reads: its soft prompt, its start and the answer."""
    prompt = sequence.request.prompt
    vectors = None if prompt is None else prompt.tensor[prompt.num_virtual_tokens :]
    return TokenSpan(vectors if sequence.num_virtual else None, sequence.ids, sequence.computed, count)


def _encoded_alone(base: Base, forward: Seq2SeqForward, span: TokenSpan) -> Tensor:
    """The encoder's states [S, D] of one row."""
    embeds_SH, _ = embed_spans(base, [span])
    return forward.encode(embeds_SH[None], torch.ones(1, span.length, dtype=torch.long, device=embeds_SH.device))[0]


@torch.inference_mode()
def _bytes_per_position(base: Base, forward: Seq2SeqForward) -> int:
    """Bytes that a position of either side takes: keys and values, and an encoder's state."""
    span = TokenSpan(None, base.decoder_start_ids * _NUM_MEASURED, 0, _NUM_MEASURED)
    states_SD, cache = _encoded_alone(base, forward, span), forward.new_cache()
    mask_BS = torch.ones(1, _NUM_MEASURED, dtype=torch.long, device=states_SD.device)
    forward.decode(embed_spans(base, [span])[0][None], states_SD[None], mask_BS, cache)
    return math.ceil(cache.num_bytes() / (2 * _NUM_MEASURED)) + states_SD[0].nbytes


_TEST_IDS = ((3, 1, 4, 1, 5, 9), (2, 6, 5))
_CAPACITY = 16
_NUM_VIRTUAL = 2
_STEPS = ((2, None), (1, 2), (1, 1), (None, 1))  # positions of each row; None: it does not run


@torch.inference_mode()
def why_not_batched(base: Base, forward: Seq2SeqForward) -> str | None:
    """Why sequences of this base have to run one at a time; None where they need not.

    Two rows, of which one joins and one leaves, over cached keys and values are compared with plain forwards.
    """
    if not forward.can_pack:
        return forward.packing.note
    prompts = [_random_prompt(base, seed) for seed in (1, 2)]
    texts = [tuple(token % base.vocab_size for token in ids) for ids in _TEST_IDS]
    spans = [TokenSpan(p, ids, 0, len(p) + len(ids)) for p, ids in zip(prompts, texts, strict=True)]
    try:
        found = _cached_logits(base, forward, spans)
    except Exception as error:  # an unknown model may raise anything for a batch that it does not understand
        return f"{type(error).__name__}: {error}".split("\n")[0]
    if not all(map(is_close, found, _plain_logits(base, forward, spans))):
        return "batched sequences failed their test on this base: its answers differ"
    swapped = [replace(span, prompt=other) for span, other in zip(spans, reversed(prompts), strict=True)]
    if any(map(is_close, found, _plain_logits(base, forward, swapped))):
        return "batched sequences could not be tested on this base: it answers alike whatever the soft prompt"
    return None


def _random_prompt(base: Base, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(_NUM_VIRTUAL, base.hidden_size, generator=generator) * base.embedding_rms


def _answer(base: Base, row: int, first: int, length: int) -> TokenSpan:
    start = (base.decoder_start_ids or (0,))[0]
    return TokenSpan(None, (start, *(token % base.vocab_size for token in _TEST_IDS[1 - row])), first, length)


def _cached_logits(base: Base, forward: Seq2SeqForward, texts: SequenceOf[TokenSpan]) -> list[Tensor]:
    """[T, V] of each row."""
    own, cross, computed = KVBuffer(2, _CAPACITY), KVBuffer(2, _CAPACITY), [0, 0]
    parts: list[list[Tensor]] = [[], []]
    for counts in _STEPS:
        rows = [(row, count) for row, count in enumerate(counts) if count is not None]
        embeds, positions = embed_spans(base, [_answer(base, row, computed[row], count) for row, count in rows])
        new = [row for row, _ in rows if not computed[row]]
        chunks = [QueryChunk(own, row, computed[row], count) for row, count in rows]
        across = [QueryChunk(cross, row, texts[row].length - 1, count, is_cross=True) for row, count in rows]
        is_native = has_native_attention(base.device, base.dtype)
        hidden = forward.decode_packed(
            embeds, positions, cached_batch(chunks, base.device, is_native),
            encoded(base, forward, [texts[row] for row in new]),
            CrossBatch(
                cached_batch(across, base.device, is_native),
                tuple(QueryChunk(cross, row, 0, texts[row].length) for row in new),
            ),
        )  # fmt: skip
        for (row, count), states in zip(rows, hidden.split([count for _, count in rows]), strict=True):
            parts[row].append(forward.head(states))
            computed[row] += count
    return [torch.cat(own_parts) for own_parts in parts]


def _plain_logits(base: Base, forward: Seq2SeqForward, texts: SequenceOf[TokenSpan]) -> list[Tensor]:
    """[T, V] of each row, by one plain forward for each."""
    found = []
    for row, span in enumerate(texts):
        states = _encoded_alone(base, forward, span)[None]
        length = sum(counts[row] or 0 for counts in _STEPS)
        embeds, _ = embed_spans(base, [_answer(base, row, 0, length)])
        mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
        found.append(forward.head(forward.decode(embeds[None], states, mask))[0])
    return found


@torch.inference_mode()
def _sample_buffers(base: Base, forward: Seq2SeqForward) -> tuple[KVBuffer, KVBuffer]:
    """Buffers of one position, which have the decoder's attention modules: its own, and those across."""
    own, cross = KVBuffer(1, 1), KVBuffer(1, 1)
    embeds, positions = embed_spans(base, [_answer(base, 0, 0, 1)])
    forward.decode_packed(
        embeds,
        positions,
        cached_batch([QueryChunk(own, 0, 0, 1)], base.device),
        encoded(base, forward, [TokenSpan(None, (0,), 0, 1)]),
        CrossBatch(
            cached_batch([QueryChunk(cross, 0, 0, 1, is_cross=True)], base.device), (QueryChunk(cross, 0, 0, 1),)
        ),
    )
    return own, cross
