"""Training and answering on one base at once: the prompt has its bits as if alone, the answers their tokens."""

import asyncio
import threading

import pytest
import torch
from tiny_bases import build_base, random_prompt

from softprompt.config import SamplingConfig, TrainConfig
from softprompt.engine import AsyncEngine, Engine, Finished, Request
from softprompt.prompt import SoftPrompt
from softprompt.training import train
from softprompt.turns import Turns

TEXTS = [" ".join(f"w{(7 * row + 3 * word) % 90}" for word in range(5 + row % 9)) for row in range(24)]
CONFIG = TrainConfig(virtual_tokens=3, epochs=4, micro_batch_rows=3)


def requests(base):
    sampling = SamplingConfig(max_new_tokens=12, ignore_eos=True)
    prompts = [SoftPrompt(random_prompt(base, 2 + number % 3, number)) for number in range(8)]
    return [Request(tuple(range(3 + number, 10 + number)), prompt, sampling) for number, prompt in enumerate(prompts)]


async def answers(running, request):
    return [event.answers async for event in running.generate(request) if isinstance(event, Finished)]


def answered(base, turns, is_over=None):
    """Every stream's answers; with `is_over`, again and again until then, all of them alike."""

    async def run():
        async with AsyncEngine(Engine(base), turns) as running:
            found = await asyncio.gather(*(answers(running, request) for request in requests(base)))
            while is_over is not None and not is_over.is_set():
                assert await asyncio.gather(*(answers(running, request) for request in requests(base))) == found
            return found

    return asyncio.run(run())


@pytest.mark.medium
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_both_give_what_they_give_alone(family):
    base = build_base(family)
    before = {name: value.clone() for name, value in base.model.named_parameters()}
    alone, expected = train(base, TEXTS, CONFIG).prompt, answered(base, Turns())
    turns, is_over, trained = Turns(share=0.5), threading.Event(), []

    def run():
        try:
            with turns.second():
                trained.append(train(base, TEXTS, CONFIG).prompt)
        finally:
            is_over.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert answered(base, turns, is_over) == expected
    thread.join(60)
    assert torch.equal(trained[0].tensor, alone.tensor)
    assert all(torch.equal(value, before[name]) for name, value in base.model.named_parameters())
