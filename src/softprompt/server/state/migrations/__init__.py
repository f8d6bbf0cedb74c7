"""Brings a database to the tables of this release, in one transaction: afterwards all is new, or all is as it was."""

from __future__ import annotations

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect, text

from softprompt.errors import DatabaseError
from softprompt.server.state.schema import Table

_TURN = 7_364_928_115_340_021  # PostgreSQL's lock of that number: processes that start together migrate in turn


def migrate(engine: Engine) -> None:
    """Run the migrations that a database lacks. Raises DatabaseError for one of a newer release, or of others."""
    config = Config()
    config.set_main_option("script_location", "softprompt.server.state:migrations")
    with engine.begin() as connection:  # SQLite: with the right to write, which one process has at a time
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:turn)"), {"turn": _TURN})
        script = ScriptDirectory.from_config(config)
        present = MigrationContext.configure(connection).get_current_heads()
        if present != tuple(script.get_heads()):
            _check(connection, present, script)
            config.attributes["connection"] = connection  # what migrations/env.py works on
            command.upgrade(config, "head")


def _check(connection: Connection, present: tuple[str, ...], script: ScriptDirectory) -> None:
    where = connection.engine.url.render_as_string()
    known = {each.revision for each in script.walk_revisions()}
    for revision in present:
        if revision not in known:
            raise DatabaseError(f"the database {where} is of a newer release of softprompt (its tables are "
                                f"revision {revision!r}); use that release, or another database")  # fmt: skip
    ours = set(Table.metadata.tables) & set(inspect(connection).get_table_names())
    if ours and not present:
        raise DatabaseError(f"the database {where} has tables of these names that softprompt did not make "
                            f"({', '.join(sorted(ours))}); give one of its own")  # fmt: skip
