"""Tags as entities, logits as spans of text, and how both are scored.

Entities are those of seqeval, as CoNLL-2000's script conlleval finds them: from B- or a change of type to the next
beginning, O or end. Where no tag has a prefix, an entity is a run of one tag other than O. F1 is over the entities of
all rows: one is right where its first and last word and its type are.

Exact match and F1 of answers are SQuAD's (1606.05250): over words without case, ASCII punctuation and the articles a,
an, the, against the nearest of several references.

C columns.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

OUTSIDE = "O"  # the tag of a word in no entity
MAX_ANSWER_TOKENS = 30  # of a span, as in transformers' scripts for SQuAD
_PREFIX = re.compile(r"([BIESLU])[-_](.+)", re.DOTALL)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Entity(NamedTuple):
    """Some consecutive words of one row."""

    kind: str
    first: int  # the number of its first word
    last: int


def entities(tags: Sequence[str | None], *, has_prefixes: bool = True) -> list[Entity]:
    """The entities of one row's words; None is a word without a tag, in no entity."""
    found: list[Entity] = []
    before, first = (OUTSIDE, ""), 0
    for number, tag in enumerate([*tags, OUTSIDE]):
        own = _split(tag, has_prefixes)
        if before[0] != OUTSIDE and _ends(before, own):
            found.append(Entity(before[1], first, number - 1))
        if own[0] != OUTSIDE and _begins(before, own):
            first = number
        before = own
    return found


def has_prefixes(labels: Sequence[str]) -> bool:
    """Whether the tags say where an entity begins: all but O are B-, I- and the like."""
    return all(_PREFIX.fullmatch(label) for label in labels if label != OUTSIDE)


def _split(tag: str | None, has_prefixes: bool) -> tuple[str, str]:
    if tag is None or tag == OUTSIDE:
        return OUTSIDE, ""
    match = _PREFIX.fullmatch(tag) if has_prefixes else None
    return ("I", tag) if match is None else (match[1].replace("L", "E").replace("U", "S"), match[2])


def _ends(before: tuple[str, str], own: tuple[str, str]) -> bool:
    return before[0] in "ES" or own[0] in (OUTSIDE, "B", "S") or before[1] != own[1]


def _begins(before: tuple[str, str], own: tuple[str, str]) -> bool:
    return own[0] in "BS" or before[0] in (OUTSIDE, "E", "S") or before[1] != own[1]


def entity_f1(truth: Sequence[Sequence[Entity]], found: Sequence[Sequence[Entity]]) -> float:
    """Of the entities of all rows; 0 where there are none at all."""
    right = sum(len(set(own) & set(guess)) for own, guess in zip(truth, found, strict=True))
    total = sum(map(len, truth)) + sum(map(len, found))
    return 2 * right / total if total else 0.0


class Span(NamedTuple):
    """The likeliest span of a context."""

    window: int
    first: int  # column of its window
    last: int
    probability: float  # among all spans of all windows


def best_span(windows: Sequence[np.ndarray]) -> Span:
    """Of logits [C, 2], of start and end, of each window: the span with the highest sum of the two."""
    sums = [_span_sums(logits_C2) for logits_C2 in windows]
    highest = max(float(own.max()) for own in sums)
    total = sum(float(np.exp(own - highest).sum()) for own in sums)
    window = max(range(len(sums)), key=lambda number: float(sums[number].max()))
    length, first = np.unravel_index(int(sums[window].argmax()), sums[window].shape)
    return Span(window, int(first), int(first + length), 1 / total)


def _span_sums(logits_C2: np.ndarray) -> np.ndarray:
    """[lengths, C]: the logit of each span by its length less 1 and its first column; those that do not fit -inf."""
    starts_C, ends_C = logits_C2.astype(np.float64).T
    num_columns = len(starts_C)
    sums = np.full((min(MAX_ANSWER_TOKENS, num_columns), num_columns), -np.inf)
    for length in range(len(sums)):
        sums[length, : num_columns - length] = starts_C[: num_columns - length] + ends_C[length:]
    return sums


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where the answer is one of the references, apart from what SQuAD leaves out."""
    return float(any(_words(answer) == _words(reference) for reference in references))


def answer_f1(answer: str, references: Sequence[str]) -> float:
    """The F1 of the words of the answer, against the nearest reference."""
    return max((_word_f1(_words(answer), _words(reference)) for reference in references), default=0.0)


def _word_f1(own: list[str], reference: list[str]) -> float:
    if not own or not reference:
        return float(own == reference)
    common = sum((Counter(own) & Counter(reference)).values())
    return 2 * common / (len(own) + len(reference))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()
