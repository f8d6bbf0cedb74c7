"""Why a job failed, in words for its owner: no path, no traceback."""

from __future__ import annotations

from collections.abc import Mapping

from softprompt import errors
from softprompt.server.errors import ApiError

_LONGEST = 2_000  # characters
_NO_MEMORY = ("out of memory", "can't allocate memory")  # torch's words, on a GPU and on a CPU
_CODES: tuple[tuple[type[Exception], str, str | None], ...] = (
    (errors.DataError, "invalid_file", "training_file"),
    (errors.ConfigError, "invalid_hyperparameters", "method"),
    (errors.PromptError, "invalid_prompt", "model"),
    (errors.DivergedError, "training_diverged", "method"),
    (errors.MemoryLimitError, "out_of_memory", None),
    (errors.MissingDependencyError, "not_installed", "method"),
    (errors.StorageError, "storage_error", None),
)


def code_and_param(error: Exception) -> tuple[str, str | None]:
    """OpenAI's `code` and `param` for what ended a job."""
    if isinstance(error, ApiError):
        return error.code or "invalid_request", error.param
    if _is_of_memory(error):
        return "out_of_memory", None
    return next(((code, param) for kind, code, param in _CODES if isinstance(error, kind)), ("server_error", None))


def said(error: Exception, names: Mapping[str, str]) -> str:
    """The sentence for the job's owner. `names` are the server's paths of the files, and what the owner calls them."""
    return errors.truncated(_sentence(error, names), _LONGEST)


def _sentence(error: Exception, names: Mapping[str, str]) -> str:
    if isinstance(error, ApiError):
        return error.message
    if is_of_disk(error):
        return "the server could not read or write the job's files and has paused it; resume it when there is room"
    if isinstance(error, errors.SoftpromptError) and not isinstance(error, errors.StorageError):
        text = str(error)
        for path, name in names.items():
            text = text.replace(path, name)
        return text
    if _is_of_memory(error):
        return "the memory does not hold a step of this job; ask for fewer rows per step, or shorter ones"
    return "the job has failed for a reason that lies with the server; its log says why"


def is_of_disk(error: Exception) -> bool:
    """A full disk, say: the job can go on later."""
    return type(error) in (errors.StorageError, errors.ExistsError)


def _is_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return not isinstance(error, errors.SoftpromptError)
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)
