"""HTTP connections that cannot be held open, or filled, by a client that stalls.

uvicorn's own limits begin with a request's body; its head has neither a time limit nor, with httptools, a largest size,
and an answer that nobody reads waits for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_LARGEST_HEAD = 64 * 2**10  # bytes of a request's line and headers


class Connection(HttpToolsProtocol):
    """uvicorn's, with time limits for a request's head and for an answer that is not read. Use `connection_class`."""

    patience_s = 60.0

    def __init__(self, *arguments: Any, **options: Any) -> None:  # Any: uvicorn's own
        super().__init__(*arguments, **options)
        self._head_bytes = 0  # of the request that is being sent, until its head is whole
        self._header_bytes = 0  # of the request, trailers behind its body included
        self._in_head = True
        self._waiting: asyncio.TimerHandle | None = None  # for the head
        self._stalled: asyncio.TimerHandle | None = None  # the answer

    def connection_made(self, transport: Any) -> None:  # Any: uvloop's transports are not asyncio's to mypy
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            self._expect_head()
        super().data_received(data)
        if self._in_head and self._head_bytes > _LARGEST_HEAD and not self.transport.is_closing():
            self.send_400_response("The request's line and headers are too long.")

    def on_message_begin(self) -> None:
        self._in_head, self._header_bytes = True, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > _LARGEST_HEAD:
            self.transport.abort()
            return
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True  # what comes next is another one
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self.patience_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _expect_head(self) -> None:
        """From its first byte on, or the connection's beginning, it has so much time; between requests uvicorn has."""
        if self._waiting is None:
            self._waiting = self.loop.call_later(self.patience_s, self.transport.abort)

    def _cancel_timers(self) -> None:
        for timer in (self._waiting, self._stalled):
            if timer is not None:
                timer.cancel()
        self._waiting = self._stalled = None


def connection_class(patience_s: float) -> type[Connection]:
    """The class for uvicorn's `http`, with that many seconds for a client that stalls."""
    return type("Connection", (Connection,), {"patience_s": patience_s})
