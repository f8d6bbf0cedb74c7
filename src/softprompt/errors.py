"""Every error that a caller may see, as one family.

SoftpromptError
├── ConfigError        a setting is out of its range, or contradicts another (ValueError)
│   └── UnknownSettingError  no setting has this name (TypeError)
├── BaseModelError     a base cannot be loaded, or cannot take a soft prompt (ValueError)
├── PromptError        a soft prompt's tensor is unusable (ValueError)
│   └── WrongBaseError a soft prompt was trained on another base
├── DataError          a data set, a row or an input is unusable (ValueError)
│   ├── EncodingError  the base's tokenizer cannot encode a text
│   └── LengthError    an input and its answer are longer than the base allows
├── StorageError       an adapter, a library or a run folder on disk is unusable (OSError)
│   ├── AdapterError   an adapter folder must not be loaded (ValueError)
│   ├── ExistsError    a folder would be overwritten (FileExistsError)
│   └── DatabaseError  the server's database does not answer, or is of another release
├── MemoryLimitError   not even one row fits into memory (MemoryError)
├── DivergedError      the training loss is no longer a number (ArithmeticError)
├── QueueFullError     the engine's queue is full (RuntimeError)
├── EngineError        the generation engine has stopped (RuntimeError)
├── TimeLimitError     a request's time ended before its answer (TimeoutError)
├── RankError          another process of the same run has ended (RuntimeError)
└── MissingDependencyError  an optional package is not installed (ImportError)

A message has what is wrong, the value, and what to do. The command line prints it as one line and exits with code 2.
"""


class SoftpromptError(Exception):
    """Base class of all errors that this package raises on purpose.

    `param` is the setting, or the field of a request, that the error is about; None where it is about no single one.
    """

    def __init__(self, *arguments: object, param: str | None = None) -> None:
        super().__init__(*arguments)
        self.param = param


class ConfigError(SoftpromptError, ValueError):
    """A setting is out of its range, unknown, or contradicts another."""


class UnknownSettingError(ConfigError, TypeError):
    """No setting has this name, or a setting was given without a name."""


class BaseModelError(SoftpromptError, ValueError):
    """The base cannot be loaded, or cannot take a soft prompt."""


class PromptError(SoftpromptError, ValueError):
    """A soft prompt's tensor has the wrong shape, dtype or values."""


class WrongBaseError(PromptError):
    """The soft prompt was trained on another base."""


class DataError(SoftpromptError, ValueError):
    """A data set, a row of it or an input cannot be used."""


class EncodingError(DataError):
    """The base's tokenizer cannot encode a text, or encodes it to ids that the base does not have."""


class LengthError(DataError):
    """An input and its answer do not fit into the base's positions."""


class StorageError(SoftpromptError, OSError):
    """Something on disk is missing or broken, or must not be changed."""


class AdapterError(StorageError, ValueError):
    """An adapter folder is refused: wrong type, wrong shapes, unsafe or incomplete."""


class ExistsError(StorageError, FileExistsError):
    """A folder exists, and neither resuming nor overwriting was requested."""


class DatabaseError(StorageError):
    """The server's database does not answer, or its tables are those of another release."""


class MemoryLimitError(SoftpromptError, MemoryError):
    """One row alone needs more memory than the machine allows."""


class DivergedError(SoftpromptError, ArithmeticError):
    """The training loss is no longer a number."""


class QueueFullError(SoftpromptError, RuntimeError):
    """The engine's queue is full; the request may succeed later."""


class EngineError(SoftpromptError, RuntimeError):
    """The engine has stopped and accepts no requests."""


class TimeLimitError(SoftpromptError, TimeoutError):
    """A request's time limit ended before its answer was complete."""


class RankError(SoftpromptError, RuntimeError):
    """Another process of the same training run has ended early; this one cannot continue alone."""


class MissingDependencyError(SoftpromptError, ImportError):
    """An optional package is not installed; the message names the extra that installs it."""


def shortened(value: object, limit: int = 60) -> str:
    """A value as messages show it: its repr, cut to a readable length."""
    try:
        shown = repr(value)
    except ValueError:  # a whole number of very many digits
        return "a number of very many digits"
    return truncated(shown, limit)


def truncated(text: str, limit: int) -> str:
    """The text, cut to `limit` characters; a cut one ends in "..."."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
