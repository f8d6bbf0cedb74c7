"""Text to token ids where something stands before it: a completion behind its prompt, the pieces of a rendered chat.

The ids of a prompt are exactly those that inference sees, so they never depend on what follows. The ids of a completion
are what the joined text adds; where joining changes the prompt's own ids ("Sentiment: " + "good" may fuse the space
into the word), the completion is tokenised alone. So it always is for an encoder-decoder, whose decoder writes it. In
a chat, control tokens ("<|im_end|>") are control tokens only where the template writes them: in a message they are
text.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from softprompt.base import Base
from softprompt.compute_share import yield_point
from softprompt.data.chat_template import DEFAULT_CHAT_TEMPLATE, ChatTemplate
from softprompt.data.messages import MESSAGES_PER_YIELD, Message
from softprompt.errors import DataError, EncodingError, LengthError
from softprompt.types import Branch

_USUAL_CHARACTERS = 8  # per token, at most, in most texts
_UNSURE_IDS = 64  # at the end of a cut text; the rest of the text may change them
_PROBE = "x"
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BREAK = "\ufdd0"  # a Unicode noncharacter: keeps a control token in a message from being read as one
_SEARCHED = 2**16  # characters searched between two yield points
# Texts that do not fuse with what follows them; more than one, because any of them may fuse with something.
_ANCHORS = ("\n", ".", "a", "1", ")")


def completion_ids(base: Base, prompt: str, completion: str) -> tuple[int, ...]:
    """Ids of `completion` after `prompt`, nothing added behind."""
    return _ids_behind(base, prompt, base.encode(prompt), completion)


def target_ids(base: Base, text: str) -> tuple[int, ...]:
    """What the decoder of an encoder-decoder is to write for a completion: its ids by itself, nothing around them.

    There is no text that it is joined to, so the space that separates it from a prompt (" {label}") is left out.
    """
    return base.encode(text.removeprefix(" "))


def source_ids(base: Base, text: str, max_ids: int | None = None) -> tuple[int, ...]:
    """What a base reads of a text: its ids between those that the tokenizer puts around it.

    A text longer than `max_ids` may be cut, but not to `max_ids` or fewer: the rest is not tokenised.
    """
    return (*base.bos_ids, *first_ids(base.encode, text, None if max_ids is None else max_ids + 1), *base.end_ids)


def fit_source(base: Base, ids: tuple[int, ...], max_ids: int, *, keep_end: bool = False) -> tuple[int, ...]:
    """At most `max_ids` of the ids that an encoder reads, those around the text included.

    A text loses its end, as when its tokenizer cuts it: a document's title and the name of a task stand at its start.
    With `keep_end` it loses its start: a chat ends with the question. Raises LengthError where no token of it fits.
    """
    if len(ids) <= max_ids:
        return ids
    before = base.bos_ids if ids[: len(base.bos_ids)] == base.bos_ids else ()
    behind = base.end_ids if base.end_ids and ids[-len(base.end_ids) :] == base.end_ids else ()
    kept = max_ids - len(before) - len(behind)
    if kept < 1:
        raise LengthError(f"no text fits into {max_ids} tokens behind the soft prompt; use fewer virtual tokens")
    own = ids[len(before) : len(ids) - len(behind)]
    return before + (own[-kept:] if keep_end else own[:kept]) + behind


def _ids_behind(base: Base, prompt: str, prompt_ids: tuple[int, ...], completion: str) -> tuple[int, ...]:
    if base.kind == "seq2seq":
        return target_ids(base, completion)
    joined_ids = base.encode(prompt + completion)
    if joined_ids[: len(prompt_ids)] == prompt_ids:
        return joined_ids[len(prompt_ids) :]
    return continuation_ids(base, completion)


def label_ids(base: Base, prompt: str, label: str) -> tuple[int, ...]:
    """Ids of a label after `prompt`, as in training but without EOS."""
    return completion_ids(base, prompt, label)


def label_branches(
    base: Base, prompt: str, own: str, labels: Sequence[str], end_ids: tuple[int, ...]
) -> tuple[Branch, ...]:
    """Where the label `own` could become another of the labels after `prompt`; columns count from its first id.

    `end_ids` (EOS, or nothing) end each label, so that one that ends differs from a longer one that begins with it.
    """
    prompt_ids = base.encode(prompt)
    paths = [_ids_behind(base, prompt, prompt_ids, label) + end_ids for label in dict.fromkeys((own, *labels))]
    next_ids = [{path[i] for path in paths if _continues(path, paths[0], i)} for i in range(len(paths[0]))]
    return tuple(Branch(column, tuple(sorted(ids))) for column, ids in enumerate(next_ids) if len(ids) > 1)


def _continues(path: tuple[int, ...], own: tuple[int, ...], index: int) -> bool:
    """Whether the path begins as the other does up to `index`, and goes on."""
    return len(path) > index and path[:index] == own[:index]


def continuation_ids(base: Base, text: str) -> tuple[int, ...]:
    """Ids of a text in the middle of another: without the space that some tokenizers add at the start of a text."""
    if not adds_space(base):
        return base.encode(text)
    for anchor in _ANCHORS:
        anchor_ids = base.encode(anchor)
        both_ids = base.encode(anchor + text)
        # An anchor that the tokenizer drops or encodes as a space does not help.
        if anchor_ids and anchor_ids != base.encode(" ") and both_ids[: len(anchor_ids)] == anchor_ids:
            return both_ids[len(anchor_ids) :]
    return base.encode(text)


def adds_space(base: Base) -> bool:
    """True if the first word of a text is tokenised as if a space preceded it (SentencePiece, add_prefix_space)."""
    try:
        return base.encode("\n" + _PROBE) != base.encode("\n") + base.encode(_PROBE)
    except EncodingError:  # a word-level tokenizer without that word
        return False


def first_ids(encode: Callable[[str], Sequence[int]], text: str, count: int | None) -> Sequence[int]:
    """At least the first `count` ids of a text; all of them if it has no more, or if `count` is None.

    The rest of a much longer text is not tokenised.
    """
    num_characters = _USUAL_CHARACTERS * ((count or 0) + _UNSURE_IDS)
    while count is not None and num_characters < len(text):
        yield_point()
        ids = encode(text[:num_characters])
        if len(ids) >= count + _UNSURE_IDS:
            return ids[: len(ids) - _UNSURE_IDS]
        num_characters *= 4
    return encode(text)


def common_length(first: str, second: str) -> int:
    """The length of the longest common prefix."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class IncrementalIds:
    """The ids of a text that grows by segments.

    The ids of a segment are those that the joined text adds; where joining changes earlier ids, the segment is
    tokenised alone. Nothing is tokenised twice: ids up to a control token of the template are final, whatever follows.
    """

    def __init__(self, tokenizer: ChatTokenizer, text: str, max_ids: int | None) -> None:
        self._tokenizer, self._text, self._max_ids = tokenizer, text, max_ids
        self.ids = list(tokenizer.leading_ids)
        self._first_break = text.find(_BREAK)
        self._is_broken = False  # a message so far contains the text of a control token
        self._restart()

    def _restart(self) -> None:
        self._anchor = 0  # characters whose ids are final
        self._num_settled = len(self._tokenizer.leading_ids)
        self._control = ""  # the control token that they end with
        self._is_apart = False  # the joined text's final ids differ from ours

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

    def _num_wanted(self, num_ids: int) -> int | None:
        return None if self._max_ids is None else max(1, self._max_ids + 1 - num_ids)

    def _alone(self, start: int, end: int) -> list[int]:
        return self._tokenizer.segments_ids(
            self._text[start:end], at_start=False, min_ids=self._num_wanted(len(self.ids))
        )

    def _joined(self, end: int) -> list[int]:
        """The ids of the joined text after the final ones."""
        text, min_ids = self._text[self._anchor : end], self._num_wanted(self._num_settled)
        if self._is_broken:
            return self._tokenizer.segments_ids(text, at_start=not self._anchor, min_ids=min_ids)
        return self._tokenizer.own_ids(text, min_ids, behind=self._control)

    def _settle(self, end: int, joined: Sequence[int]) -> None:
        """Make the ids up to the last control token final, if the tokenizer recognised every control token."""
        controls = self._tokenizer.controls
        matches = list(controls.found_in(self._text, self._anchor, end))
        found = [index for index, token in enumerate(joined) if token in controls.known_ids]
        if [controls.ids[match.group()] for match in matches] != [joined[index] for index in found]:
            return
        last = next((i for i in reversed(range(len(matches))) if self._tokenizer.is_settled(matches[i].group())), None)
        if last is None:
            return
        num_new = found[last] + 1
        mine = self.ids[self._num_settled : self._num_settled + num_new]
        if mine != list(joined[: len(mine)]):
            self._is_apart = True
        elif len(mine) == num_new:
            self._anchor, self._control = matches[last].end(), matches[last].group()
            self._num_settled += num_new


class ControlTokens(NamedTuple):
    """A tokenizer's control tokens: special ones, and added ones that the template writes."""

    ids: Mapping[str, int]
    known_ids: frozenset[int]  # the same
    pattern: re.Pattern[str] | None
    longest: int  # characters

    def found_in(self, text: str, start: int = 0, end: int | None = None) -> Iterator[re.Match[str]]:
        """Their matches. A long text is searched in pieces, because a search holds the interpreter's lock."""
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

    def escape(self, value: Any) -> Any:  # Any: JSON
        """The value with every control token in it broken by _BREAK."""
        if isinstance(value, str):
            return self._escaped(value)
        if isinstance(value, Mapping):
            return {key: self.escape(item) for key, item in value.items()}
        return [self.escape(item) for item in value] if isinstance(value, (list, tuple)) else value

    def _escaped(self, text: str) -> str:
        parts, done = [], 0
        for match in self.found_in(text):
            parts += [text[done : match.start() + 1], _BREAK]
            done = match.start() + 1
        return "".join(parts) + text[done:] if parts else text


class ChatTokenizer:
    """Renders and tokenises the conversations of one base."""

    def __init__(self, base: Base, template: ChatTemplate) -> None:
        self.base, self.template = base, template
        self.controls = control_tokens(base.tokenizer, template.source)
        self.has_marks = _GENERATION_MARK.search(template.source) is not None
        # The tokenizer's own template writes BOS itself, as text; with the default template it is added.
        self.leading_ids = () if base.tokenizer.chat_template else base.bos_ids

    def escaped(self, messages: Sequence[Message], where: str) -> list[Message]:
        if self.controls.pattern is None:
            return list(messages)
        try:
            return list(self._escaped(messages))
        except RecursionError as error:
            raise DataError(f"{where}: a message is nested too deeply") from error

    def _escaped(self, messages: Sequence[Message]) -> Iterator[Message]:
        for number, message in enumerate(messages):
            if number % MESSAGES_PER_YIELD == 0:
                yield_point()
            yield self.controls.escape(message)

    def encode(self, text: str, max_ids: int | None) -> list[int]:
        """Ids of a rendered conversation: the tokenizer's own, unless a message holds a control token."""
        min_ids = None if max_ids is None else max_ids + 1
        return (
            self.segments_ids(text, at_start=True, min_ids=min_ids) if _BREAK in text else self.own_ids(text, min_ids)
        )

    def own_ids(self, text: str, min_ids: int | None, behind: str = "") -> list[int]:
        """Ids as the tokenizer itself gives them after the control token `behind`, at least `min_ids` of them."""
        tokenizer, first = own_tokenizer(self.base.tokenizer), 1 if behind else 0

        def read(part: str) -> Sequence[int]:
            return self.base.encode_with(tokenizer, behind + part)[first:]

        return list(first_ids(read, text, min_ids))

    def segments_ids(self, text: str, *, at_start: bool, min_ids: int | None) -> list[int]:
        """Ids of a text that is split at the template's control tokens first; everything between them is text."""
        ids: list[int] = []
        done = 0
        for match in self.controls.found_in(text):
            ids += self._segment_ids(text[done : match.start()], at_start and not done, min_ids)
            ids.append(self.controls.ids[match.group()])
            done = match.end()
            if min_ids is not None and len(ids) >= min_ids:
                return ids
        return ids + self._segment_ids(text[done:], at_start and not done, min_ids)

    def _segment_ids(self, segment: str, at_start: bool, min_ids: int | None) -> list[int]:
        text = segment.replace(_BREAK, "")
        if not text:
            return []
        if at_start or self._starts_anew:
            return list(first_ids(self.base.encode, text, min_ids))
        return list(first_ids(lambda part: continuation_ids(self.base, part), text, min_ids))

    @cached_property
    def _starts_anew(self) -> bool:
        """Whether text after a control token is tokenised as the start of a text (and gets its space)."""
        tokens = self.base.tokenizer.added_tokens_decoder.values()
        control = next((token.content for token in tokens if token.special), None)
        if control is None:
            return False
        try:
            return tuple(self.own_ids(_PROBE, None, behind=control)) == self.base.encode(_PROBE)
        except EncodingError:  # a word-level tokenizer without that word
            return False

    def ending(self, text: str) -> int | None:
        """The control token that a turn ends with."""
        ends = (token for token in sorted(self.controls.ids, key=len, reverse=True) if text.endswith(token))
        return self.controls.ids.get(next(ends, ""))

    def without_trailing_space(self, text: str, start: int, end: int) -> int:
        """The end of a turn without the line break after its end token, which is never generated."""
        shorter = start + len(text[start:end].rstrip())
        return shorter if text.endswith(tuple(self.controls.ids), start, shorter) else end

    def is_settled(self, control: str) -> bool:
        """Whether a control token is recognised as one whatever follows it."""
        return control in _settled_controls(self.base.tokenizer, self.template.source)


def chat_tokenizer(base: Base, where: str) -> ChatTokenizer:
    templates = base.tokenizer.chat_template
    source = templates if templates else DEFAULT_CHAT_TEMPLATE
    if isinstance(source, dict):
        if "default" not in source:
            raise DataError(
                f"{where}: the base's tokenizer has chat templates named {', '.join(map(repr, sorted(source)))} and "
                "none named 'default'; save the base with the one that you want as its tokenizer's only chat_template"
            )
        source = source["default"]
    return ChatTokenizer(base, ChatTemplate(source, base.tokenizer.special_tokens_map))


@lru_cache(maxsize=8)
def control_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> ControlTokens:
    ids = {
        token.content: token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.content and (token.special or (token.content in template and not token.content.isspace()))
    }
    pattern = re.compile(_one_of(sorted(ids))) if ids else None
    return ControlTokens(ids, frozenset(ids.values()), pattern, max(map(len, ids), default=0))


def _one_of(tokens: Sequence[str]) -> str:
    """A pattern that matches the longest of the sorted tokens; common prefixes are factored out."""
    if len(tokens) == 1:
        return re.escape(tokens[0])
    shared = common_length(tokens[0], tokens[-1])
    rest = [token[shared:] for token in tokens]
    branches = [_one_of(list(group)) for _, group in groupby(filter(None, rest), key=lambda token: token[0])]
    return f"{re.escape(tokens[0][:shared])}(?:{'|'.join(branches)}){'' if rest[0] else '?'}"


@lru_cache(maxsize=8)
def _settled_controls(tokenizer: PreTrainedTokenizerBase, template: str) -> frozenset[str]:
    known, own = control_tokens(tokenizer, template).ids, own_tokenizer(tokenizer)
    in_words = {token.content for token in tokenizer.added_tokens_decoder.values() if token.single_word}
    return frozenset(
        token
        for token, token_id in known.items()
        if list(own(token, add_special_tokens=False)["input_ids"]) == [token_id]
        and token not in in_words
        and not any(other != token and other.startswith(token) for other in known)
    )


@lru_cache(maxsize=4)
def own_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that recognises control tokens. That is a mutable setting of a tokenizer: with one tokenizer for each
    value, no thread changes the setting under another.
    """
    return copy.deepcopy(tokenizer)
