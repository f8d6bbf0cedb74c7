"""Fine-tuning jobs as they go over the wire: OpenAI's shapes, field by field."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Json = dict[str, Any]  # Any: whatever JSON holds


def _sayable(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("the text is no Unicode: half a surrogate pair stands alone") from None
    return text


JOB_ID = "ftjob-5d0f6e1c2b7a4938a1c0d2e3"
_FILE_ID = "file-6b1f0c9a7d3e48f2a5b8c1d4e7f0a3b6"
_MODEL = f"ft:embedded:reviews:{JOB_ID}"
_MADE = 1_789_000_000  # seconds since 1970
_SETTINGS: JsonDict = {"n_epochs": 6, "batch_size": 8, "learning_rate_multiplier": 1.0}
_METHOD: JsonDict = {"type": "supervised", "supervised": {"hyperparameters": {"epochs": 6, "virtual_tokens": 20}}}
_JOB: JsonDict = {
    "id": JOB_ID, "object": "fine_tuning.job", "created_at": _MADE, "finished_at": _MADE + 60, "status": "succeeded",
    "error": None, "model": "embedded", "fine_tuned_model": _MODEL, "training_file": _FILE_ID, "validation_file": None,
    "hyperparameters": _SETTINGS, "method": _METHOD, "seed": 0, "trained_tokens": 21_504, "estimated_finish": None,
    "result_files": [], "organization_id": "", "integrations": None, "metadata": {"owner": "me"},
    "user_provided_suffix": "reviews",
}  # fmt: skip
_EVENT: JsonDict = {
    "id": "ftevent-8c2e5f0a9b1d47e6a3c4f5d2", "object": "fine_tuning.job.event", "created_at": _MADE + 9,
    "level": "info", "message": "step 10 of 60, training loss 1.2100", "type": "metrics",
    "data": {"step": 10, "total_steps": 60, "train_loss": 1.21, "learning_rate": 0.3, "epoch": 1},
}  # fmt: skip
_CHECKPOINT: JsonDict = {
    "id": f"ftckpt-{JOB_ID.removeprefix('ftjob-')}-20", "object": "fine_tuning.job.checkpoint",
    "created_at": _MADE + 20, "fine_tuned_model_checkpoint": f"{_MODEL}:ckpt-step-20", "fine_tuning_job_id": JOB_ID,
    "metrics": {"step": 20, "train_loss": 1.02, "valid_loss": None, "full_valid_loss": 1.1}, "step_number": 20,
}  # fmt: skip

Text = Annotated[str, AfterValidator(_sayable)]


class Hyperparameters(BaseModel):
    """OpenAI's three; ours stand in `method`. Until the rows are read, what depends on them is "auto"."""

    n_epochs: int | Literal["auto"]
    batch_size: int
    learning_rate_multiplier: float | Literal["auto"] | None = Field(
        description="Times the task's default rate; null: an absolute one is set."
    )


class SupervisedMethod(BaseModel):
    """How the soft prompt is trained."""

    hyperparameters: Json | None = Field(
        None, description="n_epochs, batch_size, learning_rate_multiplier, and every setting of `softprompt train`."
    )


class Method(BaseModel):
    """Supervised is the only method."""

    type: str = Field("supervised", max_length=64)
    supervised: SupervisedMethod | None = None


class CreateJob(BaseModel):
    """A fine-tuning job asked for."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "model": "base",
                    "training_file": _FILE_ID,
                    "suffix": "reviews",
                    "method": {
                        "type": "supervised",
                        "supervised": {"hyperparameters": {"n_epochs": 6, "virtual_tokens": 20}},
                    },
                }
            ]
        },
    )

    model: Text = Field(max_length=256, description="The base's id, `base`, or a prompt's name to train it further.")
    training_file: Text = Field(max_length=256)
    validation_file: Text | None = Field(None, max_length=256)
    suffix: Text | None = Field(
        None,
        description="1 to 64 letters, digits, '.', '_' or '-', and spaces, which become "
        "hyphens: a part of the new name.",
    )
    seed: int | None = Field(None, description="Default 0: the same file, settings and seed give the same prompt.")
    hyperparameters: Json | None = Field(None, description="As in `method`; deprecated by OpenAI.")
    method: Method | None = None
    metadata: dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )
    integrations: list[Json] | None = None


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class FineTuningJob(BaseModel):
    """OpenAI's `fine_tuning.job`, and the status `paused`."""

    model_config = ConfigDict(json_schema_extra={"examples": [_JOB]})

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    status: Status
    error: JobError | None = None
    model: str
    fine_tuned_model: str | None
    training_file: str
    validation_file: str | None = None
    hyperparameters: Hyperparameters
    method: Method
    seed: int
    trained_tokens: int | None
    estimated_finish: int | None = None
    result_files: list[str]
    recommendation: Literal["prompt", "bare base"] | None = Field(
        None, description="Of a job that has succeeded and has validation rows with labels or a score."
    )
    verdict: str | None = Field(None, description="The figures behind it, in a sentence.")
    organization_id: str = ""
    integrations: list[Json] | None = None
    metadata: dict[str, str] | None
    user_provided_suffix: str | None


class JobList(BaseModel):
    """Jobs, the latest first."""

    object: Literal["list"] = "list"
    data: list[FineTuningJob]
    has_more: bool = Field(examples=[False])


class JobEvent(BaseModel):
    """One line of a job's story. `data` of metrics: step, total_steps, train_loss, valid_loss, learning_rate, epoch."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EVENT]})

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: Json


class EventList(BaseModel):
    """Events, the latest first."""

    object: Literal["list"] = "list"
    data: list[JobEvent]
    has_more: bool = Field(examples=[False])


class CheckpointMetrics(BaseModel):
    """Nats per token at a checkpoint's step."""

    step: int
    train_loss: float | None = None
    valid_loss: float | None = None
    full_valid_loss: float | None = None


class JobCheckpoint(BaseModel):
    """A prompt on its way, served under a name of its own."""

    model_config = ConfigDict(json_schema_extra={"examples": [_CHECKPOINT]})

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int


class CheckpointList(BaseModel):
    """Checkpoints, the latest first."""

    object: Literal["list"] = "list"
    data: list[JobCheckpoint]
    has_more: bool = Field(examples=[False])
    first_id: str | None = Field(examples=[_CHECKPOINT["id"]])
    last_id: str | None = Field(examples=[_CHECKPOINT["id"]])
