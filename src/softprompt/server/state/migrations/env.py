"""What alembic runs: the migrations, on the connection and in the transaction that `migrate` has begun."""

from __future__ import annotations

from alembic import context

from softprompt.server.state.schema import Table

context.configure(connection=context.config.attributes["connection"], target_metadata=Table.metadata)
with context.begin_transaction():  # ours, which stays open
    context.run_migrations()
