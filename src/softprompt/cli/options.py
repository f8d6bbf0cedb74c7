"""Command-line flags made from the fields of a config, so that a default and its meaning stand in one place."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, TypeVar, Union

import click

from softprompt.settings import make_config, nearest, typed_text

Function = TypeVar("Function", bound=Callable[..., Any])
ConfigT = TypeVar("ConfigT")


class TypedText(click.ParamType[str]):
    r"""Text as it is typed in a shell: `\n` and `\t` are a line break and a tab, `\\n` a backslash and an n."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return typed_text(value)


class NearChoice(click.Choice[str]):
    """One of a closed set; another value comes with the one that was probably meant."""

    def get_invalid_choice_message(self, value: str, ctx: click.Context | None) -> str:
        near = nearest(value, self.choices)
        said = super().get_invalid_choice_message(value, ctx)
        return said if near is None else f"{said} Did you mean {near!r}?"


TYPED_TEXT = TypedText()


def options_of(
    kind: type[Any], *, leave_out: Collection[str] = (), optional: bool = False
) -> Callable[[Function], Function]:
    """One flag per field of `kind` that may have one. `optional`: required fields become optional."""
    hints = typing.get_type_hints(kind)

    def decorate(function: Function) -> Function:
        for item in reversed(dataclasses.fields(kind)):
            if item.name not in leave_out and item.metadata.get("flag", True):
                function = _option(item, hints[item.name], optional)(function)
        return function

    return decorate


def config_of(kind: type[ConfigT], flags: Mapping[str, Any]) -> ConfigT:
    """The config that the flags say. Flags of other configs are left alone. Raises ConfigError."""
    names = {item.name for item in dataclasses.fields(kind)}  # type: ignore[arg-type]  # every ConfigT is a dataclass
    return make_config(kind, {name: value for name, value in flags.items() if name in names})


def require_flags(flags: Mapping[str, Any], *names: str) -> None:
    """What click does for a required flag, where it is required in some cases only. Raises click.UsageError."""
    for name in names:
        if flags[name] is None:
            raise click.UsageError(f"Missing option '--{name}'.")


def given_flags() -> set[str]:
    """Names of the flags that the user typed, as opposed to defaults."""
    context = click.get_current_context()
    commandline = click.core.ParameterSource.COMMANDLINE
    return {name for name in context.params if context.get_parameter_source(name) == commandline}


def _option(item: dataclasses.Field[Any], hint: Any, optional: bool) -> Callable[[Function], Function]:
    flag = "--" + item.name.replace("_", "-")
    text = item.metadata["help"]
    if item.default is dataclasses.MISSING:
        return click.option(flag, item.name, required=not optional, help=text, type=str)
    shown = item.default not in (None, (), False)
    if hint is bool:
        names = f"{flag}/--no-{flag[2:]}" if item.default else flag
        return click.option(names, item.name, default=item.default, is_flag=True, help=text)
    kind = TYPED_TEXT if item.metadata.get("typed") else _type_of(hint)
    multiple = typing.get_origin(hint) is tuple
    return click.option(
        flag, item.name, default=item.default, help=text, type=kind, show_default=shown, multiple=multiple
    )


def _type_of(hint: Any) -> Any:  # Any: a type hint in, a click type out
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _type_of(next(argument for argument in arguments if argument is not type(None)))
    if origin is Literal:
        return NearChoice(arguments)
    if origin is tuple:
        return _type_of(arguments[0])
    return hint
