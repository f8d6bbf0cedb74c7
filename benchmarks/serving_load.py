"""A load on an OpenAI-compatible server, from a process of its own: `load(request)` runs one and times every event.

Plain asyncio streams and no client library, so that little of the machine goes to the load itself; what it takes is
reported. A closed loop keeps so many streams going, each asking again as soon as it is answered. An open loop asks at
Poisson moments, however many answers are still on their way.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

Request = dict[str, Any]  # JSON values, as they pass between the processes
Clock = Callable[[], float]

_HEAD = (
    "POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    "Content-Length: {size}\r\n\r\n"
)


@dataclass
class Told:
    """What came of the requests of one load."""

    first_s: list[float] = field(default_factory=list)  # to the first event
    gaps_s: list[float] = field(default_factory=list)  # between events
    whole_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    errors: list[str] = field(default_factory=list)


class Stream:
    """One connection, used for one request after another."""

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)

    async def ask(self, body: Request, told: Told) -> None:
        """One streamed completion."""
        began = last = time.perf_counter()
        is_first = True
        async for event in self._events(json.dumps(body).encode()):
            now = time.perf_counter()
            if event.get("usage"):
                told.num_tokens += event["usage"]["completion_tokens"]
            if not event.get("choices"):
                if "error" in event:
                    told.errors.append(event["error"]["message"])
                continue
            (told.first_s if is_first else told.gaps_s).append(now - last)
            last, is_first = now, False
        told.whole_s.append(time.perf_counter() - began)

    async def _events(self, body: bytes) -> AsyncIterator[Request]:
        reader, writer = await asyncio.open_connection(self._parts.hostname, self._parts.port)
        try:
            head = _HEAD.format(host=self._parts.netloc, size=len(body))
            writer.write(head.encode() + body)
            status = (await reader.readline()).split(b" ")[1:2]
            if status != [b"200"]:
                text = (await reader.read()).decode(errors="replace")
                yield {"error": {"message": text.splitlines()[-1] if text else str(status)}}
                return
            while line := await reader.readline():
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])
                elif line.startswith(b"data: [DONE]"):
                    return
        finally:
            writer.close()


def body_of(request: Request, chance: random.Random, model: str) -> Request:
    ids = [chance.randrange(3, request["vocab"]) for _ in range(request["text_tokens"])]
    return {
        "model": model, "prompt": _beginning(request, chance) + ids, "max_tokens": request["new_tokens"],
        "temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        **({"cache_salt": f"salt {chance.randrange(request['salts'])}"} if "salts" in request else {}),
    }  # fmt: skip


def _beginning(request: Request, chance: random.Random) -> list[int]:
    """One of those that the texts share, where they share some."""
    if "beginnings" not in request:
        return []
    own = random.Random(chance.randrange(request["beginnings"]))
    return [own.randrange(3, request["vocab"]) for _ in range(request["beginning_tokens"])]


async def closed_loop(request: Request, told: Told) -> None:
    """`streams` at once, until `seconds` are over; the answers that run then are read to their end."""
    end = time.perf_counter() + request["seconds"]

    async def client(number: int) -> None:
        chance = random.Random(f"{request['seed']}/{number}")
        model, stream = request["models"][number % len(request["models"])], Stream(request["url"])
        while time.perf_counter() < end and not told.errors:
            await stream.ask(body_of(request, chance, model), told)

    await asyncio.gather(*(client(number) for number in range(request["streams"])))


async def open_loop(request: Request, told: Told) -> None:
    """`rate` requests per second at Poisson moments, `count` of them."""
    chance = random.Random(request["seed"])
    moment, tasks = time.perf_counter(), []
    for number in range(request["count"]):
        moment += chance.expovariate(request["rate"])
        await asyncio.sleep(max(0.0, moment - time.perf_counter()))
        body = body_of(request, chance, request["models"][number % len(request["models"])])
        tasks.append(asyncio.create_task(Stream(request["url"]).ask(body, told)))
    await asyncio.gather(*tasks)


async def idle_connections(url: str, count: int) -> list[asyncio.StreamWriter]:
    """Open connections that say nothing."""
    parts = urlsplit(url)
    opened = [await asyncio.open_connection(parts.hostname, parts.port) for _ in range(count)]
    return [writer for _, writer in opened]


async def _run(request: Request, told: Told) -> None:
    idle = await idle_connections(request["url"], request.get("idle", 0))
    await (closed_loop if request["loop"] == "closed" else open_loop)(request, told)
    for writer in idle:
        writer.close()


def load(request: Request) -> Request:
    """One load; its figures. `cpu_s` is what the load itself took of the processor."""
    told, began, cpu = Told(), time.perf_counter(), time.process_time()
    asyncio.run(_run(request, told))
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds, "cpu_s": time.process_time() - cpu, "requests": len(told.whole_s),
        "tokens": told.num_tokens, "tokens_per_s": told.num_tokens / seconds,
        "requests_per_s": len(told.whole_s) / seconds, "first_ms": spread_ms(told.first_s),
        "between_ms": spread_ms(told.gaps_s), "whole_ms": spread_ms(told.whole_s), "errors": told.errors[:5],
    }  # fmt: skip


def spread_ms(seconds: list[float]) -> Request:
    """Percentiles in milliseconds."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    found = {f"p{part}": ordered[min(len(ordered) - 1, len(ordered) * part // 100)] * 1e3 for part in (50, 95, 99)}
    return {**found, "mean": statistics.fmean(ordered) * 1e3, "max": ordered[-1] * 1e3}
