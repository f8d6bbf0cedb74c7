"""What every command adds to click's: flags made from the fields of settings, so that a default and its meaning are
written once; help in sections with examples; and everything that is missing reported at once.

No torch here, nor in any module of a command: what computes is imported inside the function that runs.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, TypeVar

import click

from softprompt.settings import check_names, checked_value, read_text, require, typed_text

Function = TypeVar("Function", bound=Callable[..., Any])
ConfigT = TypeVar("ConfigT")
Sections = Mapping[str, type[Any] | Sequence[str]]  # title -> a config, or names of parameters
Lacking = Callable[
    [Collection[str]], Sequence[str]
]  # names of the given parameters -> the required ones that are missing


class TypedText(click.ParamType[str]):
    r"""Text as it is typed in a shell: `\n` and `\t` are a line break and a tab, `\\n` a backslash and an n."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return typed_text(value)


class Setting(click.ParamType[Any]):  # Any: of the setting's own type
    """A value from a flag, an environment variable or a TOML file, read and checked by `softprompt.settings`."""

    def __init__(self, hint: Any, *, least: int | None = None) -> None:  # Any: a type hint
        self.hint, self.name, self.least = hint, _KINDS[hint], least

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = _read(self.hint, value, param)
        require(self.least is None or found >= self.least, _name(param), found, f"at least {self.least}")
        return found


class Switch(click.types.BoolParamType):
    """True or false, read and checked like any setting."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        found: bool = _read(bool, value, param)
        return found


class OneOf(click.Choice[str]):
    """One of a closed set, read and checked like any setting."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        found: str = _read(Literal[tuple(self.choices)], value, param)
        return found


_KINDS = {int: "integer", float: "float", str: "text"}  # click's own names, for a command's help
TYPED_TEXT = TypedText()


def options_of(
    kind: type[Any], *, leave_out: Collection[str] = (), optional: bool = False
) -> Callable[[Function], Function]:
    """Adds a flag for each field of `kind` that may have one. `optional`: required fields become optional."""
    hints = typing.get_type_hints(kind)

    def decorate(function: Function) -> Function:
        for item in reversed(dataclasses.fields(kind)):
            if item.name not in leave_out and item.metadata.get("flag", True):
                function = _option(item, hints[item.name], optional)(function)
        return function

    return decorate


def config_of(kind: type[ConfigT], flags: Mapping[str, Any]) -> ConfigT:
    """The config made from its own flags; flags of other configs are ignored. Raises ConfigError."""
    names = {item.name for item in dataclasses.fields(kind)}  # type: ignore[arg-type]  # every ConfigT is a dataclass
    return kind(**{name: value for name, value in flags.items() if name in names})


def require_flags(flags: Mapping[str, Any], *names: str) -> None:
    """Raises click.UsageError for a missing flag, as click does, where it is required in some cases only."""
    for name in names:
        if flags[name] is None:
            raise click.UsageError(f"Missing option '--{name}'.")


def given_flags() -> set[str]:
    """Names of the flags that the user typed, without defaults."""
    context = click.get_current_context()
    commandline = click.core.ParameterSource.COMMANDLINE
    return {name for name in context.params if context.get_parameter_source(name) == commandline}


def _option(item: dataclasses.Field[Any], hint: Any, optional: bool) -> Callable[[Function], Function]:
    flag = _flag(item.name)
    text = item.metadata["help"]
    if item.default is dataclasses.MISSING:
        return click.option(flag, item.name, required=not optional, help=text, type=str)
    shown = item.default not in (None, (), False)
    if hint is bool:
        names = f"{flag}/--no-{flag[2:]}" if item.default else flag
        return click.option(names, item.name, default=item.default, is_flag=True, help=text, type=Switch())
    kind = TYPED_TEXT if item.metadata.get("typed") else _type_of(hint)
    multiple = typing.get_origin(hint) is tuple
    return click.option(
        flag, item.name, default=item.default, help=text, type=kind, show_default=shown, multiple=multiple
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _type_of(hint: Any) -> click.ParamType[Any]:  # Any: a type hint; what the flag's values are
    """The type of the flag of a setting, or of one of its values where it takes several."""
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind not in (type(None), ...)]
    if typing.get_origin(hint) is Literal:
        return OneOf(kinds)
    return Setting(kinds[0]) if kinds[0] in _KINDS else _type_of(kinds[0])


def _read(hint: Any, value: object, parameter: click.Parameter | None) -> Any:  # Any: as with `Setting`
    name = _name(parameter)
    return read_text(hint, value, name) if isinstance(value, str) else checked_value(hint, value, name)


def _name(parameter: click.Parameter | None) -> str:
    return str(parameter.name) if parameter is not None else "the value"


class Command(click.Command):
    """A command whose help lists flags in `sections`, then the remaining ones, then `examples`.

    `lacking` names missing parameters that are required in some cases only.
    """

    def __init__(
        self,
        *arguments: Any,
        sections: Sections | None = None,
        examples: Sequence[str] = (),
        lacking: Lacking | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(*arguments, **settings)
        self.sections = {title: _names(listed) for title, listed in (sections or {}).items()}
        self.examples = examples
        self._lacking = lacking

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        left = {item.name: item for item in self.get_params(ctx) if isinstance(item, click.Option)}
        for title, names in self.sections.items():
            _write_section(ctx, formatter, title, [left.pop(name) for name in names if name in left])
        _write_section(ctx, formatter, "Other options" if self.sections else "Options", list(left.values()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        if any(isinstance(item.type, TypedText) for item in self.get_params(ctx)):
            formatter.write_paragraph()
            formatter.write_text(
                r"In text that is typed here, \n is a line break and \t a tab; \\n a backslash and an n."
            )
        if self.examples:
            with formatter.section("Examples"):
                for line in "\n".join(self.examples).split("\n"):
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)
        try:
            rest = super().parse_args(ctx, args)
        except click.MissingParameter as first:
            raise self._missing(ctx, given) or first from None
        except click.NoSuchOption as unknown:
            flags = [flag for item in self.get_params(ctx) for flag in item.opts if flag.startswith("--")]
            names = [flag.lstrip("-").replace("-", "_") for flag in (unknown.option_name, *flags)]
            check_names(names[:1], names[1:], written=_flag, listing="--help lists them")
            raise
        if self._lacking is not None and not ctx.resilient_parsing:
            error = self._missing(ctx, given)
            if error is not None:
                raise error
        return rest

    def _missing(self, ctx: click.Context, args: list[str]) -> click.UsageError | None:
        """One error about all missing parameters; None if there are none."""
        found, _, _ = self.make_parser(ctx).parse_args(args)
        known = {item: item.consume_value(ctx, found) for item in self.get_params(ctx)}
        lacking = [
            (item.param_type_name, item.get_error_hint(ctx))
            for item, (value, _) in known.items()
            if item.required and item.value_is_missing(value)
        ]
        given = {
            str(item.name) for item, (_, source) in known.items() if source is not click.core.ParameterSource.DEFAULT
        }
        if self._lacking is not None:
            lacking += [("option", name) for name in self._lacking(given)]
        return click.UsageError(_missing_text(lacking), ctx) if lacking else None


class Group(click.Group):
    """A command with subcommands."""

    command_class = Command


def _names(listed: type[Any] | Sequence[str]) -> Sequence[str]:
    return [item.name for item in dataclasses.fields(listed)] if isinstance(listed, type) else listed


def _write_section(
    ctx: click.Context, formatter: click.HelpFormatter, title: str, options: Sequence[click.Option]
) -> None:
    records = [record for option in options if (record := option.get_help_record(ctx)) is not None]
    if records:
        with formatter.section(title):
            formatter.write_dl(records)


def _missing_text(lacking: Sequence[tuple[str, str]]) -> str:
    """Such as `Missing argument 'NAME', option '--library'.`, from the kind and name of each."""
    kinds = {kind for kind, _ in lacking}
    if len(kinds) > 1:
        return f"Missing {', '.join(f'{kind} {name}' for kind, name in lacking)}."
    (kind,) = kinds
    *before, last = [name for _, name in lacking]
    listed = f"{', '.join(before)} and {last}" if before else last
    return f"Missing {kind}{'s' if before else ''} {listed}."
