"""Errors as OpenAI's API tells them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any

from softprompt import errors


@dataclass
class ApiError(Exception):
    """What a client is told instead of an answer."""

    status: int
    message: str  # what was wrong, the value, what to do
    code: str | None = None  # for programs, "model_not_found" say
    param: str | None = None  # the field of the request
    retry_after_s: float | None = None

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        return _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def envelope(self) -> dict[str, Any]:
        """The answer's body. Whatever a message echoes, no client gets a long one back."""
        param = None if self.param is None else errors.truncated(self.param, _LONGEST_PARAM)
        message = errors.truncated(self.message, _LONGEST_MESSAGE)
        return {"error": {"message": message, "type": self.kind, "param": param, "code": self.code}}

    @classmethod
    def of(cls, error: errors.SoftpromptError) -> ApiError:
        """What an error of ours means to a client."""
        if any(isinstance(each, OSError) and each.errno in _NO_SPACE for each in (error, error.__cause__)):
            return cls(507, "the server has no space left; nothing was kept", "no_space")
        if isinstance(error, errors.DatabaseError):  # where it is, and why it fails, is the operator's business
            return cls(503, "the server's database does not answer; try again", "database_unavailable", None, 1.0)
        for kind, status, code in _STATUSES:
            if isinstance(error, kind):
                return cls(status, str(error), code, error.param, 1.0 if status == 503 else None)
        return cls(500, "the server has failed; its log says why")


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
