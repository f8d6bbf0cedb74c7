"""Which prompt a name means, for whom, and keeping it. Reading is a look into a table and never waits."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import replace

from softprompt.errors import shortened
from softprompt.prompt import SoftPrompt
from softprompt.server.clients.client import OPERATOR, Client
from softprompt.server.clients.quotas import Amounts
from softprompt.server.errors import ApiError
from softprompt.server.prompts.model import BASE_ALIAS, LIBRARY, Alias, Model
from softprompt.server.prompts.names import Names, taken, unknown
from softprompt.server.prompts.repository import LibraryFlags, PromptRepository

__all__ = ["BASE_ALIAS", "Alias", "Model", "PromptRegistry"]

_log = logging.getLogger(__name__)


class PromptRegistry:
    """All models. Each client sees its own and the shared ones; its own come first.

    `resolve`, `find`, `models` and `aliases` never wait. What changes something writes to the disk first, where there
    is a repository to write to, and may wait for another change: not for an event loop's thread.
    """

    def __init__(self, base_name: str, repository: PromptRepository | None = None) -> None:
        """Without a `repository` nothing outlives the process."""
        self.base = Model(id=base_name, source="base")
        self.problems: dict[str, str] = {}  # kept prompts that cannot be served, by name
        self._repository = repository
        self._names = Names(self.base)
        self._flags: dict[str, LibraryFlags] = {}  # of the library's prompts
        self._pinned: dict[tuple[str, str], Model] = {}
        self._lock = threading.RLock()  # for changes

    def load(self) -> None:
        """Serve what was kept. A broken prompt is set aside and stands in `problems`."""
        if self._repository is None:
            return
        loaded = self._repository.load()
        self.problems, self._flags = loaded.problems, loaded.flags
        for model in loaded.models:
            try:
                self.put(model)
            except ApiError as error:  # the base is called so now, say
                self.problems[model.id] = error.message
        for alias in loaded.aliases:
            self._names.put_alias(alias)
        _log.info("%d prompts and %d aliases were kept", len(loaded.models), len(loaded.aliases))

    # -- looking up

    def resolve(self, name: str, client: Client, user: str | None = None) -> Model:
        """The model that `name` means for this client now; where an alias shares requests out, `user` stays with one.

        `alias` of the result says that it was asked for by one. Raises ApiError 404 with the nearest names it sees.
        """
        return self._names.resolve(name, client, user)

    def find(self, name: str, client: Client) -> Model:
        """The prompt of that very name, aliases apart. Raises ApiError 404."""
        found = self._names.prompt(name, client.id)
        if found is not None:
            return found
        meant = self._names.resolve(name, client)
        raise unknown(f"{name!r} is an alias, of {meant.id!r} for one; ask for that, or for /v1/aliases")

    def models(self, client: Client) -> list[Model]:
        """All that the client may use, the base first."""
        return self._names.models(client)

    def aliases(self, client: Client) -> list[Alias]:
        """All other names that the client may use."""
        return self._names.aliases(client)

    def alias_names(self, client: Client) -> dict[tuple[str, str], list[str]]:
        """What else the client may call each prompt, by its owner and name."""
        found: dict[tuple[str, str], list[str]] = {}
        for alias in self.aliases(client):
            meant = [self._names.prompt(target.model, alias.owner) for target in alias.targets]
            for model in meant:
                if model is not None:
                    found.setdefault((model.owner, model.id), []).append(alias.name)
        return found

    def pinned(self) -> list[Model]:
        """The prompts of everybody whose keys and values shall stay."""
        return list(self._pinned.copy().values())

    def everything(self) -> Iterable[Model]:
        """Every prompt of everybody, the base apart."""
        return self._names.everything()

    def amounts(self, owner: str) -> Amounts:
        """What is kept for a client; the library is nobody's."""
        kept = [each.prompt for each in self._names.owned(owner) if each.source != LIBRARY and each.prompt is not None]
        return Amounts(prompts=len(kept), aliases=self._names.num_aliases(owner),
                       num_bytes=sum(prompt.num_bytes for prompt in kept))  # fmt: skip

    def more(self, name: str, owner: str, prompt: SoftPrompt | None = None) -> Amounts:
        """What a client's amounts grow by with a prompt of that name, which may replace one of its own."""
        there = self._names.own(name, owner)
        old = None if there is None else there.prompt
        num_bytes = (0 if prompt is None else prompt.num_bytes) - (0 if old is None else old.num_bytes)
        return Amounts(prompts=1 if old is None else 0, num_bytes=max(0, num_bytes))

    # -- prompts

    def put(self, model: Model) -> None:
        """Serve a prompt from now on, in memory only; it replaces what its owner had under that name.

        Raises ApiError 409 where the name means something else.
        """
        with self._lock:
            self._names.check_free(model)
            self._names.put(model)
            self._follow_pin(model)

    def remove(self, name: str, owner: str) -> None:
        """Serve it no longer; what is on the disk stays. One that is not there is let be."""
        with self._lock:
            self._names.remove(name, owner)
            self._pinned.pop((owner, name), None)

    def keep(
        self,
        prompt: SoftPrompt,
        *,
        name: str,
        owner: str,
        source: str,
        job: str | None = None,
        is_shared: bool = False,
        overwrite: bool = True,
    ) -> Model:
        """Write a prompt to the disk and serve it: all or nothing. It replaces its owner's of that name.

        Raises ApiError 409 where the name means something else, or, without `overwrite`, a prompt of the owner's;
        StorageError.
        """
        model = Model(id=name, prompt=prompt, owner=owner, source=source, job=job, is_shared=is_shared)
        self.check_free(model, overwrite)
        if self._repository is None:
            self.put(model)
            return model
        folder = self._repository.write(model)
        try:
            with self._lock:
                self.check_free(model, overwrite)
                model = self._as_before(model)
                folder_before = self._repository.enter(model, folder)
                self.put(model)
                self.problems.pop(name, None)
        except BaseException:
            self._repository.discard(folder)
            raise
        self._repository.discard(folder_before)
        return model

    def check_free(self, model: Model, overwrite: bool) -> None:
        """A prompt may be kept under its name. Raises ApiError 409."""
        self._names.check_free(model)
        there = self._names.own(model.id, model.owner)
        if there is not None and there.source == LIBRARY:
            raise taken(f"{model.id!r} is a prompt of the library; choose another name, or replace its folder")
        if there is not None and not overwrite:
            raise taken(f"you have a prompt {model.id!r} already; set overwrite to replace it, or choose another name")

    def forget(self, name: str, owner: str) -> None:
        """Serve a kept prompt no longer, and delete it. One that is not there is let be."""
        with self._lock:
            folder = None if self._repository is None else self._repository.take_out(name, owner)
            self.remove(name, owner)
        if self._repository is not None:
            self._repository.discard(folder)

    def delete(self, model: Model) -> None:
        """`forget` for a client; the checkpoints of a job's prompt go with it.

        Raises ApiError 409 where an alias of its owner's points to one of them.
        """
        with self._lock:
            going = [model, *self._checkpoints(model)]
            for each in going:
                self._refuse_aliased(each)
            for each in going:
                self.forget(each.id, each.owner)

    def _checkpoints(self, model: Model) -> list[Model]:
        if model.source != "job" or model.job is None:
            return []
        return [
            each for each in self._names.everything()
            if each.source == "checkpoint" and (each.job, each.owner) == (model.job, model.owner)
        ]  # fmt: skip

    def change(
        self, model: Model, *, name: str | None = None, is_pinned: bool | None = None, is_shared: bool | None = None
    ) -> Model:
        """Rename, pin or share a prompt. Raises ApiError 404 where it has just gone, 409 where that cannot be."""
        with self._lock:
            now = self._names.own(model.id, model.owner)
            if now is None:
                raise unknown(f"there is no model {model.id!r} any more")
            changed = replace(
                now,
                id=now.id if name is None else name,
                is_pinned=now.is_pinned if is_pinned is None else is_pinned,
                is_shared=now.is_shared if is_shared is None else is_shared,
            )
            self._check_change(now, changed)
            self._write_down(changed, now.id)
            self.put(changed)
            if changed.id != now.id:
                self.remove(now.id, now.owner)
        return changed

    # -- the library's

    def put_from_library(self, model: Model) -> None:
        """Serve a prompt of the library, pinned as it was before. Raises ApiError 409 where the name is taken."""
        with self._lock:
            there = self._names.own(model.id, model.owner)
            if there is not None and there.source != LIBRARY:
                raise taken(f"{model.id!r} is the name of another prompt already")
            self.put(replace(model, is_pinned=self._note(model.id).is_pinned))

    def is_unloaded(self, name: str) -> bool:
        """Whether an operator has taken a library's prompt out of service."""
        return self._note(name).is_unloaded

    def unload(self, model: Model) -> None:
        """Serve a library's prompt no longer, also after a restart, until it is loaded again; its folder stays."""
        with self._lock:
            self._refuse_aliased(model)
            self._write_note(model, LibraryFlags(model.is_pinned, True))
            self.remove(model.id, model.owner)

    def allow(self, name: str) -> None:
        """The library's prompt may be served again."""
        with self._lock:
            if self.is_unloaded(name):
                self._write_note(Model(id=name), LibraryFlags(self._note(name).is_pinned, False))

    # -- aliases

    def put_alias(self, alias: Alias) -> None:
        """Another name, or another meaning of it, from one moment to the next. Raises ApiError 400 or 409."""
        with self._lock:
            if self._names.is_base(alias.name):
                raise taken(f"{alias.name!r} means the base; choose another name")
            self._names.check_free_alias(alias)
            for target in alias.targets:
                self._check_target(target.model, alias.owner)
            if self._repository is not None:
                self._repository.put_alias(alias)
            self._names.put_alias(alias)

    def remove_alias(self, name: str, owner: str) -> None:
        """The owner's alias is none any more. Raises ApiError 404 where it has none of that name."""
        with self._lock:
            if self._names.alias(name, owner) is None:
                raise unknown(f"you have no alias {shortened(name, 100)}")
            if self._repository is not None:
                self._repository.remove_alias(name, owner)
            self._names.remove_alias(name, owner)

    def own_alias(self, name: str, owner: str) -> Alias | None:
        """The owner's alias of that name."""
        return self._names.alias(name, owner)

    # -- parts of these

    def _as_before(self, model: Model) -> Model:
        """A prompt that replaces another stays pinned."""
        there = self._names.own(model.id, model.owner)
        return model if there is None else replace(model, is_pinned=there.is_pinned)

    def _check_change(self, now: Model, changed: Model) -> None:
        if now.source == LIBRARY and (changed.id != now.id or not changed.is_shared):
            raise ApiError(409, f"{now.id!r} is its folder's name in the library, for everybody; rename or move that")
        if changed.id != now.id:
            self.check_free(changed, overwrite=False)
            self._refuse_aliased(now)
        self._names.check_free(changed)

    def _refuse_aliased(self, model: Model) -> None:
        aliases = self._names.aliases_to(model)
        if aliases:
            raise ApiError(409, f"the alias {aliases[0]!r} points to {model.id!r}; point it elsewhere first", "in_use")

    def _check_target(self, name: str, owner: str) -> None:
        if self._names.prompt(name, owner) is not None:
            return
        meant = self._names.resolve(name, Client(owner))  # raises where there is nothing
        raise ApiError(400, f"{name!r} is an alias; point to a prompt, to {meant.id!r} say", "invalid_value", "model")

    def _write_down(self, model: Model, name: str) -> None:
        if model.source == LIBRARY:
            self._write_note(model, LibraryFlags(model.is_pinned, False))
        elif self._repository is not None:
            self._repository.change(model, name)

    def _note(self, name: str) -> LibraryFlags:
        return self._flags.get(name, LibraryFlags(False, False))

    def _write_note(self, model: Model, note: LibraryFlags) -> None:
        if self._repository is not None:
            self._repository.note(replace(model, owner=OPERATOR), note)
        self._flags[model.id] = note

    def _follow_pin(self, model: Model) -> None:
        if model.is_pinned:
            self._pinned[model.owner, model.id] = model
        else:
            self._pinned.pop((model.owner, model.id), None)
