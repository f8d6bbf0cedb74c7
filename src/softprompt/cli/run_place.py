"""Where a run is recorded, and whether it goes on there: the flags of `train` and `sweep`, and what is made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.command import Function
from softprompt.config import KEPT_CHECKPOINTS

if TYPE_CHECKING:
    from softprompt.runs import Recorder

_RUN_OPTIONS = (
    click.option(
        "--out", required=True, type=click.Path(), help="The run's folder: adapter, run.json, metrics.jsonl."
    ),
    click.option("--overwrite", is_flag=True, help="Replace an earlier run in --out."),
    click.option("--resume", is_flag=True, help="Go on with the run in --out where it stopped, or begin it."),
    click.option(
        "--keep-checkpoints", type=click.IntRange(min=1), default=KEPT_CHECKPOINTS, show_default=True,
        help="Checkpoints to keep, the latest.",
    ),
    click.option("--tensorboard", is_flag=True, help="Also write TensorBoard events into --out/tensorboard."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."),
)  # fmt: skip
RUN_FLAGS = ("out", "overwrite", "resume", "processes", "keep_checkpoints", "tensorboard")


def run_options(function: Function) -> Function:
    """The flags that say where and how a run is recorded."""
    for decorate in reversed(_RUN_OPTIONS):
        function = decorate(function)
    return function


@dataclass(frozen=True, kw_only=True)
class RunPlace:
    """The folder of `--out`."""

    out: str
    overwrite: bool
    goes_on: bool  # a run was begun here, and it is to be resumed

    @classmethod
    def of(cls, out: str, *, overwrite: bool, resume: bool) -> RunPlace:
        from softprompt.runs import RunFolder

        return cls(out=out, overwrite=overwrite, goes_on=resume and RunFolder(Path(out)).has_begun())

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to resume."""
        from softprompt.cli.resume import is_finished

        return self.goes_on and is_finished(self.out)

    def check(self, flags: Mapping[str, Any], tasks: Iterable[str] = ()) -> None:
        """Raises, before anything slow is begun, where a run with these flags cannot be recorded here."""
        from softprompt.runs import RunFolder, require_tensorboard

        if not self.goes_on:
            RunFolder.check_free(self.out, overwrite=self.overwrite, tasks=tasks)
        require_tensorboard(flags["tensorboard"])

    def recorder(self, facts: Mapping[str, Any], flags: Mapping[str, Any]) -> Recorder:
        """Of a run with these flags. It touches nothing yet."""
        from softprompt.cli.resume import recorded_settings
        from softprompt.runs import Recorder

        return Recorder(
            Path(self.out), {**facts, "settings": recorded_settings(flags)}, overwrite=self.overwrite,
            resume=self.goes_on, keep_checkpoints=flags["keep_checkpoints"], tensorboard=flags["tensorboard"],
        )  # fmt: skip
