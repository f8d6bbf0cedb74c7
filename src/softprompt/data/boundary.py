"""Where a text is continued: the ids of a completion after the ids of its prompt.

The prompt's ids are exactly what inference will see, so they never depend on what follows. The completion's ids are
what the joined text adds; where joining changes the prompt's own ids ("Sentiment: " + "good" may fuse the space into
the word), the completion is tokenised alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from softprompt.base import Base
from softprompt.compute_share import yield_point
from softprompt.errors import EncodingError

_USUAL_CHARACTERS = 8  # of a token, at most, in most texts
_UNSURE_IDS = 64  # at the end of a beginning; the rest of the text may change them
_PROBE = "x"
# Texts that do not fuse with what follows them; more than one, because any of them may fuse with something.
_ANCHORS = ("\n", ".", "a", "1", ")")


def completion_ids(base: Base, prompt: str, completion: str) -> tuple[int, ...]:
    """Ids of `completion` after `prompt`, nothing added behind."""
    prompt_ids = base.encode(prompt)
    joined_ids = base.encode(prompt + completion)
    if joined_ids[: len(prompt_ids)] == prompt_ids:
        return joined_ids[len(prompt_ids) :]
    return continuation_ids(base, completion)


def label_ids(base: Base, prompt: str, label: str) -> tuple[int, ...]:
    """Ids whose summed log-likelihood after `prompt` is the label's: as trained, EOS excluded."""
    return completion_ids(base, prompt, label)


def continuation_ids(base: Base, text: str) -> tuple[int, ...]:
    """Ids of a text in the middle of another: without the space that some tokenizers put before a text's start."""
    if not adds_space(base):
        return base.encode(text)
    for anchor in _ANCHORS:
        anchor_ids = base.encode(anchor)
        both_ids = base.encode(anchor + text)
        # An anchor that the tokenizer drops or takes for a space shields nothing.
        if anchor_ids and anchor_ids != base.encode(" ") and both_ids[: len(anchor_ids)] == anchor_ids:
            return both_ids[len(anchor_ids) :]
    return base.encode(text)


def adds_space(base: Base) -> bool:
    """True where a text's first word is tokenised as if a space stood before it (SentencePiece, add_prefix_space)."""
    try:
        return base.encode("\n" + _PROBE) != base.encode("\n") + base.encode(_PROBE)
    except EncodingError:  # a tokenizer of words that has no such word, and so no space within one
        return False


def first_ids(encode: Callable[[str], Sequence[int]], text: str, count: int | None) -> Sequence[int]:
    """The ids of a text's beginning, at least `count` of them; all of them where it has no more, or for None.

    Of a text that is much longer, the rest is not read.
    """
    num_characters = _USUAL_CHARACTERS * ((count or 0) + _UNSURE_IDS)
    while count is not None and num_characters < len(text):
        yield_point()
        ids = encode(text[:num_characters])
        if len(ids) >= count + _UNSURE_IDS:
            return ids[: len(ids) - _UNSURE_IDS]
        num_characters *= 4
    return encode(text)
