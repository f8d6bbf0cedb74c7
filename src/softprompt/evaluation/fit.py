"""What of an input fits: the base's positions less the soft prompt, and the start of a text that does not."""

from __future__ import annotations

from softprompt.base import Base
from softprompt.errors import LengthError
from softprompt.prompt import SoftPrompt


def room_for_text(base: Base, prompt: SoftPrompt | None, max_length: int | None = None) -> int:
    """Tokens of text that fit beside the prompt, special ones included; `max_length` at most."""
    own = base.max_length - (prompt.num_virtual_tokens if prompt is not None else 0)
    return own if max_length is None else min(own, max_length)


def without_start(base: Base, ids: tuple[int, ...], room: int) -> tuple[int, ...]:
    """At most `room` of the ids (BOS included): BOS and the end, as training keeps them.

    Raises LengthError where not even one token fits.
    """
    special = base.bos_ids if ids[: len(base.bos_ids)] == base.bos_ids else ()
    kept = room - len(special)
    if kept < 1:
        raise LengthError(f"{room} tokens leave no room for a text before its answer; use fewer virtual tokens")
    return special + ids[len(special) :][-kept:]
