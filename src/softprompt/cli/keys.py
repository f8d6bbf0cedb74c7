"""softprompt keys"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.command import Group, Setting, config_of, options_of
from softprompt.cli.console import print_json, print_table, say
from softprompt.cli.serve_settings import ENVIRONMENT
from softprompt.config import ServerConfig
from softprompt.errors import MissingDependencyError

if TYPE_CHECKING:
    from softprompt.server.clients.keys import Key
    from softprompt.server.state.database import Database

_PLACE = ("state", "database")
_LIMITS = {
    "requests_per_minute": "Requests of any kind per minute; default as the server says.",
    "tokens_per_minute": "Tokens per minute, read and written; likewise.",
    "max_concurrent": "Generations that wait or run at once; likewise.",
    "max_jobs": "Fine-tuning jobs that wait or run; likewise.",
    "max_prompts": "Prompts that are kept, and as many aliases; likewise, and by default no limit with --admin.",
    "max_files": "Files that are kept; likewise.",
    "max_stored_bytes": "Bytes of files and prompts together; likewise.",
}
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _place(function: Callable[..., Any]) -> Callable[..., Any]:
    """Where the server's flags and environment say that its keys are."""
    others = {item.name for item in dataclasses.fields(ServerConfig)} - {*_PLACE}
    function = options_of(ServerConfig, leave_out=others)(function)
    for parameter in function.__click_params__:  # type: ignore[attr-defined]  # what click.option leaves there
        if parameter.name in _PLACE:
            parameter.envvar = f"{ENVIRONMENT}_{parameter.name.upper()}"
    return function


def _limits(function: Callable[..., Any]) -> Callable[..., Any]:
    for name, text in reversed(_LIMITS.items()):
        function = click.option(f"--{name.replace('_', '-')}", name, type=Setting(int, least=1), help=text)(function)
    return function


@click.group("keys", cls=Group)
def command() -> None:
    """Create, list or revoke API keys. A server that is running follows within two seconds."""


@command.command("create")
@click.argument("name")
@click.option("--admin", is_flag=True, help="A key that may also do what concerns all: prompts for everybody, say.")
@_limits
@_place
@_json
def create(name: str, admin: bool, as_json: bool, **flags: Any) -> None:
    """Make a key for NAME and print it, once: only its hash is kept.

    Its holder sees its own prompts, files and jobs, and what is shared. Limits that are not given are the server's.
    """
    with _database(flags) as database:
        from softprompt.server.clients.keys import Limits, create_key

        limits = Limits(**{name: flags[name] for name in _LIMITS})
        key, secret = create_key(database, name, is_admin=admin, limits=limits)
    if as_json:
        print_json({**dataclasses.asdict(key), "key": secret})
        return
    say(f"{key.id} for {key.name}; keep the key, it is shown this once:")
    click.echo(secret)


@command.command("list")
@_place
@_json
def list_all(as_json: bool, **flags: Any) -> None:
    """Every key, revoked ones too; of the key itself its first characters."""
    with _database(flags) as database:
        from softprompt.server.clients.keys import list_keys

        keys = list_keys(database)
    if as_json:
        print_json([dataclasses.asdict(key) for key in keys])
        return
    print_table(f"{len(keys)} key{'' if len(keys) == 1 else 's'}",
                ["id", "name", "key", "admin", "limits", "created", "state"], [_row(key) for key in keys])  # fmt: skip


@command.command("revoke")
@click.argument("key_id", metavar="ID")
@_place
@_json
def revoke(key_id: str, as_json: bool, **flags: Any) -> None:
    """Refuse a key from now on. What its holder made stays."""
    with _database(flags) as database:
        from softprompt.server.clients.keys import revoke_key

        key = revoke_key(database, key_id)
    if as_json:
        print_json(dataclasses.asdict(key))
        return
    say(f"{key.id} for {key.name} is revoked")


@contextmanager
def _database(flags: dict[str, Any]) -> Iterator[Database]:
    for package in ("sqlalchemy", "alembic", "fastapi"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(f"{package} is not installed; pip install 'softprompt[serve]'")
    from softprompt.server.state.database import Database

    place = {name: flags[name] for name in _PLACE}
    database = Database.of(config_of(ServerConfig, place))
    try:
        yield database
    finally:
        database.close()


def _row(key: Key) -> list[str]:
    limits = [f"{name} {value:,}" for name, value in dataclasses.asdict(key.limits).items() if value is not None]
    state = "valid" if key.revoked is None else f"revoked {_date(key.revoked)}"
    return [key.id, key.name, f"{key.beginning}...", "yes" if key.is_admin else "no", ", ".join(limits),
            _date(key.created), state]  # fmt: skip


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M")
