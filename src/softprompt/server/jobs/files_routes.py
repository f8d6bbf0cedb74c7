"""OpenAI's Files API: what a fine-tuning job learns from."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated, BinaryIO, Literal

import anyio
from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from softprompt.server.clients.auth import CurrentClient
from softprompt.server.clients.quotas import Amounts, QuotasDep
from softprompt.server.dependencies import dependency
from softprompt.server.error_schemas import error_responses
from softprompt.server.errors import ApiError
from softprompt.server.jobs.files import PURPOSE, Files, StoredFile

router = APIRouter(prefix="/v1/files", tags=["files"], responses=error_responses(400, 401, 429, 503))

TheFiles = Annotated[Files, dependency(Files)]

_PIECE_BYTES = 2**16
_ID = "file-6b1f0c9a7d3e48f2a5b8c1d4e7f0a3b6"
FileId = Annotated[str, InPath(description="The file's id.", examples=[_ID])]


class FileObject(BaseModel):
    """An uploaded file."""

    id: str = Field(examples=[_ID])
    object: Literal["file"] = "file"
    bytes: int = Field(examples=[48213])
    created_at: int = Field(description="Seconds since 1970.", examples=[1764000000])
    filename: str = Field(examples=["reviews.jsonl"])
    purpose: str = Field(examples=[PURPOSE])
    status: Literal["processed"] = "processed"
    status_details: None = None
    num_rows: int = Field(description="Rows that a job learns from.", examples=[512])
    form: str = Field(
        description="Of the rows: template (prompt and completion), chat or plain.", examples=["template"]
    )


class FileList(BaseModel):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None = Field(examples=[_ID])
    last_id: str | None = Field(examples=[_ID])
    has_more: bool = Field(examples=[False])


class FileDeleted(BaseModel):
    """A file that is gone."""

    id: str = Field(examples=[_ID])
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


_ROW = '{"prompt": "Good film.", "completion": " positive"}\n'
_FORM = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {
                        "type": "string",
                        "format": "binary",
                        "description": 'JSON lines, all of {"prompt", "completion"}, of {"messages"} or of {"text"}.',
                    },
                    "purpose": {"type": "string", "enum": [PURPOSE]},
                },
            },
            "example": {"file": _ROW, "purpose": PURPOSE},
        }
    },
}
_UPLOADED = {"links": {"Train on it": {
    "operationId": "create_job", "requestBody": {"model": "base", "training_file": "$response.body#/id"}}}}  # fmt: skip
_CONTENT = {"description": "The file.", "content": {"application/jsonl": {
    "schema": {"type": "string"}, "example": _ROW}}}  # fmt: skip


@router.post("", summary="Upload a file", openapi_extra={"requestBody": _FORM},
             responses={200: _UPLOADED, **error_responses(403, 408, 413, 507)})  # fmt: skip
async def upload_file(request: Request, client: CurrentClient, files: TheFiles, quotas: QuotasDep) -> FileObject:
    """Takes a file of rows. They are checked line by line; a refusal names the first broken lines."""
    file_id = files.new_id()
    room, stored = await anyio.to_thread.run_sync(quotas.reserve, client, Amounts(files=1)), None
    try:
        upload = await files.receive(file_id, request, partial(quotas.grow, room))
        stored = await anyio.to_thread.run_sync(files.add, file_id, upload, client, limiter=files.checks)
    finally:
        quotas.release(room, is_kept=stored is not None)
        files.arriving(file_id).unlink(missing_ok=True)
    return _object(stored)


@router.get("", summary="List files", responses=error_responses(404))
def list_files(
    client: CurrentClient,
    files: TheFiles,
    purpose: Annotated[str | None, Query(description="Only files with this purpose.")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000, description="Files of a page.")] = 10_000,
    order: Annotated[Literal["asc", "desc"], Query(description="The newest first (desc) or last (asc).")] = "desc",
    after: Annotated[str | None, Query(description="The last id of the page before.")] = None,
) -> FileList:
    """The client's own files, the newest first."""
    found, has_more = files.list(client, purpose=purpose, after=after, limit=limit, newest_first=order == "desc")
    data = [_object(each) for each in found]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return FileList(data=data, first_id=first, last_id=last, has_more=has_more)


@router.get("/{file_id}", summary="Retrieve a file", responses=error_responses(404))
def retrieve_file(file_id: FileId, client: CurrentClient, files: TheFiles) -> FileObject:
    """What is known of a file."""
    return _object(files.get(file_id, client))


@router.delete("/{file_id}", summary="Delete a file", responses=error_responses(404, 409))
def delete_file(file_id: FileId, client: CurrentClient, files: TheFiles) -> FileDeleted:
    """Deletes a file, unless a job that waits, runs or is paused needs it."""
    files.delete(file_id, client)
    return FileDeleted(id=file_id)


@router.get("/{file_id}/content", summary="Retrieve a file's content", response_class=StreamingResponse,
            responses={200: _CONTENT, **error_responses(404)})  # fmt: skip
def retrieve_file_content(file_id: FileId, client: CurrentClient, files: TheFiles) -> StreamingResponse:
    """The bytes that were uploaded."""
    stored = files.get(file_id, client)
    try:
        file = open(stored.path, "rb")  # noqa: SIM115  # closed by _pieces
    except FileNotFoundError as error:
        raise ApiError(404, f"the content of file {file_id!r} is lost; upload it again", "file_lost") from error
    headers = {
        "Content-Length": str(stored.num_bytes),
        "Content-Disposition": f'attachment; filename="{stored.id}.jsonl"',
        "X-Content-Type-Options": "nosniff",
    }
    return StreamingResponse(_pieces(file), media_type="application/jsonl", headers=headers)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while piece := file.read(_PIECE_BYTES):
            yield piece


def _object(stored: StoredFile) -> FileObject:
    return FileObject(id=stored.id, bytes=stored.num_bytes, created_at=int(stored.created), filename=stored.filename,
                      purpose=stored.purpose, num_rows=stored.num_rows, form=stored.form)  # fmt: skip
