"""The command line. Commands are found by name and imported when they run: `softprompt --help` loads no torch."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
import warnings
from contextlib import suppress

import click

from softprompt.errors import SoftpromptError
from softprompt.launch.processes import may_report_errors, world_size

_COMMANDS = {
    "train": ("softprompt.cli.train", "Train a soft prompt on a frozen base."),
    "compare": (
        "softprompt.cli.compare",
        "Answer the same inputs with the bare base and each prompt; held-out figures.",
    ),
    "sweep": ("softprompt.cli.sweep", "Train many prompts together, of one task or several, as a file says."),
    "generate": ("softprompt.cli.generate", "Answer texts, with a soft prompt or bare."),
    "serve": ("softprompt.cli.serve", "Serve a base and its prompts over OpenAI's API, and train new ones meanwhile."),
    "prompts": ("softprompt.cli.prompts", "List, show, check, import, export, remove, push or pull prompts."),
    "runs": ("softprompt.cli.runs", "List training runs, or show one with its curves."),
    "keys": ("softprompt.cli.keys", "Create, list or revoke API keys of the server."),
    "demo": (
        "softprompt.cli.demo",
        "The main job on the embedded base: train three prompts, compare before and after.",
    ),
}


class _Commands(click.Group):
    """Loads a command's module only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(_COMMANDS[cmd_name][0]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if not args[0].startswith("-") and args[0] not in _COMMANDS:
            close = difflib.get_close_matches(args[0], _COMMANDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(_COMMANDS)}"
            ctx.fail(f"no such command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="softprompt")
def commands() -> None:
    """Train, compare and keep soft prompts for a frozen language model."""


def main() -> None:
    """Run a command. What a user did wrong is one line and exit code 2; Ctrl-C is 130."""
    _quieten()
    _escape_what_streams_cannot_encode()
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        code = _run()
        if world_size() > 1:
            _leave_at_once(code)
        sys.exit(code)


def _leave_at_once(code: int) -> None:
    """Without tearing the interpreter down, in which threads of the processes' collectives have been seen to abort."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _run() -> int:
    try:
        _refuse_broken_text(sys.argv[1:])
        code = commands(standalone_mode=False)  # what a command's Exit says; None where it just ended
        sys.stdout.flush()  # here, where a closed pipe can still be caught
    except click.exceptions.NoArgsIsHelpError as asked:
        asked.show()
        return 2
    except click.ClickException as error:
        return _refused(error.format_message())
    except SoftpromptError as error:
        return _refused(str(error))
    except BrokenPipeError:
        return _reader_left()
    except OSError as error:
        return _refused(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except (KeyboardInterrupt, click.Abort) as stop:
        if isinstance(stop.__cause__, EOFError):  # which click takes for Ctrl-D
            return _refused(f"a file or the input ended too early ({stop.__cause__ or 'EOFError'})")
        _say("interrupted")
        return 130
    return code if isinstance(code, int) else 0


def _refused(message: str) -> int:
    """Of several processes that a launcher has started, which all refuse alike, the first one speaks."""
    if may_report_errors():
        _say(message)
    return 2


def _say(message: str) -> None:
    click.echo(f"softprompt: {' '.join(message.splitlines())}", err=True)


def _refuse_broken_text(arguments: list[str]) -> None:
    """Bytes of a command line that are no text arrive as lone surrogates, which no tokenizer takes."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise click.UsageError(f"{os.fsencode(argument)!r} is not UTF-8") from None


def _reader_left() -> int:
    """The other end of our pipe, `head` say, has read enough: nothing to complain of, nothing left to write."""
    with suppress(OSError, ValueError):  # a stdout that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _escape_what_streams_cannot_encode() -> None:
    r"""Write `\u65e5` where stdout or stderr has no such character, as in cp1252: a report never ends in mid-table."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _quieten() -> None:
    """Other libraries' chatter stays off the terminal, unless the user set it so."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
