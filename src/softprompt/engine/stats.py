"""What an engine has done, and how full it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from softprompt.engine.model_runner import Runners
from softprompt.engine.scheduler import Scheduler


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counts since the engine was made, and its present state."""

    num_steps: int
    num_read_tokens: int  # positions run: virtual ones, texts, answers
    num_new_tokens: int  # sampled
    num_finished: int  # requests
    num_aborted: int
    num_failed: int
    num_preemptions: int  # sequences that had to free their memory for a while
    num_running: int  # sequences
    num_waiting: int  # and texts to be classified or embedded
    kv_bytes: int  # size of the KV cache's buffers
    kv_bytes_in_use: int
    kv_bytes_limit: int
    prefix_bytes: int  # size of the prefix cache
    num_prefixes: int
    num_prefix_hits: int
    num_prefix_misses: int


@dataclass
class Counts:
    """The part that an engine counts itself."""

    num_steps: int = 0
    num_read_tokens: int = 0
    num_new_tokens: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_failed: int = 0

    def with_state(self, scheduler: Scheduler, runners: Runners, num_pooling: int = 0) -> EngineStats:
        """`num_pooling`: pooling requests that have not ended; they count as waiting."""
        kv_cache, prefix_cache = runners.kv_cache, runners.prefix_cache
        return EngineStats(
            **asdict(self),
            num_preemptions=scheduler.num_preemptions,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + num_pooling,
            kv_bytes=kv_cache.num_bytes,
            kv_bytes_in_use=kv_cache.num_bytes_in_use,
            kv_bytes_limit=kv_cache.budget_positions * kv_cache.bytes_per_position,
            prefix_bytes=prefix_cache.num_bytes,
            num_prefixes=len(prefix_cache),
            num_prefix_hits=prefix_cache.num_hits,
            num_prefix_misses=prefix_cache.num_misses,
        )
