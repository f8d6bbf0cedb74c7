"""Training and answering on one base at once: the prompt has its bits as if alone, the answers their tokens."""

import asyncio
import threading
from dataclasses import replace

import pytest
import torch
from support.tiny_bases import build_base, random_prompt

from softprompt.compute_share import ComputeShare
from softprompt.config import SamplingConfig, TrainConfig
from softprompt.engine import AsyncEngine, Engine, Finished, Request
from softprompt.prompt import SoftPrompt
from softprompt.training import train

TEXTS = [" ".join(f"w{(7 * row + 3 * word) % 90}" for word in range(5 + row % 9)) for row in range(24)]
CONFIG = TrainConfig(virtual_tokens=3, epochs=4, micro_batch_rows=3)


def requests(base):
    sampling = SamplingConfig(max_new_tokens=12, ignore_eos=True)
    prompts = [SoftPrompt(random_prompt(base, 2 + number % 3, number)) for number in range(8)]
    return [Request(tuple(range(3 + number, 10 + number)), prompt, sampling) for number, prompt in enumerate(prompts)]


async def answers(running, request):
    return [event.answers async for event in running.generate(request) if isinstance(event, Finished)]


def answered(engine, compute_share, training=None):
    """Every stream's answers; with `training`, which starts behind them, again and again until its end, all alike."""

    async def run():
        async with AsyncEngine(engine, compute_share) as running:
            found = await asyncio.gather(*(answers(running, request) for request in requests(engine.base)))
            if training is not None:
                training.start()
            while training is not None and training.is_alive():
                assert await asyncio.gather(*(answers(running, request) for request in requests(engine.base))) == found
            return found

    return asyncio.run(run())


@pytest.mark.medium
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_both_give_what_they_give_alone(family):
    base = build_base(family)
    before = {name: value.clone() for name, value in base.model.named_parameters()}
    alone, expected = train(base, TEXTS, CONFIG).prompt, answered(Engine(base), ComputeShare())
    engine, compute_share, trained, steps = Engine(base), ComputeShare(share=0.5), [], []

    def run():
        with compute_share.training():
            sink = lambda event: steps.append(engine.stats().num_steps)  # noqa: E731
            trained.append(train(base, TEXTS, CONFIG, sink=sink).prompt)

    assert answered(engine, compute_share, threading.Thread(target=run)) == expected
    assert torch.equal(trained[0].tensor, alone.tensor)
    assert len({*steps}) > 12, "engine's steps and training's pieces have to have been mixed"
    assert not torch.equal(alone.tensor, train(base, TEXTS, replace(CONFIG, seed=1)).prompt.tensor)
    assert all(torch.equal(value, before[name]) for name, value in base.model.named_parameters())
