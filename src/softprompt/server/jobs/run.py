"""One job's training, in the thread that trains: from its file to the prompt that is served.

It is `softprompt train` on the same rows with the same settings, and gives the same prompt to the bit. It stops where
it is told to between two slices; what it goes on from lies in the run's folder.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from softprompt.base import Base
from softprompt.compute_share import ComputeShare
from softprompt.config import KEPT_CHECKPOINTS, DataConfig, TrainConfig
from softprompt.data import Rows, Split, split_rows
from softprompt.errors import ConfigError, DatabaseError
from softprompt.evaluation import criterion
from softprompt.openmp import release_omp_threads
from softprompt.prompt import SoftPrompt
from softprompt.runs import Recorder, RunFolder
from softprompt.runs.run_folder import CHECKPOINTS_NAME
from softprompt.server.clients.client import Client
from softprompt.server.jobs.failures import code_and_param, is_of_disk, said
from softprompt.server.jobs.files import Files, StoredFile
from softprompt.server.jobs.records import TAKEN, JobRecords
from softprompt.server.jobs.results import add_results
from softprompt.server.jobs.schemas import Json
from softprompt.server.jobs.story import Story
from softprompt.server.prompts.registry import PromptRegistry
from softprompt.server.state.schema import JobRow
from softprompt.storage import load_prompt
from softprompt.training import (
    Candidate,
    Checkpoint,
    Event,
    Prepared,
    ResumePoint,
    RunState,
    StepDone,
    TrainResult,
    train_together,
)

_log = logging.getLogger(__name__)

Order = Literal["cancel", "pause", "stop"]  # stop: the server ends, and the job goes on when it is back
MAX_STEPS = 400_000  # the loss of each stands in the prompt's record
_SAVE_EVERY_S = 60.0  # what a killed server loses at most, slow validations apart


class Stopped(Exception):  # noqa: N818  # no error
    """Training ends here, because it was told to."""


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """What every job works with."""

    base: Base
    registry: PromptRegistry
    files: Files
    compute_share: ComputeShare
    records: JobRecords
    runs: Path  # a folder for each job's run
    starts: Path  # and one for the prompt that a job trains further
    count_trained: Callable[[int], None]  # tokens of each step, for the metrics


def model_name(base_name: str, row: JobRow) -> str:
    """What the job's prompt is called; spaces of the suffix become hyphens, as in OpenAI's names."""
    return f"ft:{base_name}:{'-'.join((row.suffix or '').split())}:{row.id}"


def checkpoint_name(model: str, step: int) -> str:
    return f"{model}:ckpt-step-{step}"


class JobRun:
    """One job until it succeeds, fails or is told to stop."""

    def __init__(self, row: JobRow, at: Workplace, order: Callable[[], Order | None]) -> None:
        """`order` is asked after each slice."""
        self._row, self._at, self._order = row, at, order
        self._client = Client(id=row.owner, is_admin=False)
        self._config = TrainConfig(**row.settings["train"])
        self._name = model_name(at.registry.base.id, row)
        self._folder = RunFolder(at.runs / row.id)
        self._story = Story(at.records, row)
        self._ready: Prepared | None = None
        self._saved_step = -1
        self._saved_at = time.monotonic()
        self._owes_validation = False  # what a step is followed by has not come yet: no state to go on from

    def run(self) -> None:
        """Raises DatabaseError alone. Afterwards nothing of the job is held, nor threads to compute with."""
        try:
            self._keep(self._train())
        except Stopped as stopped:
            self._end_stopped(str(stopped))
        except DatabaseError:  # nothing can be written down; whoever keeps the queue begins anew when it is back
            raise
        except Exception as error:
            self._end_failed(error)
        finally:
            self._ready = None
            release_omp_threads()

    def _train(self) -> TrainResult:
        self._check_base()
        self._story.say("reading the files")
        self._story.write()
        saved = self._saved()
        self._recorder = Recorder(
            self._folder.path, {"job": self._facts()}, overwrite=False, resume=self._folder.has_begun(),
            keep_checkpoints=KEPT_CHECKPOINTS, tensorboard=False,
        )  # fmt: skip
        with self._at.compute_share.training(self._obey):  # reading too: Python runs in one thread at a time
            return train_together(
                self._at.base, [self._candidate()], sink=self._take, prepared=self._begin, resume=saved
            )[0]

    def _check_base(self) -> None:
        if self._row.settings["base_fingerprint"] != self._at.base.fingerprint:
            raise ConfigError(
                f"the job was made for another base than {self._at.registry.base.id!r}, which is served now; "
                "make it anew"
            )

    def _candidate(self) -> Candidate:
        """As `softprompt train` makes it."""
        split, config, score = self._split(), self._config, None
        if config.best_by != "loss" and split.validation is not None:
            score = criterion(self._at.base, split.validation, config.best_by)
        return Candidate(
            data=split.train, config=config, validation=split.validation, start=self._start(), score=score
        )  # fmt: skip

    def _split(self) -> Split:
        train, validation = self._training_file(), self._validation_file()
        split = split_rows(data_config(train, validation), seed=self._config.seed)
        return replace(
            split,
            train=_called(split.train, train),
            validation=_called(split.validation, validation) if split.validation and validation else None,
        )

    def _training_file(self) -> StoredFile:
        return self._at.files.get(self._row.training_file, self._client)

    def _validation_file(self) -> StoredFile | None:
        wanted = self._row.validation_file
        return None if wanted is None else self._at.files.get(wanted, self._client)

    def _start(self) -> SoftPrompt | None:
        if not self._row.settings["has_start"]:
            return None
        return load_prompt(self._at.starts / self._row.id, self._at.base)

    def _saved(self) -> RunState | None:
        if not self._folder.has_begun():
            return None
        saved, problems = self._folder.load_latest()
        for problem in problems:
            _log.warning("job %s: %s", self._row.id, problem)
        return None if saved is None else RunState.from_json(saved.facts, saved.tensors)

    def _facts(self) -> Json:
        """What the run and the prompt's record say of where it comes from: no path of the server's."""
        row = self._row
        return {"id": row.id, "training_file": row.training_file, "validation_file": row.validation_file}

    def _begin(self, ready: Prepared) -> None:
        self._ready, step, total = ready, ready.loop.step, ready.trial.plan.num_steps
        if total > MAX_STEPS:
            raise ConfigError(f"the job would take {total:,} steps, more than {MAX_STEPS:,}; ask for fewer epochs")
        self._recorder.begin(ready)
        lines = self._folder.read_metrics()
        self._story.begin(step, total, sum(line.get("num_tokens", 0) for line in lines))
        self._story.say(f"goes on behind step {step:,} of {total:,}" if step else f"training begins: {total:,} steps")
        for note in ready.notes:
            self._story.say(note)
        if self._at.records.move(self._row.id, TAKEN, "running"):
            self._story.write()

    def _take(self, event: Event) -> None:
        self._take_and_record(event)
        self._obey()

    def _take_and_record(self, event: Event) -> None:
        self._recorder.take(event)
        if isinstance(event, StepDone):
            self._story.step(event)
            self._at.count_trained(event.num_tokens)
            self._owes_validation = self._trial_saves
        if isinstance(event, Checkpoint):
            self._serve(event)
        if isinstance(event, ResumePoint):
            self._owes_validation = False
            self._has_saved(event.step)
        if time.monotonic() - self._saved_at > _SAVE_EVERY_S and not self._owes_validation:
            self._save()
        self._story.write(now=isinstance(event, Checkpoint))

    @property
    def _trial_saves(self) -> bool:
        assert self._ready is not None
        return self._ready.trial.saving_is_due

    def _obey(self) -> None:
        """Stop here if told to. Within a step that is the state before it; within a validation it has to end first."""
        order = self._order()
        if order == "cancel":
            raise Stopped(order)
        if order is not None and not self._owes_validation:
            self._save()
            raise Stopped(order)

    def _save(self) -> None:
        if self._ready is None or self._ready.loop.step == self._saved_step:
            return
        loop = self._ready.loop
        prompts = {trial.name: trial.snapshot() for trial in loop.trials}
        self._recorder.take(ResumePoint(step=loop.step, state=loop.state(), prompts=prompts))
        self._has_saved(loop.step)

    def _has_saved(self, step: int) -> None:
        self._saved_step, self._saved_at = step, time.monotonic()

    def _serve(self, event: Checkpoint) -> None:
        """The prompt as it stands is a model too; of these the last few are kept."""
        name = checkpoint_name(self._name, event.step)
        self._put(event.prompt, name, "checkpoint", {"step": event.step})
        entry = {
            "id": f"ftckpt-{self._row.id.removeprefix('ftjob-')}-{event.step}", "step": event.step, "model": name,
            "created": time.time(), "metrics": self._story.checkpoint(event),
        }  # fmt: skip
        known = [each for each in self._story.outcome.get("checkpoints", []) if each["step"] != event.step]
        for old in known[: 1 - KEPT_CHECKPOINTS]:
            self._at.registry.forget(old["model"], self._row.owner)
        self._story.outcome["checkpoints"] = [*known[1 - KEPT_CHECKPOINTS :], entry]

    def _put(self, prompt: SoftPrompt, name: str, source: str, more: Mapping[str, Any]) -> SoftPrompt:
        run = {**prompt.record.run, "job": {**self._facts(), **more}}
        record = replace(prompt.record, base_source=None, run=run)  # a path of the server's is nobody else's business
        known = SoftPrompt(prompt.tensor, record)
        self._at.registry.keep(known, name=name, owner=self._row.owner, source=source, job=self._row.id)
        return known

    def _keep(self, result: TrainResult) -> None:
        """Served first, and then told so."""
        if result.diverged_after is not None:
            self._story.say(f"{result.diverged_words}; the best before is kept", "warn")
        prompt = self._put(result.prompt, self._name, "job", {"step": result.kept_step})
        self._recorder.finish(replace(result, prompt=prompt), (), {})
        self._recorder.end({"result": {"content_hash": prompt.content_hash, "kept_step": result.kept_step}})
        results = add_results(self._at.files, self._at.records, self._row.owner, self._folder.read_metrics())
        self._story.say(f"step {result.kept_step:,} is kept, and served as {self._name}")
        self._story.outcome |= {"estimated_finish": None, "result_files": [results]}
        has_moved = self._at.records.move(
            self._row.id, TAKEN, "succeeded", self._story.rest(), fine_tuned_model=self._name,
            finished=time.time(), outcome=self._story.outcome,
        )  # fmt: skip
        if has_moved:
            self._tidy()
        else:  # cancelled or paused at the very last moment
            self._at.registry.forget(self._name, self._row.owner)

    def _tidy(self) -> None:
        forget_state(self._at, self._row.id)

    def _end_stopped(self, order: str) -> None:
        """Whoever cancels or pauses a job has set its status."""
        self._story.outcome["estimated_finish"] = None
        if order == "stop":
            self._story.say("the server stops; the job goes on when it is back")
            outcome = {**self._story.outcome, "is_interrupted": True}
            self._at.records.move(self._row.id, TAKEN, "queued", self._story.rest(), outcome=outcome)
            return
        self._story.write()
        if order == "cancel":
            self._tidy()

    def _end_failed(self, error: Exception) -> None:
        message = said(error, self._paths())
        code, param = code_and_param(error)
        if param == "training_file" and self._names_validation_file(message):
            param = "validation_file"
        if code in ("server_error", "storage_error"):
            _log.error("job %s failed", self._row.id, exc_info=error)
        error.__traceback__ = None  # its frames hold tensors
        self._story.say(message, "error")
        outcome = {**self._story.outcome, "estimated_finish": None}
        if is_of_disk(error):
            self._at.records.move(self._row.id, TAKEN, "paused", self._story.rest(), outcome=outcome)
            return
        outcome["error"] = {"code": code, "message": message, "param": param}
        events, now = self._story.rest(), time.time()
        if self._at.records.move(self._row.id, TAKEN, "failed", events, outcome=outcome, finished=now):
            self._tidy()

    def _names_validation_file(self, message: str) -> bool:
        row = self._row
        return row.validation_file not in (None, row.training_file) and str(row.validation_file) in message

    def _paths(self) -> dict[str, str]:
        """The server's names of the files, and the client's."""
        wanted = (self._row.training_file, self._row.validation_file)
        places = {self._at.files.folder / f"{each}.jsonl": each for each in wanted if each is not None}
        return {str(known): each for place, each in places.items() for known in (place.absolute(), place)}


def forget_state(at: Workplace, job: str) -> None:
    """What a job that has ended goes on from is needed no longer; the plan and the metrics stay."""
    for folder in (at.runs / job / CHECKPOINTS_NAME, at.starts / job):
        shutil.rmtree(folder, ignore_errors=True)


def data_config(train: StoredFile, validation: StoredFile | None) -> DataConfig:
    """What `softprompt train` is told for such files."""
    held_out = None if validation is None else str(validation.path)
    if train.form == "template":
        return DataConfig(
            data=str(train.path), template="{prompt}", completion="{completion}", validation=held_out
        )  # fmt: skip
    if train.form == "chat":
        return DataConfig(data=str(train.path), messages_column="messages", validation=held_out)
    return DataConfig(data=str(train.path), text_column="text", validation=held_out)


def _called(rows: Rows, file: StoredFile) -> Rows:
    """The rows by the name that their owner knows."""
    return replace(rows, source=f"{file.id} ({file.filename})")
