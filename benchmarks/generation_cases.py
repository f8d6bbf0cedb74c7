"""What generation.py and its contenders share: workloads, their seeded requests, and the record of every token.

Softprompt and transformers are not imported here: vLLM's process has a Python of its own.
"""

from __future__ import annotations

import ctypes
import json
import math
import random
import statistics
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training_cases import NUM_SPECIAL, differences, peak_bytes

Request = dict[str, Any]  # JSON values, as they pass between the processes

CASES = ("batch", "single", "float32", "poisson", "same", "length", "many", "curves")
PERCENTILES = (50, 95, 99)
PROMPT_SCALE = 0.02  # standard deviation of a soft prompt's numbers, as of Bloom's embeddings
WARM_UP_TOKENS, WARM_UP_TEXT_TOKENS = 4, 64  # new ones, and of the text at most
PENALTIES = (1.0, 1.5)
POISSON_LOAD = 1.2  # arrivals, times what static batches get done
# Random weights behind a tied head repeat one token for ever, whatever the soft prompt: only where no token may come
# twice do the answers depend on the prompt.
UNREPEATED = 100.0


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests that differ only in their seeded text, prompt, answer length and arrival."""

    name: str  # seeds texts and prompts too
    num_requests: int
    max_rows: int  # answers generated at once
    num_prompts: int | None = None  # request i has the prompt first_prompt + i, modulo this; None: each its own
    first_prompt: int = 0
    pool: str | None = None  # seeds the prompts instead of the name: workloads of one pool share them
    virtual_tokens: int = 4
    text_tokens: int = 12
    new_tokens: tuple[int, int] = (50, 50)  # least and most, drawn alike
    penalty: float = 1.0
    requests_per_s: float | None = None  # Poisson arrivals; None: all are there at once

    @property
    def pool_size(self) -> int:
        return self.num_prompts or self.num_requests

    def warm_up(self) -> Workload:
        """A short workload of the same width, with other texts and prompts."""
        return replace(
            self, name=f"{self.name}, warm-up", pool=None, num_prompts=None,
            num_requests=min(self.num_requests, self.max_rows),
            text_tokens=min(self.text_tokens, WARM_UP_TEXT_TOKENS), new_tokens=(WARM_UP_TOKENS, WARM_UP_TOKENS),
            requests_per_s=None,
        )  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """One request of a workload."""

    ids: tuple[int, ...]  # of the text
    prompt: int  # its number among the workload's prompts
    new_tokens: int
    arrives_s: float  # since the workload's start


@dataclass
class Served:
    """The result of one request, with a time for each token, in seconds since the workload's start."""

    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    called_s: float | None = None  # where requests run one after another: when this one began, instead of its arrival

    def note(self, ids: Sequence[int], now: float) -> None:
        self.ids.extend(ids)
        self.times.extend([now] * len(ids))


Serve = Callable[[Workload], list[Served]]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a run."""

    rows: tuple[int, ...] = (16, 32)
    new_tokens: int = 50
    agreement_tokens: int = 16
    poisson_rows: int = 16
    poisson_requests: int = 200
    poisson_tokens: tuple[int, int] = (5, 100)
    capacity_requests: int = 96
    pairs: int = 10
    lengths: tuple[int, int] = (4, 100)  # virtual tokens
    repeats: int = 15
    many_requests: int = 160
    pools: tuple[int, ...] = (1_000, 10_000)
    curve_rows: tuple[int, ...] = (1, 2, 4, 8, 16, 24, 32)
    curve_prompts: tuple[int, ...] = (1, 2, 4, 8, 16)
    curve_texts: tuple[int, ...] = (12, 64, 256, 1_024)


QUICK = Sizes(
    rows=(4,), new_tokens=6, agreement_tokens=6, poisson_rows=4, poisson_requests=12, poisson_tokens=(2, 6),
    capacity_requests=8, pairs=2, repeats=2, many_requests=20, pools=(60, 100), curve_rows=(1, 4), curve_prompts=(1, 4),
    curve_texts=(12, 64),
)  # fmt: skip


def agreement(sizes: Sizes) -> Workload:
    """Answers that depend on their prompts, for the judge."""
    rows, tokens = sizes.rows[0], sizes.agreement_tokens
    return _at_once("agreement", rows, sizes, new_tokens=(tokens, tokens), penalty=UNREPEATED)


def batch_workloads(sizes: Sizes, rows: Sequence[int]) -> list[Workload]:
    """As many requests as rows, each under a prompt of its own, without and with the repetition penalty."""
    return [
        _at_once(f"rows {count}, penalty {penalty:g}", count, sizes, penalty=penalty)
        for count in rows
        for penalty in PENALTIES
    ]


def poisson_workload(sizes: Sizes, requests_per_s: float) -> Workload:
    return Workload(
        name="poisson", num_requests=sizes.poisson_requests, max_rows=sizes.poisson_rows,
        new_tokens=sizes.poisson_tokens, requests_per_s=requests_per_s,
    )  # fmt: skip


def capacity_workload(sizes: Sizes) -> Workload:
    """The same requests, all present from the start."""
    return replace(
        poisson_workload(sizes, 1.0), name="capacity", num_requests=sizes.capacity_requests, requests_per_s=None
    )


def study_settings(sizes: Sizes, rounds: int) -> Request:
    """The parameters of `generation_ours.run_studies` for each case."""
    rows = sizes.poisson_rows
    many = _at_once("many", sizes.many_requests, sizes, max_rows=rows)
    return {
        "many": {"workload": asdict(many), "pools": sizes.pools, "rounds": rounds},
        "same": {"workload": asdict(_at_once("same", rows, sizes)), "pairs": sizes.pairs},
        "length": {
            "workload": asdict(_at_once("length", 1, sizes, new_tokens=(1, 1))),
            "lengths": sizes.lengths,
            "repeats": sizes.repeats,
        },
    }


def curve_workloads(sizes: Sizes) -> dict[str, list[tuple[int, Workload]]]:
    """For each curve, the varied quantity and the workload."""
    rows = sizes.poisson_rows
    return {
        "rows": [(count, _at_once(f"rows {count}", count, sizes)) for count in sizes.curve_rows],
        "prompts": [
            (count, _at_once(f"prompts {count}", rows, sizes, num_prompts=count)) for count in sizes.curve_prompts
        ],
        "text tokens": [
            (count, _at_once(f"text tokens {count}", rows, sizes, text_tokens=count)) for count in sizes.curve_texts
        ],
    }


def _at_once(name: str, count: int, sizes: Sizes, **settings: Any) -> Workload:
    tokens = {"new_tokens": (sizes.new_tokens, sizes.new_tokens), "max_rows": count, **settings}
    return Workload(name=name, num_requests=count, **tokens)


def asked_of(workload: Workload, vocab: int) -> list[Asked]:
    """The workload's requests in the order of their arrival, the same in every process."""
    draw, arrives_s, found = random.Random(workload.name), 0.0, []
    for number in range(workload.num_requests):
        ids = tuple(draw.randrange(NUM_SPECIAL, vocab) for _ in range(workload.text_tokens))
        prompt = (workload.first_prompt + number) % workload.pool_size
        found.append(Asked(ids, prompt, draw.randint(*workload.new_tokens), arrives_s))
        if workload.requests_per_s is not None:
            arrives_s += draw.expovariate(workload.requests_per_s)
    return found


def prompt_of(name: str, number: int, virtual_tokens: int, hidden: int) -> Tensor:
    """Soft prompt [P, H], float32."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}:{number}".encode()))
    return PROMPT_SCALE * torch.randn(virtual_tokens, hidden, generator=generator)


def prompts_of(workload: Workload, hidden: int) -> Iterator[Tensor]:
    """All soft prompts of the workload's pool, made one by one."""
    name = workload.pool or workload.name
    return (prompt_of(name, number, workload.virtual_tokens, hidden) for number in range(workload.pool_size))


class Watch:
    """Seconds since this clock was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._began

    def sleep_until(self, moment: float) -> None:
        time.sleep(max(0.0, moment - self.now()))


def run_workloads(request: Request, serve: Serve, warm_ups: bool = True) -> Request:
    """A child's result: each workload after its warm-up, with the peak memory of the process."""
    runs, peaks = [], [peak_bytes()]
    for fields in request["workloads"]:
        workload = workload_of(fields)
        if warm_ups:
            serve(workload.warm_up())
        reset_peak()
        served = serve(workload)
        peaks.append(peak_bytes())
        runs.append({"served": [asdict(each) for each in served], "peak_bytes": peaks[-1]})
    return {"runs": runs, "process_peak_bytes": max(peaks)}


def workload_of(fields: Request) -> Workload:
    return Workload(**{**fields, "new_tokens": tuple(fields["new_tokens"])})


def reset_peak() -> None:
    """Restart the count of `peak_bytes`, where the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library is glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def summarise(workload: Workload, run: Request, vocab: int) -> Request:
    """Speed, waiting times in ms, and memory of one run. Raises SystemExit where an answer has another length."""
    asked, served = asked_of(workload, vocab), [Served(**each) for each in run["served"]]
    for wanted, found in zip(asked, served, strict=False):  # PEFT serves the first ones only
        if len(found.ids) != wanted.new_tokens:
            raise SystemExit(f"{workload.name}: {wanted.new_tokens} tokens were asked for, {len(found.ids)} came")
    begins = [
        wanted.arrives_s if found.called_s is None else found.called_s
        for wanted, found in zip(asked, served, strict=False)
    ]
    return {
        "num_requests": len(served),
        "seconds": max(each.times[-1] for each in served),
        "tokens_per_second": sum(len(each.ids) for each in served) / max(each.times[-1] for each in served),
        "first_ms": spread_ms(each.times[0] - began for each, began in zip(served, begins, strict=True)),
        "between_ms": spread_ms(gap for each in served for gap in differences(each.times)),
        "latency_ms": spread_ms(each.times[-1] - began for each, began in zip(served, begins, strict=True)),
        "peak_bytes": run["peak_bytes"],
    }


def spread_ms(seconds: Iterable[float]) -> Request:
    """Mean and percentiles, in ms."""
    ordered = sorted(1e3 * value for value in seconds)
    found = {f"p{percent}": percentile(ordered, percent) for percent in PERCENTILES}
    return {"mean": statistics.fmean(ordered), **found} if ordered else {}


def percentile(ordered: Sequence[float], percent: float) -> float:
    """A percentile of sorted values, by linear interpolation."""
    if not ordered:
        return math.nan
    place = percent / 100 * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def equal_share(some: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """The number of tokens that are equal at the same position."""
    pairs = [pair for own, other in zip(some, others, strict=False) for pair in zip(own, other, strict=False)]
    return sum(one == other for one, other in pairs) / len(pairs)


def medians(summaries: Sequence[Request]) -> Request:
    """The median over the rounds of every figure."""
    first = summaries[0]
    return {
        name: medians([each[name] for each in summaries])
        if isinstance(value, dict)
        else statistics.median(each[name] for each in summaries)
        for name, value in first.items()
    }


def model_facts(folder: str) -> tuple[int, int]:
    """V and H from the folder's config.json."""
    config = json.loads((Path(folder) / "config.json").read_text())
    return config["vocab_size"], config["hidden_size"]
