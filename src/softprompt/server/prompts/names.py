"""The table of names: who sees which prompt and which alias under a name.

Whoever changes it holds a lock of his own; whoever reads needs none. Each change of one name is one assignment in one
dictionary, and readers that go through a dictionary copy it first, in one step of the interpreter.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import replace

from softprompt.errors import shortened
from softprompt.server.clients.client import Client
from softprompt.server.errors import ApiError
from softprompt.server.prompts.model import BASE_ALIAS, Alias, Model, by_share

_MOST_COMPARED = 128  # names, to find the nearest
_LONGEST_COMPARED = 256  # characters


class Names:
    """Prompts by owner and name, the shared ones by name; aliases likewise. An owner's own come before shared ones."""

    def __init__(self, base: Model) -> None:
        self.base = base
        self._own: dict[str, dict[str, Model]] = {}
        self._shared: dict[str, Model] = {}
        self._aliases: dict[str, dict[str, Alias]] = {}
        self._shared_aliases: dict[str, Alias] = {}

    def resolve(self, name: str, client: Client, user: str | None = None) -> Model:
        """The model that the name means for a client. Raises ApiError 404 with the nearest names that it sees."""
        found = self.own(name, client.id)
        if found is not None:
            return found
        alias = self._aliases.get(client.id, {}).get(name)
        if alias is None and name in self._shared:
            found = self._shared.get(name)
        if found is None:
            alias = alias or self._shared_aliases.get(name)
            found = None if alias is None else self._target(alias, user)
        if found is None:
            raise self._unknown(name, client)
        return found

    def own(self, name: str, owner: str) -> Model | None:
        """The base, or what the owner itself has under that name."""
        return self.base if self.is_base(name) else self._own.get(owner, {}).get(name)

    def prompt(self, name: str, owner: str) -> Model | None:
        """The base or the prompt that the name means in the owner's view; aliases apart."""
        return self.own(name, owner) or self._shared.get(name)

    def alias(self, name: str, owner: str) -> Alias | None:
        """The owner's own alias of that name."""
        return self._aliases.get(owner, {}).get(name)

    def is_base(self, name: str) -> bool:
        return name in (self.base.id, BASE_ALIAS)

    def models(self, client: Client) -> list[Model]:
        """All prompts that the client may use, the base first."""
        own = self._own.get(client.id, {}).copy()
        return [self.base, *own.values(), *(each for name, each in self._shared.copy().items() if name not in own)]

    def aliases(self, client: Client) -> list[Alias]:
        """All aliases that the client may use."""
        own = self._aliases.get(client.id, {}).copy()
        return [*own.values(), *(each for name, each in self._shared_aliases.copy().items() if name not in own)]

    def everything(self) -> Iterator[Model]:
        """Every prompt of everybody, the base apart."""
        for own in self._own.copy().values():
            yield from own.copy().values()

    def owned(self, owner: str) -> list[Model]:
        """Every prompt of an owner's."""
        return list(self._own.get(owner, {}).copy().values())

    def num_aliases(self, owner: str) -> int:
        return len(self._aliases.get(owner, {}))

    def aliases_to(self, model: Model) -> list[str]:
        """Names of its owner's aliases that point to a prompt."""
        aliases = self._aliases.get(model.owner, {}).copy().values()
        return [each.name for each in aliases if any(target.model == model.id for target in each.targets)]

    def check_free(self, model: Model) -> None:
        """A prompt may be served under its name; one of its owner's is replaced. Raises ApiError 409."""
        name = model.id
        if self.is_base(name):
            raise taken(f"{name!r} means the base; choose another name")
        if name in self._aliases.get(model.owner, {}):
            raise taken(f"{name!r} is an alias; choose another name, or delete the alias first")
        shared = self._shared.get(name) or self._shared_aliases.get(name)
        if model.is_shared and shared is not None and shared.owner != model.owner:
            raise taken(f"{name!r} is shared with everybody already; choose another name")

    def check_free_alias(self, alias: Alias) -> None:
        """An alias may have its name; an alias of its owner's is replaced. Raises ApiError 409."""
        if self.own(alias.name, alias.owner) is not None:
            raise taken(f"{alias.name!r} is the name of a prompt; an alias needs a name of its own")
        shared = self._shared.get(alias.name) or self._shared_aliases.get(alias.name)
        if alias.is_shared and shared is not None and shared.owner != alias.owner:
            raise taken(f"{alias.name!r} is shared with everybody already; choose another name")

    def put(self, model: Model) -> None:
        self._own.setdefault(model.owner, {})[model.id] = model
        if model.is_shared:
            self._shared[model.id] = model
        else:
            self._unshare(model.id, model.owner)

    def remove(self, name: str, owner: str) -> None:
        self._unshare(name, owner)
        self._own.get(owner, {}).pop(name, None)

    def put_alias(self, alias: Alias) -> None:
        self._aliases.setdefault(alias.owner, {})[alias.name] = alias
        if alias.is_shared:
            self._shared_aliases[alias.name] = alias
        else:
            self._unshare_alias(alias.name, alias.owner)

    def remove_alias(self, name: str, owner: str) -> None:
        self._unshare_alias(name, owner)
        self._aliases.get(owner, {}).pop(name, None)

    def _unshare(self, name: str, owner: str) -> None:
        shared = self._shared.get(name)
        if shared is not None and shared.owner == owner:
            del self._shared[name]

    def _unshare_alias(self, name: str, owner: str) -> None:
        shared = self._shared_aliases.get(name)
        if shared is not None and shared.owner == owner:
            del self._shared_aliases[name]

    def _target(self, alias: Alias, user: str | None) -> Model | None:
        """One of the alias's targets that are served, as its owner sees them."""
        found = [(self.prompt(target.model, alias.owner), target.share) for target in alias.targets]
        served = [(model, share) for model, share in found if model is not None]
        return replace(by_share(served, alias.draw(user)), alias=alias.name) if served else None

    def _unknown(self, name: str, client: Client) -> ApiError:
        if len(name) > _LONGEST_COMPARED:
            return unknown(f"there is no model {shortened(name)} ({len(name):,} characters)")
        names = self._names(client)
        first = [each for each in names if each[:1].lower() == name[:1].lower()][:_MOST_COMPARED]
        close = difflib.get_close_matches(name, first or names[:_MOST_COMPARED], n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"there is {', '.join(names[:5])}"
        return unknown(f"there is no model {name!r}; {hint}")

    def _names(self, client: Client) -> list[str]:
        places = (self._own.get(client.id, {}), self._aliases.get(client.id, {}), self._shared, self._shared_aliases)
        return [self.base.id, *dict.fromkeys(name for place in places for name in list(place))]


def taken(why: str) -> ApiError:
    """A name that cannot be had."""
    return ApiError(409, why, "exists", "name")


def unknown(why: str) -> ApiError:
    """Something that is not there, or that the client may not know of."""
    return ApiError(404, why, "model_not_found", "model")
