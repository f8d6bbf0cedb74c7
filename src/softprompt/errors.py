"""Every error that a caller may meet, one family.

SoftpromptError
├── ConfigError        a setting that cannot be meant (ValueError)
│   └── UnknownSettingError  a setting that there is none of (TypeError)
├── BaseModelError     a base that cannot be loaded or is not a causal LM (ValueError)
├── PromptError        a soft prompt's tensor is not usable (ValueError)
│   └── WrongBaseError a prompt made for another base
├── DataError          a training set, a row or an input (ValueError)
│   ├── EncodingError  a text that the base's tokenizer cannot encode
│   └── LengthError    longer than the base allows
├── StorageError       adapters, libraries and run folders on disk (OSError)
│   ├── AdapterError   an adapter folder that must not be loaded
│   ├── ExistsError    a folder that would be overwritten
│   └── DatabaseError  the server's database does not answer, or is not one of this release
├── MemoryLimitError   not even one row fits (MemoryError)
├── DivergedError      a training whose loss is no longer a number (ArithmeticError)
├── QueueFullError     more requests wait than the engine may keep (RuntimeError)
├── EngineError        a generation engine that has stopped (RuntimeError)
├── TimeLimitError     a request's time was over before its answer (TimeoutError)
├── RankError          another process of the same run has ended (RuntimeError)
└── MissingDependencyError  an optional package is needed (ImportError)

A message says what was wrong, the value, and what to do. The command line prints it as one line and exits with code 2.
"""


class SoftpromptError(Exception):
    """Root of all errors raised on purpose by this package.

    `param` is the setting, or the field of a request, that the error is about; None where it is about no single one.
    """

    def __init__(self, *arguments: object, param: str | None = None) -> None:
        super().__init__(*arguments)
        self.param = param


class ConfigError(SoftpromptError, ValueError):
    """A setting is out of its range, unknown, or contradicts another."""


class UnknownSettingError(ConfigError, TypeError):
    """A setting by a name that its class does not have, or by no name at all."""


class BaseModelError(SoftpromptError, ValueError):
    """The base cannot be loaded, or is not a decoder-only causal language model."""


class PromptError(SoftpromptError, ValueError):
    """A soft prompt's tensor has the wrong shape, dtype or values."""


class WrongBaseError(PromptError):
    """The soft prompt was trained on another base."""


class DataError(SoftpromptError, ValueError):
    """A data set, a row of it or an input cannot be used."""


class EncodingError(DataError):
    """A text that the base's tokenizer cannot encode, or encodes to ids that the base does not have."""


class LengthError(DataError):
    """An input and its answer do not fit into the base's positions."""


class StorageError(SoftpromptError, OSError):
    """Something on disk is missing, broken or may not be touched."""


class AdapterError(StorageError, ValueError):
    """An adapter folder is refused: wrong type, wrong shapes, unsafe or incomplete."""


class ExistsError(StorageError, FileExistsError):
    """A folder exists and neither resuming nor overwriting was asked for."""


class DatabaseError(StorageError):
    """The server's database does not answer, or its tables are not those of this release."""


class MemoryLimitError(SoftpromptError, MemoryError):
    """One row alone needs more memory than the machine allows."""


class DivergedError(SoftpromptError, ArithmeticError):
    """A training whose loss is no longer a number."""


class QueueFullError(SoftpromptError, RuntimeError):
    """The engine's queue is full; a later try may be taken."""


class EngineError(SoftpromptError, RuntimeError):
    """The engine has stopped, and takes no requests."""


class TimeLimitError(SoftpromptError, TimeoutError):
    """A request was given less time than its answer took."""


class RankError(SoftpromptError, RuntimeError):
    """Another of the processes that train one run has ended early; this one cannot go on alone."""


class MissingDependencyError(SoftpromptError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


def shortened(value: object, limit: int = 60) -> str:
    """A value as a message shows it: its repr, cut to a length that can be read."""
    try:
        shown = repr(value)
    except ValueError:  # a whole number of very many digits
        return "a number of very many digits"
    return truncated(shown, limit)


def truncated(text: str, limit: int) -> str:
    """Words of others in a message: what is longer than `limit` characters ends in "..."."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
