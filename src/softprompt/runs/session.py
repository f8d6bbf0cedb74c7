"""A training session: one or more prompts trained in one pass, resumed, recorded, stopped and finished.

It is the one way for `train`, `sweep`, `demo` and the server's jobs. Each of them brings its rows and settings, and
callbacks for what it shows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from softprompt.base import Base
from softprompt.config import DataConfig, TrainConfig
from softprompt.data import Split, held_out_record, task_of, with_split_task
from softprompt.errors import ConfigError, DataError
from softprompt.evaluation import criterion, judge
from softprompt.evaluation.classification import wilson_interval
from softprompt.prompt import Judgement, SoftPrompt
from softprompt.runs.recorder import Recorder
from softprompt.runs.run_folder import TASKS_KEY
from softprompt.training import (
    Alone,
    Candidate,
    Event,
    Prepared,
    Ranks,
    ResumePoint,
    RunState,
    TrainResult,
    train_together,
)
from softprompt.training.loop import TrainingLoop
from softprompt.training.train import as_started


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """The rows that one prompt is wanted for, and the candidates of which the best becomes it."""

    split: Split
    configs: Mapping[str, TrainConfig]  # of each candidate by name; "" for the only one
    name: str = ""  # empty where there is one task only
    start: SoftPrompt | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)  # of its rows, for `run.json` and the prompts' records

    def candidates(self, base: Base, group: int) -> list[Candidate]:
        return [self._candidate(base, group, name, config) for name, config in self.configs.items()]

    def as_begun(self, recorder: Recorder) -> TrainingTask:
        """With the defaults that the run was begun with, where it is resumed."""
        configs = recorder.as_begun(self.name, task_of(self.split.train.form), self.configs)
        return replace(self, configs=configs)

    def _candidate(self, base: Base, group: int, name: str, config: TrainConfig) -> Candidate:
        split = with_split_task(self.split, base, config if self.start is None else as_started(config, self.start))
        validation, score = split.validation, None
        if config.best_by != "loss" and validation is not None:
            score = criterion(base, validation, config.best_by)
        return Candidate(
            name="/".join(part for part in (self.name, name) if part) or None, data=split.train, config=config,
            validation=validation, start=self.start, score=score, group=group,
        )  # fmt: skip


def rows_metadata(data: DataConfig, seed: int, split: Split) -> dict[str, Any]:
    """Where a task's rows came from, and which of them were held out for what; `seed` dealt the rows."""
    test, validation = (None if rows is None else held_out_record(rows) for rows in (split.test, split.validation))
    settings = {**asdict(data), "validation": split.validation_setting}
    return {"data": {**settings, "seed": seed, "folder": os.getcwd()}, "test": test, "validation": validation}


def tasks_metadata(tasks: Sequence[TrainingTask]) -> dict[str, Any]:
    """The tasks' metadata for `run.json`, by task where the tasks have names."""
    if not tasks[0].name:
        return dict(tasks[0].metadata)
    return {TASKS_KEY: {task.name: task.metadata for task in tasks}}


def best_of(results: Sequence[TrainResult]) -> TrainResult:
    """The best by validation; the first of equals."""
    return min(results, key=lambda result: result.value)


class SessionStopped(Exception):  # noqa: N818  # no error
    """The training was asked to stop; the argument is the reason."""


class TrainingSession:
    """Trains the candidates of all tasks together on one base, and keeps the best of each task.

    Of several ranks only the first one records and calls back.
    """

    def __init__(
        self, base: Base, tasks: Sequence[TrainingTask], recorder: Recorder, *, halving: bool = False,
        ensemble: bool = False, base_id: str | None = None, ranks: Ranks | None = None, max_steps: int | None = None,
        save_every_s: float | None = None, should_stop: Callable[[], str | None] = lambda: None,
        on_start: Callable[[Prepared], None] = lambda ready: None,
        on_event: Callable[[Event], None] = lambda event: None, on_note: Callable[[str], None] = lambda note: None,
    ) -> None:  # fmt: skip
        """`ensemble` keeps all candidates as a set that votes. `base_id` is the base's name in the adapters.

        `save_every_s` saves the state that often, besides the configured saves. `should_stop` gives the reason to stop
        as soon as there is one; it may raise SessionStopped itself, to stop without saving. `on_note` gets sentences
        for the user.
        """
        self.base, self.recorder, self.ranks = base, recorder, ranks or Alone()
        self.tasks = [task.as_begun(recorder) for task in tasks]
        self.halving, self.ensemble = halving and not ensemble, ensemble
        self._base_id, self._max_steps, self._save_every_s = base_id, max_steps, save_every_s
        self._should_stop, self._on_start, self._on_event, self._on_note = should_stop, on_start, on_event, on_note
        self._loop: TrainingLoop | None = None
        self._saved_step = -1
        self._saved_at = time.monotonic()

    @property
    def is_one_prompt(self) -> bool:
        return [task.name for task in self.tasks] == [""] and list(self.tasks[0].configs) == [""]

    def train(self) -> list[TrainResult]:
        """Train from the start, or from the last checkpoint where the recorder resumes a run.

        Raises SessionStopped, with the state saved, where `should_stop` says so, and whatever `train_together` raises.
        """
        self._check_choice()
        candidates = [each for group, task in enumerate(self.tasks) for each in task.candidates(self.base, group)]
        try:
            results = train_together(
                self.base, candidates, halving=self.halving, sink=self._take, prepared=self._begin, ranks=self.ranks,
                resume=self._saved_state(),
            )  # fmt: skip
        finally:
            self._loop = None
        return [replace(result, prompt=self._with_base_id(result.prompt)) for result in results]

    def check_stop(self) -> None:
        """Stop if asked to, at a state from which the run can be resumed; raises SessionStopped.

        In the middle of a step that is the state before it; a pending validation is finished first.
        """
        reason = self._should_stop()
        if reason is not None and self._save():
            raise SessionStopped(reason)

    def by_task(self, results: Sequence[TrainResult]) -> list[tuple[TrainingTask, Sequence[TrainResult]]]:
        """Each task with the results of its candidates."""
        left = iter(results)
        return [(task, [next(left) for _ in task.configs]) for task in self.tasks]

    def judge(self, results: Sequence[TrainResult]) -> dict[str, Judgement]:
        """By task: the kept prompt beside the bare base on the validation rows, where these have labels or a score.

        None of an interrupted run, or of a base that is sharded over ranks. Test rows are left to `compare`.
        """
        if results[0].interrupted or (self.ranks.count > 1 and self.ranks.in_step):
            return {}
        judged = {task.name: self._judgement(task, best_of(rivals)) for task, rivals in self.by_task(results)}
        return {name: judgement for name, judgement in judged.items() if judgement is not None}

    def finish(
        self, results: Sequence[TrainResult], judgements: Mapping[str, Judgement] | None = None
    ) -> dict[str, Any]:
        """Write the kept prompts and the result into the run's folder; returns the result with every step's loss."""
        held_out = {name: held_out_metadata(judgement) for name, judgement in (judgements or {}).items()}
        for task, rivals in self.by_task(results):
            metadata = {**task.metadata, **held_out.get(task.name, {})}
            others = rivals if len(rivals) > 1 else ()
            self.recorder.save_prompts(best_of(rivals), others, metadata, task.name, is_set=self.ensemble)
        if self.is_one_prompt:
            only = results[0]
            result = {"content_hash": only.prompt.content_hash, **only.to_json(), **held_out.get("", {})}
            self.recorder.end({"plan": only.plan.to_json(), "result": result})
            return result
        kept = {task.name: best_of(rivals).name for task, rivals in self.by_task(results)}
        result = {"kept": kept if any(kept) else kept[""], "interrupted": results[0].interrupted, **_by_task(held_out)}
        candidates = {str(each.name): each.to_json() for each in results}
        self.recorder.end({
            "candidates": {
                str(each.name): {"plan": each.plan.to_json(), "result": _without_losses(each.to_json())}
                for each in results
            },
            "result": result,
        })  # fmt: skip
        return {**result, "candidates": candidates}

    def _check_choice(self) -> None:
        """Raises ConfigError where there is nothing to choose among candidates by."""
        for task in self.tasks:
            if len(task.configs) > 1 and task.split.validation is None and not self.ensemble:
                source = task.metadata["data"]["data"] if "data" in task.metadata else task.split.train.source
                raise ConfigError(
                    f"{source} has no validation rows to choose among {len(task.configs)} candidates by; "
                    "give a validation share (0.2, say) or file"
                )

    def _saved_state(self) -> RunState | None:
        saved, problems = self.recorder.load_latest()
        for problem in problems:
            self._on_note(problem)
        return None if saved is None else RunState.from_json(saved.state, saved.tensors)

    def _begin(self, ready: Prepared) -> None:
        if self.ranks.rank != 0:
            return
        num_steps = max(trial.plan.num_steps for trial in ready.loop.trials)
        if self._max_steps is not None and num_steps > self._max_steps:
            raise ConfigError(
                f"the job would take {num_steps:,} steps, more than {self._max_steps:,}; ask for fewer epochs"
            )
        self.recorder.begin(ready)
        self._loop = ready.loop
        self._on_start(ready)

    def _take(self, event: Event) -> None:
        if self.ranks.rank != 0:
            return
        self._record(event)
        self._on_event(event)
        if self._save_every_s is not None and time.monotonic() - self._saved_at > self._save_every_s:
            self._save()
        self.check_stop()

    def _record(self, event: Event) -> None:
        if isinstance(event, ResumePoint):
            event = replace(event, prompts={name: self._with_base_id(each) for name, each in event.prompts.items()})
        self.recorder.record(event)
        if isinstance(event, ResumePoint):
            self._saved_step, self._saved_at = event.step, time.monotonic()

    def _save(self) -> bool:
        """Save the current state; False while a validation is pending."""
        if self._loop is None or self._loop.step == self._saved_step:
            return True
        point = self._loop.resume_point()
        if point is not None:
            self._record(point)
        return point is not None

    def _with_base_id(self, prompt: SoftPrompt) -> SoftPrompt:
        if self._base_id is None:
            return prompt
        record = replace(prompt.record, base_name=self._base_id, base_source=self._base_id)
        return replace(prompt, record=record)

    def _judgement(self, task: TrainingTask, kept: TrainResult) -> Judgement | None:
        form, rows = kept.prompt.record.form, task.split.validation
        if rows is None:
            if form.labels:
                self._on_note("no validation rows, so the prompt's accuracy is unknown; softprompt compare measures it")
            return None
        best_by, num_rows = kept.plan.config.best_by, len(task.split.train)
        try:
            return judge(self.base, replace(rows, form=form), kept.prompt, best_by, train_rows=num_rows)
        except DataError as error:
            self._on_note(f"no accuracy on the validation set: {error}")
            return None


def held_out_metadata(judgement: Judgement) -> dict[str, Any]:
    """The part of a judgement that the prompt's record and the run's result keep."""
    figures = judgement.to_json()
    if judgement.measure == "accuracy":
        interval = wilson_interval(round(judgement.prompt * judgement.rows), judgement.rows)
        figures |= {"accuracy": judgement.prompt, "interval": [interval.low, interval.high]}
    return {"held_out": figures, "recommendation": judgement.recommendation}


def _by_task(held_out: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The same of several tasks, by their names; plain where there is one task without a name."""
    if "" in held_out:
        return dict(held_out[""])
    keys = ("held_out", "recommendation") if held_out else ()
    return {key: {name: found[key] for name, found in held_out.items()} for key in keys}


def _without_losses(result: Mapping[str, Any]) -> dict[str, Any]:
    """The losses are in `metrics.jsonl` too, and would be long for many candidates."""
    return {name: value for name, value in result.items() if name != "losses"}
