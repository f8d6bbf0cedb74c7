"""Errors in OpenAI's envelope, {"error": {"message", "type", "param", "code"}}, and what our own mean over HTTP."""

from __future__ import annotations

import errno
import math
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from softprompt import errors


@dataclass
class ApiError(Exception):
    """An error response."""

    status: int
    message: str  # what was wrong, the value, what to do
    code: str | None = None  # for programs, such as "model_not_found"
    param: str | None = None  # the field of the request
    retry_after_s: float | None = None

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        return _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def envelope(self) -> dict[str, Any]:
        """The response's body. Whatever a message quotes, it is short and encodable."""
        param = None if self.param is None else encodable(errors.truncated(self.param, _LONGEST_PARAM))
        message = encodable(errors.truncated(self.message, _LONGEST_MESSAGE))
        return {"error": {"message": message, "type": self.kind, "param": param, "code": self.code}}

    @classmethod
    def of(cls, error: errors.SoftpromptError) -> ApiError:
        """What one of our own errors means to a client."""
        if any(isinstance(each, OSError) and each.errno in _NO_SPACE for each in (error, error.__cause__)):
            return cls(507, "the server has no space left; nothing was kept", "no_space")
        if isinstance(error, errors.DatabaseError):  # its address and its failure are for the operator's eyes only
            return cls(503, "the server's database does not answer; try again", "database_unavailable", None, 1.0)
        for kind, status, code in _STATUSES:
            if isinstance(error, kind):
                return cls(status, str(error), code, error.param, 1.0 if status == 503 else None)
        return cls(500, "the server has failed; its log says why")


def error_response(error: ApiError) -> JSONResponse:
    """The response of a route; in middleware, `await error_response(error)(scope, receive, send)`."""
    headers = {} if error.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.envelope(), error.status, headers)


def encodable(text: str) -> str:
    """Text that UTF-8 can hold: half a surrogate pair is written as `\\ud800`."""
    return text.encode("utf-8", "backslashreplace").decode()


_LONGEST_MESSAGE, _LONGEST_PARAM = 2_000, 100  # characters
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_STATUSES: tuple[tuple[type[errors.SoftpromptError], int, str | None], ...] = (
    (errors.QueueFullError, 503, "queue_full"),
    (errors.EngineError, 503, "engine_stopped"),
    (errors.TimeLimitError, 408, "timeout"),
    (errors.LengthError, 400, "context_length_exceeded"),
    (errors.MemoryLimitError, 400, "context_length_exceeded"),
    (errors.ExistsError, 409, "exists"),
    (errors.AdapterError, 400, "invalid_adapter"),
    (errors.WrongBaseError, 400, "wrong_base"),
    (errors.PromptError, 400, "invalid_prompt"),
    (errors.DataError, 400, "invalid_data"),
    (errors.ConfigError, 400, "invalid_value"),
    (errors.MissingDependencyError, 501, "not_installed"),
)
