"""Which names may be labels of a metric, where clients decide how many names there are."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)

OTHER = "other"  # the label of all the rest
_REMEMBERED = 20  # times as many names are counted as may be shown
_CLEARLY = 2  # times as often as the least used one must a name be used to take its place


class BoundedNames(Generic[Name]):
    """At most `most` names are shown at any time.

    A name that has clearly overtaken the least used one takes its place; `forget` is told of the one that lost it. So
    no series ever counts backwards: one begins at 0, grows, and may end.
    """

    def __init__(self, most: int, forget: Callable[[Name], None]) -> None:
        self._most = most
        self._forget = forget
        self._uses: Counter[Name] = Counter()
        self._shown: set[Name] = set()
        self._lock = threading.Lock()

    def use(self, name: Name) -> bool:
        """Count one use; whether the name is shown."""
        with self._lock:
            self._uses[name] += 1
            self._limit_memory()
            return name in self._shown or self._finds_place(name)

    def _finds_place(self, name: Name) -> bool:
        if len(self._shown) >= self._most:
            least = min(self._shown, key=self._uses.__getitem__)
            if self._uses[name] <= _CLEARLY * self._uses[least]:
                return False
            self._shown.discard(least)
            self._forget(least)
        self._shown.add(name)
        return True

    def _limit_memory(self) -> None:
        if len(self._uses) > _REMEMBERED * self._most:
            kept = [*self._shown, *(name for name, _ in self._uses.most_common(_REMEMBERED * self._most // 2))]
            self._uses = Counter({name: self._uses[name] for name in kept})
