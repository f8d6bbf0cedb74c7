"""A form with a file, straight onto the disk: neither is ever whole in memory, and nothing is written twice."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import anyio
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from softprompt.errors import shortened
from softprompt.server.errors import ApiError

_FILE = b"file"
_MAX_FIELDS = 16
_MAX_FIELD_BYTES = 4096
_MAX_HEADER_BYTES = 2**16  # the file's name stands in one
_WRITE_BYTES = 2**20  # written at once, in a thread: the disk may be slow


@dataclass
class Form:
    """What a client sent."""

    fields: dict[str, str] = field(default_factory=dict)  # all but the file
    filename: str = ""  # as the client says it; nothing that is used as a path
    num_bytes: int = 0  # of the file
    sha256: str = ""


async def receive_form(
    content_type: str, body: AsyncIterator[bytes], place: Path, max_bytes: int,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> Form:  # fmt: skip
    """A multipart form's fields; its file lies at `place`, synced. Raises ApiError for one that is not whole.

    `on_bytes` hears of the file's bytes as they come, and may refuse them.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise ApiError(400, f"the body is {shortened(content_type)}; send a multipart/form-data form with a file")
    with _disk_errors(), open(place, "xb") as file:
        receiver = _Receiver(file, max_bytes, on_bytes)
        try:
            await receiver.receive(options[b"boundary"], body)
        except FormParserError as error:
            raise ApiError(400, "the body is no valid multipart/form-data form; send it again") from error
        except ClientDisconnect as error:
            raise ApiError(400, "the upload ended before its end") from error
        await anyio.to_thread.run_sync(os.fsync, file.fileno())
        return receiver.form()


class _Receiver:
    """Takes a form apart as it arrives."""

    def __init__(self, file: BinaryIO, max_bytes: int, on_bytes: Callable[[int], None]) -> None:
        self._file = file
        self._on_bytes = on_bytes
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self._form = Form()
        self._fields: dict[bytes, bytearray] = {}
        self._num_files = 0
        self._unwritten = bytearray()
        self._header, self._value, self._disposition = b"", b"", b""  # of the part that is being read
        self._name = b""
        self._is_whole = False

    async def receive(self, boundary: bytes, body: AsyncIterator[bytes]) -> None:
        parser = MultipartParser(boundary, {
            "on_part_begin": self._begin, "on_header_field": self._take_header, "on_header_value": self._take_value,
            "on_header_end": self._end_header, "on_headers_finished": self._open_part, "on_part_data": self._take_data,
            "on_end": self._end,
        }, max_header_size=_MAX_HEADER_BYTES)  # fmt: skip
        async for piece in body:
            parser.write(piece)
            if len(self._unwritten) >= _WRITE_BYTES:
                await self._write()
        parser.finalize()
        await self._write()

    def form(self) -> Form:
        """Raises ApiError where the form broke off, or had no file."""
        if not self._is_whole:
            raise ApiError(400, "the form ends before its last boundary; send it again, whole")
        if self._num_files != 1:
            raise ApiError(400, f"the form has {self._num_files} fields 'file'; send one file in it", None, "file")
        self._form.fields = {_text(name): _text(value) for name, value in self._fields.items()}
        self._form.sha256 = self._hash.hexdigest()
        return self._form

    def _begin(self) -> None:
        self._header, self._value, self._disposition, self._name = b"", b"", b"", b""

    def _take_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _take_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _open_part(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"")
        if self._name == _FILE:
            self._num_files += 1
            self._form.filename = _text(options.get(b"filename", b""))
        elif len(self._fields) >= _MAX_FIELDS:
            raise ApiError(400, f"the form has more than {_MAX_FIELDS} fields; send a file and its purpose")
        else:
            self._fields[self._name] = bytearray()

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == _FILE:
            self._form.num_bytes += end - start
            if self._form.num_bytes > self._max_bytes:
                raise ApiError(413, f"the file is larger than {self._max_bytes:,} bytes, the most that is taken here",
                               "file_too_large", "file")  # fmt: skip
            self._on_bytes(end - start)
            self._unwritten += data[start:end]
            return
        self._fields[self._name] += data[start:end]
        if len(self._fields[self._name]) > _MAX_FIELD_BYTES:
            raise ApiError(400, f"field {shortened(_text(self._name))} is longer than {_MAX_FIELD_BYTES:,} bytes")

    def _end(self) -> None:
        self._is_whole = True

    async def _write(self) -> None:
        data, self._unwritten = bytes(self._unwritten), bytearray()
        await anyio.to_thread.run_sync(self._write_now, data)

    def _write_now(self, data: bytes) -> None:
        self._hash.update(data)
        self._file.write(data)
        self._file.flush()


def _text(raw: bytes | bytearray) -> str:
    """Text that any database holds: UTF-8, what is not being replaced, and no NUL."""
    return raw.decode("utf-8", "replace").replace("\0", "\ufffd")


@contextmanager
def _disk_errors() -> Iterator[None]:
    """A full disk, as an error for the client."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ApiError(507, "the server has no space left for files; nothing was kept", "no_space") from error
