"""Scores of generated text: greedy answers against the rows' own, in a report and as the criterion of checkpoints.

A row's own answer is its completion, or the last turn of the assistant in a chat; plain text has none. A score is the
mean over rows, from 0 to 1, higher is better, as torchmetrics computes it (the extra `scores`):

- `exact_match`, `f1`: SQuAD's, over words without case, ASCII punctuation and the articles a, an, the (1606.05250).
- `rouge_l`: F-measure of the longest common subsequence of words, without case and punctuation (W04-1013).
- `chrf`: F2 over n-grams of characters, spaces left out, orders 1 to 6 or to the reference's length (W15-3049).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple, get_args

from softprompt.base import Base
from softprompt.config import Criterion, SamplingConfig, ScoreConfig, TextScore
from softprompt.data import Rows, RowText, chat_prompt_ids, completion_ids, render_rows
from softprompt.data.messages import last_answer
from softprompt.data.rows import with_labels
from softprompt.data.tokens import source_ids
from softprompt.engine import Request, generate
from softprompt.errors import ConfigError, MissingDependencyError
from softprompt.evaluation.classification import class_scores, label_confusion, labelled_rows, macro_f1, share_right
from softprompt.evaluation.heads import criterion_score
from softprompt.evaluation.heldout import Interval, bootstrap_interval, contenders, max_text_tokens, truncate_start
from softprompt.families import Forward, forward_of
from softprompt.prompt import SoftPrompt


@dataclass(frozen=True)
class TaskScore:
    """One score of one prompt (or, with `prompt` None, of the bare base) on one held-out set."""

    held_out: str  # the set's name
    prompt: str | None
    name: str  # a TextScore, or of a head: entity_f1, accuracy (of words), accuracy_at_1, mrr
    value: float  # from 0 to 1: the mean over rows; of tags the entities' or words' of all rows
    num_rows: int
    num_available: int  # rows of the set that have an answer; more than `num_rows` where the set was cut
    difference: float | None  # value minus the base's on the same rows; above 0 is better
    interval: Interval | None  # of the difference, over rows, at 95 %; None for a single row
    better_rows: tuple[int, ...]  # source indices of the rows that the prompt answers better
    worse_rows: tuple[int, ...]  # and of those that it answers worse
    is_baseline: bool = False  # what needs no head: the bare base's vectors, the commonest tag, the whole context


def check_scores(config: ScoreConfig, sets: Mapping[str, Rows]) -> None:
    """Raises ConfigError where no set suits `config`, MissingDependencyError without torchmetrics."""
    listed = ", ".join(sets) or "no set at all"
    if config.score and all(rows.form.kind == "plain" for rows in sets.values()):
        raise ConfigError(
            f"score {config.score[0]!r} compares answers with completions, and the held-out rows have none "
            f"({listed}); give rows with a completion or a chat"
        )
    if config.calibrate and not any(rows.form.labels for rows in sets.values()):
        raise ConfigError(f"calibrate needs labels, and the held-out rows have none ({listed}); leave it out")
    if config.score:
        torchmetrics_text()


def task_scores(
    base: Base,
    forward: Forward,
    prompts: Mapping[str, SoftPrompt],
    sets: Mapping[str, Rows],
    config: ScoreConfig,
    max_length: int,
    seed: int = 0,
) -> list[TaskScore]:
    """Every score in `config`, of the bare base and each prompt, on each set that has answers.

    `max_length` (tokens, virtual ones not counted) is one for all; `seed` is the bootstrap's. Raises as
    `check_scores` and `greedy_answers` do.
    """
    names = tuple(dict.fromkeys(config.score))
    results: list[TaskScore] = []
    for set_name, rows in sets.items() if names else ():
        questions = questions_of(base, rows, config.score_rows)
        if questions.items:
            limits = (max_length, config.score_tokens)
            answers = {n: greedy_answers(base, forward, questions.items, p, *limits) for n, p in contenders(prompts)}
            results += [score for name in names for score in _scored(set_name, name, questions, answers, seed)]
    return results


def _scored(
    held_out: str, name: TextScore, questions: QuestionSet, answers: Mapping[str | None, Sequence[str]], seed: int
) -> Iterator[TaskScore]:
    references = [question.reference for question in questions.items]
    bare = text_scores(name, answers[None], references)
    for prompt, own in answers.items():
        values = bare if prompt is None else text_scores(name, own, references)
        yield _task_score(held_out, prompt, name, questions, values, None if prompt is None else bare, seed)


def _task_score(
    held_out: str,
    prompt: str | None,
    name: TextScore,
    questions: QuestionSet,
    values: Sequence[float],
    bare: Sequence[float] | None,
    seed: int,
) -> TaskScore:
    gaps = [ours - theirs for ours, theirs in zip(values, bare or values, strict=True)]
    rows = [question.index for question in questions.items]
    return TaskScore(
        held_out=held_out,
        prompt=prompt,
        name=name,
        value=sum(values) / len(values),
        num_rows=len(values),
        num_available=questions.num_available,
        difference=sum(gaps) / len(gaps) if bare is not None else None,
        interval=bootstrap_interval(gaps, [1] * len(gaps), seed) if bare is not None else None,
        better_rows=tuple(row for row, gap in zip(rows, gaps, strict=True) if gap > 0),
        worse_rows=tuple(row for row, gap in zip(rows, gaps, strict=True) if gap < 0),
    )


CRITERIA: tuple[Criterion, ...] = get_args(Criterion)


def criterion(base: Base, rows: Rows, name: Criterion) -> Callable[[SoftPrompt], float]:
    """A score of a prompt on these rows, from 0 to 1, higher is better; the base is not changed.

    `accuracy` and `f1_macro` are by label likelihood, or by the prompt's head where its task has one, which also has
    `f1` (of entities or answers) and `exact_match`; else the others score greedy answers, of all rows at every call.
    Raises ConfigError where the rows do not fit the score or the name is no score (training measures
    `loss` itself), DataError for a row whose completion is none of the labels, MissingDependencyError without
    torchmetrics.
    """
    if name != "loss" and rows.form.task != "generate":
        return _by_head(base, rows, name)
    if name in ("accuracy", "f1_macro"):
        return _by_labels(base, rows, name)
    for text_score in get_args(TextScore):
        if name == text_score:
            return _by_answers(base, rows, text_score)
    raise ConfigError(
        f"{name!r} is not a task score; known are {', '.join(known for known in CRITERIA if known != 'loss')}"
    )


def _by_head(base: Base, rows: Rows, name: Criterion) -> Callable[[SoftPrompt], float]:
    forward = forward_of(base)
    return lambda prompt: criterion_score(base, forward, rows, prompt, name)


def _by_labels(base: Base, rows: Rows, name: Criterion) -> Callable[[SoftPrompt], float]:
    labelled = with_labels(rows)
    if not labelled.form.labels:
        raise ConfigError(
            f"{name!r} needs labelled rows, and {rows.source} has no closed set of completions; "
            "choose another score, or a template whose completion is the label"
        )
    known, forward = labelled_rows(labelled), forward_of(base)

    def score(prompt: SoftPrompt) -> float:
        if prompt.record.form.task != "generate":  # which the base and the settings decide, not the rows
            return criterion_score(base, forward, rows, prompt, name)
        confusion = label_confusion(base, forward, known, prompt)
        if name == "accuracy":
            return share_right(confusion)
        return macro_f1(class_scores(known.labels, confusion), confusion)

    return score


def _by_answers(base: Base, rows: Rows, name: TextScore) -> Callable[[SoftPrompt], float]:
    questions = questions_of(base, rows).items
    if not questions:
        raise ConfigError(
            f"{name!r} compares answers with completions, and none of the {len(rows):,} rows of {rows.source} "
            "has one; choose another score, or rows with a completion or a chat"
        )
    forward = forward_of(base)
    torchmetrics_text()
    references = [question.reference for question in questions]

    def score(prompt: SoftPrompt) -> float:
        values = text_scores(name, greedy_answers(base, forward, questions, prompt), references)
        return sum(values) / len(values)

    return score


@dataclass(frozen=True)
class Question:
    """One row to be answered."""

    ids: tuple[int, ...]  # the text before the answer, BOS included, of any length
    reference: str
    num_reference_tokens: int
    index: int  # in the source
    is_chat: bool = False


@dataclass(frozen=True)
class QuestionSet:
    """The first rows of a set that have an answer."""

    items: tuple[Question, ...]
    num_available: int  # rows of the set that have an answer, in `items` or not


def questions_of(base: Base, rows: Rows, max_rows: int | None = None) -> QuestionSet:
    """The rows that have an answer, the first `max_rows` of them; none where the set is plain text.

    Raises DataError, naming the row, for one that cannot be written.
    """
    texts = render_rows(rows) if rows.form.kind != "plain" else []
    available = [(position, row) for position, row in enumerate(texts) if _has_answer(row)]
    asked = [_question(base, rows, position, row) for position, row in available[:max_rows]]
    return QuestionSet(tuple(asked), len(available))


def greedy_answers(
    base: Base,
    forward: Forward,
    questions: Sequence[Question],
    prompt: SoftPrompt | None,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
) -> list[str]:
    """One answer per question, ended by EOS or after one token more than the longest reference has.

    `max_new_tokens` lowers that limit, and so does `max_length`, the tokens of question and answer together. A question
    loses its start, as in training, only where it and its own reference do not fit.
    """
    limit = max_text_tokens(base, prompt, max_length)
    longest = 1 + max((question.num_reference_tokens for question in questions), default=0)
    cap = longest if max_new_tokens is None else min(longest, max_new_tokens)
    requests = []
    for question in questions:
        if base.kind == "seq2seq":  # the answer is not in the same text
            ids, room = truncate_start(base, question.ids, limit, is_chat=question.is_chat), limit
        else:
            ids = truncate_start(base, question.ids, limit - _reserved(base, question, limit, cap))
            room = limit - len(ids)
        requests.append(Request(ids, prompt, SamplingConfig(max_new_tokens=min(cap, room))))
    return [answer.text for answer in generate(base, requests, forward=forward)]


def _reserved(base: Base, question: Question, limit: int, cap: int) -> int:
    """Tokens reserved for the answer: those of its reference, if that leaves one token of the question."""
    return max(1, min(question.num_reference_tokens + 1, cap, limit - len(base.bos_ids) - 1))


class _Turn(NamedTuple):
    position: int  # among the messages
    text: str


def _last_turn(row: RowText) -> _Turn | None:
    """The assistant's last learned turn, if a message precedes it."""
    position = last_answer(row.messages)
    return None if position is None else _Turn(position, row.messages[position]["content"])


def _has_answer(row: RowText) -> bool:
    return not row.is_empty and (not row.messages or _last_turn(row) is not None)


def _question(base: Base, rows: Rows, position: int, row: RowText) -> Question:
    turn = _last_turn(row)
    if turn is None:
        ids, reference = source_ids(base, row.prompt), row.text
        num_tokens = len(completion_ids(base, row.prompt, row.text))
    else:
        ids = chat_prompt_ids(base, row.messages[: turn.position], rows.where(position))
        reference, num_tokens = turn.text, len(base.encode(turn.text))
    return Question(ids, reference, num_tokens, rows.indices[position], turn is not None)


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
    target = {"answers": {"answer_start": [0], "text": [reference]}, "id": "0"}
    return float(library.squad({"prediction_text": answer, "id": "0"}, target)[key]) / 100


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
    """Orders longer than the reference are left out: they would count as 0 even for an answer equal to it."""
    order = max(1, min(_CHRF_ORDER, len(reference.replace(" ", ""))))
    return float(library.chrf_score([answer], [[reference]], n_char_order=order, n_word_order=0))


_SCORES: Mapping[TextScore, Callable[[ModuleType, str, str], float]] = {
    "exact_match": _exact_match,
    "f1": _f1,
    "rouge_l": _rouge_l,
    "chrf": _chrf,
}
