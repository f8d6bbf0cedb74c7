"""The prompt registry: which prompt or alias a name means, for whom, and the rules by which names are given.

Each client sees its own prompts and aliases and the shared ones; its own come first. Looking up never waits: every
change of one name is one assignment in one dictionary, and readers that go through a dictionary copy it first, in one
step of the interpreter. Changes take a lock and are written to the repository before they count, so they may wait for
the disk: never call one from the event loop's thread.
"""

from __future__ import annotations

import difflib
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace

from softprompt.errors import shortened
from softprompt.prompt import SoftPrompt
from softprompt.server.clients.keys import Client
from softprompt.server.clients.quotas import Amounts
from softprompt.server.errors import ApiError
from softprompt.server.prompts.model import BASE_ALIAS, LIBRARY, Alias, Model, by_share
from softprompt.server.prompts.repository import LibraryFlags, PromptRepository

_log = logging.getLogger(__name__)
_MOST_COMPARED = 128  # names, to find the nearest
_LONGEST_COMPARED = 256  # characters


class PromptRegistry:
    """Prompts by owner and name, the shared ones by name; aliases likewise."""

    def __init__(self, base_name: str, repository: PromptRepository) -> None:
        self.base = Model(id=base_name, source="base")
        self.problems: dict[str, str] = {}  # kept prompts that cannot be served, by name
        self._repository = repository
        self._own: dict[str, dict[str, Model]] = {}  # by owner and name
        self._shared: dict[str, Model] = {}
        self._own_aliases: dict[str, dict[str, Alias]] = {}
        self._shared_aliases: dict[str, Alias] = {}
        self._flags: dict[str, LibraryFlags] = {}  # of the library's prompts, by name
        self._lock = threading.RLock()  # for changes

    def load(self) -> None:
        """Serve what was kept. A broken prompt is set aside and named in `problems`."""
        kept = self._repository.load()
        self.problems, self._flags = kept.problems, kept.flags
        for model in kept.models:
            try:
                self.publish(model)
            except ApiError as error:  # the base now has this name, for example
                self.problems[model.id] = error.message
        for alias in kept.aliases:
            self._publish_alias(alias)
        _log.info("%d prompts and %d aliases were kept", len(kept.models), len(kept.aliases))

    def resolve(self, name: str, client: Client, user: str | None = None) -> Model:
        """The model that a request of this client means by `name`.

        An alias with shares draws one of its targets; requests with the same `user` always draw the same one, and the
        result's `alias` says which alias was asked for. Raises ApiError 404 with the nearest names the client sees.
        """
        found = self._own_prompt(name, client.id)
        if found is not None:
            return found
        alias = self.own_alias(name, client.id)
        if alias is None and name in self._shared:
            found = self._shared.get(name)
        if found is None:
            alias = alias or self._shared_aliases.get(name)
            found = None if alias is None else self._draw_target(alias, user)
        if found is None:
            raise self._unknown(name, client)
        return found

    def find(self, name: str, client: Client) -> Model:
        """The prompt of exactly that name, no alias. Raises ApiError 404."""
        found = self._prompt(name, client.id)
        if found is not None:
            return found
        target = self.resolve(name, client)
        raise unknown(f"{name!r} is an alias, of {target.id!r} for one; ask for that, or for /v1/aliases")

    def models(self, client: Client) -> list[Model]:
        """All that the client may use, the base first."""
        own = self._own.get(client.id, {}).copy()
        return [self.base, *own.values(), *(each for name, each in self._shared.copy().items() if name not in own)]

    def all_prompts(self) -> Iterator[Model]:
        """Every prompt of every owner, without the base."""
        for own in self._own.copy().values():
            yield from own.copy().values()

    def pinned(self) -> list[Model]:
        """Every owner's prompts whose keys and values stay in the engine's memory."""
        return [each for each in self.all_prompts() if each.is_pinned]

    def aliases(self, client: Client) -> list[Alias]:
        """All aliases that the client may use."""
        own = self._own_aliases.get(client.id, {}).copy()
        return [*own.values(), *(each for name, each in self._shared_aliases.copy().items() if name not in own)]

    def own_alias(self, name: str, owner: str) -> Alias | None:
        """The owner's alias of that name."""
        return self._own_aliases.get(owner, {}).get(name)

    def alias_names(self, client: Client) -> dict[tuple[str, str], list[str]]:
        """The aliases by which the client may call each prompt, by the prompt's owner and name."""
        found: dict[tuple[str, str], list[str]] = {}
        for alias in self.aliases(client):
            for target in alias.targets:
                model = self._prompt(target.model, alias.owner)
                if model is not None:
                    found.setdefault((model.owner, model.id), []).append(alias.name)
        return found

    def amounts(self, owner: str) -> Amounts:
        """What is kept for a client; the library belongs to no one."""
        own = list(self._own.get(owner, {}).copy().values())
        kept = [each.prompt for each in own if each.source != LIBRARY and each.prompt is not None]
        return Amounts(prompts=len(kept), aliases=len(self._own_aliases.get(owner, {})),
                       num_bytes=sum(prompt.num_bytes for prompt in kept))  # fmt: skip

    def growth(self, name: str, owner: str, prompt: SoftPrompt | None = None) -> Amounts:
        """What a client's amounts grow by with a prompt of that name, which may replace one of its own."""
        known = self._own_prompt(name, owner)
        old = None if known is None else known.prompt
        num_bytes = (0 if prompt is None else prompt.num_bytes) - (0 if old is None else old.num_bytes)
        return Amounts(prompts=1 if old is None else 0, num_bytes=max(0, num_bytes))

    def check_free(self, model: Model, *, overwrite: bool = True) -> None:
        """A prompt may have its name, replacing its owner's own of the same kind. Raises ApiError 409."""
        name = model.id
        if self._is_base(name):
            raise _taken(f"{name!r} means the base; choose another name")
        if self.own_alias(name, model.owner) is not None:
            raise _taken(f"{name!r} is an alias; choose another name, or delete the alias first")
        self._check_shared_name(model.id, model.owner, is_shared=model.is_shared)
        known = self._own_prompt(name, model.owner)
        if known is None:
            return
        if model.source == LIBRARY and known.source != LIBRARY:
            raise _taken(f"{name!r} is the name of another prompt already")
        if known.source == LIBRARY and model.source != LIBRARY:
            raise _taken(f"{name!r} is a prompt of the library; choose another name, or replace its folder")
        if not overwrite:
            raise _taken(f"you have a prompt {name!r} already; set overwrite to replace it, or choose another name")

    def publish(self, model: Model) -> None:
        """Serve a prompt that is on the disk already; one of the library is pinned as it was before.

        Raises ApiError 409 where the name means something else.
        """
        with self._lock:
            self.check_free(model)
            if model.source == LIBRARY:
                model = replace(model, is_pinned=self._library_flags(model.id).is_pinned)
            self._serve(model)

    def withdraw(self, name: str, owner: str) -> None:
        """Stop serving a prompt; what is on the disk stays. An unknown name changes nothing."""
        with self._lock:
            self._unshare(name, owner)
            self._own.get(owner, {}).pop(name, None)

    def keep(
        self, prompt: SoftPrompt, *, name: str, owner: str, source: str, job: str | None = None,
        is_shared: bool = False, overwrite: bool = True,
    ) -> Model:  # fmt: skip
        """Write a prompt to the disk and serve it: all or nothing. It replaces its owner's of that name, and stays
        pinned where that one was.

        Raises ApiError 409 where the name means something else or, without `overwrite`, a prompt of the owner's;
        StorageError.
        """
        model = Model(id=name, prompt=prompt, owner=owner, source=source, job=job, is_shared=is_shared)
        folder = self._repository.write(model)
        try:
            with self._lock:
                self.check_free(model, overwrite=overwrite)
                known = self._own_prompt(name, owner)
                model = model if known is None else replace(model, is_pinned=known.is_pinned)
                replaced_folder = self._repository.add(model, folder)
                self._serve(model)
                self.problems.pop(name, None)
        except BaseException:
            self._repository.discard(folder)
            raise
        self._repository.discard(replaced_folder)
        return model

    def forget(self, name: str, owner: str) -> None:
        """Stop serving a kept prompt, and delete it. An unknown name changes nothing."""
        with self._lock:
            folder = self._repository.remove(name, owner)
            self.withdraw(name, owner)
        self._repository.discard(folder)

    def delete(self, model: Model) -> None:
        """Forget a prompt as a client asks for it: with it go the checkpoints of the job that made it.

        Raises ApiError 409 where an alias of its owner's points to one of them.
        """
        with self._lock:
            doomed = [model, *self._checkpoints(model)]
            for each in doomed:
                self._check_not_aliased(each)
            for each in doomed:
                self.forget(each.id, each.owner)

    def change(
        self, model: Model, *, name: str | None = None, is_pinned: bool | None = None, is_shared: bool | None = None
    ) -> Model:
        """Rename, pin or share a prompt. Raises ApiError 404 where it is gone by now, 409 where that cannot be."""
        with self._lock:
            now = self._own_prompt(model.id, model.owner)
            if now is None:
                raise unknown(f"there is no model {model.id!r} any more")
            changed = replace(
                now,
                id=now.id if name is None else name,
                is_pinned=now.is_pinned if is_pinned is None else is_pinned,
                is_shared=now.is_shared if is_shared is None else is_shared,
            )
            self._check_change(now, changed)
            if now.source == LIBRARY:
                self._set_flags(now.id, LibraryFlags(changed.is_pinned, False))
            else:
                self._repository.update(changed, now.id)
            self._serve(changed)
            if changed.id != now.id:
                self.withdraw(now.id, now.owner)
        return changed

    def is_unloaded(self, name: str) -> bool:
        """Whether an admin has stopped serving a library's prompt."""
        return self._library_flags(name).is_unloaded

    def unload(self, model: Model) -> None:
        """Stop serving a library's prompt, also after a restart, until it is loaded again; its folder stays."""
        with self._lock:
            self._check_not_aliased(model)
            self._set_flags(model.id, LibraryFlags(model.is_pinned, True))
            self.withdraw(model.id, model.owner)

    def allow(self, name: str) -> None:
        """Let a library's prompt that was unloaded be served again."""
        with self._lock:
            if self.is_unloaded(name):
                self._set_flags(name, LibraryFlags(self._library_flags(name).is_pinned, False))

    def put_alias(self, alias: Alias) -> None:
        """Set an alias, or let it mean something else from the next request on. Raises ApiError 400, 404 or 409."""
        with self._lock:
            if self._is_base(alias.name):
                raise _taken(f"{alias.name!r} means the base; choose another name")
            if self._own_prompt(alias.name, alias.owner) is not None:
                raise _taken(f"{alias.name!r} is the name of a prompt; an alias needs a name of its own")
            self._check_shared_name(alias.name, alias.owner, is_shared=alias.is_shared)
            for target in alias.targets:
                self._check_target(target.model, alias.owner)
            self._repository.put_alias(alias)
            self._publish_alias(alias)

    def remove_alias(self, name: str, owner: str) -> None:
        """Delete the owner's alias. Raises ApiError 404 where it has none of that name."""
        with self._lock:
            if self.own_alias(name, owner) is None:
                raise unknown(f"you have no alias {shortened(name, 100)}")
            self._repository.remove_alias(name, owner)
            self._unshare_alias(name, owner)
            self._own_aliases.get(owner, {}).pop(name, None)

    def _is_base(self, name: str) -> bool:
        return name in (self.base.id, BASE_ALIAS)

    def _own_prompt(self, name: str, owner: str) -> Model | None:
        """The base, or the owner's own prompt of that name."""
        return self.base if self._is_base(name) else self._own.get(owner, {}).get(name)

    def _prompt(self, name: str, owner: str) -> Model | None:
        """The base or the prompt that the name means for the owner, aliases apart."""
        return self._own_prompt(name, owner) or self._shared.get(name)

    def _serve(self, model: Model) -> None:
        self._own.setdefault(model.owner, {})[model.id] = model
        if model.is_shared:
            self._shared[model.id] = model
        else:
            self._unshare(model.id, model.owner)

    def _unshare(self, name: str, owner: str) -> None:
        shared = self._shared.get(name)
        if shared is not None and shared.owner == owner:
            del self._shared[name]

    def _publish_alias(self, alias: Alias) -> None:
        self._own_aliases.setdefault(alias.owner, {})[alias.name] = alias
        if alias.is_shared:
            self._shared_aliases[alias.name] = alias
        else:
            self._unshare_alias(alias.name, alias.owner)

    def _unshare_alias(self, name: str, owner: str) -> None:
        shared = self._shared_aliases.get(name)
        if shared is not None and shared.owner == owner:
            del self._shared_aliases[name]

    def _draw_target(self, alias: Alias, user: str | None) -> Model | None:
        """One of the alias's targets that are served, as its owner sees them."""
        found = [(self._prompt(target.model, alias.owner), target.share) for target in alias.targets]
        served = [(model, share) for model, share in found if model is not None]
        return replace(by_share(served, alias.draw(user)), alias=alias.name) if served else None

    def _check_shared_name(self, name: str, owner: str, *, is_shared: bool) -> None:
        """No two owners share one name with everybody."""
        shared = self._shared.get(name) or self._shared_aliases.get(name)
        if is_shared and shared is not None and shared.owner != owner:
            raise _taken(f"{name!r} is shared with everybody already; choose another name")

    def _check_change(self, now: Model, changed: Model) -> None:
        is_renamed = changed.id != now.id
        if now.source == LIBRARY and (is_renamed or not changed.is_shared):
            raise ApiError(409, f"{now.id!r} is its folder's name in the library, for everybody; rename or move that")
        self.check_free(changed, overwrite=not is_renamed)
        if is_renamed:
            self._check_not_aliased(now)

    def _check_not_aliased(self, model: Model) -> None:
        for alias in self._own_aliases.get(model.owner, {}).copy().values():
            if any(target.model == model.id for target in alias.targets):
                raise ApiError(
                    409, f"the alias {alias.name!r} points to {model.id!r}; point it elsewhere first", "in_use"
                )

    def _check_target(self, name: str, owner: str) -> None:
        if self._prompt(name, owner) is not None:
            return
        target = self.resolve(name, Client(owner))  # raises where there is nothing
        raise ApiError(400, f"{name!r} is an alias; point to a prompt, to {target.id!r} say", "invalid_value", "model")

    def _checkpoints(self, model: Model) -> list[Model]:
        """Those of the job that made the prompt."""
        if model.source != "job" or model.job is None:
            return []
        own = self._own.get(model.owner, {}).copy().values()
        return [each for each in own if each.source == "checkpoint" and each.job == model.job]

    def _library_flags(self, name: str) -> LibraryFlags:
        return self._flags.get(name, LibraryFlags(is_pinned=False, is_unloaded=False))

    def _set_flags(self, name: str, flags: LibraryFlags) -> None:
        self._repository.set_flags(name, flags)
        self._flags[name] = flags

    def _unknown(self, name: str, client: Client) -> ApiError:
        if len(name) > _LONGEST_COMPARED:
            return unknown(f"there is no model {shortened(name)} ({len(name):,} characters)")
        names = self._names(client)
        first = [each for each in names if each[:1].lower() == name[:1].lower()][:_MOST_COMPARED]
        close = difflib.get_close_matches(name, first or names[:_MOST_COMPARED], n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"there is {', '.join(names[:5])}"
        return unknown(f"there is no model {name!r}; {hint}")

    def _names(self, client: Client) -> list[str]:
        tables = (self._own.get(client.id), self._own_aliases.get(client.id), self._shared, self._shared_aliases)
        return [self.base.id, *dict.fromkeys(name for table in tables for name in list(table or ()))]


def unknown(why: str) -> ApiError:
    """The error of a name that means nothing, or nothing that the client may know of."""
    return ApiError(404, why, "model_not_found", "model")


def _taken(why: str) -> ApiError:
    return ApiError(409, why, "exists", "name")
