"""Bodies that a route reads itself: JSON, and multipart forms whose files the route opens. All are bounded.

A form's file is written in pieces as it arrives, in a thread, since the disk may be slow: it is never whole in memory,
and is written once.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import IO, TypeVar

import anyio
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, TypeAdapter, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from softprompt.errors import shortened, truncated
from softprompt.server.errors import ApiError

_MAX_FIELDS = 16
_MAX_FIELD_BYTES = 4_096
_MAX_HEADER_BYTES = 2**16  # a part's; the file's name is in one
_FORM_BYTES = 2**16  # of boundaries, headers and fields
_WRITE_BYTES = 2**20  # at once

Body = TypeVar("Body")
Fields = TypeVar("Fields", bound=BaseModel)


OnBytes = Callable[[int], None]
"""Called with the number of bytes that have come; may refuse them by raising ApiError."""


class FormFile:
    """A file of a form on its way to the disk."""

    def __init__(
        self,
        file: IO[bytes],
        filename: str,
        max_bytes: int,
        too_large: str,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        """`too_large` is the message for more than `max_bytes`."""
        self.file = file
        self.filename = filename  # the client's; never a path of ours
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._too_large = too_large
        self._on_bytes = on_bytes
        self._hash = hashlib.sha256()
        self._unwritten = bytearray()

    @property
    def sha256(self) -> str:
        """Of what has been written."""
        return self._hash.hexdigest()

    def add(self, piece: bytes) -> None:
        """The next bytes. Raises ApiError 413, and what `on_bytes` raises."""
        self.num_bytes += len(piece)
        if self.num_bytes > self._max_bytes:
            raise ApiError(413, self._too_large, "file_too_large", "file")
        if self._on_bytes is not None:
            self._on_bytes(len(piece))
        self._unwritten += piece

    async def write(self, *, at_least: int = 1) -> None:
        """Write what has arrived, if it is so many bytes."""
        if len(self._unwritten) >= at_least:
            data, self._unwritten = bytes(self._unwritten), bytearray()
            await anyio.to_thread.run_sync(self._write_now, data)

    def _write_now(self, data: bytes) -> None:
        self._hash.update(data)
        self.file.write(data)
        self.file.flush()


OpenFile = Callable[[str, str], FormFile | None]
"""By a part's name and filename ("" if it has none): its file, or None if the part is a field. May raise ApiError."""


def is_form(request: Request) -> bool:
    """Whether the body is a multipart form."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data"


async def read_json(request: Request, kind: TypeAdapter[Body], max_bytes: int) -> Body:
    """The body as JSON of that kind. Raises ApiError 413, RequestValidationError."""
    data = bytearray()
    async for piece in _limited(request, max_bytes):
        data += piece
    try:
        return kind.validate_json(bytes(data))
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_context=False)) from error


async def read_form(request: Request, open_file: OpenFile, max_file_bytes: int) -> dict[str, str]:
    """A multipart form's fields; its files, together at most so long, have been written.

    Raises ApiError for a form that is too large, not whole, or has a field twice, and whatever writing raises.
    """
    content_type = request.headers.get("content-type", "")
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise ApiError(400, f"the body is {shortened(content_type)}; send a multipart/form-data form with a file")
    try:
        form = _Form(options[b"boundary"], open_file)
        async for piece in _limited(request, max_file_bytes + _FORM_BYTES):
            await form.add(piece)
        return await form.end()
    except FormParserError as error:
        raise ApiError(400, "the body is no valid multipart/form-data form; send it again", "invalid_value") from error


def checked(kind: type[Fields], fields: Mapping[str, str]) -> Fields:
    """A form's fields as a model. Raises RequestValidationError."""
    try:
        return kind.model_validate(dict(fields))
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_context=False)) from error


class _Form:
    """A form that is taken apart as it arrives."""

    def __init__(self, boundary: bytes, open_file: OpenFile) -> None:
        self._open_file = open_file
        self._fields: dict[str, bytearray] = {}
        self._files: list[FormFile] = []
        self._part: FormFile | bytearray = bytearray()  # that is being read
        self._header = self._value = self._disposition = b""
        self._is_whole = False
        self._parser = MultipartParser(boundary, {
            "on_part_begin": self._begin_part, "on_header_field": self._add_header, "on_header_value": self._add_value,
            "on_header_end": self._end_header, "on_headers_finished": self._open_part, "on_part_data": self._add_data,
            "on_end": self._end,
        }, max_header_size=_MAX_HEADER_BYTES)  # fmt: skip

    async def add(self, piece: bytes) -> None:
        self._parser.write(piece)
        for file in self._files:
            await file.write(at_least=_WRITE_BYTES)

    async def end(self) -> dict[str, str]:
        """The fields, once all has arrived."""
        self._parser.finalize()
        if not self._is_whole:
            raise ApiError(400, "the form ends before its last boundary; send it again, whole")
        for file in self._files:
            await file.write()
        return {name: _text(value) for name, value in self._fields.items()}

    def _begin_part(self) -> None:
        self._header = self._value = self._disposition = b""

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _open_part(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = _text(options.get(b"name", b""))
        file = self._open_file(name, _text(options.get(b"filename", b"")))
        if file is not None:
            self._files.append(file)
        elif name in self._fields:
            raise ApiError(400, f"the form has {shortened(name)} twice", "invalid_value", truncated(name, 80))
        elif len(self._fields) >= _MAX_FIELDS:
            raise ApiError(400, f"the form has more than {_MAX_FIELDS} fields", "invalid_value")
        self._part = self._fields.setdefault(name, bytearray()) if file is None else file

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if isinstance(self._part, FormFile):
            self._part.add(data[start:end])
            return
        self._part += data[start:end]
        if len(self._part) > _MAX_FIELD_BYTES:
            name = next(reversed(self._fields))
            raise ApiError(400, f"field {shortened(name)} is longer than {_MAX_FIELD_BYTES:,} bytes", "invalid_value")

    def _end(self) -> None:
        self._is_whole = True


def _text(raw: bytes | bytearray) -> str:
    """Text that any database can store: UTF-8, with the rest replaced, and without NUL."""
    return raw.decode("utf-8", "replace").replace("\0", "\ufffd")


async def _limited(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body's pieces. Raises ApiError 413 as soon as it is too long: by its headers, before any of it is read."""
    stated = request.headers.get("content-length", "")
    if stated.isascii() and stated.isdigit() and int(stated[:20]) > max_bytes:
        raise _too_large(max_bytes)
    num_bytes = 0
    try:
        async for piece in request.stream():
            num_bytes += len(piece)
            if num_bytes > max_bytes:
                raise _too_large(max_bytes)
            yield piece
    except ClientDisconnect as error:
        raise ApiError(400, "the body ended before its end") from error


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the body is longer than {max_bytes:,} bytes, which is the most that fits", "too_large")
