"""What Python callers give to be answered: texts, fields of a template by name, chat messages; a list of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from softprompt.errors import DataError, shortened


def input_list(inputs: Iterable[Any], name: str, *, also: tuple[type, ...] = ()) -> list[Any]:  # Any: checked here
    """The inputs, each of them of a kind that can be answered, or one of `also`.

    Raises DataError for one input in the place of a list, of which each letter or field would be answered, and for an
    input that is nothing of the kind.
    """
    if isinstance(inputs, (str, bytes, Mapping)) or not isinstance(inputs, Iterable):
        raise DataError(f"{name} is {shortened(inputs)}; it must be a list, [{shortened(inputs, 30)}] say")
    return [_checked(item, f"item {number:,} of {name}", also) for number, item in enumerate(inputs, start=1)]


def _checked(item: Any, where: str, also: tuple[type, ...]) -> Any:  # Any: as above
    is_chat = isinstance(item, (list, tuple)) and all(isinstance(message, Mapping) for message in item)
    if not (isinstance(item, (str, Mapping, *also)) or is_chat):
        kind = type(item).__name__
        raise DataError(f"{where} is a {kind}, {shortened(item)}; give a text, fields by name or a list of messages")
    for text in (item,) if isinstance(item, str) else item.values() if isinstance(item, Mapping) else ():
        _refuse_half_pairs(text, where)
    return item


def _refuse_half_pairs(text: object, where: str) -> None:
    try:
        if isinstance(text, str):
            text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where} holds half of a surrogate pair, which is no text") from None
