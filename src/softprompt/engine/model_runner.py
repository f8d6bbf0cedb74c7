"""How the rows of one base run: the fast way where it passes its test, the slow one for all others."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from softprompt.base import Base, free_bytes
from softprompt.config import EngineConfig
from softprompt.engine.kv_cache import KeyValueMemory
from softprompt.engine.prefix_cache import Key, Prefix, PrefixCache, shared_beginnings
from softprompt.engine.request import Request
from softprompt.engine.sequence import Ran, Row, Runner
from softprompt.families import (
    Forward,
    KVBuffer,
    ModelCache,
    QueryChunk,
    batch_order,
    cached_batch,
    has_native_attention,
)
from softprompt.prompt import SoftPrompt
from softprompt.splice import TokenSpan, embed_spans

_LOG = logging.getLogger(__name__)
_KV_SHARE, _PREFIX_SHARE = 0.5, 0.125  # of the free memory
_MAX_ROWS = {"cpu": 32}
_MAX_ROWS_ELSEWHERE = 256
_STEP_TOKENS = {"cpu": 64}  # more gain nothing on a CPU, and make everybody wait
_STEP_TOKENS_ELSEWHERE = 2_048
_READING_STEPS = {"cpu": 8}  # of a short text, where somebody answers: here each token more makes a step longer

Facts = tuple[int, int, str | None]  # bytes of one position, of a row besides, and why rows cannot run together
_FACTS: WeakKeyDictionary[Forward, Facts] = WeakKeyDictionary()  # found out once per base


@dataclass(frozen=True)
class Runners:
    """Both ways, their memory, and the limits that hold for them together."""

    held: Runner
    plain: Runner
    memory: KeyValueMemory
    prefixes: PrefixCache
    is_held: bool  # whether the fast way passed its test
    held_up_to: float  # positions: a longer row runs by itself
    max_rows: int
    max_step_tokens: int
    num_reading_steps: int
    notes: tuple[str, ...]

    def of(self, request: Request) -> Runner:
        """Which of the two runs a request."""
        return self.held if self.is_held and request.max_length <= self.held_up_to else self.plain

    def run(self, plan: Sequence[tuple[Row, int]]) -> Ran:
        """What a step's rows give, in their order."""
        parts = {
            runner: [number for number, (row, _) in enumerate(plan) if row.runner is runner]
            for runner in (self.held, self.plain)
        }
        ran = [runner.run([plan[number] for number in own]) for runner, own in parts.items() if own]
        order = torch.tensor([number for own in parts.values() for number in own])
        last = torch.cat([part.last for part in ran])
        return Ran(last[order.argsort().to(last.device)], [pair for part in ran for pair in part.telling])

    def pin(self, prompt: SoftPrompt) -> bool:
        """Whether the prompt's keys and values stay from when they come; where rows run alone none are held."""
        num_bytes = prompt.num_virtual_tokens * self.memory.bytes_per_position
        return not self.is_held or self.prefixes.keep(_key(prompt), num_bytes)

    def unpin(self, prompt: SoftPrompt) -> None:
        """They may go again."""
        self.prefixes.let_go(_key(prompt))

    def check_integrity(self, running: Sequence[Row]) -> None:
        """Memory and pins are what the running rows hold. Raises AssertionError."""
        self.memory.check_integrity()
        self.prefixes.check_integrity()
        places = [place for shelf in self.memory.shelves.values() for place in shelf.places]
        assert {id(place) for place in places} == {id(row.place) for row in running if row.place is not None}
        assert all(row.place is None or row.place.length == row.computed for row in running)
        assert self.prefixes.num_pins == sum(row.prefix is not None for row in running)


def _key(prompt: SoftPrompt) -> Key:
    """What the beginning of a row goes by that has nothing but the soft prompt in it."""
    (_, key), *_ = shared_beginnings(prompt, (0,))
    return key


def make_runners(base: Base, forward: Forward, config: EngineConfig, arrange: bool) -> Runners:
    """Both ways for one base, tested, with the memory that the machine allows where `config` does not say.

    `arrange`: for many requests, with weights and memory made ready for them.
    """
    if arrange:
        _arrange(base, forward)
    free = free_bytes(base.device)
    kv_bytes = config.kv_bytes or int(free * _KV_SHARE)
    prefix_bytes = int(free * _PREFIX_SHARE) if config.prefix_bytes is None else config.prefix_bytes
    per_position, per_row, problem = _facts(base, forward)
    memory, prefixes = KeyValueMemory(kv_bytes, per_position, base.max_length), PrefixCache(prefix_bytes)
    device = base.device.type
    max_rows = config.max_rows or _MAX_ROWS.get(device, _MAX_ROWS_ELSEWHERE)
    if arrange and problem is None:
        memory.prepare(sample_store(base, forward), max_rows)
    return Runners(
        held=HeldRunner(base, forward, memory, prefixes),
        plain=PlainRunner(base, forward, kv_bytes, per_position, per_row),
        memory=memory,
        prefixes=prefixes,
        is_held=problem is None,
        held_up_to=math.inf if forward.max_batchable_length is None else forward.max_batchable_length,
        max_rows=max_rows,
        max_step_tokens=config.max_step_tokens or _STEP_TOKENS.get(device, _STEP_TOKENS_ELSEWHERE),
        num_reading_steps=_READING_STEPS.get(device, 1),
        notes=("answers run together over held keys and values" if problem is None else problem,),
    )


def _facts(base: Base, forward: Forward) -> Facts:
    if forward not in _FACTS:
        problem = why_not_held(base, forward)
        if problem is not None:
            _LOG.warning("base %r: answers run one row at a time, which is slow: %s", base.name, problem)
            per_position = bytes_per_position(base, forward)
            _FACTS[forward] = (per_position, bytes_per_row(base, forward, per_position), problem)
        else:  # a layer that shares another's keys and values holds them too, which a cache does not show
            _FACTS[forward] = (sample_store(base, forward).num_bytes(), 0, None)
    return _FACTS[forward]


def _arrange(base: Base, forward: Forward) -> None:
    """Keep the weights as this processor reads them fastest, where there is memory for it."""
    needed = forward.bytes_to_prepack(both_ways=False)
    if needed and needed < free_bytes(base.device) * _KV_SHARE:
        forward.prepack(both_ways=False)


_NUM_MEASURED = 4  # tokens whose cache is measured


def bytes_per_position(base: Base, forward: Forward) -> int:
    """Bytes of all keys and values of one position, read off one forward."""
    cache = _cache_after(base, forward, _NUM_MEASURED)
    return max(1, cache.bytes_of_keys_and_values() // _NUM_MEASURED) if cache is not None else 1


def bytes_per_row(base: Base, forward: Forward, per_position: int) -> int:
    """Bytes that a row takes however short it is: the states of recurrent layers."""
    cache = _cache_after(base, forward, _NUM_MEASURED)
    return max(0, cache.num_bytes() - per_position * _NUM_MEASURED) if cache is not None else 0


@torch.inference_mode()
def _cache_after(base: Base, forward: Forward, num_tokens: int) -> ModelCache | None:
    cache = forward.new_cache()
    if cache is not None:
        embeds_SH, positions_S = embed_spans(base, [TokenSpan(None, (0,) * num_tokens, 0, num_tokens)])
        forward.hidden_states(embeds_SH[None], torch.ones_like(positions_S)[None], positions_S[None], cache)
    return cache


# --

_WORTH_WAITING = 32  # positions of a beginning: computing fewer twice is quicker than waiting a step for them


class HeldRunner:
    """The fast way: a `Runner` over `KeyValueMemory`, with the beginnings of rows in a `PrefixCache`."""

    reads_in_pieces = True

    def __init__(self, base: Base, forward: Forward, memory: KeyValueMemory, prefixes: PrefixCache) -> None:
        self.base = base
        self.forward = forward
        self.memory = memory
        self.prefixes = prefixes
        self._promised: dict[Key, Row] = {}
        self._has_light = has_native_attention(base.device, base.dtype)

    def can_ever_hold(self, length: int) -> bool:
        return self.memory.can_ever_hold(length)

    def is_worth_waiting(self, row: Row) -> bool:
        """The longest beginning that somebody computes now, unless a longer one is there already."""
        for length, key in reversed(_useful(row)):
            if key in self.prefixes:
                return False
            if key in self._promised and length >= _WORTH_WAITING:
                return True
        return False

    def start(self, row: Row) -> bool:
        place = self.memory.place(row.length + 1)
        if place is None:
            return False
        row.place = place
        keys = _useful(row)
        row.prefix = self.prefixes.pin([key for _, key in reversed(keys)]) if keys else None
        if row.prefix is not None:
            row.computed = min(row.prefix.length, row.most_taken)
            place.shelf.store.write(place.row, row.prefix.states, row.computed)
            place.length = row.computed
        if row.num_cached is None:  # what a preempted row finds again is its own
            row.num_cached = row.computed
        self._promise(row)
        return True

    def make_room(self, row: Row) -> bool:
        assert row.place is not None
        return self.memory.grow(row.place, row.length + 1)

    def stop(self, row: Row) -> None:
        assert row.place is not None
        self.memory.release(row.place)
        if row.prefix is not None:
            self.prefixes.unpin(row.prefix)
        for _, key in row.promises:
            self._promised.pop(key, None)
        row.place, row.prefix, row.computed, row.promises = None, None, 0, []

    def run(self, pieces: Sequence[tuple[Row, int]]) -> Ran:
        placed = [_piece(row, count) for row, count in pieces]
        order = batch_order(placed)
        spans = [_span(*pieces[number]) for number in order]
        held = cached_batch([placed[number] for number in order], self.base.device, self._has_light)
        hidden = self.forward.packed_hidden_states(*embed_spans(self.base, spans), held)
        ends = _ends(placed, order)
        telling = [
            (row, hidden[int(ends[number]) + 1 - count :][row.telling(count)])
            for number, (row, count) in enumerate(pieces)
            if row.is_reporting
        ]
        for row, count in pieces:
            row.computed += count
            assert row.place is not None
            row.place.length = row.computed
            if row.promises:
                self._keep_promises(row)
        return Ran(hidden[ends.to(hidden.device)], telling)

    def _promise(self, row: Row) -> None:
        """What the row will leave to others: its soft prompt, and the longest beginning that was asked for before."""
        wanted = [(length, key) for length, key in row.keys if length == row.num_virtual]
        texts = [(length, key) for length, key in row.keys if length > row.num_virtual]
        seen = [pair for pair in texts if self.prefixes.was_seen(pair[1])]
        wanted += seen[-1:]
        row.promises = [pair for pair in wanted if pair[0] > row.computed and self._is_wanted(*pair)]
        self._promised.update((key, row) for _, key in row.promises)

    def _is_wanted(self, length: int, key: Key) -> bool:
        """Nobody has it or promised it, and it can be kept: nobody shall wait for what cannot."""
        can_be_kept = length * self.memory.bytes_per_position <= self.prefixes.budget_bytes
        return can_be_kept and key not in self.prefixes and key not in self._promised

    def _keep_promises(self, row: Row) -> None:
        assert row.place is not None
        for length, key in [pair for pair in row.promises if pair[0] <= row.computed]:
            states = row.place.shelf.store.read(row.place.row, length)
            self.prefixes.put(key, Prefix(states, length))
            self._promised.pop(key, None)
            row.promises.remove((length, key))


def _useful(row: Row) -> list[tuple[int, Key]]:
    """Beginnings that may spare it work: one that reports on its text runs the text itself."""
    return [pair for pair in row.keys if pair[0] <= row.most_taken + 1] if row.is_reporting else row.keys


def _ends(placed: Sequence[QueryChunk], order: Sequence[int]) -> Tensor:
    """Where each piece ends in a forward that runs them in that order."""
    ends = torch.empty(len(placed), dtype=torch.long)
    ends[torch.tensor(order)] = torch.tensor([placed[number].num_tokens for number in order]).cumsum(0) - 1
    return ends


def _span(row: Row, count: int) -> TokenSpan:
    prompt = row.request.prompt
    return TokenSpan(None if prompt is None else prompt.tensor, row.ids, row.computed, count)


def _piece(row: Row, count: int) -> QueryChunk:
    assert row.place is not None
    return QueryChunk(row.place.shelf.store, row.place.row, row.computed, count)


# --


class PlainRunner:
    """The slow way: a `Runner` in which each row has a cache of its own, and all the memory it may come to need.

    `bytes_per_row`: of the states that a row has however short it is.
    """

    def __init__(
        self, base: Base, forward: Forward, budget_bytes: int, bytes_per_position: int, bytes_per_row: int = 0
    ) -> None:
        self.base = base
        self.forward = forward
        self.budget_bytes = budget_bytes
        self.bytes_per_position = bytes_per_position
        self.bytes_per_row = bytes_per_row
        self.num_bytes = 0
        is_fixed = forward.max_batchable_length is None  # else a whole text's positions are not those of its parts
        self.reads_in_pieces = is_fixed and forward.supports_chunked_prefill

    def can_ever_hold(self, length: int) -> bool:
        return self._bytes(length) <= self.budget_bytes

    def is_worth_waiting(self, row: Row) -> bool:
        return False

    def start(self, row: Row) -> bool:
        needed = self._bytes(row.longest)
        if self.num_bytes + needed > self.budget_bytes:
            return False
        self.num_bytes += needed
        row.cache = self.forward.new_cache()
        return True

    def make_room(self, row: Row) -> bool:
        return True

    def stop(self, row: Row) -> None:
        self.num_bytes -= self._bytes(row.longest)
        row.cache, row.computed = None, 0

    def run(self, pieces: Sequence[tuple[Row, int]]) -> Ran:
        last: list[Tensor] = []
        telling: list[tuple[Row, Tensor]] = []
        for row, count in pieces:
            which = row.telling(count) if row.is_reporting else None
            hidden = self._run_one(row, count)
            last.append(hidden[-1])
            if which is not None:
                telling.append((row, hidden[which]))
        return Ran(torch.stack(last), telling)

    def _run_one(self, row: Row, count: int) -> Tensor:
        """Hidden states [count, D]."""
        prompt = row.request.prompt
        first = row.computed if row.cache is not None else 0
        row.computed += count
        span = TokenSpan(None if prompt is None else prompt.tensor, row.ids, first, row.computed - first)
        embeds_SH, positions_S = embed_spans(self.base, [span])
        mask = torch.ones(1, row.computed, dtype=torch.long, device=embeds_SH.device)
        return self.forward.hidden_states(embeds_SH[None], mask, positions_S[None], row.cache)[0, -count:]

    def _bytes(self, length: int) -> int:
        return self.bytes_per_row + length * self.bytes_per_position


# --

_IDS = (3, 1, 4, 1, 5, 9)
_NUM_VIRTUAL = 3
_CAPACITY = 16
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}  # relative; some families compute softmax in float32
_TOLERANCE_16_BIT = 0.1


@torch.inference_mode()
def why_not_held(base: Base, forward: Forward) -> str | None:
    """Why rows of this base have to run one at a time; None where they need not."""
    if forward.packing.carrier is None:
        return forward.packing.note
    ids = tuple(token % base.vocab_size for token in _IDS)
    right, wrong = (_some_prompt(base, seed) for seed in (1, 2))
    try:
        held = _held_logits(base, forward, right, ids)
    except Exception as error:  # whatever a model that nobody knew does with rows that it does not understand
        return f"{type(error).__name__}: {error}".split("\n")[0]
    if not _is_close(held, _plain_logits(base, forward, right, ids)):
        return "held rows failed their test on this base: its answers differ"
    if _is_close(held, _plain_logits(base, forward, wrong, ids)):
        return "held rows could not be tested on this base: it answers alike whatever the soft prompt"
    return None


@torch.inference_mode()
def sample_store(base: Base, forward: Forward) -> KVBuffer:
    """A store that one token of the base has been written to, so that it knows the attention modules."""
    store = KVBuffer(1, 1)
    _hidden(base, forward, TokenSpan(None, (0,), 0, 1), store, 0)
    return store


def _some_prompt(base: Base, seed: int) -> Tensor:
    """[P, H], of the size of the base's embeddings."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(_NUM_VIRTUAL, base.hidden_size, generator=generator) * base.embedding_rms


def _held_logits(base: Base, forward: Forward, prompt: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Logits [V] behind the last id, of a row whose soft prompt comes from another."""
    store = KVBuffer(2, _CAPACITY)
    _run(base, forward, TokenSpan(prompt, ids[:1], 0, _NUM_VIRTUAL + 1), store, 1)
    store.write(0, store.read(1, _NUM_VIRTUAL), _NUM_VIRTUAL)
    half, last = len(ids) // 2, len(ids) - 1
    _run(base, forward, TokenSpan(prompt, ids, _NUM_VIRTUAL, half), store, 0)
    _run(base, forward, TokenSpan(prompt, ids, _NUM_VIRTUAL + half, last - half), store, 0)
    return _run(base, forward, TokenSpan(prompt, ids, _NUM_VIRTUAL + last, 1), store, 0)


def _run(base: Base, forward: Forward, span: TokenSpan, store: KVBuffer, row: int) -> Tensor:
    return forward.logits(_hidden(base, forward, span, store, row)[-1:])[0]


def _hidden(base: Base, forward: Forward, span: TokenSpan, store: KVBuffer, row: int) -> Tensor:
    pieces = [QueryChunk(store, row, span.first, span.length)]
    rows = cached_batch(pieces, base.device, has_native_attention(base.device, base.dtype))
    return forward.packed_hidden_states(*embed_spans(base, [span]), rows)


def _plain_logits(base: Base, forward: Forward, prompt: Tensor, ids: tuple[int, ...]) -> Tensor:
    embeds_SH, positions_S = embed_spans(base, [TokenSpan(prompt, ids, 0, _NUM_VIRTUAL + len(ids))])
    mask = torch.ones_like(positions_S)[None]
    return forward.logits(forward.hidden_states(embeds_SH[None], mask, positions_S[None])[:, -1])[0]


def _is_close(ours: Tensor, truth: Tensor) -> bool:
    tolerance = _TOLERANCE.get(truth.dtype, _TOLERANCE_16_BIT)
    return bool((ours - truth).abs().max() <= tolerance * truth.abs().max())
