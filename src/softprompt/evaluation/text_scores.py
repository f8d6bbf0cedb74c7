"""Scores of one answer against one reference, from 0 to 1, as torchmetrics computes them (the extra `scores`).

- `exact_match`, `f1`: SQuAD's, over words without case, ASCII punctuation and the articles a, an, the (1606.05250).
- `rouge_l`: F-measure of the longest common subsequence of words, without case and punctuation (W04-1013).
- `chrf`: F2 over n-grams of characters, spaces left out, orders 1 to 6 or to the reference's length (W15-3049).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

from softprompt.config import TextScore
from softprompt.errors import MissingDependencyError

_CHRF_ORDER = 6  # n-grams of characters up to this long


def text_scores(name: TextScore, answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """One score per answer, against its own reference; white space around either does not count.

    Raises MissingDependencyError without torchmetrics.
    """
    library, score = torchmetrics_text(), _SCORES[name]
    pairs = zip(answers, references, strict=True)
    return [score(library, " ".join(answer.split()), " ".join(reference.split())) for answer, reference in pairs]


def torchmetrics_text() -> ModuleType:
    """torchmetrics' functions for text. Raises MissingDependencyError where it is not installed."""
    try:
        import torchmetrics.functional.text as library
    except ImportError as error:
        raise MissingDependencyError(
            "scores of generated text need torchmetrics; pip install 'softprompt[scores]'"
        ) from error
    return library


def _squad(library: ModuleType, key: str, answer: str, reference: str) -> float:
    asked = {"answers": {"answer_start": [0], "text": [reference]}, "id": "0"}
    return float(library.squad({"prediction_text": answer, "id": "0"}, asked)[key]) / 100


def _exact_match(library: ModuleType, answer: str, reference: str) -> float:
    return _squad(library, "exact_match", answer, reference)


def _f1(library: ModuleType, answer: str, reference: str) -> float:
    return _squad(library, "f1", answer, reference)


def _rouge_l(library: ModuleType, answer: str, reference: str) -> float:
    found = library.rouge_score(answer, reference, normalizer=_words, tokenizer=str.split, rouge_keys="rougeL")
    return float(found["rougeL_fmeasure"])


def _words(text: str) -> str:
    """Letters, marks and digits of every script, where torchmetrics itself would keep a to z only."""
    return "".join(sign if unicodedata.category(sign)[0] in "LMN" else " " for sign in text.lower())


def _chrf(library: ModuleType, answer: str, reference: str) -> float:
    """An order that the reference is too short for would count as 0, even where the answer is the reference."""
    order = max(1, min(_CHRF_ORDER, len(reference.replace(" ", ""))))
    return float(library.chrf_score([answer], [[reference]], n_char_order=order, n_word_order=0))


_SCORES: Mapping[TextScore, Callable[[ModuleType, str, str], float]] = {
    "exact_match": _exact_match,
    "f1": _f1,
    "rouge_l": _rouge_l,
    "chrf": _chrf,
}
