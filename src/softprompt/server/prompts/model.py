"""What a name may mean: the bare base, one soft prompt, or another name for one or several."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from softprompt.base import Base
from softprompt.prompt import SoftPrompt
from softprompt.server.clients.keys import OPERATOR

BASE_ALIAS = "base"  # always means the bare base
LIBRARY = "library"  # the source of what lies in the operator's folder
_BUCKETS = 2**64
_FINGERPRINT_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a name means: the bare base, or one soft prompt on it."""

    id: str  # its own name, also where a request used an alias
    prompt: SoftPrompt | None = None  # None: the bare base
    owner: str = OPERATOR
    source: str = LIBRARY  # base, library, upload, folder, hub, job or checkpoint
    job: str | None = None
    is_shared: bool = True
    is_pinned: bool = False
    created: float = field(default_factory=time.time)
    alias: str | None = None  # the alias that the request used

    def fingerprint(self, base: Base, weights: str = "loaded") -> str:
        """A hash of base and soft prompt, whatever their names, and the weights in use where they are not as loaded:
        equal where equal requests get equal answers."""
        parts = (base.fingerprint, "" if self.prompt is None else self.prompt.content_hash)
        digits = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:_FINGERPRINT_DIGITS]
        return f"fp_{digits}" + ("" if weights == "loaded" else f"_{weights}")


@dataclass(frozen=True)
class Target:
    """One prompt behind an alias."""

    model: str  # a name as the alias's owner uses it
    share: float = 1.0  # of the requests, beside the other targets' shares


@dataclass(frozen=True, kw_only=True)
class Alias:
    """Another name for one prompt, or for several that share its requests."""

    name: str
    targets: tuple[Target, ...]
    owner: str = OPERATOR
    is_shared: bool = False
    created: float = field(default_factory=time.time)

    def draw(self, user: str | None) -> float:
        """A number in [0, 1): the same for the same user of this alias, else a new one each time."""
        if user is None:
            return random.random()
        digest = hashlib.sha256("\0".join((self.owner, self.name, user)).encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") / _BUCKETS


def by_share(choices: Sequence[tuple[Model, float]], drawn: float) -> Model:
    """The choice in whose share of the whole `drawn` (in [0, 1)) falls."""
    left = drawn * sum(share for _, share in choices)
    for model, share in choices:
        left -= share
        if left < 0:
            return model
    return choices[-1][0]  # rounding
