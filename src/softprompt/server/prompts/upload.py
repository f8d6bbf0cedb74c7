"""The body of `POST /v1/prompts`: JSON, or an adapter's files as a multipart form. Nothing is read beyond its limit."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from softprompt.errors import StorageError, shortened, truncated
from softprompt.server.errors import ApiError

_MOST_FIELDS = 8
_LONGEST_FIELD = 4_096  # bytes
_FORM_BYTES = 65_536  # of boundaries, headers and fields

Body = TypeVar("Body")
Fields = TypeVar("Fields", bound=BaseModel)


@dataclass(frozen=True)
class Form:
    """A multipart form: its fields, and its files by their file names."""

    fields: dict[str, str]
    files: dict[str, bytes]


def is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data"


async def read_json(request: Request, kind: TypeAdapter[Body], max_bytes: int) -> Body:
    """The body as JSON of that kind. Raises ApiError 413, RequestValidationError."""
    data = bytearray()
    async for chunk in _limited(request, max_bytes):
        data += chunk
    try:
        return kind.validate_json(bytes(data))
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_context=False)) from error


async def read_form(request: Request, max_bytes: Mapping[str, int]) -> Form:
    """A form with files of these names only, none longer than its limit. Raises ApiError 400 or 413, StorageError."""
    whole = sum(max_bytes.values()) + _FORM_BYTES
    parser = MultiPartParser(request.headers, _limited(request, whole), max_files=len(max_bytes),
                             max_fields=_MOST_FIELDS, max_part_size=_LONGEST_FIELD)  # fmt: skip
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise ApiError(400, f"the form cannot be read: {error.message}", "invalid_value") from error
    except OSError as error:  # large files are held on the disk meanwhile
        raise StorageError(f"an upload cannot be held: {error.strerror or error}; free some space") from error
    try:
        return await _read_parts(form, max_bytes)
    finally:
        await form.close()


def checked(kind: type[Fields], fields: Mapping[str, str]) -> Fields:
    """A form's fields as a model. Raises RequestValidationError."""
    try:
        return kind.model_validate(dict(fields))
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_context=False)) from error


async def _read_parts(form: FormData, max_bytes: Mapping[str, int]) -> Form:
    found = Form({}, {})
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            _check_file(value, found.files, max_bytes)
            found.files[value.filename or ""] = await value.read()
        elif name in found.fields:
            raise ApiError(400, f"the form has {shortened(name)} twice", "invalid_value", truncated(name, 80))
        else:
            found.fields[name] = value
    return found


def _check_file(file: UploadFile, before: Mapping[str, bytes], max_bytes: Mapping[str, int]) -> None:
    name = file.filename or ""
    limit = max_bytes.get(name)
    if limit is None:
        allowed = ", ".join(max_bytes)
        why = "; a pickle may hold code and is never read" if name.endswith((".bin", ".pt", ".pth", ".pkl")) else ""
        raise ApiError(
            400, f"{shortened(name)} is not a file of an adapter; send {allowed}{why}", "invalid_value", "files"
        )
    if name in before:
        raise ApiError(400, f"the form has {name} twice", "invalid_value", "files")
    if (file.size or 0) > limit:
        raise ApiError(413, f"{name} has {file.size:,} bytes; the limit for this base is {limit:,}", "too_large")


async def _limited(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body's pieces. Raises ApiError 413 as soon as it is too long, where it says so before anything is read."""
    stated = request.headers.get("content-length", "")
    if stated.isascii() and stated.isdigit() and int(stated[:20]) > max_bytes:
        raise _too_large(max_bytes)
    num_bytes = 0
    try:
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise _too_large(max_bytes)
            yield chunk
    except ClientDisconnect as error:
        raise ApiError(400, "the body ended before its end") from error


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the body is longer than {max_bytes:,} bytes, which is the most that fits", "too_large")
