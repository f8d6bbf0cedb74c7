"""How the rows of one base run: the fast way where it passes its test, the slow one for all others."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from softprompt.base import Base, free_bytes
from softprompt.config import EngineConfig, SamplingConfig
from softprompt.engine.held_runner import HeldRunner
from softprompt.engine.memory import KeyValueMemory
from softprompt.engine.plain_runner import PlainRunner
from softprompt.engine.prefixes import Key, PrefixCache, shared_beginnings
from softprompt.engine.requests import Request
from softprompt.engine.rows import Ran, Row, Runner
from softprompt.engine.self_test import sample_store, why_not_held
from softprompt.families import Forward, ModelCache
from softprompt.prompt import SoftPrompt
from softprompt.splice import Stretch, splice_stretches

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

    def of(self, request: Request, sampling: SamplingConfig) -> Runner:
        """The way of a request."""
        num_virtual = 0 if request.prompt is None else request.prompt.num_virtual_tokens
        longest = num_virtual + len(request.ids) + sampling.max_new_tokens
        return self.held if self.is_held and longest <= self.held_up_to else self.plain

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
        held_up_to=math.inf if forward.alone_beyond is None else forward.alone_beyond,
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
    needed = forward.bytes_to_arrange(both_ways=False)
    if needed and needed < free_bytes(base.device) * _KV_SHARE:
        forward.arrange(both_ways=False)


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
        embeds_SH, positions_S = splice_stretches(base, [Stretch(None, (0,) * num_tokens, 0, num_tokens)])
        forward.hidden_states(embeds_SH[None], torch.ones_like(positions_S)[None], positions_S[None], cache)
    return cache
