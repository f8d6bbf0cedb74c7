"""Which prompt a name means, for whom. Reading is a look into a table and never waits."""

from __future__ import annotations

import difflib
import threading
import time
from dataclasses import dataclass, field

from softprompt.prompt import SoftPrompt
from softprompt.server.clients.client import OPERATOR, Client
from softprompt.server.errors import ApiError

BASE_ALIAS = "base"  # always means the bare base


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a name means: the bare base, or one soft prompt on it."""

    id: str  # its own name, also where it was asked for by an alias
    prompt: SoftPrompt | None = None  # None: the bare base
    owner: str = OPERATOR
    source: str = "library"  # base, library, upload, folder, hub, job or checkpoint
    job: str | None = None
    is_shared: bool = True
    is_pinned: bool = False
    created: float = field(default_factory=time.time)


class Catalogue:
    """All models. Each client sees its own and the shared ones; its own come first."""

    def __init__(self, base_name: str) -> None:
        self.base = Model(id=base_name, source="base")
        self._lock = threading.Lock()  # for changes
        self._models: dict[tuple[str, str], Model] = {}  # by owner and name

    def resolve(self, name: str, client: Client) -> Model:
        """The model that `name` means for this client now. Raises ApiError 404 with the nearest names that it sees."""
        if name in (self.base.id, BASE_ALIAS):
            return self.base
        found = self._models.get((client.id, name)) or self._models.get((OPERATOR, name))
        if found is None or not _sees(client, found):
            raise self._unknown(name, client)
        return found

    def models(self, client: Client) -> list[Model]:
        """All that the client may use, the base first."""
        return [self.base, *(each for each in self._models.values() if _sees(client, each))]

    def put(self, model: Model) -> None:
        """Serve a prompt from now on; it replaces what its owner had under that name."""
        with self._lock:
            self._models = {**self._models, (model.owner, model.id): model}

    def remove(self, name: str, owner: str) -> None:
        """Serve it no longer. One that is not there is let be."""
        with self._lock:
            self._models = {key: model for key, model in self._models.items() if key != (owner, name)}

    def _unknown(self, name: str, client: Client) -> ApiError:
        names = [each.id for each in self.models(client)]
        close = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"there is {', '.join(names[:5])}"
        return ApiError(404, f"there is no model {name!r}; {hint}", "model_not_found", "model")


def _sees(client: Client, model: Model) -> bool:
    return model.is_shared or model.owner == client.id
