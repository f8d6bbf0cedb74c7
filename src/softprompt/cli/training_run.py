"""What `train` and `sweep` print: a session's plan before it, its progress, and its results."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click

from softprompt.base import Base
from softprompt.base.load import trainable_line
from softprompt.cli.console import print_json, print_table, say
from softprompt.cli.progress import ProgressLine
from softprompt.data import report_lines
from softprompt.runs.recorder import Recorder
from softprompt.runs.session import TrainingSession, TrainingTask, best_of
from softprompt.training import Checkpoint, Event, Prepared, Ranks, StepDone, TrainResult
from softprompt.types import COUNTED


def run_session(
    base: Base, tasks: Sequence[TrainingTask], recorder: Recorder, *, ranks: Ranks, as_json: bool,
    halving: bool, ensemble: bool, base_id: str | None = None, start_name: str | None = None, command: str = "train",
) -> None:  # fmt: skip
    """Train, record and print. Ends with exit code 130 where it was interrupted. Raises as `TrainingSession.train`.

    `command` with its arguments is what resumes the run.
    """
    with training_progress() as progress:

        def on_start(ready: Prepared) -> None:
            _say_prepared(session, ready, start_name)
            progress.begin(max(trial.plan.num_steps for trial in ready.loop.trials), ready.loop.step)

        session = TrainingSession(
            base, tasks, recorder, halving=halving, ensemble=ensemble, base_id=base_id, ranks=ranks,
            on_start=on_start, on_event=progress.show, on_note=lambda note: say(f"note: {note}"),
        )  # fmt: skip
        results = session.train()
    interrupted = results[0].interrupted
    if ranks.rank == 0:
        judgements = session.judge(results)
        outcome = session.finish(results, judgements)
        if interrupted:
            _say_interrupted(session, results[0], command)
        if session.is_one_prompt:
            _say_result(session, results[0])
        else:
            if not as_json:
                _show_candidates(session, results, start_name)
            say(f"saved to {recorder.folder}")
        for name, judgement in judgements.items():
            line = f"{name}: {judgement.text}" if name else judgement.text
            say(line) if as_json else click.echo(line)
        if as_json:
            print_json({"out": str(recorder.folder), **outcome})
    if interrupted:
        raise click.exceptions.Exit(130)


def _say_prepared(session: TrainingSession, ready: Prepared, start_name: str | None) -> None:
    plan = ready.trial.plan
    say(trainable_line(session.base, len(ready.trial.start), ready.trial.num_head_parameters))
    for report in dict.fromkeys(
        examples.report for examples in (*ready.data, *ready.validation) if examples is not None
    ):
        for line in report_lines(report):
            say(line)
    for line in ready.task_lines:
        say(line)
    if session.is_one_prompt:
        start = plan.config.init if start_name is None else f"prompt {start_name}"
        say(
            f"{plan.num_steps} steps, start {start}, learning rate {plan.learning_rate:.3g} "
            f"({plan.learning_rate / plan.embedding_rms:.3g} x embedding RMS), {plan.config.schedule}, "
            f"seed {plan.config.seed}"
        )
    else:
        say(f"{len(ready.loop.trials)} prompts train together, {plan.num_steps} steps the first of them")
    for note in ready.notes:
        say(f"note: {note}")


def _say_interrupted(session: TrainingSession, first: TrainResult, command: str) -> None:
    kept = f"the prompt of step {first.kept_step} is" if session.is_one_prompt else "the prompts so far are"
    processes = f" --processes {session.ranks.count}" if session.ranks.count > 1 else ""
    folder = shlex.quote(str(session.recorder.folder))
    say(f"interrupted; {kept} kept; go on with: softprompt {command} --resume --out {folder}{processes}")


def _say_result(session: TrainingSession, only: TrainResult) -> None:
    if only.diverged_after is not None:
        say(f"note: {only.diverged_words}; the best before is kept")
    if only.losses:
        began, ended = session.recorder.epoch_loss(0), session.recorder.epoch_loss(-1)
        per = COUNTED.get(only.plan.task, "label" if only.plan.config.loss == "labels" else "target")
        say(f"loss {began:.3f} in the first epoch, {ended:.3f} in the last (nats per {per})")
    say(f"kept step {only.kept_step} of {len(only.losses)}, saved to {session.recorder.folder}")


def _show_candidates(session: TrainingSession, results: Sequence[TrainResult], start_name: str | None) -> None:
    columns = ["candidate", "validation", "learning rate", "tokens", "start", "seed", "step"]
    for task, rivals in session.by_task(results):
        best = best_of(rivals)
        ranked = sorted(rivals, key=lambda result: result.value)
        rows = [_candidate_row(result, result is best, start_name) for result in ranked]
        print_table(task.name or "Candidates", columns, rows, figures=True)


def _candidate_row(result: TrainResult, is_kept: bool, start_name: str | None) -> list[str]:
    config = result.plan.config
    end = "" if result.dropped_after is None else ", dropped"
    return [
        str(result.name).rpartition("/")[2] + (" (kept)" if is_kept else ""),
        f"{abs(result.value):.4f}" if result.validation_losses else "",
        f"{result.plan.learning_rate:.3g}",
        f"{config.virtual_tokens}",
        start_name or config.init,
        f"{config.seed}",
        f"{result.kept_step} of {len(result.losses)}" + (", diverged" if result.diverged_after is not None else end),
    ]


class TrainingProgress:
    """A training run as a progress line: loss, tokens per second, time left.

    `begin` once the number of steps is known, then `show` every event.
    """

    def __init__(self, line: ProgressLine) -> None:
        self._line = line
        self._tokens = 0
        self._validation = ""

    def begin(self, num_steps: int, num_before: int = 0) -> None:
        """`num_before` steps were done before the run was resumed."""
        self._line.begin(num_steps, num_before)

    def show(self, event: Event) -> None:
        if isinstance(event, Checkpoint) and event.validation_loss is not None:
            self._validation = f", validation {event.validation_loss:.3f}"
        if isinstance(event, StepDone):
            self._tokens += event.num_tokens
            rate = self._tokens / self._line.seconds
            self._line.show(event.step, f"loss {event.loss:.3f}{self._validation}, {rate:,.0f} tokens/s")


@contextmanager
def training_progress(clock: Callable[[], float] = time.perf_counter) -> Iterator[TrainingProgress]:
    """Shows a training while the context lasts."""
    with ProgressLine("training", "step", clock) as line:
        yield TrainingProgress(line)
