"""Prompts while a server runs: the registry is loaded, the library watched, and pinned prompts stay in the engine."""

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
    """Keeps the keys and values of the registry's pinned prompts in the engine; equal vectors are pinned once."""

    def __init__(self, engine: AsyncEngine, registry: PromptRegistry) -> None:
        self._engine = engine
        self._registry = registry
        self._pinned: dict[str, SoftPrompt] = {}  # in the engine, by content hash
        self._changing = asyncio.Lock()

    async def add(self, prompt: SoftPrompt) -> None:
        """Pin a prompt that is about to be marked as pinned. Raises ApiError 409 where the engine's memory is full."""
        try:
            async with self._changing:
                await self._pin(prompt)
        except MemoryLimitError as error:
            raise ApiError(409, str(error), "pins_full", "pinned") from error

    async def follow(self) -> None:
        """Pin what is marked now, and unpin the rest. A prompt that does not fit is logged, and served all the same."""
        async with self._changing:
            marked = {each.prompt.content_hash: each for each in self._registry.pinned() if each.prompt is not None}
            for content_hash in self._pinned.keys() - marked.keys():
                await self._engine.unpin(self._pinned.pop(content_hash))
            for model in marked.values():
                assert model.prompt is not None
                try:
                    await self._pin(model.prompt)
                except MemoryLimitError as error:
                    _log.warning("the prompt %r is not pinned: %s", model.id, error)

    async def _pin(self, prompt: SoftPrompt) -> None:
        if prompt.content_hash not in self._pinned:
            await self._engine.pin(prompt)
            self._pinned[prompt.content_hash] = prompt


@asynccontextmanager
async def serving_prompts(registry: PromptRegistry, library: LibraryWatcher, pins: Pins) -> AsyncIterator[None]:
    """Load what was kept and what the library has, then watch the library. The engine must run.

    Raises StorageError where the library's folder is missing.
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
