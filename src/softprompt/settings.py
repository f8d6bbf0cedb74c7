"""How a class of settings is declared, read and checked: a frozen dataclass, each field with meaning, type and default.

Flags, environment variables, TOML files, HTTP and Python all come through here, so a mistake has one message wherever
it is made. No torch here.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import operator
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from softprompt.errors import ConfigError, UnknownSettingError, shortened

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ConfigT = TypeVar("ConfigT")
Table = dict[str, Any]  # a TOML section; Any: whatever TOML holds

_LONGEST_NAME = 200  # characters; the nearest name is searched for shorter ones only, since the search takes time
_TYPE_NAMES = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}
_LARGEST_WHOLE = 2**63  # torch, SQLite and JSON readers handle numbers below it
_SWITCHES = {
    **dict.fromkeys(("1", "true", "t", "yes", "y", "on"), True),
    **dict.fromkeys(("0", "false", "f", "no", "n", "off", ""), False),
}
_TYPED_ESCAPE = re.compile(r"\\(\\?)([nt])")
_ESCAPES = {"n": "\n", "t": "\t"}
_FLAG = re.compile(r"--([a-z][a-z-]*)")
_MAKERS = {"Base": "load_base('embedded')", "SoftPrompt": "load_prompt('prompts/coach', base)"}
_classes: list[type[Any]] = []  # every class of settings, for the setting that belongs to another one
# Names in PEFT, transformers, TRL and vLLM, each with the settings to suggest: the first that the class has.
_ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    "num_virtual_tokens": ("virtual_tokens",), "prompt_length": ("virtual_tokens",),
    "prompt_tuning_init": ("init",), "prompt_tuning_init_text": ("init_text",),
    "num_train_epochs": ("epochs",), "num_epochs": ("epochs",), "n_epochs": ("epochs",), "max_epochs": ("epochs",),
    "per_device_train_batch_size": ("batch_rows",), "train_batch_size": ("batch_rows",), "batch_size": ("batch_rows",),
    "gradient_checkpointing": ("checkpoint_layers",), "lr": ("learning_rate",),
    "learning_rate_multiplier": ("relative_learning_rate",), "lr_scheduler_type": ("schedule",),
    "scheduler": ("schedule",), "num_warmup_steps": ("warmup_steps",), "eval_steps": ("validate_every",),
    "metric_for_best_model": ("best_by",), "early_stopping_patience": ("patience",), "save_steps": ("save_every",),
    "max_tokens": ("max_new_tokens",), "max_completion_tokens": ("max_new_tokens",),
    "max_length": ("max_new_tokens", "max_length"), "max_seq_length": ("max_length",), "max_model_len": ("max_length",),
    "min_tokens": ("min_new_tokens",), "do_sample": ("temperature",), "stop_strings": ("stop",),
    "stop_token_ids": ("stop_ids",), "guided_choice": ("choice",), "guided_json": ("json_schema",),
    "max_num_seqs": ("max_rows",), "max_num_batched_tokens": ("max_step_tokens",),
    "model": ("base",), "model_id": ("base",), "model_name": ("base",), "model_name_or_path": ("base",),
    "pretrained_model_name_or_path": ("base",), "torch_dtype": ("dtype",), "local_files_only": ("offline",),
    "task_type": ("task",), "pooling_type": ("pooling",), "pooling_strategy": ("pooling",),
    "verbalizer": ("label_words",),
    "dataset": ("data",), "dataset_name": ("data",), "data_files": ("data",), "train_file": ("data",),
    "dataset_config_name": ("subset",), "dataset_text_field": ("text_column",), "label": ("label_column",),
    "labels": ("label_column",), "sep": ("delimiter",), "separator": ("delimiter",), "max_train_samples": ("rows",),
}  # fmt: skip


def option(
    default: Any, help: str, *, flag: bool = True, typed: bool = False
) -> Any:  # Any: dataclasses.field is typed as its own type
    r"""A setting with its meaning and unit.

    Without `flag` it has no flag on the command line. With `typed`, `\n` on the command line stands for a line break.
    """
    return field(default=default, metadata={"help": help, "flag": flag, "typed": typed})


def required(help: str) -> Any:  # Any: as with `option`
    """A setting without a default."""
    return field(metadata={"help": help})


def settings_class(kind: type[ConfigT]) -> type[ConfigT]:
    """Class decorator: an unknown name is refused with the nearest one, and `help()` shows each setting's meaning."""
    plain: Any = kind.__init__  # Any: a function once it is looked up on the class

    @functools.wraps(plain)
    def __init__(self: Any, *unnamed: object, **named: object) -> None:  # noqa: N807  # it becomes the class's own
        if unnamed:
            first = dataclasses.fields(self)[0].name
            raise UnknownSettingError(f"{kind.__name__} takes its settings by name, {kind.__name__}({first}=...) say")
        check_settings(kind, named)
        plain(self, **named)

    kind.__init__ = __init__  # type: ignore[method-assign]  # the same signature, with a better message
    kind.__doc__ = "\n".join([kind.__doc__ or "", "", "Settings, given by name:", "", *_documented(kind)])
    _classes.append(kind)
    return kind


def check_settings(kind: type[Any], names: Iterable[str]) -> None:
    """Raises UnknownSettingError for a name that is no setting of the class."""
    check_names(names, [item.name for item in dataclasses.fields(kind)])


def check_names(
    names: Iterable[str], known: Sequence[str], *, written: Callable[[str], str] = str, listing: str | None = None
) -> None:
    """Raises UnknownSettingError, with the name that was probably meant, for one that is not among the known ones.

    `written` spells a name as it is given there, as a flag say; `listing` stands for the list of all of them.
    """
    for name in names:
        if name not in known:
            message = f"there is no setting {shortened(written(name))} here; "
            message += _meant(name, known, written) or listing or f"known are {', '.join(map(written, known))}"
            raise UnknownSettingError(message, param=name)


def nearest(wanted: object, known: Iterable[object], likeness: float = 0.6) -> str | None:
    """The known name that was probably meant: the most similar one (difflib's ratio), or one that contains it."""
    names = [str(name) for name in known]
    if not isinstance(wanted, str) or not wanted.strip() or len(wanted) > _LONGEST_NAME:
        return None
    lowered = wanted.strip().lower()
    close = difflib.get_close_matches(lowered, [name.lower() for name in names], n=1, cutoff=likeness)
    found = close[0] if close else next((name.lower() for name in names if len(lowered) > 2 and lowered in name), None)
    return next((name for name in names if name.lower() == found), None)


def check_types(config: Any) -> None:  # Any: an instance of a settings class, in its __post_init__
    """Converts each setting to its type: lists to tuples, numpy's numbers to Python's. Raises ConfigError."""
    kind: Any = type(config)  # Any: mypy takes no class for hashable
    for name, hint in _hints(kind).items():
        value = getattr(config, name)
        checked = checked_value(hint, value, name)
        if checked is not value:
            object.__setattr__(config, name, checked)


def checked_value(hint: Any, value: object, where: str) -> Any:  # Any: a type hint in, a value of that type out
    """The value in the setting's type, such as a float for a whole number. Raises ConfigError for any other value."""
    allowed = _allowed(hint)
    for kind in allowed:
        found = _as(kind, value, where)
        if found is not None:
            return found[0]
    raise ConfigError(f"{where} is {shortened(value)}; {_wanted(allowed, value)}", param=where)


def read_text(hint: Any, text: str, name: str) -> Any:  # Any: as with `checked_value`
    """The value that a flag or an environment variable gives as text. Raises ConfigError, as `checked_value` does."""
    allowed = _allowed(hint)
    value: object = text
    if bool in allowed:
        value = _SWITCHES.get(text.strip().lower(), text)
    elif int in allowed or float in allowed:
        value = _number(text)
    return checked_value(hint, value, name)


@contextmanager
def located(where: str) -> Iterator[None]:
    """Puts `where`, the file and its section, before the message of every ConfigError that is raised inside."""
    try:
        yield
    except ConfigError as error:
        raise type(error)(f"{where}: {error}", param=error.param) from error


def read_toml(path: Path, known: Sequence[str], what: str) -> Table:
    """The top level of a TOML file. `what` is the file's name in messages.

    Raises: ConfigError where it cannot be read, is not TOML, or has a key that is not known.
    """
    try:
        found: Table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {' '.join(str(error).split())}") from error
    with located(str(path)):
        check_names(found, known)
    return found


def read_section(kind: type[Any], table: object, where: str) -> Table:
    """A section's settings, each of them known and of its type. Raises ConfigError."""
    found = require_table(table, where)
    hints = typing.get_type_hints(kind)
    with located(where):
        check_settings(kind, found)
        return {name: checked_value(hints[name], value, name) for name, value in found.items()}


def require_table(value: object, where: str) -> Table:
    """A section. Raises ConfigError for anything else."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {shortened(value)}; it must be a section of settings")
    return value


def check_kinds(**given: tuple[object, type[Any]]) -> None:
    """Raises ConfigError for an argument that is neither None nor of its class, with an expression that makes one."""
    for name, (value, kind) in given.items():
        if value is not None and not isinstance(value, kind):
            example = _MAKERS.get(kind.__name__, f"{kind.__name__}(...)")
            raise ConfigError(f"{name} is {shortened(value)}; it must be a {kind.__name__}, {example} say")


def require(holds: bool, name: str, value: object, range_text: str) -> None:
    """Raises ConfigError where a setting is out of its range."""
    if not holds:
        raise ConfigError(f"{name} is {shortened(value)}; it must be {range_text}", param=name)


def typed_text(text: str) -> str:
    r"""Text as it was typed on a command line: `\n` and `\t` become newline and tab, `\\n` stays a literal `\n`.

    Applied once: by the flag's own type or, for templates, where settings become an InputForm
    (`softprompt.data.columns`), so that templates from TOML files and from Python are read alike.
    """
    return _TYPED_ESCAPE.sub(lambda match: "\\" + match[2] if match[1] else _ESCAPES[match[2]], text)


def _documented(kind: type[Any]) -> list[str]:
    lines = []
    for item in dataclasses.fields(kind):
        default = "" if item.default is dataclasses.MISSING else f" = {item.default!r}"
        meaning = _FLAG.sub(lambda match: match[1].replace("-", "_"), item.metadata["help"])
        lines += [f"{item.name}: {item.type}{default}", f"    {meaning}"]
    return lines


def _meant(name: str, known: Sequence[str], written: Callable[[str], str]) -> str | None:
    elsewhere = next((ours for ours in _ELSEWHERE.get(name, ()) if ours in known), None)
    if elsewhere is not None:
        return f"did you mean {written(elsewhere)!r}?"
    for ours in (name, *_ELSEWHERE.get(name, ())):
        owner = next((other for other in _classes if ours in other.__dataclass_fields__), None)
        if owner is not None:
            return f"{written(ours)} is a setting of {owner.__name__}"
    near = nearest(name, known)
    return f"did you mean {written(near)!r}?" if near is not None else None


def _number(text: str) -> object:
    """The number that a text is, or the text where it is none."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@functools.cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {item.name: hints[item.name] for item in dataclasses.fields(kind)}


@functools.cache
def _allowed(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type hint."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(kind for part in typing.get_args(hint) for kind in _allowed(part))
    return (hint,)


def _as(kind: Any, value: Any, where: str) -> tuple[Any] | None:  # Any: whatever was given
    """The value in this type, wrapped in a tuple; None if it is of another type."""
    if kind is type(None):
        return (None,) if value is None else None
    if typing.get_origin(kind) is Literal:
        return (value,) if isinstance(value, str) and value in typing.get_args(kind) else None
    if typing.get_origin(kind) is tuple:
        return _as_tuple(typing.get_args(kind), value, where)
    if isinstance(value, bool) or kind is bool:
        return (value,) if isinstance(value, bool) and kind is bool else None
    if kind is int and isinstance(value, Integral):
        whole = operator.index(value)
        require(-_LARGEST_WHOLE < whole < _LARGEST_WHOLE, where, value, "a whole number of 63 bits at most")
        return (whole,)
    if kind is float and isinstance(value, Real):
        return _as_float(value)
    return _as_text(value, where) if kind is str else None


def _as_float(value: Real) -> tuple[float] | None:
    try:
        return (float(value),)
    except OverflowError:
        return None


def _as_text(value: object, where: str) -> tuple[str] | None:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where} holds half of a surrogate pair, which is no text", param=where) from None
    return (text,)


def _as_tuple(inner: tuple[Any, ...], value: Any, where: str) -> tuple[Any] | None:  # Any: as with `_as`
    if isinstance(value, Mapping):
        value = tuple(value.items())
    if not isinstance(value, (list, tuple)):
        return None
    if inner[-1] is ...:
        return (tuple(checked_value(inner[0], item, f"{where}[{index}]") for index, item in enumerate(value)),)
    if len(value) != len(inner):
        return None
    return (tuple(checked_value(kind, item, where) for kind, item in zip(inner, value, strict=True)),)


def _wanted(allowed: Sequence[Any], value: object) -> str:
    """The part of a message that says which values are allowed, with the one that was probably meant."""
    choices = [choice for kind in allowed if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
    lists = [kind for kind in allowed if typing.get_origin(kind) is tuple]
    if lists:
        example = f", [{value!r}] say" if isinstance(value, str) and len(value) < 30 else ""
        return f"it must be a list{example}"
    names = [_TYPE_NAMES[kind] for kind in allowed if kind in _TYPE_NAMES]
    if choices:
        names.append(f"one of {', '.join(map(repr, choices))}")
    near = nearest(value, choices)
    hint = f"did you mean {near!r}? " if near is not None else ""
    return f"{hint}it must be {' or '.join(names)}"
