"""Prompts for as long as a server runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from softprompt.server.prompts.catalogue import Catalogue
from softprompt.server.prompts.library import WatchedLibrary
from softprompt.server.prompts.pins import Pins


@asynccontextmanager
async def serving_prompts(catalogue: Catalogue, library: WatchedLibrary, pins: Pins) -> AsyncIterator[None]:
    """Load what was kept and what the library has, then follow the library. The engine must run.

    Raises StorageError where there is no library at the place that was given.
    """
    await asyncio.to_thread(catalogue.load)
    await asyncio.to_thread(library.scan)
    await pins.follow()
    watching = asyncio.create_task(library.watch(pins.follow))
    try:
        yield
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
