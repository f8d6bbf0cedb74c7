"""What `train` and `sweep` share: train the candidates of one or more tasks in one pass, and record them.

A task is a set of rows; every candidate trains on every task, and the best of each task is kept.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from types import TracebackType
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from softprompt.base import Base
from softprompt.base.load import trainable_line
from softprompt.cli.console import print_json, print_table, say, words
from softprompt.config import DataConfig, TrainConfig
from softprompt.data import Split, held_out_record, report_lines
from softprompt.errors import ConfigError, DataError
from softprompt.evaluation import Verdict, criterion, verdict_of
from softprompt.prompt import SoftPrompt
from softprompt.runs import Recorder, RunFolder
from softprompt.runs.run_folder import TASKS_KEY
from softprompt.training import (
    Candidate,
    Checkpoint,
    Event,
    Prepared,
    Ranks,
    ResumePoint,
    RunState,
    StepDone,
    TrainResult,
    train_together,
)

# Of a labelled set at the end of a training; compare reads all of it.
_MOST_JUDGED_ROWS, _LEAST_JUDGED_ROWS = 100, 20
_MOST_JUDGED_LABELS = 1_000  # rows times labels: each label of a row is read


@dataclass(frozen=True, kw_only=True)
class Task:
    """The rows that one prompt is wanted for. `name` is empty where there is one task only."""

    name: str
    data: DataConfig
    seed: int  # that dealt the rows
    split: Split

    def facts(self) -> dict[str, Any]:
        """Where its rows came from, and which were held out."""
        test = held_out_record(self.split.test) if self.split.test is not None else None
        return {"data": {**asdict(self.data), "seed": self.seed, "folder": os.getcwd()}, "test": test}


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that is trained in one pass."""

    base: Base
    tasks: Sequence[Task]
    configs: Mapping[str, TrainConfig]  # of each candidate by name; "" for the only one
    start: SoftPrompt | None = None
    start_name: str | None = None
    halving: bool = False
    keeps_all: bool = False  # all candidates vote: none is dropped, and none is the best
    base_id: str | None = None  # what the adapters call their base, and load it from, in place of what was given
    command: str = "train"  # and its arguments: what goes on with the job where it was interrupted

    def facts(self) -> dict[str, Any]:
        """Those of its rows, by task where the tasks have names."""
        if not self.tasks[0].name:
            return self.tasks[0].facts()
        return {TASKS_KEY: {task.name: task.facts() for task in self.tasks}}

    def candidates(self) -> list[Candidate]:
        return [
            self._candidate(group, task, name, config)
            for group, task in enumerate(self.tasks)
            for name, config in self.configs.items()
        ]

    def _candidate(self, group: int, task: Task, name: str, config: TrainConfig) -> Candidate:
        validation = task.split.validation
        score = None
        if config.best_by != "loss" and validation is not None:
            score = criterion(self.base, validation, config.best_by)
        return Candidate(
            name="/".join(part for part in (task.name, name) if part) or None, data=task.split.train, config=config,
            validation=validation, start=self.start, score=score, group=group,
        )  # fmt: skip

    @property
    def is_one_prompt(self) -> bool:
        return [each.name for each in self.tasks] == [""] and list(self.configs) == [""]


def check_choice(job: Job) -> None:
    """Raises ConfigError where there is nothing to choose among candidates by."""
    missing = [task.data.data for task in job.tasks if task.split.validation is None]
    if len(job.configs) > 1 and missing and not job.keeps_all:
        raise ConfigError(
            f"{missing[0]} has no validation rows to choose among {len(job.configs)} candidates by; "
            "give a validation share (0.2, say) or file"
        )


def run_job(job: Job, recorder: Recorder, *, ranks: Ranks, as_json: bool) -> None:
    """Train, record, say and print. Ends with exit code 130 where it was interrupted. Raises as `train_together`."""
    check_choice(job)
    results = [replace(result, prompt=_with_base_id(job, result.prompt)) for result in _train(job, recorder, ranks)]
    if ranks.rank == 0:
        found = _verdicts(job, results) if ranks.count == 1 else {}
        outcome = _record(job, recorder, results, found)
        _say_results(job, recorder, results, found, shows=not as_json, num_ranks=ranks.count)
        if as_json:
            print_json({"out": str(recorder.place), **outcome})
    if results[0].interrupted:
        raise click.exceptions.Exit(130)


def _with_base_id(job: Job, prompt: SoftPrompt) -> SoftPrompt:
    """The same prompt, whose record names its base by --base-id."""
    if job.base_id is None:
        return prompt
    return SoftPrompt(prompt.tensor, replace(prompt.record, base_name=job.base_id, base_source=job.base_id))


def _train(job: Job, recorder: Recorder, ranks: Ranks) -> Sequence[TrainResult]:
    """Of several ranks, the first one records and shows."""
    with TrainingProgress() as progress:

        def sink(event: Event) -> None:
            if ranks.rank == 0:
                if isinstance(event, ResumePoint):
                    named = {name: _with_base_id(job, prompt) for name, prompt in event.prompts.items()}
                    event = replace(event, prompts=named)
                recorder.take(event)
                progress.take(event)

        def prepared(ready: Prepared) -> None:
            if ranks.rank == 0:
                recorder.begin(ready)
                _say_prepared(job, ready)
                progress.begin(max(trial.plan.num_steps for trial in ready.loop.trials))

        return train_together(
            job.base, job.candidates(), halving=job.halving, sink=sink, prepared=prepared, ranks=ranks,
            resume=_saved_state(recorder),
        )  # fmt: skip


def _saved_state(recorder: Recorder) -> RunState | None:
    if not recorder.resume:
        return None
    saved, problems = RunFolder(recorder.place).load_latest()
    for problem in problems:
        say(f"note: {problem}")
    return None if saved is None else RunState.from_json(saved.facts, saved.tensors)


def best_of(results: Sequence[TrainResult]) -> TrainResult:
    """The best by validation; the first of equals."""
    return min(results, key=lambda result: result.value)


def _by_task(job: Job, results: Sequence[TrainResult]) -> list[tuple[Task, Sequence[TrainResult]]]:
    each = len(job.configs)
    return [(task, results[index * each : (index + 1) * each]) for index, task in enumerate(job.tasks)]


def _verdicts(job: Job, results: Sequence[TrainResult]) -> dict[str, Verdict]:
    """How often the prompt kept for each labelled task is right, on rows that it was not trained on."""
    if results[0].interrupted:
        return {}
    judged = {task.name: _verdict(job.base, task, best_of(rivals)) for task, rivals in _by_task(job, results)}
    return {name: verdict for name, verdict in judged.items() if verdict is not None}


def _verdict(base: Base, task: Task, kept: TrainResult) -> Verdict | None:
    """On validation rows alone: test rows are `compare`'s."""
    form, rows = kept.prompt.record.form, task.split.validation
    if not form.labels:
        return None
    if rows is None:
        say("note: no validation rows, so nobody knows yet how often the prompt is right; softprompt compare shows it")
        return None
    num_rows = min(len(rows), _MOST_JUDGED_ROWS, max(_LEAST_JUDGED_ROWS, _MOST_JUDGED_LABELS // len(form.labels)))
    first = replace(rows.take(range(num_rows)), form=form)
    try:
        return verdict_of(base, "the validation set", first, task.name or "the prompt", kept.prompt)
    except DataError as error:
        say(f"note: no accuracy on the validation set: {error}")
        return None


def _held_out_facts(verdict: Verdict | None) -> dict[str, Any]:
    """What the prompt's record and the run's result keep of it."""
    if verdict is None:
        return {}
    known = verdict.baselines
    return {
        "held_out": {
            "rows": verdict.num_rows, "accuracy": verdict.accuracy, "interval": list(astuple(verdict.interval)),
            "majority": known.majority, "bare_base": known.template,
        }
    }  # fmt: skip


def _record(
    job: Job, recorder: Recorder, results: Sequence[TrainResult], verdicts: Mapping[str, Verdict]
) -> dict[str, Any]:
    for task, rivals in _by_task(job, results):
        others = rivals if len(rivals) > 1 else ()
        facts = {**task.facts(), **_held_out_facts(verdicts.get(task.name))}
        recorder.finish(best_of(rivals), others, facts, task.name, is_set=job.keeps_all)
    if job.is_one_prompt:
        found = {
            "content_hash": results[0].prompt.content_hash, **_outcome(results[0]), **_held_out_facts(verdicts.get("")),
        }  # fmt: skip
        recorder.end({"plan": results[0].plan.to_json(), "result": found})
        return found
    kept = {task.name: best_of(rivals).name for task, rivals in _by_task(job, results)}
    interrupted = results[0].interrupted
    outcome = {"kept": kept if any(kept) else kept[""], "interrupted": interrupted}
    candidates = {str(each.name): {"plan": each.plan.to_json(), "result": _summary(each)} for each in results}
    recorder.end({"candidates": candidates, "result": outcome})
    return {**outcome, "candidates": {str(each.name): _outcome(each) for each in results}}


def _summary(result: TrainResult) -> dict[str, Any]:
    """Without the loss of every step, which stands in `metrics.jsonl` and would be much for many candidates."""
    return {name: value for name, value in _outcome(result).items() if name != "losses"}


def _outcome(result: TrainResult) -> dict[str, Any]:
    found: dict[str, Any] = {
        "steps": len(result.losses),
        "kept_step": result.kept_step,
        "interrupted": result.interrupted,
        "losses": list(result.losses),
        "validation_losses": [list(pair) for pair in result.validation_losses],
    }
    if result.scores:
        found["scores"] = [list(pair) for pair in result.scores]
    if result.name is not None:
        found |= {"value": result.value, "dropped_after": result.dropped_after}
    if result.diverged_after is not None:
        found["diverged_after"] = result.diverged_after
    return found


def _say_prepared(job: Job, ready: Prepared) -> None:
    plan = ready.trial.plan
    say(trainable_line(job.base, plan.config.virtual_tokens))
    seen: list[object] = []
    for examples in (*ready.data, *ready.validation):
        if examples is not None and not any(examples is known for known in seen):
            seen.append(examples)
            for line in report_lines(examples.report):
                say(line)
    if job.is_one_prompt:
        start = plan.config.init if job.start_name is None else f"prompt {job.start_name}"
        say(
            f"{plan.num_steps} steps, start {start}, learning rate {plan.learning_rate:.3g} "
            f"({plan.learning_rate / plan.embedding_rms:.3g} x embedding RMS), {plan.config.schedule}, "
            f"seed {plan.config.seed}"
        )
    else:
        say(f"{len(ready.loop.trials)} prompts train together, {plan.num_steps} steps the first of them")
    for note in ready.notes:
        say(f"note: {note}")


def _say_results(
    job: Job, recorder: Recorder, results: Sequence[TrainResult], verdicts: Mapping[str, Verdict], *, shows: bool,
    num_ranks: int,
) -> None:  # fmt: skip
    first = results[0]
    place = shlex.quote(str(recorder.place))
    processes = f" --processes {num_ranks}" if num_ranks > 1 else ""
    if first.interrupted:
        kept = f"the prompt of step {first.kept_step} is" if job.is_one_prompt else "the prompts so far are"
        say(f"interrupted; {kept} kept; go on with: softprompt {job.command} --resume --out {place}{processes}")
    for verdict in verdicts.values():
        say(verdict.text)
    if not job.is_one_prompt:
        for task, rivals in _by_task(job, results) if shows else ():
            _show_candidates(job, task, rivals)
        say(f"saved to {recorder.place}")
        return
    if first.diverged_after is not None:
        say(f"note: {first.diverged_words}; the best before is kept")
    if first.losses:
        began, ended = recorder.epoch_loss(0), recorder.epoch_loss(-1)
        say(f"loss {began:.3f} in the first epoch, {ended:.3f} in the last (nats per target)")
    say(f"kept step {first.kept_step} of {len(first.losses)}, saved to {recorder.place}")


def _end_of(result: TrainResult) -> str:
    if result.diverged_after is not None:
        return ", diverged"
    return "" if result.dropped_after is None else ", dropped"


def _show_candidates(job: Job, task: Task, rivals: Sequence[TrainResult]) -> None:
    best = best_of(rivals)
    rows = [
        [
            str(result.name).rpartition("/")[2] + (" (kept)" if result is best else ""),
            f"{abs(result.value):.4f}" if result.validation_losses else "",
            f"{result.plan.learning_rate:.3g}",
            f"{result.plan.config.virtual_tokens}",
            job.start_name or result.plan.config.init,
            f"{result.plan.config.seed}",
            f"{result.kept_step} of {len(result.losses)}" + _end_of(result),
        ]
        for result in sorted(rivals, key=lambda result: result.value)
    ]
    columns = ["candidate", "validation", "learning rate", "tokens", "start", "seed", "step"]
    print_table(task.name or "Candidates", columns, rows, figures=True)


_LINE_EVERY_S = 5.0  # where stderr is no terminal


class TrainingProgress:
    """Use as a context; `begin` once the number of steps is known, then `take` every event."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(), console=words, disable=not words.is_terminal,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._tokens = 0
        self._began = self._last_line = 0.0
        self._num_steps = 0
        self._first_step = 0  # of this process; a resumed run has done some already
        self._validation = ""

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, num_steps: int) -> None:
        self._began = self._last_line = self._clock()
        self._num_steps = num_steps
        self._task = self._bar.add_task("training", total=num_steps, figures="")

    def take(self, event: Event) -> None:
        if isinstance(event, Checkpoint) and event.validation_loss is not None:
            self._validation = f", validation {event.validation_loss:.3f}"
        if isinstance(event, StepDone) and self._task is not None:
            self._tokens += event.num_tokens
            now = self._clock()
            rate = self._tokens / max(now - self._began, 1e-9)
            figures = f"loss {event.loss:.3f}{self._validation}, {rate:,.0f} tokens/s"
            self._bar.update(self._task, completed=event.step, figures=figures)
            self._first_step = self._first_step or event.step
            if self._bar.disable and now - self._last_line >= _LINE_EVERY_S:
                self._last_line = now
                say(f"step {event.step:,} of {self._num_steps:,}, {figures}, {self._left(event.step, now)} left")

    def _left(self, step: int, now: float) -> str:
        """Minutes and seconds at the rate until now."""
        done = step - self._first_step + 1
        seconds = round((now - self._began) / done * max(self._num_steps - step, 0))
        return f"{seconds // 60}:{seconds % 60:02d}"
