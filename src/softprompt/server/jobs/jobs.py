"""Fine-tuning jobs: created by clients, trained one at a time in a thread of their own, beside the engine's.

The queue is in the database and outlives the process. Clients take turns: next is the oldest job of the client whose
last turn is longest ago. A status changes in the database first; then the running training gets its stop signal.
"""

from __future__ import annotations

import logging
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from softprompt.base import Base
from softprompt.compute_share import ComputeShare
from softprompt.config import ServerConfig, TrainConfig
from softprompt.data.split import LEAST_SPLIT_ROWS
from softprompt.errors import shortened
from softprompt.prompt import SoftPrompt
from softprompt.server.clients.keys import Client
from softprompt.server.clients.quotas import Amounts, Quotas
from softprompt.server.errors import ApiError
from softprompt.server.jobs.files import Files, StoredFile
from softprompt.server.jobs.records import ACTIVE, OPEN, JobRecords, NewEvent
from softprompt.server.jobs.run import JobContext, JobRun, StopSignal, forget_state
from softprompt.server.jobs.schemas import CreateJob, Json
from softprompt.server.jobs.settings import (
    JobSettings,
    check_job_task,
    check_rows,
    job_settings,
    template_setting,
    validation_setting,
)
from softprompt.server.prompts.registry import PromptRegistry
from softprompt.server.state.database import Database
from softprompt.server.state.schema import JobEventRow, JobRow
from softprompt.storage import save_prompt
from softprompt.storage.library import NAME
from softprompt.types import NO_VALIDATION

_log = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")  # of a job or an event
_RETRY_AFTER_S = 60.0
_LOOK_AGAIN_S = 5.0  # where nothing woke the thread; for revoked keys also while a job runs


class Jobs:
    """The jobs of all clients; each sees its own."""

    def __init__(
        self, base: Base, config: ServerConfig, database: Database, registry: PromptRegistry, files: Files,
        compute_share: ComputeShare, count_trained: Callable[[int], None] = lambda num_tokens: None,
        quotas: Quotas | None = None,
    ) -> None:  # fmt: skip
        state = Path(config.state)
        self._context = JobContext(
            base=base, registry=registry, files=files, compute_share=compute_share, records=JobRecords(database),
            runs=state / "jobs", starts=state / "starts",
            count_trained=count_trained,
        )  # fmt: skip
        self._max_jobs = config.max_jobs
        self._quotas = quotas
        self._records = self._context.records
        self._gate = threading.Lock()  # of the limits: two requests at once may not both be the last
        self._woken = threading.Event()
        self._is_stopping = False
        self._signals: dict[str, StopSignal] = {}
        self._current: str | None = None
        self._looked_at = 0.0  # for revoked keys, by the monotonic clock
        self._thread = threading.Thread(target=self._work, name="softprompt-training", daemon=True)

    def start(self) -> None:
        """Start training the queued jobs; first those that a killed or stopped server left unfinished."""
        for left in self._context.starts.glob(".*"):  # half-written
            shutil.rmtree(left, ignore_errors=True)
        self._records.recover()
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> None:
        """Save the running job for the next start. Returns when it is saved, or at the timeout."""
        self._is_stopping = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def create(self, asked: CreateJob, client: Client) -> JobRow:
        """Queue a job. Raises ApiError for one that cannot be trained, and 429 where the client has too many."""
        _check_request(asked)
        model = self._context.registry.resolve(asked.model, client)
        settings, validation = job_settings(asked, self._context.base, model.prompt), validation_setting(asked)
        with self._context.files.changes:  # no file is deleted before the job that needs it is recorded
            form = self._check_files(asked, settings.train, validation, client)
            template = template_setting(asked, form)
            check_job_task(settings.train, self._context.base, form, template, model.prompt)
            row = self._row(asked, client, model.id, settings, model.prompt)
            row.settings = {**row.settings, "validation": validation, "template": template}
            return self._add(row, client, model.prompt)

    def get(self, job: str, client: Client) -> JobRow:
        """Raises ApiError 404, in the same words for an unknown job and another client's."""
        row = self._records.get(job) if _ID.fullmatch(job) else None
        if row is None or row.owner != client.id:
            raise ApiError(
                404, f"there is no fine-tuning job {shortened(job, 100)}", "job_not_found", "fine_tuning_job_id"
            )
        return row

    def page(
        self, client: Client, after: str | None, limit: int, metadata: Mapping[str, str] | None, has_none: bool = False
    ) -> tuple[list[JobRow], bool]:
        """The client's jobs, the latest first, and whether there are more. `has_none`: those without metadata."""
        behind = None if after is None else self.get(after, client)
        wanted = None if metadata is None and not has_none else partial(_has_metadata, metadata or {}, has_none)
        return self._records.page(client.id, behind, limit, wanted)

    def cancel(self, job: str, client: Client) -> JobRow:
        """End a job for good. The checkpoints that it served stay."""
        row = self._change(job, client, OPEN, "cancelled", "cancel", finished=time.time())
        if self._current != row.id:  # a running job deletes its state itself
            forget_state(self._context, row.id)
        return row

    def pause(self, job: str, client: Client) -> JobRow:
        """Keep the job's state and let other jobs run."""
        return self._change(job, client, ACTIVE, "paused", "pause")

    def resume(self, job: str, client: Client) -> JobRow:
        """Queue a paused job again; it resumes where it was."""
        with self._gate:
            if self.get(job, client).status == "paused":
                self._check_limit(client)
            return self._change(job, client, ("paused",), "queued", None)

    def events(self, job: str, client: Client, after: str | None, limit: int) -> tuple[list[JobEventRow], bool]:
        """The job's events, the latest first, and whether there are more."""
        row = self.get(job, client)
        behind = None
        if after is not None:
            behind = self._records.event(after) if _ID.fullmatch(after) else None
            if behind is None or behind.job != row.id:
                raise ApiError(404, f"job {row.id} has no event {shortened(after, 100)}", "event_not_found", "after")
        return self._records.events(row.id, behind, limit)

    def checkpoints(self, job: str, client: Client) -> list[Json]:
        """Those of the job's checkpoints that are still served, the latest first."""
        row = self.get(job, client)
        served = {model.id for model in self._context.registry.models(client) if model.job == row.id}
        return [each for each in reversed(row.outcome.get("checkpoints", [])) if each["model"] in served]

    def _change(
        self, job: str, client: Client, before: Collection[str], status: str, signal: StopSignal | None, **values: float
    ) -> JobRow:
        row = self.get(job, client)
        if not self._records.move(row.id, before, status, [NewEvent(f"the job is {status}")], **values):
            now = self.get(job, client).status
            raise ApiError(
                400, f"job {row.id} is {now}; only one that is {', '.join(before)} can become {status}",
                "invalid_status",
            )  # fmt: skip
        if signal is not None and self._current == row.id:
            self._signals[row.id] = signal
        self._woken.set()
        return self.get(job, client)

    def _check_files(self, asked: CreateJob, config: TrainConfig, setting: str | None, client: Client) -> str:
        """The form of the files' rows."""
        training = self._file(asked.training_file, client, "training_file")
        check_rows(config, training.num_rows)
        validation = None
        if asked.validation_file is not None:
            validation = self._file(asked.validation_file, client, "validation_file")
            _check_forms(training, validation)
        is_kept = setting != NO_VALIDATION if setting is not None else training.num_rows >= LEAST_SPLIT_ROWS
        _check_criterion(config, has_rows=validation is not None or is_kept)
        return training.form

    def _file(self, file: str, client: Client, param: str) -> StoredFile:
        try:
            found = self._context.files.get(file, client)
        except ApiError as error:
            raise replace(error, param=param) from None
        if found.purpose != "fine-tune":
            raise ApiError(
                400, f"file {found.id} has the purpose {found.purpose!r}; upload it with 'fine-tune'",
                "invalid_file", param,
            )  # fmt: skip
        return found

    def _row(
        self, asked: CreateJob, client: Client, model: str, settings: JobSettings, start: SoftPrompt | None
    ) -> JobRow:
        record = {
            "train": asdict(settings.train), "learning_rate_multiplier": settings.rate_multiplier,
            "metadata": asked.metadata, "has_start": start is not None,
            "base_fingerprint": self._context.base.fingerprint,
        }  # fmt: skip
        return JobRow(
            id=f"ftjob-{uuid.uuid4().hex[:24]}", owner=client.id, status="queued", model=model,
            suffix=asked.suffix or None, training_file=asked.training_file, validation_file=asked.validation_file,
            settings=record, outcome={}, created=time.time(),
        )  # fmt: skip

    def _add(self, row: JobRow, client: Client, start: SoftPrompt | None) -> JobRow:
        with self._gate:
            self._check_limit(client)
            if start is not None:  # as it is now, whatever becomes of its name
                save_prompt(start, self._context.starts / row.id)
            self._records.add(row, NewEvent(f"the job is queued, to train on {row.training_file}"))
        self._woken.set()
        return row

    def _check_limit(self, client: Client) -> None:
        """Each queued or running job becomes a prompt. Raises ApiError 403 or 429."""
        limit = self._max_jobs if client.limits.max_jobs is None else client.limits.max_jobs
        count = self._records.count(client.id, ACTIVE)
        if self._quotas is not None:
            self._quotas.check(client, Amounts(prompts=count + 1))
        if count >= limit:
            raise ApiError(
                429, f"{count} of your fine-tuning jobs wait or run, and {limit} may; try again when one has ended",
                "max_jobs", retry_after_s=_RETRY_AFTER_S,
            )  # fmt: skip

    def _work(self) -> None:
        is_sound = True
        while not self._is_stopping:
            try:
                if not is_sound:
                    self._records.recover()
                self._work_on_next()
                is_sound = True
            except Exception:  # from the database, for example; the queue resumes when it is back
                _log.exception("the queue of jobs was interrupted")
                is_sound = False
                time.sleep(1.0)

    def _work_on_next(self) -> None:
        self._woken.clear()
        self._cancel_revoked()
        row = self._records.next()
        if row is None:
            self._woken.wait(_LOOK_AGAIN_S)
            return
        self._current = row.id
        try:
            if self._records.move(row.id, ("queued",), "validating_files", started=time.time()):
                JobRun(row, self._context, partial(self._stop_signal, row.id)).run()
        finally:
            self._current = None
            if self._signals.pop(row.id, None) == "cancel":  # perhaps when it was about to pause
                forget_state(self._context, row.id)

    def _cancel_revoked(self) -> None:
        self._looked_at = time.monotonic()
        for job in self._records.cancel_revoked():
            if job == self._current:
                self._signals[job] = "cancel"
            else:
                forget_state(self._context, job)

    def _stop_signal(self, job: str) -> StopSignal | None:
        if time.monotonic() - self._looked_at > _LOOK_AGAIN_S:
            self._cancel_revoked()
        return self._signals.get(job) or ("stop" if self._is_stopping else None)


def _check_request(asked: CreateJob) -> None:
    if asked.integrations:
        raise ApiError(
            400, "integrations are not supported; read the job's events and metrics instead", "unsupported",
            "integrations",
        )  # fmt: skip
    if asked.suffix and not NAME.fullmatch("-".join(asked.suffix.split())):
        raise ApiError(
            400, f"suffix is {shortened(asked.suffix)}; it must be 1 to 64 letters, digits, spaces, '.', '_' or '-', "
            "the first one a letter or digit", "invalid_value", "suffix",
        )  # fmt: skip


def _check_forms(training: StoredFile, validation: StoredFile) -> None:
    if training.form != validation.form:
        raise ApiError(
            400, f"the validation file's rows are of the form {validation.form!r} and the training file's of "
            f"{training.form!r}; give both in one form", "invalid_file", "validation_file",
        )  # fmt: skip


def _check_criterion(config: TrainConfig, *, has_rows: bool) -> None:
    if config.best_by != "loss" and not has_rows:
        raise ApiError(
            400, f"best_by is {config.best_by!r}, but there are no validation rows to choose by; give a "
            f"validation_file, or {LEAST_SPLIT_ROWS} rows or more, of which some are kept",
            "invalid_value", "hyperparameters.best_by",
        )  # fmt: skip


def _has_metadata(wanted: Mapping[str, str], has_none: bool, row: JobRow) -> bool:
    known = row.settings.get("metadata") or {}
    return not known if has_none else all(known.get(key) == value for key, value in wanted.items())
