"""Training and answering on one base at once: neither changes a bit of the other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from openai import AsyncOpenAI, OpenAI
from support.job_server import (
    LONG,
    SETTINGS,
    Record,
    create_job,
    job_server,
    plain_rows,
    same_bits,
    served_prompt,
    steps_done,
    trained_alone,
    upload,
    wait_for_success,
    wait_until,
    words,
)

from softprompt.base import Base

BUSY = {**SETTINGS, "epochs": 4}


@pytest.fixture(scope="module")
def server(tiny_llama: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[OpenAI, FastAPI]]:
    with job_server(tiny_llama, tmp_path_factory.mktemp("state")) as found:
        yield found


@pytest.fixture(scope="module")
def models(server: tuple[OpenAI, FastAPI]) -> list[str]:
    client, _ = server
    file = upload(client, plain_rows())
    jobs = [create_job(client, file, {**SETTINGS, "seed": seed, "init": "random"}) for seed in range(3)]
    return ["base", *(str(wait_for_success(client, job.id).fine_tuned_model) for job in jobs)]


async def stream(client: AsyncOpenAI, model: str, prompt: str, max_tokens: int = 40) -> str:
    answer = await client.completions.create(
        model=model, prompt=prompt, max_tokens=max_tokens, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    return "".join([chunk.choices[0].text async for chunk in answer if chunk.choices])


async def eight(url: str, models: list[str], meanwhile: Callable[[], Awaitable[bool]]) -> list[set[str]]:
    """What eight clients are answered, again and again until `meanwhile` has come true."""
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        found: list[set[str]] = [set() for _ in range(8)]
        is_over = False
        while not is_over:
            is_over = await meanwhile()
            answers = await asyncio.gather(
                *(stream(client, models[number % len(models)], words(number, 4)) for number in range(8))
            )
            for answer, seen in zip(answers, found, strict=True):
                seen.add(answer)
        return found


async def at_once() -> bool:
    return True


def test_eight_streams_and_a_job_at_once_give_what_each_gives_alone(
    server: tuple[OpenAI, FastAPI], models: list[str], tiny_llama: Base, tmp_path: Path
) -> None:
    client, app = server
    url = str(client.base_url)
    alone = asyncio.run(eight(url, models, at_once))
    assert all(len(answers) == 1 for answers in alone)
    assert len(set.union(*alone)) == 8  # each its own
    job = create_job(client, upload(client, plain_rows()), BUSY)

    async def has_succeeded() -> bool:
        found = await asyncio.to_thread(client.fine_tuning.jobs.retrieve, job.id)
        assert found.status not in ("failed", "cancelled"), found.error
        return found.status == "succeeded"

    assert asyncio.run(eight(url, models, has_succeeded)) == alone
    mine = served_prompt(app, str(wait_for_success(client, job.id).fine_tuned_model))
    assert same_bits(mine, trained_alone(tiny_llama, tmp_path, plain_rows(), BUSY))
    changed: Record = {**BUSY, "seed": 1}
    assert not same_bits(mine, trained_alone(tiny_llama, tmp_path, plain_rows(), changed))


@pytest.mark.medium
def test_a_job_that_waits_for_streams_can_be_cancelled(server: tuple[OpenAI, FastAPI], models: list[str]) -> None:
    client, _ = server
    url, file = str(client.base_url), upload(client, plain_rows())
    job = create_job(client, file, LONG)

    async def has_cancelled() -> bool:
        if await asyncio.to_thread(steps_done, client, job.id) < 2:
            return False
        found = await asyncio.to_thread(client.fine_tuning.jobs.cancel, job.id)
        return found.status == "cancelled"

    asyncio.run(eight(url, models, has_cancelled))
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "cancelled")
    wait_for_success(client, create_job(client, file).id)
