"""Pinned prompts: their keys and values stay in the engine's memory for prefixes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from softprompt.engine import AsyncEngine
from softprompt.errors import MemoryLimitError
from softprompt.prompt import SoftPrompt
from softprompt.server.errors import ApiError
from softprompt.server.prompts.library_watcher import LibraryWatcher
from softprompt.server.prompts.registry import PromptRegistry

_log = logging.getLogger(__name__)


class Pins:
    """What the engine keeps, after what the registry says is pinned; two names of the same vectors take one place."""

    def __init__(self, engine: AsyncEngine, registry: PromptRegistry) -> None:
        self._engine = engine
        self._registry = registry
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
            wanted = {each.prompt.content_hash: each for each in self._registry.pinned() if each.prompt is not None}
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


@asynccontextmanager
async def serving_prompts(registry: PromptRegistry, library: LibraryWatcher, pins: Pins) -> AsyncIterator[None]:
    """Load what was kept and what the library has, then follow the library. The engine must run.

    Raises StorageError where there is no library at the place that was given.
    """
    await asyncio.to_thread(registry.load)
    await asyncio.to_thread(library.scan)
    await pins.follow()
    watching = asyncio.create_task(library.watch(pins.follow))
    try:
        yield
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
