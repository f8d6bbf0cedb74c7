"""Serves a library's folder and watches it: additions, replacements and removals count within a second.

A folder that is broken, made for another base or half written is not served; it is named in `problems` and read again
when it changes. What was served under its name is withdrawn after a moment, since replacing a folder is not instant.
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
_DEBOUNCE_MS = 400  # changes within this time are handled together
_SETTLE_S = 0.5  # how long a served folder may be broken before its prompt is withdrawn
_RESCAN_S = 30.0  # for changes that the system did not report
_POLL_S = 1.0  # where the system reports no changes

Stamp = tuple[tuple[int, int, int], ...]  # time of change, size and inode of each of the adapter's files
_UNSURE: Stamp = ((-1, -1, -1),)  # of a folder to read again in any case


class LibraryWatcher:
    """Publishes the adapters of one folder in the registry, each under its folder's name, for everybody."""

    def __init__(self, folder: Path | None, base: Base, registry: PromptRegistry) -> None:
        self.folder = folder
        self.problems: dict[str, str] = {}  # by name
        self._base = base
        self._registry = registry
        self._stamps: dict[str, Stamp] = {}  # of what was last read
        self._served: set[str] = set()
        self._scanning = threading.Lock()
        self._is_notified = True  # whether the system reports changes

    def scan(self, names: Iterable[str] | None = None, *, is_settled: bool = True) -> set[str]:
        """Read these folders, or all that have changed; returns those to read again in a moment.

        Blocks on the disk. Raises StorageError where the library itself is not there.
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
            return {name for name in sorted(changed) if not self._update(library, name, there, is_settled)}

    def load(self, name: str) -> Model:
        """Serve a prompt of the library that was unloaded. Raises ApiError 400 with its problem, or 404."""
        self._registry.allow(name)
        self.scan([name])
        if name in self.problems:
            raise ApiError(400, f"{name!r} cannot be served: {self.problems[name]}", "invalid_adapter", "name")
        if name not in self._served:
            raise ApiError(404, f"the library has no folder {name!r}", "model_not_found", "name")
        return self._registry.find(name, Client())

    async def watch(self, on_change: Callable[[], Awaitable[None]]) -> None:
        """Watch the folder until cancelled; calls `on_change` after each scan."""
        if self.folder is None:
            return
        stop = asyncio.Event()
        listening = asyncio.create_task(self._listen(on_change, stop))
        rescanning = asyncio.create_task(self._rescan(on_change))
        try:
            await asyncio.wait((listening, rescanning))
        finally:
            stop.set()
            rescanning.cancel()
            await asyncio.gather(listening, rescanning, return_exceptions=True)

    async def _listen(self, on_change: Callable[[], Awaitable[None]], stop: asyncio.Event) -> None:
        """Scan what the system reports as changed."""
        assert self.folder is not None
        root = self.folder.resolve()
        try:
            async for changes in awatch(root, debounce=_DEBOUNCE_MS, watch_filter=None, stop_event=stop):
                names = {Path(path).relative_to(root).parts[:1] for _, path in changes}
                await self._scan_settled({part for parts in names for part in parts}, on_change)
        except (OSError, RuntimeError) as error:  # no watches left, no such file system, the folder gone
            _log.warning("the system reports no changes of %s (%s); it is scanned every second", self.folder, error)
        self._is_notified = False

    async def _rescan(self, on_change: Callable[[], Awaitable[None]]) -> None:
        """Scan everything now and then, and soon for the first time: the watch begins after the first scan."""
        await asyncio.sleep(_POLL_S)
        while True:
            await self._scan_settled(None, on_change)
            due = asyncio.get_running_loop().time() + _RESCAN_S
            while self._is_notified and asyncio.get_running_loop().time() < due:
                await asyncio.sleep(_POLL_S)
            await asyncio.sleep(_POLL_S)

    async def _scan_settled(self, names: set[str] | None, on_change: Callable[[], Awaitable[None]]) -> None:
        try:
            again = await asyncio.to_thread(self.scan, names, is_settled=False)
            if again:
                await asyncio.sleep(_SETTLE_S)
                await asyncio.to_thread(self.scan, again)
            await on_change()
        except StorageError as error:  # of the whole library: what is served stays served
            _log.warning("the library cannot be read: %s", error)
        except Exception:
            _log.exception("scanning the library failed")

    def _has_changed(self, library: Library, name: str) -> bool:
        return self._stamps.get(name) != _stamp(library.folder / name)

    def _update(self, library: Library, name: str, there: set[str], is_settled: bool) -> bool:
        """Serve a folder, or set it aside; False where it should be read again first."""
        stamp = _stamp(library.folder / name)
        problem = None
        try:
            if name in there and not self._registry.is_unloaded(name):
                self._serve(library, name, stamp)
        except (SoftpromptError, ApiError) as error:
            problem = str(error) if isinstance(error, SoftpromptError) else error.message
        except Exception as error:  # one bad folder must not keep the others from being served
            _log.exception("the library's folder %r could not be read", name)
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
        """Withdraw what is gone or broken, and remember the problem and the stamp."""
        is_gone = stamp is None or problem is not None or self._registry.is_unloaded(name)
        if is_gone and name in self._served:
            self._served.discard(name)
            self._registry.withdraw(name, OPERATOR)
            _log.info("the library's prompt %r is no longer served", name)
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
    """A value that changes whenever one of the adapter's files does. Missing files are left out."""
    found = []
    for name in (CONFIG_NAME, SAFETENSORS_NAME, PICKLE_NAME, RECORD_NAME):
        with suppress(OSError):
            status = (folder / name).stat()
            found.append((status.st_ctime_ns, status.st_size, status.st_ino))
    return tuple(found)
