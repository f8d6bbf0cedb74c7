"""The command line. Commands are found by name and imported when they run: `softprompt --help` loads no torch."""

from __future__ import annotations

import importlib
import os
import sys

import click

from softprompt.errors import SoftpromptError

_COMMANDS = {
    "train": ("softprompt.cli.train", "Train a soft prompt on a frozen base."),
    "compare": (
        "softprompt.cli.compare",
        "Answer the same inputs with the bare base and each prompt; held-out figures.",
    ),
    "generate": ("softprompt.cli.generate", "Answer texts, with a soft prompt or bare."),
    "prompts": ("softprompt.cli.prompts", "List, show, check, import, export, remove, push or pull prompts."),
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
    try:
        commands(standalone_mode=False)
    except click.exceptions.Exit as ended:
        sys.exit(ended.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except SoftpromptError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except (KeyboardInterrupt, click.Abort):
        click.echo("softprompt: interrupted", err=True)
        sys.exit(130)


def _fail(message: str) -> None:
    click.echo(f"softprompt: {message}", err=True)
    sys.exit(2)


def _quieten() -> None:
    """Other libraries' chatter stays off the terminal, unless the user set it so."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
