"""Who is compared: the bare base, which has neither a name nor a prompt, and then each prompt."""

from __future__ import annotations

from collections.abc import Mapping

from softprompt.prompt import SoftPrompt

Contender = tuple[str | None, SoftPrompt | None]  # name and prompt; both None for the bare base


def contenders(prompts: Mapping[str, SoftPrompt]) -> list[Contender]:
    return [(None, None), *prompts.items()]
