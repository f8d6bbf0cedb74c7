"""How the sequences of one base run: batched over one KV cache where the base passes a self-test, else one at a time.

The self-test compares, on a few tokens, sequences over cached keys and values with one plain forward on concatenated
embeddings. A wrong soft prompt has to fail it, or the comparison says nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from softprompt.base import Base, free_bytes
from softprompt.config import EngineConfig, Weights
from softprompt.engine.kv_cache import KVCache
from softprompt.engine.prefix_cache import Key, Prefix, PrefixCache
from softprompt.engine.request import Request
from softprompt.engine.scheduler import Plan
from softprompt.engine.sequence import ModelRunner, RunnerOutput, Sequence
from softprompt.errors import ConfigError
from softprompt.families import (
    Forward,
    KVBuffer,
    ModelCache,
    QueryChunk,
    batch_order,
    cached_batch,
    forward_of,
    has_native_attention,
)
from softprompt.splice import TokenSpan, embed_spans

_LOG = logging.getLogger(__name__)
KV_SHARE, _PREFIX_SHARE = 0.5, 0.125  # of the free memory
_MAX_SEQUENCES = {"cpu": 32}
_MAX_SEQUENCES_ELSEWHERE = 256
_STEP_TOKENS = {"cpu": 64}  # more gain nothing on a CPU, and delay every sequence
_STEP_TOKENS_ELSEWHERE = 2_048
_PREFILL_STEPS = {"cpu": 8}  # of a short text beside decoding sequences: here each token makes a step longer
BATCHED = "answers run batched over cached keys and values"
_MIN_PENDING = 32  # positions: a shorter prefix is computed twice sooner than a sequence waits a step for it

RunnerKind = Literal["auto", "torch", "eager"]  # what the base allows; without compiled attention; one at a time


@dataclass(frozen=True)
class StepLimits:
    """How much one step runs."""

    max_sequences: int
    max_step_tokens: int
    num_prefill_steps: int


def step_limits(base: Base, config: EngineConfig) -> StepLimits:
    """As configured, else what suits the device."""
    device = base.device.type
    return StepLimits(
        max_sequences=config.max_rows or _MAX_SEQUENCES.get(device, _MAX_SEQUENCES_ELSEWHERE),
        max_step_tokens=config.max_step_tokens or _STEP_TOKENS.get(device, _STEP_TOKENS_ELSEWHERE),
        num_prefill_steps=_PREFILL_STEPS.get(device, 1),
    )


@dataclass(frozen=True)
class Runners:
    """Both runners, their memory, and the limits of both together."""

    batched: ModelRunner
    eager: ModelRunner
    kv_cache: KVCache
    prefix_cache: PrefixCache
    is_batchable: bool  # whether the batched runner passed its test
    max_batchable_length: float  # positions; a longer sequence runs by itself
    limits: StepLimits
    notes: tuple[str, ...]

    def select(self, request: Request) -> ModelRunner:
        """The runner of a request."""
        is_batched = self.is_batchable and request.max_length <= self.max_batchable_length
        return self.batched if is_batched else self.eager

    def run(self, plan: Plan) -> RunnerOutput:
        """What a step's sequences give, in their order."""
        numbers: dict[ModelRunner, list[int]] = {}
        for number, (sequence, _) in enumerate(plan):
            numbers.setdefault(sequence.runner, []).append(number)
        if len(numbers) == 1:
            return next(iter(numbers)).run(plan)
        outputs = [runner.run([plan[number] for number in own]) for runner, own in numbers.items()]
        order = torch.tensor([number for own in numbers.values() for number in own])
        last = torch.cat([output.last for output in outputs])
        return RunnerOutput(
            last[order.argsort().to(last.device)], [pair for output in outputs for pair in output.prompt_states]
        )

    def check_integrity(self, running: SequenceOf[Sequence]) -> None:
        """What is in memory is that of the running sequences. Raises AssertionError."""
        for runner in (self.batched, self.eager):
            runner.check_integrity([each for each in running if each.runner is runner])


def with_weights(forward: Forward, base: Base, weights: Weights) -> Forward:
    """The forward that generates with such weights. Raises ConfigError where this base has no int8 weights."""
    if weights == "loaded":
        return forward
    if base.kind == "encoder":
        raise ConfigError(
            f"weights is int8, which is for generation, and base {base.name!r} is an encoder; leave it out"
        )
    if base.device.type != "cpu":
        raise ConfigError(
            f"weights is int8, which is for a CPU, and base {base.name!r} is on {base.device}; leave it out"
        )
    found = forward.with_int8()
    if not found.int8_bytes:
        raise ConfigError(
            f"weights is int8, but none of the weights of base {base.name!r} can be kept so: either the package was "
            "installed without a C compiler, or no layer is a float32 or bfloat16 matrix of whole groups of 32 inputs"
        )
    return found


def int8_note(base: Base) -> str:
    """What it means that answers of this base were generated with int8 weights, and the memory that these take."""
    extra = forward_of(base).with_int8().int8_bytes / 2**20
    return (
        "answers and their log-probabilities are those of int8 weights in steps of at most 32 tokens "
        f"({extra:,.1f} MiB more)"
    )


def make_runners(base: Base, forward: Forward, config: EngineConfig, prepack: bool, kind: RunnerKind) -> Runners:
    """Both runners of one base, tested, with the memory that the machine allows where `config` does not say.

    `prepack`: for many requests, with weights repacked and memory allocated in advance.
    """
    weights_notes = weights_note(base, forward, prepack)
    free = free_bytes(base.device)
    kv_bytes = config.kv_bytes or int(free * KV_SHARE)
    prefix_bytes = int(free * _PREFIX_SHARE) if config.prefix_bytes is None else config.prefix_bytes
    cost = _memory_cost(base, forward, kind)
    kv_cache = KVCache(kv_bytes, cost.bytes_per_position, base.max_length)
    prefix_cache = PrefixCache(prefix_bytes)
    limits = step_limits(base, config)
    if prepack and cost.problem is None:
        kv_cache.preallocate(_sample_buffer(base, forward), limits.max_sequences)
    return Runners(
        batched=BatchedRunner(base, forward, kv_cache, prefix_cache, compiled=kind != "torch"),
        eager=EagerRunner(base, forward, kv_bytes, cost),
        kv_cache=kv_cache,
        prefix_cache=prefix_cache,
        is_batchable=cost.problem is None,
        max_batchable_length=math.inf if forward.max_batchable_length is None else forward.max_batchable_length,
        limits=limits,
        notes=(BATCHED if cost.problem is None else cost.problem, *weights_notes),
    )


def weights_note(base: Base, forward: Forward, prepack: bool) -> list[str]:
    """Repack the weights for `prepack`, where that gains; what was done to them, for people."""
    prepacked_bytes = _prepack(base, forward) if prepack and not forward.int8_bytes else 0
    if forward.int8_bytes:
        return [int8_note(base)]
    size = f"{prepacked_bytes / 2**20:,.0f} MiB"
    return [f"weights kept once more, as this CPU multiplies them fastest ({size})"] if prepacked_bytes else []


def _prepack(base: Base, forward: Forward) -> int:
    """Keep the weights as this processor reads them fastest, where there is memory for it; the bytes that it took."""
    needed = forward.bytes_to_prepack(both_ways=False)
    if not 0 < needed < free_bytes(base.device) * KV_SHARE:
        return 0
    forward.prepack(both_ways=False)
    return needed


class BatchedRunner:
    """Sequences of any lengths and soft prompts in one forward over a KV cache, which start from cached prefixes."""

    supports_chunked_prefill = True

    def __init__(
        self, base: Base, forward: Forward, kv_cache: KVCache, prefix_cache: PrefixCache, compiled: bool = True
    ) -> None:
        self.base = base
        self.forward = forward
        self.kv_cache = kv_cache
        self.prefix_cache = prefix_cache
        self.pending_prefixes: dict[Key, Sequence] = {}  # which sequence is computing each
        self._is_compiled = compiled and has_native_attention(base.device, base.dtype)

    def can_ever_fit(self, request: Request) -> bool:
        return self.kv_cache.can_ever_fit(request.max_length)

    def should_wait_for_prefix(self, sequence: Sequence) -> bool:
        """Whether the longest prefix in sight is one that another sequence is computing, and worth waiting for."""
        for length, key in reversed(_usable_keys(sequence)):
            if key in self.prefix_cache:
                return False
            if key in self.pending_prefixes and length >= _MIN_PENDING:
                return True
        return False

    def start(self, sequence: Sequence) -> bool:
        slot = self.kv_cache.allocate(sequence.length + 1)
        if slot is None:
            return False
        sequence.slot = slot
        keys = _usable_keys(sequence)
        sequence.prefix = self.prefix_cache.pin([key for _, key in reversed(keys)]) if keys else None
        if sequence.prefix is not None:
            sequence.computed = min(sequence.prefix.length, sequence.max_reusable_tokens)
            slot.bucket.buffer.write(slot.row, sequence.prefix.states, sequence.computed)
            slot.length = sequence.computed
        if sequence.num_cached is None:  # what a preempted sequence finds again is its own
            sequence.num_cached = sequence.computed
        self._announce_prefixes(sequence)
        return True

    def grow(self, sequence: Sequence) -> bool:
        assert sequence.slot is not None
        return self.kv_cache.grow(sequence.slot, sequence.length + 1)

    def stop(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.kv_cache.free(sequence.slot)
        if sequence.prefix is not None:
            self.prefix_cache.unpin(sequence.prefix)
        for _, key in sequence.pending_prefixes:
            self.pending_prefixes.pop(key, None)
        sequence.slot, sequence.prefix, sequence.computed, sequence.pending_prefixes = None, None, 0, []

    def run(self, plan: Plan) -> RunnerOutput:
        chunks = [_chunk(sequence, count) for sequence, count in plan]
        order = batch_order(chunks)
        spans = [_span(*plan[number]) for number in order]
        batch = cached_batch([chunks[number] for number in order], self.base.device, self._is_compiled)
        hidden = self.forward.packed_hidden_states(*embed_spans(self.base, spans), batch)
        ends = ends_of_chunks(chunks, order)
        prompt_states = [
            (sequence, hidden[int(ends[number]) + 1 - count :][sequence.with_prompt_logprobs(count)])
            for number, (sequence, count) in enumerate(plan)
            if sequence.wants_prompt_logprobs
        ]
        for sequence, count in plan:
            sequence.computed += count
            assert sequence.slot is not None
            sequence.slot.length = sequence.computed
            if sequence.pending_prefixes:
                self._store_prefixes(sequence)
        return RunnerOutput(hidden[ends.to(hidden.device)], prompt_states)

    def check_integrity(self, running: SequenceOf[Sequence]) -> None:
        """Slots, pins and pending prefixes are those of the running sequences."""
        self.kv_cache.check_integrity()
        self.prefix_cache.check_integrity()
        assert {id(slot) for slot in self.kv_cache.slots} == {id(each.slot) for each in running}
        assert all(each.slot is not None and each.slot.length == each.computed for each in running)
        assert self.prefix_cache.num_pins == sum(each.prefix is not None for each in running)
        assert self.pending_prefixes == {key: each for each in running for _, key in each.pending_prefixes}

    def _announce_prefixes(self, sequence: Sequence) -> None:
        """The prefixes it will compute for others: its soft prompt, and the longest that was requested before."""
        keys = sequence.prefix_keys
        wanted = [(length, key) for length, key in keys if length == sequence.num_virtual]
        texts = [(length, key) for length, key in keys if length > sequence.num_virtual]
        wanted += [pair for pair in texts if self.prefix_cache.was_requested(pair[1])][-1:]
        sequence.pending_prefixes = [
            pair for pair in wanted if pair[0] > sequence.computed and self._should_compute(*pair)
        ]
        self.pending_prefixes.update((key, sequence) for _, key in sequence.pending_prefixes)

    def _should_compute(self, length: int, key: Key) -> bool:
        """True if no sequence has or is computing this prefix and it fits the cache; others must never wait for one
        that cannot be stored."""
        fits = length * self.kv_cache.bytes_per_position <= self.prefix_cache.budget_bytes
        return fits and key not in self.prefix_cache and key not in self.pending_prefixes

    def _store_prefixes(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        for length, key in [pair for pair in sequence.pending_prefixes if pair[0] <= sequence.computed]:
            states = sequence.slot.bucket.buffer.read(sequence.slot.row, length)
            self.prefix_cache.put(key, Prefix(states, length))
            self.pending_prefixes.pop(key, None)
            sequence.pending_prefixes.remove((length, key))


def _usable_keys(sequence: Sequence) -> list[tuple[int, Key]]:
    """Of the prefixes that it may start from. A sequence with prompt log-probabilities runs its text itself."""
    if not sequence.wants_prompt_logprobs:
        return sequence.prefix_keys
    return [pair for pair in sequence.prefix_keys if pair[0] <= sequence.max_reusable_tokens + 1]


def ends_of_chunks(chunks: SequenceOf[QueryChunk], order: SequenceOf[int]) -> Tensor:
    """Where each chunk ends in a forward that runs them in that order."""
    ends = torch.empty(len(chunks), dtype=torch.long)
    ends[torch.tensor(order)] = torch.tensor([chunks[number].num_tokens for number in order]).cumsum(0) - 1
    return ends


def _span(sequence: Sequence, count: int) -> TokenSpan:
    prompt = sequence.request.prompt
    return TokenSpan(None if prompt is None else prompt.tensor, sequence.ids, sequence.computed, count)


def _chunk(sequence: Sequence, count: int) -> QueryChunk:
    slot = sequence.slot
    assert slot is not None
    return QueryChunk(slot.bucket.buffer, slot.row, sequence.computed, count)


class EagerRunner:
    """One sequence at a time through transformers' own forward and cache, on concatenated embeddings: slow, and right
    for every base. For bases that fail the batched runner's test, and for a sequence so long that its positions depend
    on the rest of the batch.

    Each sequence has a cache of its own, and reserves all the memory that it may come to need. A base without a usable
    cache runs the whole sequence for every token.
    """

    def __init__(self, base: Base, forward: Forward, budget_bytes: int, cost: MemoryCost) -> None:
        self.base = base
        self.forward = forward
        self.budget_bytes = budget_bytes
        self.cost = cost
        self.num_bytes = 0
        is_fixed = forward.max_batchable_length is None  # else a whole text's positions are not those of its parts
        self.supports_chunked_prefill = is_fixed and forward.supports_chunked_prefill

    def can_ever_fit(self, request: Request) -> bool:
        return self.cost.of(request.max_length) <= self.budget_bytes

    def should_wait_for_prefix(self, sequence: Sequence) -> bool:
        return False

    def start(self, sequence: Sequence) -> bool:
        needed = self.cost.of(sequence.max_length)
        if self.num_bytes + needed > self.budget_bytes:
            return False
        self.num_bytes += needed
        sequence.model_cache = self.forward.new_cache()
        return True

    def grow(self, sequence: Sequence) -> bool:
        return True

    def stop(self, sequence: Sequence) -> None:
        self.num_bytes -= self.cost.of(sequence.max_length)
        sequence.model_cache, sequence.computed = None, 0

    def run(self, plan: Plan) -> RunnerOutput:
        last: list[Tensor] = []
        prompt_states: list[tuple[Sequence, Tensor]] = []
        for sequence, count in plan:
            wanted = sequence.with_prompt_logprobs(count) if sequence.wants_prompt_logprobs else None
            hidden = self._run_one(sequence, count)
            last.append(hidden[-1])
            if wanted is not None:
                prompt_states.append((sequence, hidden[wanted]))
        return RunnerOutput(torch.stack(last), prompt_states)

    def check_integrity(self, running: SequenceOf[Sequence]) -> None:
        """Memory is that of the running sequences."""
        assert self.num_bytes == sum(self.cost.of(each.max_length) for each in running)

    def _run_one(self, sequence: Sequence, count: int) -> Tensor:
        """Hidden states [count, D]."""
        prompt = sequence.request.prompt
        first = sequence.computed if sequence.model_cache is not None else 0
        sequence.computed += count
        span = TokenSpan(None if prompt is None else prompt.tensor, sequence.ids, first, sequence.computed - first)
        embeds_SH, positions_S = embed_spans(self.base, [span])
        mask = torch.ones(1, sequence.computed, dtype=torch.long, device=embeds_SH.device)
        return self.forward.hidden_states(embeds_SH[None], mask, positions_S[None], sequence.model_cache)[0, -count:]


@dataclass(frozen=True)
class MemoryCost:
    """Bytes that keys and values take, and whether they can be batched."""

    bytes_per_position: int
    bytes_per_sequence: int = 0  # however short it is: the states of recurrent layers
    problem: str | None = None  # why sequences cannot be batched

    def of(self, length: int) -> int:
        """Bytes of one sequence."""
        return self.bytes_per_sequence + length * self.bytes_per_position


_COSTS: WeakKeyDictionary[Forward, MemoryCost] = WeakKeyDictionary()  # measured once per base
_NUM_MEASURED = 4  # tokens whose cache is measured


def _memory_cost(base: Base, forward: Forward, kind: RunnerKind) -> MemoryCost:
    if base.kind == "encoder":
        return MemoryCost(1, problem="the base is an encoder: it classifies and embeds, and generates nothing")
    if kind == "eager":
        return _eager_cost(base, forward, "answers run one at a time, as the engine was asked to run them")
    if forward not in _COSTS:
        problem = why_not_batched(base, forward)
        if problem is not None:
            _LOG.warning("base %r: answers run one row at a time, which is slow: %s", base.name, problem)
            _COSTS[forward] = _eager_cost(base, forward, problem)
        else:  # a layer that shares another's keys and values has its own here, which a model's cache does not show
            _COSTS[forward] = MemoryCost(_sample_buffer(base, forward).num_bytes())
    return _COSTS[forward]


def _eager_cost(base: Base, forward: Forward, problem: str) -> MemoryCost:
    per_position = bytes_per_position(base, forward)
    return MemoryCost(per_position, bytes_per_sequence(base, forward, per_position), problem)


def bytes_per_position(base: Base, forward: Forward) -> int:
    """Bytes of all keys and values of one position, measured on one forward."""
    cache = _cache_after(base, forward, _NUM_MEASURED)
    return max(1, cache.bytes_of_keys_and_values() // _NUM_MEASURED) if cache is not None else 1


def bytes_per_sequence(base: Base, forward: Forward, per_position: int) -> int:
    """Bytes that a sequence takes however short it is."""
    cache = _cache_after(base, forward, _NUM_MEASURED)
    return max(0, cache.num_bytes() - per_position * _NUM_MEASURED) if cache is not None else 0


@torch.inference_mode()
def _cache_after(base: Base, forward: Forward, num_tokens: int) -> ModelCache | None:
    cache = forward.new_cache()
    if cache is not None:
        embeds_SH, positions_S = embed_spans(base, [TokenSpan(None, (0,) * num_tokens, 0, num_tokens)])
        forward.hidden_states(embeds_SH[None], torch.ones_like(positions_S)[None], positions_S[None], cache)
    return cache


_TEST_IDS = (3, 1, 4, 1, 5, 9)
_NUM_VIRTUAL = 3
_CAPACITY = 16
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}  # relative; some families compute softmax in float32
_TOLERANCE_16_BIT = 0.1


@torch.inference_mode()
def why_not_batched(base: Base, forward: Forward) -> str | None:
    """Why sequences of this base have to run one at a time; None where they need not."""
    if forward.packing.carrier is None:
        return forward.packing.note
    ids = tuple(token % base.vocab_size for token in _TEST_IDS)
    right, wrong = (_random_prompt(base, seed) for seed in (1, 2))
    try:
        found = _cached_logits(base, forward, right, ids)
    except Exception as error:  # an unknown model may raise anything for a batch that it does not understand
        return f"{type(error).__name__}: {error}".split("\n")[0]
    if not _is_close(found, _plain_logits(base, forward, right, ids)):
        return "batched sequences failed their test on this base: its answers differ"
    if _is_close(found, _plain_logits(base, forward, wrong, ids)):
        return "batched sequences could not be tested on this base: it answers alike whatever the soft prompt"
    return None


@torch.inference_mode()
def _sample_buffer(base: Base, forward: Forward) -> KVBuffer:
    """A buffer of one token, which has the base's attention modules."""
    buffer = KVBuffer(1, 1)
    _hidden(base, forward, TokenSpan(None, (0,), 0, 1), buffer, 0)
    return buffer


def _random_prompt(base: Base, seed: int) -> Tensor:
    """[P, H], of the size of the base's embeddings."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(_NUM_VIRTUAL, base.hidden_size, generator=generator) * base.embedding_rms


def _cached_logits(base: Base, forward: Forward, prompt: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Logits [V] behind the last id, of a row whose soft prompt was run in another and whose text is read in chunks."""
    buffer = KVBuffer(2, _CAPACITY)
    _run(base, forward, TokenSpan(prompt, ids[:1], 0, _NUM_VIRTUAL + 1), buffer, 1)
    buffer.write(0, buffer.read(1, _NUM_VIRTUAL), _NUM_VIRTUAL)
    half, last = len(ids) // 2, len(ids) - 1
    _run(base, forward, TokenSpan(prompt, ids, _NUM_VIRTUAL, half), buffer, 0)
    _run(base, forward, TokenSpan(prompt, ids, _NUM_VIRTUAL + half, last - half), buffer, 0)
    return _run(base, forward, TokenSpan(prompt, ids, _NUM_VIRTUAL + last, 1), buffer, 0)


def _run(base: Base, forward: Forward, span: TokenSpan, buffer: KVBuffer, row: int) -> Tensor:
    return forward.logits(_hidden(base, forward, span, buffer, row)[-1:])[0]


def _hidden(base: Base, forward: Forward, span: TokenSpan, buffer: KVBuffer, row: int) -> Tensor:
    chunks = [QueryChunk(buffer, row, span.first, span.length)]
    batch = cached_batch(chunks, base.device, has_native_attention(base.device, base.dtype))
    return forward.packed_hidden_states(*embed_spans(base, [span]), batch)


def _plain_logits(base: Base, forward: Forward, prompt: Tensor, ids: tuple[int, ...]) -> Tensor:
    embeds_SH, positions_S = embed_spans(base, [TokenSpan(prompt, ids, 0, _NUM_VIRTUAL + len(ids))])
    mask = torch.ones_like(positions_S)[None]
    return forward.logits(forward.hidden_states(embeds_SH[None], mask, positions_S[None])[:, -1])[0]


def _is_close(ours: Tensor, truth: Tensor) -> bool:
    tolerance = _TOLERANCE.get(truth.dtype, _TOLERANCE_16_BIT)
    return bool((ours - truth).abs().max() <= tolerance * truth.abs().max())
