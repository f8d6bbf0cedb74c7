"""What every command of ours adds to click's: help in sections with examples, and all that is missing at once.

No torch here, nor in any module of a command: what computes is imported inside the function that runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import click

from softprompt.cli.options import TypedText

Sections = Mapping[str, type[Any] | Sequence[str]]  # title -> a config, or names of parameters
Lacking = Callable[[Collection[str]], Sequence[str]]  # names of the parameters given -> what is needed beside them


class Command(click.Command):
    """A command whose flags are listed in `sections`, the rest behind them, with `examples` at the end.

    `lacking` names what is required in some cases only, as it is to be shown.
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
        if self._lacking is not None and not ctx.resilient_parsing:
            error = self._missing(ctx, given)
            if error is not None:
                raise error
        return rest

    def _missing(self, ctx: click.Context, args: list[str]) -> click.UsageError | None:
        """About everything that is required and not given; None where nothing is."""
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
    """A command with commands of ours under it."""

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
    """`Missing argument 'NAME', option '--library'.` of what kind and name each is."""
    kinds = {kind for kind, _ in lacking}
    if len(kinds) > 1:
        return f"Missing {', '.join(f'{kind} {name}' for kind, name in lacking)}."
    (kind,) = kinds
    *before, last = [name for _, name in lacking]
    listed = f"{', '.join(before)} and {last}" if before else last
    return f"Missing {kind}{'s' if before else ''} {listed}."
