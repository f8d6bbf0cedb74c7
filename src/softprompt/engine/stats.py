"""What an engine has done, and how full it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from softprompt.engine.model_runner import Runners
from softprompt.engine.scheduler import Scheduler


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counts since the engine was made, and its state now."""

    num_steps: int
    num_read_tokens: int  # positions run: virtual ones, texts, answers
    num_new_tokens: int  # chosen
    num_finished: int  # requests
    num_aborted: int
    num_failed: int
    num_preemptions: int  # rows that had to give their memory back for a while
    num_running: int  # rows
    num_waiting: int
    kv_bytes: int  # keys and values of rows: what the stores take
    kv_bytes_in_use: int
    kv_bytes_limit: int  # what they may take
    prefix_bytes: int  # keys and values of beginnings
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

    def with_state(self, scheduler: Scheduler, runners: Runners) -> EngineStats:
        return EngineStats(
            **asdict(self),
            num_preemptions=scheduler.num_preemptions,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_bytes=runners.memory.num_bytes,
            kv_bytes_in_use=runners.memory.num_bytes_in_use,
            kv_bytes_limit=runners.memory.budget_positions * runners.memory.bytes_per_position,
            prefix_bytes=runners.prefixes.num_bytes,
            num_prefixes=len(runners.prefixes),
            num_prefix_hits=runners.prefixes.num_hits,
            num_prefix_misses=runners.prefixes.num_misses,
        )
