"""The command line. A command's module is imported when the command runs, so `softprompt --help` loads no torch."""

from __future__ import annotations

import atexit
import difflib
import gc
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
    "sweep": ("softprompt.cli.sweep", "Train many prompts together, for one task or several, from a sweep file."),
    "generate": ("softprompt.cli.generate", "Answer texts with a soft prompt, or with the bare base."),
    "predict": ("softprompt.cli.predict", "Answer a file of rows: a label with its confidence for each, or a text."),
    "serve": (
        "softprompt.cli.serve",
        "Serve a base and its prompts over OpenAI's API, and train new ones at the same time.",
    ),
    "prompts": ("softprompt.cli.prompts", "List, show, check, import, export, remove, push or pull prompts."),
    "runs": ("softprompt.cli.runs", "List training runs, or show one with its curves."),
    "keys": ("softprompt.cli.keys", "Create, list or revoke API keys of the server."),
    "info": ("softprompt.cli.info", "Show versions, this machine, the cache and the measured matrix kernels."),
    "demo": (
        "softprompt.cli.demo",
        "Train three prompts on the embedded base, and compare before and after.",
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
    """Run a command. A user's mistake is reported in one line, with exit code 2; Ctrl-C exits with 130."""
    atexit.register(gc.freeze)  # at its end Python collects garbage, a second long among the objects of a base
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
    """Exit without the interpreter's shutdown, in which threads of torch's collectives have aborted."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _run() -> int:
    try:
        _refuse_broken_text(sys.argv[1:])
        code = commands(standalone_mode=False)  # the code of a command's Exit; None where it just ended
        sys.stdout.flush()  # here, where a closed pipe can still be caught
    except click.exceptions.NoArgsIsHelpError as asked:
        asked.show()
        return 2
    except click.ClickException as error:
        return _refuse(error.format_message())
    except SoftpromptError as error:
        return _refuse(str(error))
    except BrokenPipeError:
        return _end_quietly()
    except OSError as error:
        return _refuse(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except (KeyboardInterrupt, click.Abort) as stop:
        if isinstance(stop.__cause__, EOFError):  # which click takes for Ctrl-D
            return _refuse(f"a file or the input ended too early ({stop.__cause__ or 'EOFError'})")
        _print("interrupted")
        return 130
    return code if isinstance(code, int) else 0


def _refuse(message: str) -> int:
    """Where a launcher has started several processes, which all fail alike, only the first one prints."""
    if may_report_errors():
        _print(message)
    return 2


def _print(message: str) -> None:
    click.echo(f"softprompt: {' '.join(message.splitlines())}", err=True)


def _refuse_broken_text(arguments: list[str]) -> None:
    """Bytes of a command line that are not UTF-8 arrive as lone surrogates, which no tokenizer accepts."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise click.UsageError(f"{os.fsencode(argument)!r} is not UTF-8") from None


def _end_quietly() -> int:
    """The reader of our pipe, such as `head`, has closed it: no error, and nothing left to write."""
    with suppress(OSError, ValueError):  # a stdout that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _escape_what_streams_cannot_encode() -> None:
    r"""Write `\u65e5` where stdout or stderr cannot encode a character, as in cp1252, so that no report is cut off."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _quieten() -> None:
    """Keep other libraries' messages off the terminal, unless the user has set them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
