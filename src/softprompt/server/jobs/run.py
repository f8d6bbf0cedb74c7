"""One job's training, in the training thread: from its file to the prompt that is served.

It is a `TrainingSession` as in `softprompt train`, on the same rows with the same settings, and gives the same prompt
to the bit. It stops between two slices when asked to; the run's folder holds what it resumes from.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from softprompt import errors
from softprompt.base import Base
from softprompt.compute_share import ComputeShare
from softprompt.config import KEPT_CHECKPOINTS, DataConfig, TrainConfig
from softprompt.data import Rows, Split, held_out_record, split_rows, task_of, with_split_task
from softprompt.errors import ConfigError, DatabaseError
from softprompt.openmp import release_omp_threads
from softprompt.prompt import Judgement, SoftPrompt
from softprompt.runs import RunFolder
from softprompt.runs.recorder import Recorder
from softprompt.runs.run_folder import CHECKPOINTS_NAME
from softprompt.runs.session import SessionStopped, TrainingSession, TrainingTask, held_out_metadata
from softprompt.server.clients.keys import Client
from softprompt.server.errors import ApiError
from softprompt.server.jobs.files import Files, StoredFile
from softprompt.server.jobs.records import TAKEN, JobEventLog, JobRecords, add_results
from softprompt.server.jobs.schemas import Json
from softprompt.server.jobs.settings import with_rate
from softprompt.server.prompts.registry import PromptRegistry
from softprompt.server.state.schema import JobRow
from softprompt.storage import load_prompt
from softprompt.training import Checkpoint, Event, Prepared, StepDone, TrainResult
from softprompt.training.train import as_started
from softprompt.types import NO_VALIDATION

_log = logging.getLogger(__name__)

StopSignal = Literal["cancel", "pause", "stop"]  # stop: the server ends, and the job is resumed at its next start
MAX_STEPS = 400_000  # the prompt's record keeps the loss of each
_SAVE_EVERY_S = 60.0  # work that a killed server loses at most, slow validations apart
_LONGEST_MESSAGE = 2_000  # characters
_NO_MEMORY = ("out of memory", "can't allocate memory")  # torch's words, on a GPU and on a CPU
# OpenAI's `code` and `param` for what ended a job. A request's are in `server/errors.py`: its fields are others.
_CODES: tuple[tuple[type[Exception], str, str | None], ...] = (
    (errors.DataError, "invalid_file", "training_file"),
    (errors.ConfigError, "invalid_hyperparameters", "method"),
    (errors.PromptError, "invalid_prompt", "model"),
    (errors.DivergedError, "training_diverged", "method"),
    (errors.MemoryLimitError, "out_of_memory", None),
    (errors.MissingDependencyError, "not_installed", "method"),
    (errors.StorageError, "storage_error", None),
)


@dataclass(frozen=True, kw_only=True)
class JobContext:
    """Everything that all jobs share."""

    base: Base
    registry: PromptRegistry
    files: Files
    compute_share: ComputeShare
    records: JobRecords
    runs: Path  # with a folder for each job's run
    starts: Path  # with a folder for the prompt that a job trains further
    count_trained: Callable[[int], None]  # adds a step's tokens to the metrics


def model_name(base_name: str, row: JobRow) -> str:
    """The name of the job's prompt; spaces of the suffix become hyphens, as in OpenAI's names."""
    return f"ft:{base_name}:{'-'.join((row.suffix or '').split())}:{row.id}"


def checkpoint_name(model: str, step: int) -> str:
    return f"{model}:ckpt-step-{step}"


class JobRun:
    """One job until it succeeds, fails or is stopped."""

    def __init__(self, row: JobRow, context: JobContext, stop_signal: Callable[[], StopSignal | None]) -> None:
        """`stop_signal` is called between two slices."""
        self._row, self._context, self.stop_signal = row, context, stop_signal
        self._client = Client(id=row.owner, is_admin=False)
        self._config = TrainConfig.of_record(row.settings["train"])
        self._name = model_name(context.registry.base.id, row)
        self._folder = RunFolder(context.runs / row.id)
        self._events = JobEventLog(context.records, row)
        self._session: TrainingSession | None = None

    def run(self) -> None:
        """Raises DatabaseError alone. Afterwards no tensor of the job is left, nor a thread that computed."""
        try:
            with self._context.compute_share.training(
                self._check_stop
            ):  # reading too: Python runs in one thread at a time
                session = self._session = self._open_session()
                (result,) = session.train()
                judgements = session.judge([result])
            self._succeed(session, result, judgements)
        except SessionStopped as stopped:
            self._end_stopped(str(stopped))
        except DatabaseError:  # nothing can be written; the queue's thread begins anew when the database is back
            raise
        except Exception as error:
            self._end_failed(error)
        finally:
            self._session = None
            release_omp_threads()

    def _open_session(self) -> TrainingSession:
        self._check_base()
        self._events.add("reading the files")
        self._events.write()
        start = self._start()
        config = self._config if start is None else as_started(self._config, start)
        split = with_split_task(self._split(), self._context.base, config)
        rows = {"validation": None if split.validation is None else held_out_record(split.validation)}
        metadata = {"job": {**self._metadata(), "validation": self._setting_to_resume(split)}, **rows}
        recorder = Recorder(self._folder.path, metadata, resume=self._folder.has_begun())
        multiplier = self._row.settings.get("learning_rate_multiplier")
        config = with_rate(self._config, multiplier, task_of(split.train.form))
        task = TrainingTask(split=split, configs={"": config}, start=start, metadata=rows)
        return TrainingSession(
            self._context.base, [task], recorder, max_steps=MAX_STEPS, save_every_s=_SAVE_EVERY_S,
            should_stop=self._should_stop, on_start=self._started, on_event=self.handle_event,
            on_note=lambda note: _log.warning("job %s: %s", self._row.id, note),
        )  # fmt: skip

    def _check_base(self) -> None:
        if self._row.settings["base_fingerprint"] != self._context.base.fingerprint:
            raise ConfigError(
                f"the job was made for another base than {self._context.registry.base.id!r}, which is served now; "
                "make it anew"
            )

    def _check_stop(self) -> None:
        if self._session is not None:
            self._session.check_stop()
        elif (signal := self._should_stop()) is not None:  # still reading
            raise SessionStopped(signal)

    def _should_stop(self) -> StopSignal | None:
        signal = self.stop_signal()
        if signal == "cancel":  # there is nothing to save
            raise SessionStopped(signal)
        return signal

    def _split(self) -> Split:
        files, wanted = self._context.files, self._row.validation_file
        train = files.get(self._row.training_file, self._client)
        validation = None if wanted is None else files.get(wanted, self._client)
        config = data_config(train, validation or self._validation(), self._row.settings.get("template"))
        split = split_rows(
            config, seed=self._config.seed, scored=self._config.best_by != "loss", task=self._config.task
        )
        held_out = split.validation
        return replace(
            split,
            train=_with_owners_name(split.train, train),
            validation=None if held_out is None else _with_owners_name(held_out, validation or train),
        )

    def _validation(self) -> str | None:
        """Which of the training file's rows are kept for validation, where no other file has them.

        A job that was begun keeps those that it was begun with; earlier releases kept none.
        """
        if self._folder.has_begun():
            return self._folder.read_plan()["job"].get("validation") or NO_VALIDATION
        return self._row.settings.get("validation")

    def _setting_to_resume(self, split: Split) -> str | None:
        return split.validation_setting if self._row.validation_file is None else None

    def _start(self) -> SoftPrompt | None:
        if not self._row.settings["has_start"]:
            return None
        return load_prompt(self._context.starts / self._row.id, self._context.base)

    def _metadata(self) -> Json:
        """The prompt's origin for the run and the prompt's record: no path of the server's."""
        row = self._row
        return {"id": row.id, "training_file": row.training_file, "validation_file": row.validation_file}

    def _started(self, ready: Prepared) -> None:
        step, total = ready.loop.step, ready.trial.plan.num_steps
        trained_tokens = sum(line.get("num_tokens", 0) for line in self._folder.read_metrics())
        self._events.start(step, total, trained_tokens)
        self._events.add(
            f"training continues after step {step:,} of {total:,}" if step else f"training begins: {total:,} steps"
        )
        for note in (*ready.task_lines, *ready.notes):
            self._events.add(note)
        plan = ready.trial.plan
        self._events.outcome |= {"task": plan.task, "settings": asdict(plan.config)}
        if self._context.records.move(self._row.id, TAKEN, "running"):
            self._events.write()

    def handle_event(self, event: Event) -> None:
        """Report an event of the training, which is recorded already, and serve a checkpoint."""
        if isinstance(event, StepDone):
            self._events.add_step(event)
            self._context.count_trained(event.num_tokens)
        if isinstance(event, Checkpoint):
            self._serve(event)
        self._events.write(now=isinstance(event, Checkpoint))

    def _serve(self, event: Checkpoint) -> None:
        """Serve the checkpoint as a model of its own; only the last few are kept."""
        name = checkpoint_name(self._name, event.step)
        self._keep(event.prompt, name, "checkpoint", {"step": event.step})
        entry = {
            "id": f"ftckpt-{self._row.id.removeprefix('ftjob-')}-{event.step}", "step": event.step, "model": name,
            "created": time.time(), "metrics": self._events.add_checkpoint(event),
        }  # fmt: skip
        known = [each for each in self._events.outcome.get("checkpoints", []) if each["step"] != event.step]
        for old in known[: 1 - KEPT_CHECKPOINTS]:
            self._context.registry.forget(old["model"], self._row.owner)
        self._events.outcome["checkpoints"] = [*known[1 - KEPT_CHECKPOINTS :], entry]

    def _keep(
        self,
        prompt: SoftPrompt,
        name: str,
        source: str,
        more: Mapping[str, Any],
        judged: Mapping[str, Any] | None = None,
    ) -> SoftPrompt:
        run = {**prompt.record.run, "job": {**self._metadata(), **more}, **(judged or {})}
        record = replace(prompt.record, base_source=None, run=run)  # no client sees a path of the server's
        kept = replace(prompt, record=record)
        self._context.registry.keep(kept, name=name, owner=self._row.owner, source=source, job=self._row.id)
        return kept

    def _succeed(self, session: TrainingSession, result: TrainResult, judgements: Mapping[str, Judgement]) -> None:
        """Serve the prompt first, and then report it, and whether it helps."""
        records, row = self._context.records, self._row
        if result.diverged_after is not None:
            self._events.add(f"{result.diverged_words}; the best before is kept", "warn")
        judgement = judgements.get("")
        judged = {} if judgement is None else held_out_metadata(judgement)
        prompt = self._keep(result.prompt, self._name, "job", {"step": result.kept_step}, judged)
        session.finish([replace(result, prompt=prompt)], judgements)
        results = add_results(self._context.files, records, row.owner, self._folder.read_metrics())
        self._events.add(f"step {result.kept_step:,} is kept, and served as {self._name}")
        if judgement is not None:
            self._events.add(judgement.text, "warn" if judgement.recommendation == "bare base" else "info")
        self._events.outcome |= {"estimated_finish": None, "result_files": [results], **judged}
        has_moved = records.move(
            row.id, TAKEN, "succeeded", self._events.pop_unwritten(), fine_tuned_model=self._name,
            finished=time.time(), outcome=self._events.outcome,
        )  # fmt: skip
        if has_moved:
            forget_state(self._context, row.id)
        else:  # cancelled or paused at the very last moment
            self._context.registry.forget(self._name, row.owner)

    def _end_stopped(self, signal: str) -> None:
        """The status of a cancelled or paused job is set already."""
        self._events.outcome["estimated_finish"] = None
        if signal == "stop":
            self._events.add("the server stops; the job is resumed when it is back")
            outcome = {**self._events.outcome, "is_interrupted": True}
            events = self._events.pop_unwritten()
            self._context.records.move(self._row.id, TAKEN, "queued", events, outcome=outcome)
            return
        self._events.write()
        if signal == "cancel":
            forget_state(self._context, self._row.id)

    def _end_failed(self, error: Exception) -> None:
        message = errors.truncated(_message(error, self._paths()), _LONGEST_MESSAGE)
        code, param = _code_and_param(error)
        if param == "training_file" and self._names_validation_file(message):
            param = "validation_file"
        if code in ("server_error", "storage_error"):
            _log.error("job %s failed", self._row.id, exc_info=error)
        error.__traceback__ = None  # its frames hold tensors
        self._events.add(message, "error")
        outcome, records = {**self._events.outcome, "estimated_finish": None}, self._context.records
        if _can_be_resumed(error):
            records.move(self._row.id, TAKEN, "paused", self._events.pop_unwritten(), outcome=outcome)
            return
        outcome["error"] = {"code": code, "message": message, "param": param}
        events, now = self._events.pop_unwritten(), time.time()
        if records.move(self._row.id, TAKEN, "failed", events, outcome=outcome, finished=now):
            forget_state(self._context, self._row.id)

    def _names_validation_file(self, message: str) -> bool:
        row = self._row
        return row.validation_file not in (None, row.training_file) and str(row.validation_file) in message

    def _paths(self) -> dict[str, str]:
        """The server's paths of the files, and the client's names of them."""
        wanted = (self._row.training_file, self._row.validation_file)
        places = {self._context.files.folder / f"{each}.jsonl": each for each in wanted if each is not None}
        return {str(known): each for place, each in places.items() for known in (place.absolute(), place)}


def forget_state(context: JobContext, job: str) -> None:
    """Delete the state that an ended job would resume from; the plan and the metrics stay."""
    for folder in (context.runs / job / CHECKPOINTS_NAME, context.starts / job):
        shutil.rmtree(folder, ignore_errors=True)


def data_config(train: StoredFile, validation: StoredFile | str | None, template: str | None = None) -> DataConfig:
    """The settings with which `softprompt train` reads such files; `validation` may be a part of the training file.

    `template` is for texts with labels.
    """
    held_out = str(validation.path) if isinstance(validation, StoredFile) else validation
    if train.form == "template":
        return DataConfig(
            data=str(train.path), template="{prompt}", completion="{completion}", validation=held_out
        )  # fmt: skip
    if train.form == "chat":
        return DataConfig(data=str(train.path), messages_column="messages", validation=held_out)
    if train.form == "label":
        text_column = "text" if template is None else None
        return DataConfig(
            data=str(train.path), text_column=text_column, template=template, label_column="label", validation=held_out
        )  # fmt: skip
    if train.form in ("tag", "answer", "embed"):  # by the names of their columns
        return DataConfig(data=str(train.path), validation=held_out)
    return DataConfig(data=str(train.path), text_column="text", validation=held_out)


def _with_owners_name(rows: Rows, file: StoredFile) -> Rows:
    """The rows, named as their owner knows the file; their notes name hyperparameters in place of flags."""
    flag, ours = f"--validation {NO_VALIDATION}", f"the hyperparameter validation {NO_VALIDATION!r}"
    notes = tuple(note.replace(flag, ours) for note in rows.notes)
    return replace(rows, source=f"{file.id} ({file.filename})", notes=notes)


def _code_and_param(error: Exception) -> tuple[str, str | None]:
    if isinstance(error, ApiError):
        return error.code or "invalid_request", error.param
    if _is_of_memory(error):
        return "out_of_memory", None
    return next(((code, param) for kind, code, param in _CODES if isinstance(error, kind)), ("server_error", None))


def _message(error: Exception, names: Mapping[str, str]) -> str:
    """The sentence for the job's owner, without traceback; `names` replaces the server's paths by the client's ids."""
    if isinstance(error, ApiError):
        return error.message
    if _can_be_resumed(error):
        return "the server could not read or write the job's files and has paused it; resume it when there is room"
    if isinstance(error, errors.SoftpromptError) and not isinstance(error, errors.StorageError):
        text = str(error)
        for path, name in names.items():
            text = text.replace(path, name)
        return text
    if _is_of_memory(error):
        return "the memory does not hold a step of this job; ask for fewer rows per step, or shorter ones"
    return "the job has failed for a reason that lies with the server; its log says why"


def _can_be_resumed(error: Exception) -> bool:
    """The disk is full, say."""
    return type(error) in (errors.StorageError, errors.ExistsError)


def _is_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return not isinstance(error, errors.SoftpromptError)
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)
