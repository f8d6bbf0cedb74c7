"""Transactions of this process on a SQLite file, one at a time: each has the right to write.

Another process may hold the file's lock for long. Then one transaction waits for it, those that came meanwhile fail
together with that one, and while it is stuck newcomers fail at once: no request waits for the requests before it, and
waiting threads do not pile up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from softprompt.errors import DatabaseError

_STUCK_S = 1.0  # a transaction that has waited so long for the file's lock: nobody joins it


class Transactions:
    """Any thread may use it."""

    def __init__(self, name: str, patience_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`name`: the database's, for messages. `patience_s`: how long a transaction waits for others of ours."""
        self._name = name
        self._patience_s = patience_s
        self._clock = clock
        self._changed = threading.Condition()
        self._is_running = False
        self._waiting_since: float | None = None  # the running one, for the file's lock
        self._num_failures = 0

    @contextmanager
    def one(self) -> Iterator[Callable[[], None]]:
        """While one transaction runs; gives what to call when it has the file's lock.

        Raises DatabaseError where it cannot run soon.
        """
        self._enter()
        try:
            yield self._begun
        finally:
            self._leave()

    def _enter(self) -> None:
        with self._changed:
            self._check_not_stuck()
            failures, ends = self._num_failures, self._clock() + self._patience_s
            while self._is_running:
                is_over = not self._changed.wait(max(0.0, ends - self._clock())) and self._is_running
                if is_over or self._num_failures != failures:
                    raise self._locked()
            self._is_running, self._waiting_since = True, self._clock()

    def _begun(self) -> None:
        with self._changed:
            self._waiting_since = None

    def _leave(self) -> None:
        with self._changed:
            if self._waiting_since is not None:  # it never began
                self._num_failures += 1
            self._is_running, self._waiting_since = False, None
            self._changed.notify_all()

    def _check_not_stuck(self) -> None:
        if self._waiting_since is not None and self._clock() - self._waiting_since > _STUCK_S:
            raise self._locked()

    def _locked(self) -> DatabaseError:
        return DatabaseError(f"the database {self._name} is locked; another process or transaction holds it for long")
