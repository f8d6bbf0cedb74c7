"""Task scores of generated text: greedy answers against the rows' own, with a paired bootstrap interval.

A score is the mean over rows, from 0 to 1, higher is better; what each name means stands in `text_scores`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from softprompt.base import Base
from softprompt.config import ScoreConfig, TextScore
from softprompt.data import Rows
from softprompt.errors import ConfigError
from softprompt.evaluation.contenders import contenders
from softprompt.evaluation.heldout import Interval, bootstrap_interval
from softprompt.evaluation.questions import Questions, ask, greedy_answers
from softprompt.evaluation.text_scores import text_scores, torchmetrics_text
from softprompt.families import Forward
from softprompt.prompt import SoftPrompt


@dataclass(frozen=True)
class TaskScore:
    """One score of one prompt (or, with `prompt` None, of the bare base) on one held-out set."""

    held_out: str  # the set's name
    prompt: str | None
    name: TextScore
    value: float  # mean over rows, 0 to 1
    num_rows: int
    num_available: int  # rows of the set that have an answer; more than `num_rows` where the set was cut
    difference: float | None  # value minus the base's on the same rows; above 0 is better
    interval: Interval | None  # of the difference, over rows, at 95 %; None for a single row
    better_rows: tuple[int, ...]  # source indices of the rows that the prompt answers better
    worse_rows: tuple[int, ...]  # and of those that it answers worse


def check_scores(config: ScoreConfig, sets: Mapping[str, Rows]) -> None:
    """Raises ConfigError where no set suits what is asked, MissingDependencyError without torchmetrics."""
    listed = ", ".join(sets) or "no set at all"
    if config.score and all(rows.form.kind == "plain" for rows in sets.values()):
        raise ConfigError(
            f"score {config.score[0]!r} compares answers with completions, and there is none in the held-out rows "
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
    """Every score asked for, of the bare base and each prompt, on each set that has answers; `seed` is the bootstrap's.

    `max_length` (tokens, virtual ones not counted) is one for all. Raises as `check_scores` and `greedy_answers` do.
    """
    names = tuple(dict.fromkeys(config.score))
    results: list[TaskScore] = []
    for set_name, rows in sets.items() if names else ():
        questions = ask(base, rows, config.score_rows)
        if questions.asked:
            limits = (max_length, config.score_tokens)
            said = {n: greedy_answers(base, forward, questions.asked, p, *limits) for n, p in contenders(prompts)}
            results += [score for name in names for score in _scored(set_name, name, questions, said, seed)]
    return results


def _scored(
    held_out: str, name: TextScore, questions: Questions, said: Mapping[str | None, Sequence[str]], seed: int
) -> Iterator[TaskScore]:
    references = [question.reference for question in questions.asked]
    bare = text_scores(name, said[None], references)
    for prompt, answers in said.items():
        values = bare if prompt is None else text_scores(name, answers, references)
        yield _measured(held_out, prompt, name, questions, values, None if prompt is None else bare, seed)


def _measured(
    held_out: str,
    prompt: str | None,
    name: TextScore,
    questions: Questions,
    values: Sequence[float],
    bare: Sequence[float] | None,
    seed: int,
) -> TaskScore:
    gaps = [ours - theirs for ours, theirs in zip(values, bare or values, strict=True)]
    rows = [question.index for question in questions.asked]
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
