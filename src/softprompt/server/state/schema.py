"""The tables. Times are seconds since 1970; what is JSON is read and written whole.

A change here needs a migration in `migrations/versions`; a test compares the two.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Boolean, Float, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Json = dict[str, Any]


class Table(DeclarativeBase):
    """All tables."""

    type_annotation_map = {Json: JSON, int: BigInteger, str: Text, float: Float, bool: Boolean}  # noqa: RUF012


class KeyRow(Table):
    """An API key. The key itself is not kept."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)  # the owner of what its holder makes
    name: Mapped[str]
    hash: Mapped[str] = mapped_column(String(64), unique=True)  # sha256 of the key, which is 32 random bytes
    beginning: Mapped[str] = mapped_column(String(16))  # the key's first characters, to tell it by
    is_admin: Mapped[bool]
    created: Mapped[float]
    revoked: Mapped[float | None]
    limits: Mapped[Json]


class FileRow(Table):
    """An uploaded file; its bytes lie in the state folder."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64), index=True)
    filename: Mapped[str]
    purpose: Mapped[str] = mapped_column(String(64))
    num_bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64))
    num_rows: Mapped[int | None]
    form: Mapped[str | None] = mapped_column(String(32))  # plain, template (prompt and completion) or chat
    created: Mapped[float]


class PromptRow(Table):
    """A soft prompt that is not in the library: a job's, a checkpoint's, an uploaded or a downloaded one.

    Also what is known of a library's prompt beyond its folder (pinned): then `folder` is None.
    """

    __tablename__ = "prompts"
    __table_args__ = (UniqueConstraint("owner", "name"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64), index=True)
    name: Mapped[str] = mapped_column(String(256))
    folder: Mapped[str | None]  # below the state folder
    source: Mapped[str] = mapped_column(String(32))  # library, upload, folder, hub, job or checkpoint
    job: Mapped[str | None] = mapped_column(String(64), index=True)
    is_shared: Mapped[bool]
    is_pinned: Mapped[bool]
    created: Mapped[float]


class AliasRow(Table):
    """A name for one prompt, or for several by share."""

    __tablename__ = "aliases"

    owner: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(256), primary_key=True)
    targets: Mapped[Json]  # {"targets": [{"model": ..., "share": ...}]}
    is_shared: Mapped[bool]
    created: Mapped[float]


class JobRow(Table):
    """A fine-tuning job; its run lies in the state folder."""

    __tablename__ = "jobs"
    __table_args__ = (Index("jobs_by_state", "status", "created"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64), index=True)
    status: Mapped[str] = mapped_column(String(32))  # OpenAI's: validating_files, queued, running, paused, ...
    model: Mapped[str]  # the base's id, or the prompt that is trained further
    suffix: Mapped[str | None] = mapped_column(String(64))
    training_file: Mapped[str] = mapped_column(String(64))
    validation_file: Mapped[str | None] = mapped_column(String(64))
    settings: Mapped[Json]  # what was asked for: hyperparameters, method, seed, metadata
    outcome: Mapped[Json]  # what became of it: error, trained tokens, estimated finish
    fine_tuned_model: Mapped[str | None] = mapped_column(String(256))
    created: Mapped[float]
    started: Mapped[float | None]
    finished: Mapped[float | None]


class JobEventRow(Table):
    """One line of a job's story."""

    __tablename__ = "job_events"
    __table_args__ = (Index("job_events_by_job", "job", "number"),)

    number: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    job: Mapped[str] = mapped_column(String(64), ForeignKey("jobs.id", ondelete="CASCADE"))
    created: Mapped[float]
    level: Mapped[str] = mapped_column(String(16))
    kind: Mapped[str] = mapped_column(String(16))  # message or metrics
    message: Mapped[str]
    data: Mapped[Json]
