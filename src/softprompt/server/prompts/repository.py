"""What outlives the process: prompts that are not the library's as adapter folders, and what is known of each as a row.

A prompt is there when its row is; a folder without a row is what a killed process left, and is never read.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from softprompt.base import Base
from softprompt.errors import SoftpromptError, StorageError
from softprompt.server.prompts.adapter_import import read_folder
from softprompt.server.prompts.model import LIBRARY, Alias, Model, Target
from softprompt.server.state.database import Database
from softprompt.server.state.schema import AliasRow, PromptRow
from softprompt.storage import save_prompt
from softprompt.storage.atomic import remove_folder

UNLOADED = "unloaded"  # the source of a row that keeps a library's prompt from being served
_log = logging.getLogger(__name__)


class LibraryFlags(NamedTuple):
    """What is known of a library's prompt beyond its folder."""

    is_pinned: bool
    is_unloaded: bool


class Loaded(NamedTuple):
    """All that was kept."""

    models: list[Model]
    aliases: list[Alias]
    flags: dict[str, LibraryFlags]  # of the library's prompts, by name
    problems: dict[str, str]  # of prompts that cannot be served, by name


class PromptRepository:
    """Prompts in `STATE/prompts/ID/` and their rows. Blocks on the disk; any thread may use it."""

    def __init__(self, state: Path, database: Database, base: Base) -> None:
        self._state = state
        self._database = database
        self._base = base

    def load(self) -> Loaded:
        """Everything that was kept; a prompt that is broken is set aside and named."""
        self._sweep()
        loaded = Loaded([], [], {}, {})
        with self._database.session() as session:
            rows = list(session.scalars(select(PromptRow).order_by(PromptRow.created, PromptRow.name)))
            loaded.aliases.extend(map(_alias_of, session.scalars(select(AliasRow))))
        for row in rows:
            if row.folder is None:
                loaded.flags[row.name] = LibraryFlags(row.is_pinned, row.source == UNLOADED)
                continue
            try:
                loaded.models.append(self._model_of(row, row.folder))
            except SoftpromptError as error:
                _log.warning("the prompt %r is set aside: %s", row.name, error)
                loaded.problems[row.name] = str(error)
        return loaded

    def write(self, model: Model) -> str:
        """Put a prompt into a folder of its own; nobody knows of it before `enter`. Its folder below the state."""
        assert model.prompt is not None
        folder = f"prompts/prompt-{uuid.uuid4().hex}"
        save_prompt(model.prompt, self._state / folder)
        return folder

    def enter(self, model: Model, folder: str) -> str | None:
        """From now on the folder is the prompt of that owner and name; the folder that was it before."""
        with self._database.session() as session:
            old = self._row(session, model.owner, model.id)
            replaced = None if old is None else old.folder
            if old is not None:
                session.delete(old)
                session.flush()
            session.add(_row_of(model, folder))
        return replaced

    def change(self, model: Model, name: str) -> None:
        """What is now known of a kept prompt, which was called `name`."""
        with self._database.session() as session:
            row = self._row(session, model.owner, name)
            if row is not None:
                row.name, row.is_pinned, row.is_shared = model.id, model.is_pinned, model.is_shared

    def take_out(self, name: str, owner: str) -> str | None:
        """Forget a prompt; the folder that was it."""
        with self._database.session() as session:
            row = self._row(session, owner, name)
            if row is None:
                return None
            session.delete(row)
            return row.folder

    def discard(self, folder: str | None) -> None:
        """Delete a folder that is nobody's any more. One that resists is left for another day."""
        if folder is None:
            return
        try:
            remove_folder(self._state / folder)
        except StorageError as error:
            _log.warning("a folder of no use could not be deleted: %s", error)

    def note(self, model: Model, note: LibraryFlags) -> None:
        """Remember something of a library's prompt."""
        with self._database.session() as session:
            old = self._row(session, model.owner, model.id)
            if old is not None:
                session.delete(old)
                session.flush()
            if note.is_pinned or note.is_unloaded:
                row = _row_of(model, None)
                row.is_pinned, row.source = note.is_pinned, UNLOADED if note.is_unloaded else LIBRARY
                session.add(row)

    def put_alias(self, alias: Alias) -> None:
        with self._database.session() as session:
            session.merge(_alias_row_of(alias))

    def remove_alias(self, name: str, owner: str) -> None:
        with self._database.session() as session:
            session.execute(delete(AliasRow).where(AliasRow.owner == owner, AliasRow.name == name))

    def _model_of(self, row: PromptRow, folder: str) -> Model:
        place = (self._state / folder).resolve()
        if not place.is_relative_to(self._state.resolve()):
            raise StorageError(f"the prompt's folder {folder!r} leads out of {self._state}")
        return Model(
            id=row.name,
            prompt=read_folder(place, self._base),
            owner=row.owner,
            source=row.source,
            job=row.job,
            is_shared=row.is_shared,
            is_pinned=row.is_pinned,
            created=row.created,
        )

    def _sweep(self) -> None:
        """Delete the temporaries of a killed process."""
        for left in self._hidden():
            self.discard(str(left.relative_to(self._state)))

    def _hidden(self) -> Iterator[Path]:
        folder = self._state / "prompts"
        if folder.is_dir():
            yield from (each for each in folder.iterdir() if each.is_dir() and each.name.startswith("."))

    @staticmethod
    def _row(session: Session, owner: str, name: str) -> PromptRow | None:
        return session.scalar(select(PromptRow).where(PromptRow.owner == owner, PromptRow.name == name))


def _row_of(model: Model, folder: str | None) -> PromptRow:
    return PromptRow(
        id=f"prompt-{uuid.uuid4().hex}" if folder is None else folder.rpartition("/")[2],
        owner=model.owner,
        name=model.id,
        folder=folder,
        source=model.source,
        job=model.job,
        is_shared=model.is_shared,
        is_pinned=model.is_pinned,
        created=model.created,
    )


def _alias_row_of(alias: Alias) -> AliasRow:
    targets = {"targets": [{"model": each.model, "share": each.share} for each in alias.targets]}
    return AliasRow(
        owner=alias.owner, name=alias.name, targets=targets, is_shared=alias.is_shared, created=alias.created
    )


def _alias_of(row: AliasRow) -> Alias:
    targets = tuple(Target(each["model"], each["share"]) for each in row.targets["targets"])
    return Alias(name=row.name, targets=targets, owner=row.owner, is_shared=row.is_shared, created=row.created)
