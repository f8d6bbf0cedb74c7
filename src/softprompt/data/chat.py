"""Chat messages to token ids, by the tokenizer's chat template; targets are the assistant's turns alone.

A base whose tokenizer has no chat template gets DEFAULT_CHAT_TEMPLATE, in training and in serving alike. Control tokens
("<|im_end|>") are control tokens only where the template writes them: in a message they are text.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from softprompt.base import Base
from softprompt.compute_share import yield_point
from softprompt.data.boundary import continuation_ids, first_ids
from softprompt.data.chat_template import ChatTemplate, Rendered, Span
from softprompt.data.messages import BREATH_MESSAGES, Message, is_learned
from softprompt.errors import DataError, EncodingError

# The assistant's turn ends with EOS in the history too, as it does when it is generated.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token or '' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{% if messages %}{{ '\\n' }}{% endif %}Assistant:{% endif %}"
)

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BREAK = "\ufdd0"  # a Unicode noncharacter: keeps a control token in a message from being read as one
_PROBE = "x"


_SEARCHED = 2**16  # characters of a piece
MOST_STEPS_AGAIN = 2**24  # of rendering the turns of one conversation again, each with all before it


class ChatIds(NamedTuple):
    """A conversation as ids, cut after the last target: nothing behind it can matter to a causal model."""

    ids: tuple[int, ...]
    target_mask: tuple[bool, ...]  # True on the assistant's words and on the token that ends its turn
    num_special: int  # leading ids that are the tokenizer's own (BOS)
    end_id: int | None  # the control token that ends the last turn, if the template writes one


def chat_ids(base: Base, messages: Sequence[Message], where: str, max_ids: int | None = None) -> ChatIds:
    """Ids and targets of a whole conversation; of one longer than `max_ids` more than so many, but maybe not all.

    Where the template marks `{% generation %}`, the marks are the targets; elsewhere what each turn of the assistant
    adds to its generation prompt. Turns of weight 0 are no targets.
    Raises DataError, opening with `where`, where the template refuses the messages or hides the assistant's words.
    """
    writing = _writing(base, where)
    spans: _Spans = (_MarkedSpans if writing.has_marks else _TurnSpans)(writing, messages, where)
    growing = _Growing(writing, spans.text, max_ids)
    mask = [False] * len(growing.ids)
    has_spans = is_cut = False
    for start, end, counted in _stretches(spans.each()):
        has_spans = True
        growing.add(start, end)
        mask += [counted] * (len(growing.ids) - len(mask))
        is_cut = max_ids is not None and len(mask) > max_ids
        if is_cut:
            break
    if not has_spans:
        raise DataError(
            f"{where}: the tokenizer's chat template writes the assistant's turns so that they cannot be told apart; "
            "mark them with {% generation %} in the template"
        )
    return _finished(writing, spans, tuple(growing.ids), mask, is_cut)


def chat_prompt_ids(
    base: Base, messages: Sequence[Message], where: str = "messages", max_ids: int | None = None
) -> tuple[int, ...]:
    """Ids of a conversation that the assistant is to continue, generation prompt included.

    Of one longer than `max_ids` more than so many, but maybe not all. Raises DataError where the template refuses the
    messages.
    """
    writing = _writing(base, where)
    rendered = writing.template.render(writing.guarded(messages, where), where, generation_prompt=True)
    return (*writing.leading_ids, *writing.encode(rendered.text, max_ids))


def _stretches(spans: Iterator[Span]) -> Iterator[tuple[int, int, bool]]:
    """Context and targets in turn: start, end, whether it counts."""
    done = 0
    for span in spans:
        yield done, span.start, False
        yield span.start, span.end, True
        done = span.end


def _finished(writing: _Writing, spans: _Spans, ids: tuple[int, ...], mask: list[bool], is_cut: bool) -> ChatIds:
    bos_ids = writing.base.bos_ids
    num_special = len(bos_ids) if ids[: len(bos_ids)] == bos_ids else 0
    mask[:num_special] = [False] * num_special
    length = len(ids)
    if not is_cut:
        length = max((index + 1 for index, counted in enumerate(mask) if counted), default=0)
    end_id = ids[length - 1] if length and ids[length - 1] in writing.controls.known_ids else None
    if is_cut:
        last = spans.last()
        end_id = writing.ending(spans.text[last.start : last.end])
    return ChatIds(ids[:length], tuple(mask[:length]), min(num_special, length), end_id)


# Where the assistant's turns stand ------------------------------------------------------------------------------------


class _MarkedSpans:
    """What `{% generation %}` marks."""

    def __init__(self, writing: _Writing, messages: Sequence[Message], where: str) -> None:
        rendered = writing.template.render(writing.guarded(messages, where), where)
        self.text = rendered.text
        turns = [message for message in messages if message["role"] == "assistant"]
        if not all(map(is_learned, turns)) and len(rendered.marks) != len(turns):
            raise DataError(
                f"{where}: the chat template marks {len(rendered.marks):,} stretches for {len(turns):,} turns of the "
                'assistant, so nobody can say which of them a "weight": 0 means; leave the weights out'
            )
        is_left_out = [not is_learned(turn) for turn in turns]
        self._spans = [
            span
            for number, span in enumerate(rendered.marks)
            if span.end > span.start and not (any(is_left_out) and is_left_out[number])
        ]

    def each(self) -> Iterator[Span]:
        return iter(self._spans)

    def last(self) -> Span:
        return self._spans[-1]


class _TurnSpans:
    """Where a template without marks writes the turns that are learned.

    A turn begins where the conversation before it with a generation prompt ends, and ends where the conversation up to
    it does. What these are is read off one rendering where its trace tells it; else they are rendered, for each turn
    again, up to a bound.
    """

    def __init__(self, writing: _Writing, messages: Sequence[Message], where: str) -> None:
        self._writing, self._where = writing, where
        self._messages = writing.guarded(messages, where)
        self._learned = [index for index, message in enumerate(messages) if is_learned(message)]
        self._whole = self._render(len(messages))
        self.text = self._whole.text
        self._opened = self._last_opening()
        same = 0 if self._opened is None else _common_length(self.text, self._opened.text)
        self._same_opened = same  # characters that the last opening shares with the whole
        self._num_steps_again = 0

    def each(self) -> Iterator[Span]:
        return (span for index in self._learned if (span := self._span(index)) is not None)

    def last(self) -> Span:
        return next(span for index in reversed(self._learned) if (span := self._span(index)) is not None)

    def _span(self, index: int) -> Span | None:
        """Where a turn stands in the whole conversation.

        None where a template writes it, or what comes before it, differently once more turns follow (some drop the
        reasoning of all turns but the last): then nobody can say what inference would have seen.
        """
        yield_point()
        length_before = sum(self._beginning(index)) if index else 0
        start = self._opening_end(index)
        shared, rest = self._beginning(index + 1)
        # Only a part of the generation prompt may be missing, like the empty reasoning that some put there.
        end, is_whole = shared, rest == 0
        said = self._messages[index]["content"].strip() in self.text[start:end]
        if start < length_before or end <= start or not (said or is_whole):
            return None
        return Span(start, self._writing.without_trailing_space(self.text, start, end))

    def _beginning(self, count: int) -> tuple[int, int]:
        """Of the first messages alone: characters that they share with the whole, and how many more they have."""
        known = self._whole.trace.first(count)
        if known is None:
            text = self._again(count).text
            shared = _common_length(self.text, text)
            return shared, len(text) - shared
        end, rest = known
        more = _common_length(self.text[end : end + len(rest)], rest)
        return end + more, len(rest) - more

    def _opening_end(self, index: int) -> int:
        """Characters that the conversation before a turn, with a generation prompt, shares with the whole."""
        known = self._opened.trace.first(index) if self._opened is not None and index else None
        if known is None:
            return _common_length(self.text, self._opening(index))
        end, rest = known
        if end > self._same_opened:
            return self._same_opened
        return end + _common_length(self.text[end : end + len(rest)], rest)

    def _opening(self, index: int) -> str:
        try:
            return self._again(index, generation_prompt=True).text
        except DataError:
            if index:
                raise
            return ""  # many templates cannot open a conversation with the assistant

    def _last_opening(self) -> Rendered | None:
        if not self._learned or not self._learned[-1]:
            return None
        try:
            return self._render(self._learned[-1], generation_prompt=True)
        except DataError:  # the turns before it come first, and tell their own problem
            return None

    def _again(self, count: int, generation_prompt: bool = False) -> Rendered:
        if self._num_steps_again > MOST_STEPS_AGAIN:
            raise DataError(
                f"{self._where}: the tokenizer's chat template may write a turn in another way when others follow, so "
                f"each of {len(self._learned):,} turns has to be rendered with all before it, which takes too long; "
                "split the conversation"
            )
        rendered = self._render(count, generation_prompt, is_traced=False)
        self._num_steps_again += rendered.num_steps
        return rendered

    def _render(self, count: int, generation_prompt: bool = False, is_traced: bool = True) -> Rendered:
        return self._writing.template.render(
            self._messages[:count], self._where, generation_prompt=generation_prompt, is_traced=is_traced
        )


_Spans = _MarkedSpans | _TurnSpans


def _common_length(first: str, second: str) -> int:
    """Characters that two texts begin with alike."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


# Tokenising what a template wrote -------------------------------------------------------------------------------------


class _Growing:
    """The ids of a text that grows by stretches, the ids of each behind those of the stretches before it.

    A stretch's ids are what the joined text adds; where joining changes ids that are there, the stretch is tokenised
    alone. Nothing is read twice: behind a control token of the template the ids are settled, whatever follows.
    """

    def __init__(self, writing: _Writing, text: str, max_ids: int | None) -> None:
        self._writing, self._text, self._max_ids = writing, text, max_ids
        self.ids = list(writing.leading_ids)
        self._first_break = text.find(_BREAK)
        self._is_broken = False  # a message so far holds a control token
        self._restart()

    def _restart(self) -> None:
        self._anchor = 0  # characters whose ids are settled
        self._num_settled = len(self._writing.leading_ids)
        self._control = ""  # the control token that they end with
        self._is_apart = False  # the joined text's settled ids are other ones

    def add(self, start: int, end: int) -> None:
        yield_point()
        if not self._is_broken and 0 <= self._first_break < end:
            self._is_broken = True
            self._restart()
        if not self._is_apart:
            joined = self._joined(end)
            known = self.ids[self._num_settled :]
            if joined[: len(known)] == known:
                self.ids[self._num_settled :] = joined
            else:
                self.ids += self._alone(start, end)
            self._settle(end, joined)
        else:
            self.ids += self._alone(start, end)

    def _room(self, num_ids: int) -> int | None:
        return None if self._max_ids is None else max(1, self._max_ids + 1 - num_ids)

    def _alone(self, start: int, end: int) -> list[int]:
        return self._writing.segments_ids(self._text[start:end], at_start=False, room=self._room(len(self.ids)))

    def _joined(self, end: int) -> list[int]:
        """The joined text's ids behind the settled ones."""
        text, room = self._text[self._anchor : end], self._room(self._num_settled)
        if self._is_broken:
            return self._writing.segments_ids(text, at_start=not self._anchor, room=room)
        return self._writing.own_ids(text, room, behind=self._control)

    def _settle(self, end: int, joined: Sequence[int]) -> None:
        """Move on behind the last control token, where the tokenizer has seen all of them that are there."""
        controls = self._writing.controls
        matches = list(controls.found_in(self._text, self._anchor, end))
        found = [index for index, token in enumerate(joined) if token in controls.known_ids]
        if [controls.ids[match.group()] for match in matches] != [joined[index] for index in found]:
            return
        last = next((i for i in reversed(range(len(matches))) if self._writing.is_settled(matches[i].group())), None)
        if last is None:
            return
        num_new = found[last] + 1
        mine = self.ids[self._num_settled : self._num_settled + num_new]
        if mine != list(joined[: len(mine)]):
            self._is_apart = True
        elif len(mine) == num_new:
            self._anchor, self._control = matches[last].end(), matches[last].group()
            self._num_settled += num_new


class _Controls(NamedTuple):
    """A tokenizer's control tokens: special ones, and added ones that the template writes."""

    ids: Mapping[str, int]
    known_ids: frozenset[int]  # the same
    pattern: re.Pattern[str] | None
    longest: int  # characters

    def found_in(self, text: str, start: int = 0, end: int | None = None) -> Iterator[re.Match[str]]:
        """Where they stand. A long text is searched in pieces: meanwhile nothing else runs in this process."""
        last = len(text) if end is None else end
        while self.pattern is not None and start < last:
            piece_end = start + _SEARCHED
            for match in self.pattern.finditer(text, start, min(last, piece_end + self.longest)):
                if match.start() >= piece_end:
                    break
                yield match
                start = match.end()
            start = max(start, piece_end)
            yield_point()

    def guard(self, value: Any) -> Any:  # Any: JSON
        """The value with every control token in it broken by _BREAK."""
        if isinstance(value, str):
            return self._guarded(value)
        if isinstance(value, Mapping):
            return {key: self.guard(item) for key, item in value.items()}
        return [self.guard(item) for item in value] if isinstance(value, (list, tuple)) else value

    def _guarded(self, text: str) -> str:
        parts, done = [], 0
        for match in self.found_in(text):
            parts += [text[done : match.start() + 1], _BREAK]
            done = match.start() + 1
        return "".join(parts) + text[done:] if parts else text


class _Writing:
    """How a base's conversations are written and tokenised."""

    def __init__(self, base: Base, template: ChatTemplate) -> None:
        self.base, self.template = base, template
        self.controls = _controls(base.tokenizer, template.source)
        self.has_marks = _GENERATION_MARK.search(template.source) is not None
        # A template of the tokenizer's own writes BOS itself, as text; before the default one it is added.
        self.leading_ids = () if base.tokenizer.chat_template else base.bos_ids

    def guarded(self, messages: Sequence[Message], where: str) -> list[Message]:
        if self.controls.pattern is None:
            return list(messages)
        try:
            return list(self._guarded(messages))
        except RecursionError as error:
            raise DataError(f"{where}: a message is nested too deeply") from error

    def _guarded(self, messages: Sequence[Message]) -> Iterator[Message]:
        for number, message in enumerate(messages):
            if number % BREATH_MESSAGES == 0:
                yield_point()
            yield self.controls.guard(message)

    def encode(self, text: str, max_ids: int | None) -> list[int]:
        """Ids of a rendered conversation: the tokenizer's own, unless a message holds a control token."""
        room = None if max_ids is None else max_ids + 1
        return self.segments_ids(text, at_start=True, room=room) if _BREAK in text else self.own_ids(text, room)

    def own_ids(self, text: str, room: int | None, behind: str = "") -> list[int]:
        """Ids as the tokenizer gives them behind a control token, `room` of them at least."""
        tokenizer, first = _own_tokenizer(self.base.tokenizer), 1 if behind else 0

        def read(part: str) -> Sequence[int]:
            return self.base.encode_with(tokenizer, behind + part)[first:]

        return list(first_ids(read, text, room))

    def segments_ids(self, text: str, *, at_start: bool, room: int | None) -> list[int]:
        """Ids with the template's control tokens cut out first and everything between them tokenised as text."""
        ids: list[int] = []
        done = 0
        for match in self.controls.found_in(text):
            ids += self._segment_ids(text[done : match.start()], at_start and not done, room)
            ids.append(self.controls.ids[match.group()])
            done = match.end()
            if room is not None and len(ids) >= room:
                return ids
        return ids + self._segment_ids(text[done:], at_start and not done, room)

    def _segment_ids(self, segment: str, at_start: bool, room: int | None) -> list[int]:
        text = segment.replace(_BREAK, "")
        if not text:
            return []
        if at_start or self._starts_anew:
            return list(first_ids(self.base.encode, text, room))
        return list(first_ids(lambda part: continuation_ids(self.base, part), text, room))

    @cached_property
    def _starts_anew(self) -> bool:
        """Whether a text behind a control token is tokenised as the beginning of a text (and gets its space)."""
        tokens = self.base.tokenizer.added_tokens_decoder.values()
        control = next((token.content for token in tokens if token.special), None)
        if control is None:
            return False
        try:
            return tuple(self.own_ids(_PROBE, None, behind=control)) == self.base.encode(_PROBE)
        except EncodingError:  # a tokenizer of words that has no such word
            return False

    def ending(self, text: str) -> int | None:
        """The control token that a turn ends with."""
        ends = (token for token in sorted(self.controls.ids, key=len, reverse=True) if text.endswith(token))
        return self.controls.ids.get(next(ends, ""))

    def without_trailing_space(self, text: str, start: int, end: int) -> int:
        """The end of a turn, without the line break that a template writes behind its end token: never generated."""
        shorter = start + len(text[start:end].rstrip())
        return shorter if text.endswith(tuple(self.controls.ids), start, shorter) else end

    def is_settled(self, control: str) -> bool:
        """Whether nothing behind a control token changes that it is read as one."""
        return control in _settled(self.base.tokenizer, self.template.source)


def _writing(base: Base, where: str) -> _Writing:
    templates = base.tokenizer.chat_template
    source = templates if templates else DEFAULT_CHAT_TEMPLATE
    if isinstance(source, dict):
        if "default" not in source:
            raise DataError(
                f"{where}: the base's tokenizer has chat templates named {', '.join(map(repr, sorted(source)))} and "
                "none named 'default'; save the base with the one that you want as its tokenizer's only chat_template"
            )
        source = source["default"]
    return _Writing(base, ChatTemplate(source, base.tokenizer.special_tokens_map))


@lru_cache(maxsize=8)
def _controls(tokenizer: PreTrainedTokenizerBase, template: str) -> _Controls:
    ids = {
        token.content: token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.content and (token.special or (token.content in template and not token.content.isspace()))
    }
    pattern = re.compile(_one_of(sorted(ids))) if ids else None
    return _Controls(ids, frozenset(ids.values()), pattern, max(map(len, ids), default=0))


def _one_of(tokens: Sequence[str]) -> str:
    """A pattern of sorted tokens, of which it takes the longest. What they begin with alike is looked at once."""
    if len(tokens) == 1:
        return re.escape(tokens[0])
    shared = _common_length(tokens[0], tokens[-1])
    rest = [token[shared:] for token in tokens]
    branches = [_one_of(list(group)) for _, group in groupby(filter(None, rest), key=lambda token: token[0])]
    return f"{re.escape(tokens[0][:shared])}(?:{'|'.join(branches)}){'' if rest[0] else '?'}"


@lru_cache(maxsize=8)
def _settled(tokenizer: PreTrainedTokenizerBase, template: str) -> frozenset[str]:
    known, own = _controls(tokenizer, template).ids, _own_tokenizer(tokenizer)
    in_words = {token.content for token in tokenizer.added_tokens_decoder.values() if token.single_word}
    return frozenset(
        token
        for token, token_id in known.items()
        if list(own(token, add_special_tokens=False)["input_ids"]) == [token_id]
        and token not in in_words
        and not any(other != token and other.startswith(token) for other in known)
    )


@lru_cache(maxsize=4)
def _own_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that reads control tokens. Reading them or not is a switch inside a tokenizer; with one for each of the
    two ways no thread ever turns the switch under another.
    """
    return copy.deepcopy(tokenizer)
