"""Who asks, as a value."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

OPERATOR = ""  # the owner of what belongs to the machine's operator: shared things, and all where no keys are asked for


@dataclass(frozen=True)
class Limits:
    """What one key may ask for; None: as the server's settings say."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None  # generations that wait or run
    max_jobs: int | None = None  # fine-tuning jobs that wait or run
    max_prompts: int | None = None  # that are kept; and as many aliases
    max_files: int | None = None
    max_stored_bytes: int | None = None  # of files, and of prompts' vectors

    def or_else(self, defaults: Limits) -> Limits:
        """These, and the defaults where there is none."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(defaults, **given)


@dataclass(frozen=True)
class Client:
    """One API key's holder. Its prompts, files and jobs carry `id` as their owner."""

    id: str = OPERATOR
    name: str = "local"
    is_admin: bool = True  # where no keys are asked for, whoever reaches the server operates it
    limits: Limits = field(default_factory=Limits)
