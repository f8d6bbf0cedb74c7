"""Inputs for generation, written as the prompt's training rows were.

An input is one text, the fields of a template by name, or chat messages. For the bare base and a prompt trained on
plain text, one text is used as it is; for a prompt with a template it fills the only field; for a prompt trained on
chat it is the user's message.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from softprompt.base import Base
from softprompt.data.chat import chat_prompt_ids
from softprompt.data.messages import Message, read_messages
from softprompt.data.rows import fill_template, require_fields, template_fields
from softprompt.data.tokens import source_ids
from softprompt.errors import DataError, shortened
from softprompt.types import InputForm

Input = str | Mapping[str, str] | Sequence[Mapping[str, Any]]  # Any: a message, checked where it is read


def form_ids(base: Base, form: InputForm | None, item: Input, *, max_ids: int | None = None) -> tuple[int, ...]:
    """Ids of one input in the form, with those that the tokenizer puts around a text; `form` is None for the bare base.

    Of an encoder-decoder they are what its encoder reads, EOS included.
    Raises DataError for an input that does not suit the form.
    """
    if isinstance(item, Mapping):
        return input_ids(base, form, fields=item, max_ids=max_ids)
    if not isinstance(item, str):
        return input_ids(base, form, messages=item, max_ids=max_ids)
    if form is None or form.kind == "plain":
        return input_ids(base, form, text=item, max_ids=max_ids)
    if form.kind == "chat":
        return input_ids(base, form, messages=[{"role": "user", "content": item}], max_ids=max_ids)
    return input_ids(base, form, fields=_only_field(form, item), max_ids=max_ids)


def template_text(form: InputForm, item: Input) -> str:
    """One input in the form's template: the text before the completion. Raises DataError as `form_ids` does."""
    if isinstance(item, Mapping):
        return prompt_text(form, item)
    text = item if isinstance(item, str) else _last_user_text(read_messages(item, "messages", for_training=False))
    return prompt_text(form, _only_field(form, text))


def input_ids(
    base: Base,
    form: InputForm | None = None,
    *,
    text: str | None = None,
    fields: Mapping[str, str] | None = None,
    messages: Sequence[Mapping[str, Any]] | None = None,  # Any: checked here
    max_ids: int | None = None,
) -> tuple[int, ...]:
    """Ids of one input: raw `text`, `fields` of the form's template, or chat `messages`; as `form_ids`.

    `form` is None for the bare base. Messages go through the chat template where the form is chat or the base is bare;
    else the last user message goes through the form: its template, or raw for a prompt trained on plain text.
    An input longer than `max_ids` may be cut, but not to `max_ids` or fewer: the rest is not tokenised.
    Raises DataError where not exactly one input is given, or it does not suit the form.
    """
    given = [name for name, value in (("text", text), ("fields", fields), ("messages", messages)) if value is not None]
    if len(given) != 1:
        raise DataError(f"an input is one of text, fields or messages; given: {', '.join(given) or 'none'}")
    if messages is not None:
        return _message_ids(base, form, read_messages(messages, "messages", for_training=False), max_ids)
    whole = text if text is not None else prompt_text(form, fields or {})
    return source_ids(base, whole, max_ids)


def prompt_text(form: InputForm | None, fields: Mapping[str, str]) -> str:
    """The form's template with its fields filled: the text before the completion.

    Raises DataError where the form has no template, or a field is missing, unknown or no string.
    """
    if form is None or form.template is None:
        kind = "the bare base has no template" if form is None else f"this prompt was trained on {form.kind} text"
        raise DataError(f"fields {_listed(fields)} need a template, but {kind}; give the text itself")
    wanted = template_fields(form.template)
    require_fields(form.template, fields)
    for name, value in fields.items():
        if name not in wanted:
            raise DataError(f"there is no field {name!r} in template {form.template!r}; it has {_listed(wanted)}")
        if not isinstance(value, str):
            raise DataError(f"field {name!r} must be text, not a {type(value).__name__}")
    return fill_template(form.template, fields)


def _message_ids(
    base: Base, form: InputForm | None, messages: tuple[Message, ...], max_ids: int | None
) -> tuple[int, ...]:
    if not messages:
        raise DataError("messages is empty; give at least one message")
    if form is None or form.kind == "chat":
        return chat_prompt_ids(base, messages, max_ids=max_ids)
    return form_ids(base, form, _last_user_text(messages), max_ids=max_ids)


def _last_user_text(messages: Sequence[Message]) -> str:
    texts: list[str] = [message["content"] for message in messages if message["role"] == "user"]
    if not texts:
        raise DataError("messages has no user message, and this prompt's form uses the last one as its text")
    return texts[-1]


def _only_field(form: InputForm, text: str) -> dict[str, str]:
    assert form.template is not None, form
    names = template_fields(form.template)
    if len(names) != 1:
        raise DataError(
            f"one text fills one field, but the template {form.template!r} has {_listed(names)}; give each by its name "
            "(--field NAME=TEXT), or the whole text (--raw, or /v1/completions)"
        )
    return {names[0]: text}


def _listed(names: Mapping[str, str] | Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "no fields"


def input_list(inputs: Iterable[Any], name: str, *, also: tuple[type, ...] = ()) -> list[Any]:  # Any: checked here
    """The inputs, each of them of a kind that can be answered, or of a kind in `also`.

    Raises DataError for one input instead of a list, of which each letter or field would be answered, and for an item
    of another kind.
    """
    if isinstance(inputs, (str, bytes, Mapping)) or not isinstance(inputs, Iterable):
        raise DataError(f"{name} is {shortened(inputs)}; it must be a list, for example [{shortened(inputs, 30)}]")
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
