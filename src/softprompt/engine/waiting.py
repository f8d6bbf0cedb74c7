"""Who is next: by priority, then the client that was served least, then who came first.

Service is counted in tokens, as the virtual token counter of Sheng et al. (2401.00588) does: a client that comes back
is lifted to the least served of those that are there, so that nobody saves up a claim while away. No torch here.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from softprompt.engine.rows import Row

_GENERATED = 2  # a token chosen weighs as much as so many read

Entry = tuple[int, int, int, Row]  # priority, request, choice


class WaitingRows:
    """Rows that have no memory yet, or had to give theirs back."""

    def __init__(self) -> None:
        self._heaps: dict[str | None, list[Entry]] = {}
        self._service: dict[str | None, float] = {}
        self._num_rows: dict[str | None, int] = {}  # of each client, waiting or running

    def __len__(self) -> int:
        return sum(len(heap) for heap in self._heaps.values())

    def __iter__(self) -> Iterator[Row]:
        return (entry[-1] for heap in self._heaps.values() for entry in heap)

    def enter(self, row: Row) -> None:
        """A new row."""
        client = row.request.client
        if not self._num_rows.get(client):
            self._lift(client)
        self._num_rows[client] = self._num_rows.get(client, 0) + 1
        self.push(row)

    def leave(self, row: Row) -> None:
        """A row has ended, wherever it was."""
        client = row.request.client
        self._num_rows[client] -= 1
        if not self._num_rows[client]:
            del self._num_rows[client]
            self._forget()

    def push(self, row: Row) -> None:
        entry = (row.request.priority, row.owner.id, row.choice, row)
        heapq.heappush(self._heaps.setdefault(row.request.client, []), entry)

    def pop(self) -> Row:
        """The next row."""
        client = min(self._heaps, key=lambda name: self._claim(name))
        row = heapq.heappop(self._heaps[client])[-1]
        if not self._heaps[client]:
            del self._heaps[client]
        return row

    def remove(self, row: Row) -> None:
        client = row.request.client
        kept = [entry for entry in self._heaps[client] if entry[-1] is not row]
        heapq.heapify(kept)
        self._heaps[client] = kept
        if not kept:
            del self._heaps[client]

    def charge(self, row: Row, num_read: int, num_chosen: int) -> None:
        """Tokens that were run for a row, and chosen."""
        client = row.request.client
        self._service[client] = self._service.get(client, 0.0) + num_read + _GENERATED * num_chosen

    def _claim(self, client: str | None) -> tuple[int, float, int, int]:
        priority, request, choice, _ = self._heaps[client][0]
        return priority, self._service.get(client, 0.0), request, choice

    def _lift(self, client: str | None) -> None:
        least = min((self._service.get(other, 0.0) for other in self._num_rows), default=0.0)
        self._service[client] = max(self._service.get(client, 0.0), least)

    def _forget(self) -> None:
        """Clients that are away and have had no more than those that are here lose nothing by being forgotten."""
        least = min((self._service.get(client, 0.0) for client in self._num_rows), default=float("inf"))
        for client in [name for name, had in self._service.items() if name not in self._num_rows and had <= least]:
            del self._service[client]
