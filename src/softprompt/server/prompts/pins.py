"""Pinned prompts: their keys and values stay in the engine's memory for prefixes."""

from __future__ import annotations

import asyncio
import logging

from softprompt.engine import AsyncEngine
from softprompt.errors import MemoryLimitError
from softprompt.prompt import SoftPrompt
from softprompt.server.errors import ApiError
from softprompt.server.prompts.catalogue import Catalogue

_log = logging.getLogger(__name__)


class Pins:
    """What the engine keeps, after what the catalogue says is pinned; two names of the same vectors take one place."""

    def __init__(self, engine: AsyncEngine, catalogue: Catalogue) -> None:
        self._engine = engine
        self._catalogue = catalogue
        self._kept: dict[str, SoftPrompt] = {}  # by content hash
        self._changing = asyncio.Lock()

    async def try_on(self, prompt: SoftPrompt) -> None:
        """Pin a prompt that is about to be marked as pinned. Raises ApiError 409 where there is no room."""
        async with self._changing:
            try:
                await self._pin(prompt)
            except MemoryLimitError as error:
                raise ApiError(409, str(error), "pins_full", "pinned") from error

    async def follow(self) -> None:
        """Pin what is marked now, and nothing else. What finds no room is logged and served all the same."""
        async with self._changing:
            wanted = {each.prompt.content_hash: each for each in self._catalogue.pinned() if each.prompt is not None}
            for gone in self._kept.keys() - wanted.keys():
                await self._engine.unpin(self._kept.pop(gone))
            for model in wanted.values():
                assert model.prompt is not None
                try:
                    await self._pin(model.prompt)
                except MemoryLimitError as error:
                    _log.warning("the prompt %r is not pinned: %s", model.id, error)

    async def _pin(self, prompt: SoftPrompt) -> None:
        if prompt.content_hash not in self._kept:
            await self._engine.pin(prompt)
            self._kept[prompt.content_hash] = prompt
