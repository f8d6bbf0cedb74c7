"""Where a run is recorded, and whether it goes on there: what `train` and `sweep` make of `run_options`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt.cli.resume import is_finished, recorded_settings
from softprompt.recording import Recorder, require_tensorboard
from softprompt.storage import RunFolder


@dataclass(frozen=True, kw_only=True)
class RunPlace:
    """The folder of `--out`."""

    out: str
    overwrite: bool
    goes_on: bool  # a run was begun here, and it is to be resumed

    @classmethod
    def of(cls, out: str, *, overwrite: bool, resume: bool) -> RunPlace:
        return cls(out=out, overwrite=overwrite, goes_on=resume and RunFolder(Path(out)).has_begun())

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to resume."""
        return self.goes_on and is_finished(self.out)

    def check(self, flags: Mapping[str, Any], tasks: Iterable[str] = ()) -> None:
        """Raises, before anything slow is begun, where a run with these flags cannot be recorded here."""
        if not self.goes_on:
            RunFolder.check_free(self.out, overwrite=self.overwrite, tasks=tasks)
        require_tensorboard(flags["tensorboard"])

    def recorder(self, facts: Mapping[str, Any], flags: Mapping[str, Any]) -> Recorder:
        """Of a run with these flags. It touches nothing yet."""
        return Recorder(
            Path(self.out), {**facts, "settings": recorded_settings(flags)}, overwrite=self.overwrite,
            resume=self.goes_on, keep_checkpoints=flags["keep_checkpoints"], tensorboard=flags["tensorboard"],
        )  # fmt: skip
