"""The library's folder, served as it stands and watched: what is put in, replaced or taken out counts within a second.

A folder that is broken, made for another base or half written is not served; it is named in `problems` and looked at
again when it changes. What was served under its name goes too, after a moment: replacing a folder takes one.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path

from watchfiles import awatch

from softprompt.base import Base
from softprompt.errors import SoftpromptError, StorageError
from softprompt.server.clients.keys import OPERATOR, Client
from softprompt.server.errors import ApiError
from softprompt.server.prompts.adapter_import import read_folder
from softprompt.server.prompts.model import LIBRARY, Model
from softprompt.server.prompts.registry import PromptRegistry
from softprompt.storage import Library
from softprompt.storage.files import CONFIG_NAME, PICKLE_NAME, RECORD_NAME, SAFETENSORS_NAME

_log = logging.getLogger(__name__)
_DEBOUNCE_MS = 400  # changes that come together are looked at together, after so long at most
_SETTLE_S = 0.5  # how long a folder that was sound may be none before its prompt is served no longer
_RESCAN_S = 30.0  # for what the system did not tell of
_POLL_S = 1.0  # where the system tells nothing

Stamp = tuple[tuple[int, int, int], ...]  # time of change, size and number of each of the adapter's files
_UNSURE: Stamp = ((-1, -1, -1),)  # of a folder to look at again in any case


class LibraryWatcher:
    """The adapters of one folder in the registry, each under its folder's name, for everybody."""

    def __init__(self, folder: Path | None, base: Base, registry: PromptRegistry) -> None:
        self.folder = folder
        self.problems: dict[str, str] = {}  # by name
        self._base = base
        self._registry = registry
        self._stamps: dict[str, Stamp] = {}  # of what was last looked at
        self._served: set[str] = set()
        self._scanning = threading.Lock()
        self._is_told = True  # whether the system tells of changes

    def scan(self, names: Iterable[str] | None = None, *, is_settled: bool = True) -> set[str]:
        """Look at these folders, or at all that have changed; gives those to look at again in a moment.

        Reads from the disk. Raises StorageError where the library itself is not there.
        """
        if self.folder is None:
            return set()
        library = Library(self.folder)
        with self._scanning:
            if names is None:
                there = set(library.names())
                changed = {name for name in there | set(self._stamps) if self._has_changed(library, name)}
            else:
                there = {name for name in names if _is_entry(library, name)}
                changed = there | (set(names) & set(self._stamps))
            return {name for name in sorted(changed) if not self._look_at(library, name, there, is_settled)}

    def load(self, name: str) -> Model:
        """Serve a prompt of the library that was unloaded, or say why not. Raises ApiError 400 or 404."""
        self._registry.allow(name)
        self.scan([name])
        if name in self.problems:
            raise ApiError(400, f"{name!r} cannot be served: {self.problems[name]}", "invalid_adapter", "name")
        if name not in self._served:
            raise ApiError(404, f"the library has no folder {name!r}", "model_not_found", "name")
        return self._registry.find(name, Client())

    async def watch(self, on_change: Callable[[], Awaitable[None]]) -> None:
        """Follow the folder until cancelled; `on_change` after each look at something that has changed."""
        if self.folder is None:
            return
        stop = asyncio.Event()
        told = asyncio.create_task(self._listen(on_change, stop))
        looking = asyncio.create_task(self._rescan(on_change))
        try:
            await asyncio.wait((told, looking))
        finally:
            stop.set()
            looking.cancel()
            await asyncio.gather(told, looking, return_exceptions=True)

    async def _listen(self, on_change: Callable[[], Awaitable[None]], stop: asyncio.Event) -> None:
        """Look at what the system says has changed."""
        assert self.folder is not None
        place = self.folder.resolve()
        try:
            async for changes in awatch(place, debounce=_DEBOUNCE_MS, watch_filter=None, stop_event=stop):
                names = {Path(path).relative_to(place).parts[:1] for _, path in changes}
                await self._look({part for parts in names for part in parts}, on_change)
        except (OSError, RuntimeError) as error:  # no watches left, no such file system, the folder gone
            _log.warning("the system does not tell of changes in %s (%s); looking every second", self.folder, error)
        self._is_told = False

    async def _rescan(self, on_change: Callable[[], Awaitable[None]]) -> None:
        """Look at everything now and then; soon for the first time: the watch begins after the first scan."""
        await asyncio.sleep(_POLL_S)
        while True:
            await self._look(None, on_change)
            due = asyncio.get_running_loop().time() + _RESCAN_S
            while self._is_told and asyncio.get_running_loop().time() < due:
                await asyncio.sleep(_POLL_S)
            await asyncio.sleep(_POLL_S)

    async def _look(self, names: set[str] | None, on_change: Callable[[], Awaitable[None]]) -> None:
        try:
            again = await asyncio.to_thread(self.scan, names, is_settled=False)
            if again:
                await asyncio.sleep(_SETTLE_S)
                await asyncio.to_thread(self.scan, again)
            await on_change()
        except StorageError as error:  # the whole library: what is served stays
            _log.warning("the library cannot be looked at: %s", error)
        except Exception:
            _log.exception("looking at the library failed")

    def _has_changed(self, library: Library, name: str) -> bool:
        return self._stamps.get(name) != _stamp(library.folder / name)

    def _look_at(self, library: Library, name: str, there: set[str], is_settled: bool) -> bool:
        """Serve a folder, or set it aside; False where it should be looked at again first."""
        stamp = _stamp(library.folder / name)
        problem = None
        try:
            if name in there and not self._registry.is_unloaded(name):
                self._serve(library, name, stamp)
        except (SoftpromptError, ApiError) as error:
            problem = str(error) if isinstance(error, SoftpromptError) else error.message
        except Exception as error:  # one bad folder must not keep the others from being served
            _log.exception("the library's folder %r could not be looked at", name)
            problem = f"it cannot be read ({type(error).__name__})"
        is_sound = problem is None and name in there
        if stamp != _stamp(library.folder / name) or not (is_sound or is_settled or name not in self._served):
            self._stamps[name] = _UNSURE
            return False
        self._settle(name, stamp if name in there else None, problem)
        return True

    def _serve(self, library: Library, name: str, stamp: Stamp) -> None:
        path = library.path(name)
        prompt = read_folder(path, self._base)
        created = max((changed for changed, _, _ in stamp), default=0) / 1e9
        self._registry.publish(Model(id=name, prompt=prompt, source=LIBRARY, created=created))
        if name not in self._served:
            _log.info("the library's prompt %r is served", name)
        self._served.add(name)

    def _settle(self, name: str, stamp: Stamp | None, problem: str | None) -> None:
        """What is served no longer, what is wrong, and what was seen."""
        is_gone = stamp is None or problem is not None or self._registry.is_unloaded(name)
        if is_gone and name in self._served:
            self._served.discard(name)
            self._registry.withdraw(name, OPERATOR)
            _log.info("the library's prompt %r is served no longer", name)
        if problem is None:
            self.problems.pop(name, None)
        elif self.problems.get(name) != problem:
            self.problems[name] = problem
            _log.warning("the library's prompt %r is set aside: %s", name, problem)
        if stamp is None:
            self._stamps.pop(name, None)
        else:
            self._stamps[name] = stamp


def _is_entry(library: Library, name: str) -> bool:
    """Whether `Library.names` would name it. Raises StorageError where the library itself is not there."""
    if not library.folder.is_dir():
        library.names()
    path = library.folder / name
    return not name.startswith(".") and (path.is_dir() or path.is_symlink())


def _stamp(folder: Path) -> Stamp:
    """What changes whenever one of the adapter's files does. Files that are not there have none."""
    found = []
    for name in (CONFIG_NAME, SAFETENSORS_NAME, PICKLE_NAME, RECORD_NAME):
        with suppress(OSError):
            status = (folder / name).stat()
            found.append((status.st_ctime_ns, status.st_size, status.st_ino))
    return tuple(found)
