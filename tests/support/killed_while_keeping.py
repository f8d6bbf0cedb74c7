"""Run as a program with a state folder: twenty times a child keeps, replaces and forgets prompts until it is killed,
and what it leaves is looked at. Its own process, because it forks."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from softprompt.base import Base
from softprompt.prompt import SoftPrompt
from softprompt.server.clients.keys import Client
from softprompt.server.prompts.model import Alias, Target
from softprompt.server.prompts.registry import PromptRegistry
from softprompt.server.prompts.repository import PromptRepository
from softprompt.server.state.database import Database
from support.prompt_server import made_prompt
from support.tiny_bases import build_base

ROUNDS = 8


def work(base: Base, state: Path, prompts: Sequence[SoftPrompt], ready: int) -> None:
    """Until killed."""
    registry = PromptRegistry("tiny", PromptRepository(state, Database.in_folder(state), base))
    registry.load()
    registry.keep(prompts[0], name="always", owner="ann", source="upload")
    os.write(ready, b"x")
    for number in range(10**9):
        name = f"n{number % 5}"
        if number % 7 == 6:
            registry.forget(name, "ann")
        else:
            registry.keep(prompts[number % 10], name=name, owner="ann", source="upload")
        registry.put_alias(Alias(name="alias", targets=(Target("always", number + 1.0),), owner="ann"))


def look(base: Base, state: Path, prompts: Sequence[SoftPrompt], num_kills: int) -> None:
    """Everything that is there is whole, and no more than one folder for each kill is nobody's."""
    database = Database.in_folder(state)
    registry = PromptRegistry("tiny", PromptRepository(state, database, base))
    registry.load()
    database.close()
    models = registry.models(Client("ann"))[1:]
    assert not registry.problems, registry.problems
    assert any(model.id == "always" for model in models)
    hashes = {model.prompt.content_hash for model in models if model.prompt is not None}
    assert hashes <= {prompt.content_hash for prompt in prompts}
    folders = [path.name for path in (state / "prompts").iterdir()]
    assert not [name for name in folders if name.startswith(".")], folders
    assert len(models) <= len(folders) <= len(models) + num_kills, folders


def main(state: Path) -> None:
    torch.set_num_threads(1)
    base = build_base("llama")
    prompts = [made_prompt(base, seed) for seed in range(10)]
    chance = random.Random(7)
    for number in range(ROUNDS):
        is_ready, ready = os.pipe()
        child = os.fork()
        if child == 0:
            work(base, state, prompts, ready)
        os.read(is_ready, 1)
        time.sleep(chance.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        look(base, state, prompts, number + 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
