"""OpenAI's fine_tuning endpoints."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request

from softprompt.server.clients.auth import CurrentClient
from softprompt.server.dependencies import dependency
from softprompt.server.error_schemas import error_responses
from softprompt.server.jobs.jobs import Jobs
from softprompt.server.jobs.schemas import (
    JOB_ID,
    CheckpointList,
    CreateJob,
    EventList,
    FineTuningJob,
    JobCheckpoint,
    JobEvent,
    JobList,
    Json,
    Method,
    SupervisedMethod,
)
from softprompt.server.jobs.settings import hyperparameters
from softprompt.server.state.schema import JobEventRow, JobRow

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"], responses=error_responses(400, 401, 429, 503))

TheJobs = Annotated[Jobs, dependency(Jobs)]
JobId = Annotated[str, Path(description="The job's id.", examples=[JOB_ID])]
Limit = Annotated[int, Query(ge=1, le=100, description="Items of a page.")]
After = Annotated[str | None, Query(max_length=256, description="The last id of the page before.")]
_METADATA = re.compile(r"metadata\[(.*)\]", re.DOTALL)


# Not `async`: FastAPI then queries the database in a thread, beside the event loop.


@router.post("", summary="Create a job", responses=error_responses(403, 404, 408, 413))
def create_job(asked: CreateJob, jobs: TheJobs, client: CurrentClient) -> FineTuningJob:
    """Train a soft prompt on an uploaded file; it is served under `fine_tuned_model` as soon as the job succeeds."""
    return _job(jobs.create(asked, client))


@router.get("", summary="List jobs", responses=error_responses(404))
def list_jobs(
    request: Request, jobs: TheJobs, client: CurrentClient, after: After = None, limit: Limit = 20
) -> JobList:
    """Your jobs, the latest first; `metadata[key]=value` leaves those that have it, `metadata=null` those without."""
    given = request.query_params.multi_items()
    wanted = {match[1]: value for name, value in given if (match := _METADATA.fullmatch(name))}
    has_none = ("metadata", "null") in given
    rows, has_more = jobs.page(client, after, limit, wanted or None, has_none)
    return JobList(data=[_job(row) for row in rows], has_more=has_more)


@router.get("/{fine_tuning_job_id}", summary="Retrieve a job", responses=error_responses(404))
def retrieve_job(fine_tuning_job_id: JobId, jobs: TheJobs, client: CurrentClient) -> FineTuningJob:
    """One job as it stands."""
    return _job(jobs.get(fine_tuning_job_id, client))


@router.post("/{fine_tuning_job_id}/cancel", summary="Cancel a job", responses=error_responses(404))
def cancel_job(fine_tuning_job_id: JobId, jobs: TheJobs, client: CurrentClient) -> FineTuningJob:
    """End a job for good."""
    return _job(jobs.cancel(fine_tuning_job_id, client))


@router.post("/{fine_tuning_job_id}/pause", summary="Pause a job", responses=error_responses(404))
def pause_job(fine_tuning_job_id: JobId, jobs: TheJobs, client: CurrentClient) -> FineTuningJob:
    """Let a job rest; its state is kept."""
    return _job(jobs.pause(fine_tuning_job_id, client))


@router.post("/{fine_tuning_job_id}/resume", summary="Resume a job", responses=error_responses(404))
def resume_job(fine_tuning_job_id: JobId, jobs: TheJobs, client: CurrentClient) -> FineTuningJob:
    """Go on with a paused job. It becomes the same prompt as without the pause, to the bit."""
    return _job(jobs.resume(fine_tuning_job_id, client))


@router.get("/{fine_tuning_job_id}/events", summary="List a job's events", responses=error_responses(404))
def list_job_events(
    fine_tuning_job_id: JobId, jobs: TheJobs, client: CurrentClient, after: After = None, limit: Limit = 20
) -> EventList:
    """A job's events, the latest first."""
    rows, has_more = jobs.events(fine_tuning_job_id, client, after, limit)
    return EventList(data=[_event(row) for row in rows], has_more=has_more)


@router.get("/{fine_tuning_job_id}/checkpoints", summary="List a job's checkpoints", responses=error_responses(404))
def list_job_checkpoints(
    fine_tuning_job_id: JobId, jobs: TheJobs, client: CurrentClient, after: After = None, limit: Limit = 10
) -> CheckpointList:
    """The prompts on the way that are kept, each a model of its own; the latest first."""
    known = [_checkpoint(fine_tuning_job_id, each) for each in jobs.checkpoints(fine_tuning_job_id, client)]
    ids = [each.id for each in known]
    first = ids.index(after) + 1 if after in ids else 0
    page = known[first : first + limit]
    return CheckpointList(
        data=page,
        has_more=first + limit < len(known),
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
    )


def _job(row: JobRow) -> FineTuningJob:
    outcome = row.outcome
    settings = outcome.get("settings") or row.settings["train"]
    is_running, has_ended = row.status == "running", row.finished is not None
    estimate = outcome.get("estimated_finish")
    return FineTuningJob(
        id=row.id,
        created_at=int(row.created),
        finished_at=None if row.finished is None else int(row.finished),
        status=row.status,  # type: ignore[arg-type]  # one of them
        error=outcome.get("error"),
        model=row.model,
        fine_tuned_model=row.fine_tuned_model,
        training_file=row.training_file,
        validation_file=row.validation_file,
        hyperparameters=hyperparameters(row),
        method=Method(type="supervised", supervised=SupervisedMethod(hyperparameters=settings)),
        seed=settings["seed"],
        trained_tokens=outcome.get("trained_tokens") if has_ended else None,
        estimated_finish=int(estimate) if is_running and estimate is not None else None,
        result_files=outcome.get("result_files", []),
        recommendation=outcome.get("recommendation"),
        verdict=outcome.get("held_out", {}).get("text"),
        metadata=row.settings.get("metadata"),
        user_provided_suffix=row.suffix,
    )


def _event(row: JobEventRow) -> JobEvent:
    return JobEvent(
        id=row.id, created_at=int(row.created), level=row.level, message=row.message,  # type: ignore[arg-type]
        type=row.kind, data=row.data,  # type: ignore[arg-type]  # as above
    )  # fmt: skip


def _checkpoint(job: str, entry: Json) -> JobCheckpoint:
    return JobCheckpoint(
        id=str(entry["id"]), created_at=int(float(str(entry["created"]))), fine_tuning_job_id=job,
        fine_tuned_model_checkpoint=str(entry["model"]), step_number=int(str(entry["step"])),
        metrics=entry["metrics"],
    )  # fmt: skip
