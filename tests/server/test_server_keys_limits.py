"""What a key may ask for: the bucket against the sum it stands for, and 429 with the exact time over HTTP."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.app_server import served
from support.memory import kept_bytes
from support.tiny_bases import build_base

from softprompt.config import EngineConfig, ServerConfig
from softprompt.server.clients.keys import Client, Limits, create_key
from softprompt.server.clients.rate_limits import Bucket, RateLimiter
from softprompt.server.errors import ApiError
from softprompt.server.start import serving_app
from softprompt.server.state.database import Database

CLIENT = Client(id="key-1")


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def refused(limiter: RateLimiter, client: Client = CLIENT) -> float:
    """When to come back (seconds)."""
    with pytest.raises(ApiError) as refusal:
        limiter.request(client)
    assert refusal.value.status == 429
    assert refusal.value.retry_after_s is not None
    return refusal.value.retry_after_s


@given(per_minute=st.integers(1, 1000), gaps=st.lists(st.floats(0, 100), max_size=60))
def test_no_stretch_of_time_admits_more_than_its_share(per_minute: int, gaps: list[float]) -> None:
    bucket, now, taken = Bucket(per_minute, 0.0), 0.0, []
    for gap in gaps:
        now += gap
        while bucket.wait_s(1, now) == 0:
            bucket.take(1, now)
            taken.append(now)
        wait_s = bucket.wait_s(1, now)
        assert 0 < wait_s <= 60 / per_minute * (1 + 1e-9)
        assert bucket.wait_s(1, now + wait_s) == 0  # exactly when it was said
        assert bucket.wait_s(1, now + wait_s * 0.99) > 0  # and not before
    for first in range(0, len(taken), max(1, len(taken) // 20)):
        for last in range(first, len(taken), max(1, len(taken) // 20)):
            share = per_minute + per_minute * (taken[last] - taken[first]) / 60
            assert last - first + 1 <= share + 1e-6 * per_minute + 1


@given(
    per_minute=st.integers(1, 10**6),
    steps=st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 1e6)), max_size=30),
)
def test_the_level_is_what_flowed_in_less_what_was_taken(per_minute: int, steps: list[tuple[float, float]]) -> None:
    bucket, level, now = Bucket(per_minute, 0.0), float(per_minute), 0.0
    for gap, amount in steps:
        now += gap
        level = min(per_minute, level + gap * per_minute / 60) - amount
        bucket.take(amount, now)
        assert math.isclose(bucket.level(now), level, rel_tol=1e-6, abs_tol=1e-3)


def test_a_clock_that_goes_back_gives_nothing() -> None:
    bucket = Bucket(60, 100.0)
    bucket.take(60, 100.0)
    assert bucket.level(50.0) == 0
    bucket.take(0, 50.0)
    assert bucket.level(101.0) == 1


def test_requests_are_refused_until_retry_after() -> None:
    clock = Clock()
    limiter = RateLimiter(Limits(requests_per_minute=3), clock)
    for _ in range(3):
        limiter.request(CLIENT)
    assert refused(limiter) == pytest.approx(20)
    limiter.request(Client(id="key-2"))  # another's bucket is its own
    clock.now += 19.9
    assert refused(limiter) == pytest.approx(0.1)
    clock.now += 0.1
    limiter.request(CLIENT)
    assert limiter.headers(CLIENT)["x-ratelimit-remaining-requests"] == "0"
    assert limiter.headers(CLIENT)["x-ratelimit-reset-requests"] == "60.000s"


def test_tokens_may_be_overdrawn_once_and_are_paid_back() -> None:
    clock = Clock()
    limiter = RateLimiter(Limits(tokens_per_minute=60), clock)
    limiter.admit(CLIENT, num_tokens=50)
    limiter.ended(CLIENT, num_tokens=100)  # 90 in debt
    with pytest.raises(ApiError) as refusal:
        limiter.admit(CLIENT)
    assert refusal.value.retry_after_s == pytest.approx(91)
    limiter.request(CLIENT)  # asking for something else is no matter of tokens
    clock.now += 91
    limiter.admit(CLIENT)


def test_answers_beyond_the_concurrency_limit_are_refused() -> None:
    limiter = RateLimiter(Limits(max_concurrent=3))
    limiter.admit(CLIENT, num_answers=2)
    with pytest.raises(ApiError, match="2 answers of this key wait or run") as refusal:
        limiter.admit(CLIENT, num_answers=2)
    assert refusal.value.status == 429
    limiter.ended(CLIENT, num_answers=2)
    limiter.admit(CLIENT, num_answers=3)
    with pytest.raises(ApiError, match="asks for 4 answers at once") as never:
        limiter.admit(CLIENT, num_answers=4)
    assert never.value.status == 400


def test_a_keys_own_limits_come_first() -> None:
    limiter = RateLimiter(Limits(requests_per_minute=1, max_jobs=100))
    generous = Client(id="key-3", limits=Limits(requests_per_minute=2, max_jobs=1))
    limiter.request(generous)
    limiter.request(generous)
    refused(limiter, generous)
    assert limiter.limits(generous) == Limits(requests_per_minute=2, max_jobs=1)
    assert limiter.limits(CLIENT) == Limits(requests_per_minute=1, max_jobs=100)


def test_idle_clients_are_forgotten_and_busy_ones_are_not() -> None:
    clock = Clock()
    limiter = RateLimiter(Limits(requests_per_minute=1, max_concurrent=1), clock)
    limiter.admit(CLIENT)

    def request(first: int, count: int) -> None:
        for number in range(first, first + count):
            clock.now += 60
            limiter.request(Client(id=f"key-{number}"))

    request(10, 1_000)
    assert kept_bytes(lambda: request(2_000, 3_000)) < 600_000  # as much as 1,000 of them take, not 3,000
    with pytest.raises(ApiError, match="1 answers of this key wait or run"):
        limiter.admit(CLIENT)  # its answer still runs


def test_threads_share_one_bucket() -> None:
    limiter = RateLimiter(Limits(requests_per_minute=1000), Clock())
    admitted: list[int] = []

    def ask() -> None:
        for number in range(500):
            try:
                limiter.request(CLIENT)
                admitted.append(number)
            except ApiError:
                pass

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(admitted) == 1000


# Over HTTP ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def database(state: Path) -> Iterator[Database]:
    opened = Database.in_folder(state)
    create_key(opened, "first")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def url(state: Path, database: Database) -> Iterator[str]:
    config = ServerConfig(state=str(state), require_keys=True)
    with served(serving_app(build_base(), config, EngineConfig(max_rows=4))) as place:
        yield f"{place}/v1"


def client(url: str, database: Database, limits: Limits) -> openai.OpenAI:
    asks = openai.OpenAI(base_url=url, api_key=create_key(database, "x", limits=limits)[1], max_retries=0)
    for _ in range(100):
        try:
            asks.models.list()
            break
        except openai.AuthenticationError:
            threading.Event().wait(0.05)
    return asks


def test_too_many_requests_are_429_with_the_time_to_wait(url: str, database: Database) -> None:
    asks = client(url, database, Limits(requests_per_minute=3))
    answer = asks.models.with_raw_response.list()
    assert answer.headers["x-ratelimit-limit-requests"] == "3"
    assert answer.headers["x-ratelimit-remaining-requests"] == "1"
    stream = asks.completions.with_raw_response.create(model="base", prompt="w5", max_tokens=2, stream=True)
    assert stream.headers["x-ratelimit-remaining-requests"] == "0"
    with pytest.raises(openai.RateLimitError, match="may use 3 requests per minute") as refusal:
        asks.completions.create(model="base", prompt="w5", max_tokens=2)
    assert 18 <= int(refusal.value.response.headers["Retry-After"]) <= 20
    assert refusal.value.response.headers["x-ratelimit-remaining-requests"] == "0"
    assert refusal.value.code == "rate_limit_exceeded"


def test_tokens_read_and_written_are_counted(url: str, database: Database) -> None:
    asks = client(url, database, Limits(tokens_per_minute=10))
    asks.completions.create(model="base", prompt="w5 w6 w7", max_tokens=20, extra_body={"ignore_eos": True})
    with pytest.raises(openai.RateLimitError, match="may use 10 tokens per minute") as refusal:
        asks.completions.create(model="base", prompt="w5", max_tokens=2)
    assert (
        60 <= int(refusal.value.response.headers["Retry-After"]) <= 90
    )  # 24 of 10 were used: 15 come back at 10 a minute
    asks.models.list()


def test_answers_at_once_are_counted_and_given_back(url: str, database: Database) -> None:
    asks = client(url, database, Limits(max_concurrent=2))
    with pytest.raises(openai.BadRequestError, match="asks for 3 answers at once"):
        asks.completions.create(model="base", prompt=["w5", "w6", "w7"], max_tokens=2)
    for _ in range(3):  # refusals and hang-ups give back what they took
        stream = asks.completions.create(model="base", prompt=["w5", "w6"], max_tokens=80, stream=True,
                                         extra_body={"ignore_eos": True})  # fmt: skip
        next(iter(stream))
        stream.close()
        _again(lambda: asks.completions.create(model="base", prompt=["w5", "w6"], max_tokens=2))


def _again(act):  # type: ignore[no-untyped-def]
    for _ in range(100):
        try:
            return act()
        except openai.RateLimitError:
            threading.Event().wait(0.05)
    raise AssertionError("what a client took was never given back")
