"""The error responses of routes, for the API's description: OpenAI's envelope, by status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

Responses = dict[int | str, dict[str, Any]]  # Any: as FastAPI has it

_EXAMPLE: JsonDict = {"error": {"message": "there is no model 'quots'; did you mean 'quotes'?",
                                "type": "not_found_error", "param": "model", "code": "model_not_found"}}  # fmt: skip
_MEANINGS = {
    400: "Something in the request is invalid; the message says what.",
    401: "No API key, or one that is wrong or revoked.",
    403: "The key may not do this, or its quota is full; without keys, an `Origin` or `Host` other than this server's.",
    404: "There is none, or none that the key may see.",
    408: "The answer took longer than the server allows, or the body came too slowly.",
    409: "A conflict: the name is taken, or something else still uses it.",
    413: "The body or a file of it is too large.",
    429: "Over one of the key's limits; try again after `Retry-After` seconds.",
    500: "The server has failed; its log says why.",
    503: "Too many requests wait, the server is stopping, or its database does not answer; try again after "
    "`Retry-After` seconds.",
    507: "No space is left on the server's disk; nothing was kept.",
}


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str = Field(description="What was wrong, the value, what to do.")
    type: str = Field(description="The kind of error; one for each status.")
    param: str | None = Field(None, description="The field of the request.")
    code: str | None = Field(None, description="For programs.")


class ErrorBody(BaseModel):
    """OpenAI's envelope of an error."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    error: ErrorDetail


def error_responses(*statuses: int, meanings: Mapping[int, str] | None = None) -> Responses:
    """Error responses of a route by status; `meanings` describes those whose meaning is the route's own."""
    described = {**{status: _MEANINGS[status] for status in statuses}, **(meanings or {})}
    return {status: {"model": ErrorBody, "description": described[status]} for status in sorted(described)}


DEFAULT_ERROR: Responses = {"default": {"model": ErrorBody, "description": "Any other error, in the same envelope."}}
