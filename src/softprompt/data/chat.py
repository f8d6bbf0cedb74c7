"""Conversations to token ids, by the tokenizer's chat template. Only the assistant's turns are targets.

A base whose tokenizer has no chat template gets DEFAULT_CHAT_TEMPLATE, in training and in serving alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from softprompt.base import Base
from softprompt.compute_share import yield_point
from softprompt.data.chat_template import RenderedChat
from softprompt.data.messages import Message, is_learned
from softprompt.data.template_budget import Span
from softprompt.data.tokens import ChatTokenizer, IncrementalIds, chat_tokenizer, common_length
from softprompt.errors import DataError

MOST_RERENDER_STEPS = 2**24  # template steps spent on rendering the turns of one conversation again


class ChatIds(NamedTuple):
    """A conversation as ids, cut after the last target: nothing behind it can matter to a causal model."""

    ids: tuple[int, ...]
    target_mask: tuple[bool, ...]  # True on the assistant's words and on the token that ends its turn
    num_special: int  # leading ids that are the tokenizer's own (BOS)
    end_id: int | None  # the control token that ends the last turn, if the template writes one


def chat_ids(base: Base, messages: Sequence[Message], where: str, max_ids: int | None = None) -> ChatIds:
    """Ids and targets of a conversation. One longer than `max_ids` may be cut, but not to `max_ids` or fewer.

    Where the template marks `{% generation %}`, the marked text is the target; elsewhere it is what each turn of the
    assistant adds to its generation prompt. Turns of weight 0 are not targets.
    Raises DataError, opening with `where`, where the template refuses the messages or hides the assistant's words.
    """
    tokenizer = chat_tokenizer(base, where)
    spans: _Spans = (_MarkedSpans if tokenizer.has_marks else _TurnSpans)(tokenizer, messages, where)
    incremental = IncrementalIds(tokenizer, spans.text, max_ids)
    mask = [False] * len(incremental.ids)
    has_spans = is_cut = False
    for start, end, counted in _segments(spans.each()):
        has_spans = True
        incremental.add(start, end)
        mask += [counted] * (len(incremental.ids) - len(mask))
        is_cut = max_ids is not None and len(mask) > max_ids
        if is_cut:
            break
    if not has_spans:
        raise DataError(
            f"{where}: the tokenizer's chat template writes the assistant's turns so that they cannot be located; "
            "mark them with {% generation %} in the template"
        )
    return _chat_ids(tokenizer, spans, tuple(incremental.ids), mask, is_cut)


def chat_prompt_ids(
    base: Base, messages: Sequence[Message], where: str = "messages", max_ids: int | None = None
) -> tuple[int, ...]:
    """Ids of a conversation that the assistant is to continue, generation prompt included.

    One longer than `max_ids` may be cut, but not to `max_ids` or fewer. Raises DataError where the template refuses
    the messages.
    """
    tokenizer = chat_tokenizer(base, where)
    rendered = tokenizer.template.render(tokenizer.escaped(messages, where), where, generation_prompt=True)
    ids = (*tokenizer.leading_ids, *tokenizer.encode(rendered.text, max_ids))
    has_end = bool(base.end_ids) and ids[-len(base.end_ids) :] == base.end_ids  # a template may write it
    return ids if has_end else (*ids, *base.end_ids)


def _segments(spans: Iterator[Span]) -> Iterator[tuple[int, int, bool]]:
    """Context and targets alternately: start, end, whether it is a target."""
    done = 0
    for span in spans:
        yield done, span.start, False
        yield span.start, span.end, True
        done = span.end


def _chat_ids(tokenizer: ChatTokenizer, spans: _Spans, ids: tuple[int, ...], mask: list[bool], is_cut: bool) -> ChatIds:
    bos_ids = tokenizer.base.bos_ids
    num_special = len(bos_ids) if ids[: len(bos_ids)] == bos_ids else 0
    mask[:num_special] = [False] * num_special
    length = len(ids)
    if not is_cut:
        length = max((index + 1 for index, counted in enumerate(mask) if counted), default=0)
    end_id = ids[length - 1] if length and ids[length - 1] in tokenizer.controls.known_ids else None
    if is_cut:
        last = spans.last()
        end_id = tokenizer.ending(spans.text[last.start : last.end])
    return ChatIds(ids[:length], tuple(mask[:length]), min(num_special, length), end_id)


# Where the assistant's turns stand ------------------------------------------------------------------------------------


class _MarkedSpans:
    """The spans that the template marks with `{% generation %}`."""

    def __init__(self, tokenizer: ChatTokenizer, messages: Sequence[Message], where: str) -> None:
        rendered = tokenizer.template.render(tokenizer.escaped(messages, where), where)
        self.text = rendered.text
        turns = [message for message in messages if message["role"] == "assistant"]
        if not all(map(is_learned, turns)) and len(rendered.marks) != len(turns):
            raise DataError(
                f"{where}: the chat template marks {len(rendered.marks):,} spans for {len(turns):,} turns of the "
                'assistant, so it is unknown which of them a "weight": 0 excludes; leave the weights out'
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
    """The spans of the turns to learn, for a template without marks.

    A turn begins where the conversation before it, with a generation prompt, ends; it ends where the conversation up to
    and including it ends. Both are derived from one rendering if its trace allows it; otherwise they are rendered again
    for each turn, up to a bound.
    """

    def __init__(self, tokenizer: ChatTokenizer, messages: Sequence[Message], where: str) -> None:
        self._tokenizer, self._where = tokenizer, where
        self._messages = tokenizer.escaped(messages, where)
        self._learned = [index for index, message in enumerate(messages) if is_learned(message)]
        self._whole = self._render(len(messages))
        self.text = self._whole.text
        self._prompted = self._last_generation_prompt()
        same = 0 if self._prompted is None else common_length(self.text, self._prompted.text)
        self._num_shared_prompted = same  # characters of the last generation prompt's rendering that the whole has too
        self._num_rerender_steps = 0

    def each(self) -> Iterator[Span]:
        return (span for index in self._learned if (span := self._span(index)) is not None)

    def last(self) -> Span:
        return next(span for index in reversed(self._learned) if (span := self._span(index)) is not None)

    def _span(self, index: int) -> Span | None:
        """The span of a turn in the whole conversation.

        None where a template writes it, or what comes before it, differently once more turns follow (some drop the
        reasoning of all turns but the last): then its text is not what inference would have seen.
        """
        yield_point()
        length_before = sum(self._prefix(index)) if index else 0
        start = self._generation_prompt_end(index)
        shared, rest = self._prefix(index + 1)
        # Only a part of the generation prompt may be missing, like the empty reasoning that some put there.
        end, is_whole = shared, rest == 0
        has_words = self._messages[index]["content"].strip() in self.text[start:end]
        if start < length_before or end <= start or not (has_words or is_whole):
            return None
        return Span(start, self._tokenizer.without_trailing_space(self.text, start, end))

    def _prefix(self, count: int) -> tuple[int, int]:
        """For the first `count` messages alone: how many characters match the whole, and how many follow those."""
        known = self._whole.trace.first(count)
        if known is None:
            text = self._rerender(count).text
            shared = common_length(self.text, text)
            return shared, len(text) - shared
        end, rest = known
        more = common_length(self.text[end : end + len(rest)], rest)
        return end + more, len(rest) - more

    def _generation_prompt_end(self, index: int) -> int:
        """How many characters of the conversation before a turn, with a generation prompt, match the whole."""
        known = self._prompted.trace.first(index) if self._prompted is not None and index else None
        if known is None:
            return common_length(self.text, self._generation_prompt(index))
        end, rest = known
        if end > self._num_shared_prompted:
            return self._num_shared_prompted
        return end + common_length(self.text[end : end + len(rest)], rest)

    def _generation_prompt(self, index: int) -> str:
        try:
            return self._rerender(index, generation_prompt=True).text
        except DataError:
            if index:
                raise
            return ""  # many templates cannot open a conversation with the assistant

    def _last_generation_prompt(self) -> RenderedChat | None:
        if not self._learned or not self._learned[-1]:
            return None
        try:
            return self._render(self._learned[-1], generation_prompt=True)
        except DataError:  # an earlier turn raises its own error first
            return None

    def _rerender(self, count: int, generation_prompt: bool = False) -> RenderedChat:
        if self._num_rerender_steps > MOST_RERENDER_STEPS:
            raise DataError(
                f"{self._where}: the tokenizer's chat template may write a turn differently when others follow, so "
                f"each of {len(self._learned):,} turns has to be rendered with all before it, which takes too long; "
                "split the conversation"
            )
        rendered = self._render(count, generation_prompt, is_traced=False)
        self._num_rerender_steps += rendered.num_steps
        return rendered

    def _render(self, count: int, generation_prompt: bool = False, is_traced: bool = True) -> RenderedChat:
        return self._tokenizer.template.render(
            self._messages[:count], self._where, generation_prompt=generation_prompt, is_traced=is_traced
        )


_Spans = _MarkedSpans | _TurnSpans
