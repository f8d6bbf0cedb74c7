"""softprompt's side of generation.py: workloads on its engine, and the cases that compare it with itself."""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import asdict, replace
from typing import Any

from generation_cases import (
    Request,
    Served,
    Watch,
    Workload,
    asked_of,
    give_back_memory,
    prompts_of,
    resident_bytes,
    run_workloads,
    workload_of,
)

WARM_PROMPTS = 16
RAMP = 16  # of the many requests, so many are shorter, so that their successors come one by one


class Ours:
    """A base, an engine, and the pools of soft prompts that were asked for by name."""

    def __init__(self, request: Request) -> None:
        from softprompt import load_base
        from softprompt.config import EngineConfig
        from softprompt.engine import Engine

        began = time.perf_counter()
        self.base = load_base(request["folder"], dtype=request["dtype"], device="cpu")
        loaded = time.perf_counter()
        before = resident_bytes()
        settings = request.get("settings", {})  # more of EngineConfig
        self.engine = Engine(self.base, EngineConfig(max_rows=request["max_rows"], **settings))
        self.figures: Request = {
            "load_seconds": loaded - began,
            "setup_seconds": time.perf_counter() - loaded,
            "setup_bytes": resident_bytes() - before,
            "notes": list(getattr(self.engine, "notes", ())),
        }
        self.pools: dict[str, list[Any]] = {}

    def prompts(self, workload: Workload) -> list[Any]:  # Any: SoftPrompt, which PEFT's process does not import
        """The pool's prompts; those of a named pool are kept, and so are their prefixes."""
        from softprompt import SoftPrompt

        if workload.pool in self.pools:
            return self.pools[workload.pool]
        made = [SoftPrompt(tensor) for tensor in prompts_of(workload, self.base.hidden_size)]
        if workload.pool is not None:
            self.pools[workload.pool] = made
        return made

    def serve(self, workload: Workload, ramp: int = 0) -> list[Served]:
        """Step by step; a request is added when it arrives. The first `ramp` answers end early, one after another."""
        from softprompt.engine import Tokens

        wanted = self._requests(workload, ramp)
        served, numbers, watch = [Served() for _ in wanted], dict[int, int](), Watch()
        waiting = deque(enumerate(wanted))
        while waiting or self.engine.has_work:
            while waiting and waiting[0][1][0] <= watch.now():
                number, (_, request) = waiting.popleft()
                numbers[self.engine.add(request)] = number
            if not self.engine.has_work:
                watch.sleep_until(waiting[0][1][0])
                continue
            for event in self.engine.step():
                if isinstance(event, Tokens):
                    served[numbers[event.request]].note(event.ids, watch.now())
        return served

    def _requests(self, workload: Workload, ramp: int) -> list[tuple[float, Any]]:  # Any: softprompt's Request
        """Arrival and request, in order."""
        from softprompt.config import SamplingConfig
        from softprompt.engine import Request as Generation

        prompts, found = self.prompts(workload), []
        for number, asked in enumerate(asked_of(workload, self.base.vocab_size)):
            tokens = max(1, asked.new_tokens * (number + 1) // ramp) if number < ramp else asked.new_tokens
            sampling = SamplingConfig(max_new_tokens=tokens, ignore_eos=True, repetition_penalty=workload.penalty)
            found.append((asked.arrives_s, Generation(asked.ids, prompt=prompts[asked.prompt], sampling=sampling)))
        return found

    def speed(self, workload: Workload, ramp: int = 0) -> float:
        """Tokens per second."""
        served = self.serve(workload, ramp)
        return sum(len(each.ids) for each in served) / max(each.times[-1] for each in served)


def run_ours(request: Request) -> Request:
    """Child: the workloads one after another on one engine."""
    ours = Ours(request)
    return {**run_workloads(request, ours.serve), **ours.figures}


def run_studies(request: Request) -> Request:
    """Child: the comparisons of the engine with itself; memory first, before anything is freed."""
    ours = Ours(request)
    studies = {"many": study_many, "same": study_same, "length": study_length}
    wanted = request["studies"]
    return {**ours.figures, **{name: study(ours, wanted[name]) for name, study in studies.items() if name in wanted}}


def study_same(ours: Ours, settings: Request) -> Request:
    """As many prompts as requests, then one prompt for all, in pairs that take turns in who begins.

    Prefixes are warm on both sides; every run has other texts.
    """
    workload = workload_of(settings["workload"])
    sides = {
        "different": replace(workload, num_prompts=workload.num_requests, pool="different"),
        "same": replace(workload, num_prompts=1, pool="same"),
    }
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    for pair in range(-1, settings["pairs"]):  # the first warms
        for side in sorted(sides, reverse=pair % 2 == 1):
            speed = ours.speed(replace(sides[side], name=f"{workload.name}, {side}, pair {pair}"))
            if pair >= 0:
                speeds[side].append(speed)
    return speeds


def study_length(ours: Ours, settings: Request) -> Request:
    """ms to the first token of a single request, P by P in turn: of a new prompt, then of it with another text."""
    workload = workload_of(settings["workload"])
    seconds: Request = {f"{length}": {"cold": [], "warm": []} for length in settings["lengths"]}
    for repeat in range(-1, settings["repeats"]):  # the first warms
        for length in settings["lengths"]:
            for state in ("cold", "warm"):
                pool, name = f"{length} in {repeat}", f"{workload.name}, {repeat}, {state}"
                first = ours.serve(replace(workload, name=name, pool=pool, virtual_tokens=length))[0].times[0]
                if repeat >= 0:
                    seconds[f"{length}"][state].append(first)
    return {
        length: {state: 1e3 * statistics.median(values) for state, values in both.items()}
        for length, both in seconds.items()
    }


def study_many(ours: Ours, settings: Request) -> Request:
    """Requests that name prompts of a large pool in turn, none of them twice, beside requests over a few warm ones.

    All prompts of the pools are in memory; a pool's growth of the process is measured where it is made.
    """
    workload, sizes = workload_of(settings["workload"]), [WARM_PROMPTS, *settings["pools"]]
    pools = {size: replace(workload, num_prompts=size, pool=f"of {size}") for size in sizes}
    idle = {f"{size}": _grow(ours, pools[size]) for size in sizes[1:]}
    ours.speed(replace(pools[WARM_PROMPTS], name="warm-up", num_requests=2 * WARM_PROMPTS))
    speeds: dict[str, list[float]] = {f"{size}": [] for size in sizes}
    misses = dict.fromkeys(speeds, 0)
    for round_ in range(settings["rounds"]):
        for size in sizes:
            first, before = round_ * workload.num_requests, ours.engine.stats().num_prefix_misses
            each = replace(pools[size], name=f"{size} in round {round_}", first_prompt=first)
            speeds[f"{size}"].append(ours.speed(each, RAMP))
            misses[f"{size}"] += ours.engine.stats().num_prefix_misses - before
    return {"speeds": speeds, "misses": misses, "idle": idle, "engine": asdict(ours.engine.stats())}


def _grow(ours: Ours, workload: Workload) -> Request:
    """Memory of each prompt of a pool, and the part of it that is its numbers."""
    give_back_memory()  # or they would lie where something else was
    before = resident_bytes()
    prompts = ours.prompts(workload)
    give_back_memory()
    return {
        "grown_bytes": (resident_bytes() - before) / len(prompts),
        "own_bytes": prompts[0].num_bytes,
    }
