"""Chat messages to token ids in the obvious way, as a truth: each turn is rendered and tokenised with all before it.

Templates are rendered by transformers' own function.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from softprompt.base import Base
from softprompt.data import DEFAULT_CHAT_TEMPLATE
from softprompt.data.messages import Message, is_learned
from softprompt.data.tokens import continuation_ids
from softprompt.errors import DataError

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BREAK = "\ufdd0"  # a Unicode noncharacter: keeps a control token in a message from being read as one
_PROBE = "x"


class ChatIds(NamedTuple):
    """A conversation as ids, cut after the last target: nothing behind it can matter to a causal model."""

    ids: tuple[int, ...]
    target_mask: tuple[bool, ...]  # True on the assistant's words and on the token that ends its turn
    num_special: int  # leading ids that are the tokenizer's own (BOS)
    end_id: int | None  # the control token that ends the last turn, if the template writes one


class _Span(NamedTuple):
    start: int  # characters of the rendered conversation
    end: int


def chat_ids(base: Base, messages: Sequence[Message], where: str) -> ChatIds:
    """Ids and targets of a whole conversation.

    Where the template marks `{% generation %}`, the marks are the targets; elsewhere the conversation is rendered turn
    by turn, and what a turn adds to its generation prompt are the targets.
    Raises DataError, opening with `where`, where the template refuses the messages or hides the assistant's words.
    """
    guarded = _guarded(base, messages)
    text, spans = _marked_spans(base, guarded, where) if _has_marks(base) else _turn_spans(base, guarded, where)
    if not spans:
        raise DataError(
            f"{where}: the tokenizer's chat template writes the assistant's turns so that they cannot be located; "
            "mark them with {% generation %} in the template"
        )
    ids: tuple[int, ...] = _leading_ids(base)
    mask = [False] * len(ids)
    for start, end, counted in _stretches(spans):
        ids = _continued(base, ids, text[:start], text[start:end])
        mask += [counted] * (len(ids) - len(mask))
    return _up_to_last_target(base, ids, mask)


def chat_prompt_ids(base: Base, messages: Sequence[Message], where: str = "messages") -> tuple[int, ...]:
    """Ids of a conversation that the assistant is to continue, generation prompt included.

    Raises DataError where the template refuses the messages.
    """
    text = _render(base, _guarded(base, messages), where, generation_prompt=True)
    return _leading_ids(base) + _encode(base, text)


def _stretches(spans: Sequence[_Span]) -> Iterator[tuple[int, int, bool]]:
    """Context and targets in turn: start, end, whether it counts."""
    done = 0
    for span in spans:
        yield done, span.start, False
        yield span.start, span.end, True
        done = span.end


def _continued(base: Base, ids: tuple[int, ...], before: str, addition: str) -> tuple[int, ...]:
    """The ids for `before + addition`, given those for `before`, which stay as they are."""
    joined = _leading_ids(base) + _encode(base, before + addition)
    if joined[: len(ids)] == ids:
        return joined
    return ids + _segments_ids(base, addition, at_start=False)


def _up_to_last_target(base: Base, ids: tuple[int, ...], mask: list[bool]) -> ChatIds:
    num_special = _num_special(base, ids)
    mask[:num_special] = [False] * num_special
    length = max((index + 1 for index, counted in enumerate(mask) if counted), default=0)
    controls = {_control_id(base, token) for token in _control_tokens(base)}
    end_id = ids[length - 1] if length and ids[length - 1] in controls else None
    return ChatIds(ids[:length], tuple(mask[:length]), min(num_special, length), end_id)


def _leading_ids(base: Base) -> tuple[int, ...]:
    """A template of the tokenizer's own writes BOS itself, as text; before the default one it is added."""
    return () if base.tokenizer.chat_template else base.bos_ids


def _num_special(base: Base, ids: tuple[int, ...]) -> int:
    return len(base.bos_ids) if ids[: len(base.bos_ids)] == base.bos_ids else 0


# Rendering ------------------------------------------------------------------------------------------------------------


def _template(base: Base) -> str:
    if not base.tokenizer.chat_template:
        return DEFAULT_CHAT_TEMPLATE
    template: str = base.tokenizer.get_chat_template()
    return template


def _has_marks(base: Base) -> bool:
    return _GENERATION_MARK.search(_template(base)) is not None


def _render(base: Base, messages: Sequence[Message], where: str, *, generation_prompt: bool = False) -> str:
    return _rendered(base, messages, where, add_generation_prompt=generation_prompt)[0]


def _rendered(base: Base, messages: Sequence[Message], where: str, **settings: bool) -> tuple[str, list[_Span]]:
    variables: dict[str, Any] = {**base.tokenizer.special_tokens_map, **settings}  # Any: a template's variables
    conversation = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    render: Any = render_jinja_template  # Any: annotated as giving a string, it gives texts and their marked spans
    try:
        texts, spans = render([conversation], chat_template=_template(base), **variables)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"{where}: the tokenizer's chat template refuses the messages: {error}") from error
    return texts[0], [_Span(*span) for span in (spans[0] if spans else ())]


def _marked_spans(base: Base, messages: Sequence[Message], where: str) -> tuple[str, list[_Span]]:
    text, spans = _rendered(base, messages, where, return_assistant_tokens_mask=True)
    turns = [message for message in messages if message["role"] == "assistant"]
    if all(map(is_learned, turns)):
        return text, [span for span in spans if span.end > span.start]
    if len(spans) != len(turns):
        raise DataError(
            f"{where}: the chat template marks {len(spans):,} spans for {len(turns):,} turns of the assistant, so "
            'it is unknown which of them a "weight": 0 excludes; leave the weights out'
        )
    learned = [span for span, turn in zip(spans, turns, strict=True) if is_learned(turn)]
    return text, [span for span in learned if span.end > span.start]


def _turn_spans(base: Base, messages: Sequence[Message], where: str) -> tuple[str, list[_Span]]:
    text = _render(base, messages, where)
    spans: list[_Span] = []
    for index, message in enumerate(messages):
        if is_learned(message) and (span := _turn_span(base, messages[: index + 1], text, where)):
            spans.append(span)
    return text, spans


def _turn_span(base: Base, so_far: Sequence[Message], text: str, where: str) -> _Span | None:
    """Where the last of the turns so far stands in the whole conversation.

    None where a template writes a turn, or what comes before it, differently once more turns follow (some drop the
    reasoning of all turns but the last): then nobody can say what inference would have seen.
    """
    before = _render(base, so_far[:-1], where) if len(so_far) > 1 else ""
    opening = _opening(base, so_far[:-1], where)
    turn = _render(base, so_far, where)
    # Only a part of the generation prompt may be missing, like the empty reasoning that some put there.
    start, end = _common_length(text, opening), _common_length(text, turn)
    said = so_far[-1]["content"].strip() in text[start:end]
    if start < len(before) or end <= start or not (said or text.startswith(turn)):
        return None
    return _Span(start, _without_trailing_space(base, text, start, end))


def _opening(base: Base, before: Sequence[Message], where: str) -> str:
    try:
        return _render(base, before, where, generation_prompt=True)
    except DataError:
        if before:
            raise
        return ""  # many templates cannot open a conversation with the assistant


def _common_length(first: str, second: str) -> int:
    if first.startswith(second):
        return len(second)
    differing = (index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differing, min(len(first), len(second)))


def _without_trailing_space(base: Base, text: str, start: int, end: int) -> int:
    """The end of a turn, without the line break that a template writes behind its end token: nobody generates that."""
    shorter = start + len(text[start:end].rstrip())
    return shorter if text[start:shorter].endswith(tuple(_control_tokens(base)) or ("\0",)) else end


# Tokenising what a template wrote -------------------------------------------------------------------------------------


def _control_tokens(base: Base) -> list[str]:
    """Special tokens, and added ones that the template writes."""
    added = base.tokenizer.added_tokens_decoder.values()
    template = _template(base)
    return [
        token.content for token in added if token.special or (token.content in template and not token.content.isspace())
    ]


def _control_id(base: Base, token: str) -> int:
    token_id = base.tokenizer.convert_tokens_to_ids(token)
    assert isinstance(token_id, int), token
    return token_id


def _control_pattern(base: Base) -> re.Pattern[str] | None:
    longest_first = sorted(_control_tokens(base), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _guarded(base: Base, messages: Sequence[Message]) -> list[Message]:
    """The messages with every control token in them broken by _BREAK."""
    pattern = _control_pattern(base)
    if pattern is None:
        return list(messages)

    def guard(value: Any) -> Any:  # Any: JSON, tool calls included
        if isinstance(value, str):
            return pattern.sub(lambda match: match[0][0] + _BREAK + match[0][1:], value)
        if isinstance(value, Mapping):
            return {key: guard(item) for key, item in value.items()}
        return [guard(item) for item in value] if isinstance(value, (list, tuple)) else value

    return [guard(message) for message in messages]


def _encode(base: Base, text: str) -> tuple[int, ...]:
    """Ids of a rendered conversation: the tokenizer's own, unless a message holds a control token."""
    if _BREAK in text:
        return _segments_ids(base, text, at_start=True)
    return tuple(_own_tokenizer(base.tokenizer)(text, add_special_tokens=False, verbose=False)["input_ids"])


def _segments_ids(base: Base, text: str, *, at_start: bool) -> tuple[int, ...]:
    """Ids with the template's control tokens cut out first and everything between them tokenised as text."""
    pattern = _control_pattern(base)
    ids: tuple[int, ...] = ()
    done = 0
    for match in pattern.finditer(text) if pattern else ():
        ids += _segment_ids(base, text[done : match.start()], at_start and not done)
        ids += (_control_id(base, match.group()),)
        done = match.end()
    return ids + _segment_ids(base, text[done:], at_start and not done)


def _segment_ids(base: Base, segment: str, at_start: bool) -> tuple[int, ...]:
    text = segment.replace(_BREAK, "")
    if not text:
        return ()
    return base.encode(text) if at_start or _starts_anew(base) else continuation_ids(base, text)


def _starts_anew(base: Base) -> bool:
    """Whether the tokenizer treats a text behind a control token as the beginning of a text (and adds its space)."""
    control = next((token.content for token in base.tokenizer.added_tokens_decoder.values() if token.special), None)
    if control is None:
        return False
    ids = _own_tokenizer(base.tokenizer)(control + _PROBE, add_special_tokens=False)["input_ids"]
    return tuple(ids[1:]) == base.encode(_PROBE)


@lru_cache(maxsize=4)
def _own_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that reads control tokens. Reading them or not is a switch inside a tokenizer; with one for each of the
    two ways no thread ever turns the switch under another.
    """
    return copy.deepcopy(tokenizer)
