"""The flags of a training run: its folder, whether and with what settings it is resumed there, its processes."""

from __future__ import annotations

import functools
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.command import Function, Setting
from softprompt.cli.console import print_json, say
from softprompt.config import KEPT_CHECKPOINTS, BaseConfig, with_former_defaults
from softprompt.errors import ConfigError
from softprompt.launch.processes import run_processes
from softprompt.types import NO_VALIDATION, is_row_count

if TYPE_CHECKING:
    from softprompt.base import Base
    from softprompt.runs import RunFolder
    from softprompt.runs.recorder import Recorder
    from softprompt.training import Ranks

# Settings that say where things are and how they are computed, not what is computed.
MAY_CHANGE = frozenset(
    {"base", "base_id", "data", "validation", "test", "init_from", "library", "device", "dtype", "offline",
     "trust_remote_code", "micro_batch_rows", "checkpoint_layers", "tensorboard", "keep_checkpoints", "device_map"}
)  # fmt: skip
SWEEP_KEY = "sweep"  # of run.json: the sweep file's content
_PATHS = ("base", "data", "validation", "test", "init_from", "library")

Settings = dict[str, Any]

_RUN_OPTIONS = (
    click.option(
        "--out", required=True, type=click.Path(), help="The run's folder: adapter, run.json, metrics.jsonl."
    ),
    click.option("--overwrite", is_flag=True, help="Replace an earlier run in --out."),
    click.option("--resume", is_flag=True, help="Go on with the run in --out where it stopped, or begin it."),
    click.option(
        "--keep-checkpoints", type=Setting(int, least=1), default=KEPT_CHECKPOINTS, show_default=True,
        help="Checkpoints to keep, the latest.",
    ),
    click.option("--tensorboard", is_flag=True, help="Also write TensorBoard events into --out/tensorboard."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."),
)  # fmt: skip
RUN_FLAGS = ("out", "overwrite", "resume", "processes", "keep_checkpoints", "tensorboard")


def run_options(function: Function) -> Function:
    """Give a command the flags of where and how its run is recorded."""
    for decorate in reversed(_RUN_OPTIONS):
        function = decorate(function)
    return function


@dataclass(frozen=True, kw_only=True)
class RunTarget:
    """The folder of `--out`."""

    out: str
    overwrite: bool
    is_resumed: bool  # a run was begun here, and `--resume` is given

    @classmethod
    def of(cls, out: str, *, overwrite: bool, resume: bool) -> RunTarget:
        return cls(out=out, overwrite=overwrite, is_resumed=resume and _folder(out).has_begun())

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to resume."""
        result = _folder(self.out).read_plan().get("result") if self.is_resumed else None
        return isinstance(result, dict) and not result.get("interrupted")

    def check(self, flags: Mapping[str, Any], tasks: Iterable[str] = ()) -> None:
        """Raises, before anything slow begins, where a run with these flags cannot be recorded here."""
        from softprompt.runs import RunFolder
        from softprompt.runs.recorder import require_tensorboard

        if not self.is_resumed:
            RunFolder.check_free(self.out, overwrite=self.overwrite, tasks=tasks)
        require_tensorboard(flags["tensorboard"])

    def recorder(self, metadata: Mapping[str, Any], flags: Mapping[str, Any]) -> Recorder:
        """A recorder of a run with these flags. Nothing is written yet."""
        from softprompt.runs.recorder import Recorder

        settings = {**flags, "folder": os.getcwd()}
        return Recorder(
            Path(self.out), {**metadata, "settings": settings}, overwrite=self.overwrite,
            resume=self.is_resumed, keep_checkpoints=flags["keep_checkpoints"], tensorboard=flags["tensorboard"],
        )  # fmt: skip

    def report_finished(self, as_json: bool) -> None:
        """Say that there is nothing to resume; as JSON, print what the run printed when it ended."""
        say(f"the run in {self.out} is finished; there is nothing to resume")
        if as_json:
            print_json({"out": str(Path(self.out)), **_finished_result(_folder(self.out))})


def _folder(out: str) -> RunFolder:
    from softprompt.runs import RunFolder

    return RunFolder(Path(out))


def _finished_result(run: RunFolder) -> dict[str, Any]:
    """A finished run's result, with that of each candidate where there are several."""
    plan = run.read_plan()
    result: dict[str, Any] = plan["result"]
    if "candidates" not in plan:
        return result
    losses = defaultdict(list)  # run.json leaves the losses of several candidates to the metrics
    for line in run.read_metrics():
        if line["kind"] == "step":
            losses[line["candidate"]].append(line["loss"])
    known = plan["candidates"].items()
    return {**result, "candidates": {name: {**each["result"], "losses": losses[name]} for name, each in known}}


def resumed_settings(out: str, flags: Mapping[str, Any], given: Collection[str], *, command: str = "train") -> Settings:
    """The flags that the run in `out` was begun with by `command`, and those `given` that may change.

    Raises: ConfigError where a flag that may not change is given with another value, and for another command's run.
    """
    plan = _folder(out).read_plan()
    begun_by = "sweep" if SWEEP_KEY in plan else "train"
    if begun_by != command:
        raise ConfigError(f"{out} is a run of softprompt {begun_by}; resume it with that")
    recorded = plan.get("settings")
    if isinstance(recorded, dict) and command == "train":
        recorded = {**with_former_defaults(recorded)}
    if not isinstance(recorded, dict):
        raise ConfigError(
            f"{out} does not record how it was begun, so it cannot be resumed; train further: --init-from"
        )
    for name in sorted(set(given) & set(recorded) - MAY_CHANGE):
        value = list(flags[name]) if isinstance(flags[name], tuple) else flags[name]  # JSON has no tuples
        if value != recorded[name]:
            flag = name.replace("_", "-")
            raise ConfigError(
                f"--{flag} is {flags[name]!r}, but the run in {out} was begun with {recorded[name]!r}; leave it out to "
                "resume, or train anew into another folder"
            )
    changed = {name: flags[name] for name in set(given) & MAY_CHANGE}
    return {**flags, **_relocated(recorded), **changed}


def _relocated(recorded: Mapping[str, Any]) -> Settings:
    """The settings, relative paths as seen from where the run was begun, if they still exist there.

    A run of an earlier release recorded no validation where it had none.
    """
    folder = Path(str(recorded.get("folder", "")))
    settings = {name: value for name, value in recorded.items() if name != "folder"}
    if "validation" in settings and settings["validation"] is None:
        settings["validation"] = NO_VALIDATION
    for name in _PATHS:
        path = settings.get(name)
        if isinstance(path, str) and not is_row_count(path) and (folder / path).exists():
            settings[name] = str(folder / path)
    return settings


def in_processes(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command `--processes N`, and `ranks`: this process among those that we or another launcher started."""

    @click.option("--processes", type=Setting(int, least=1), help="Train in so many processes on this machine.")
    @functools.wraps(function)
    def command(processes: int | None, **flags: Any) -> None:
        if processes is not None and processes > 1:
            raise click.exceptions.Exit(run_processes(processes, sys.argv[1:]))
        from softprompt.launch.accelerated import one_voice, ranks_of_environment

        ranks = ranks_of_environment(flags["device"])
        with one_voice(ranks):
            function(ranks=ranks, **flags)

    return command


def load_among(config: BaseConfig, ranks: Ranks) -> Base:
    """The base on this rank's device, or its part of it where Accelerate's configuration shards it."""
    from softprompt.cli.console import load
    from softprompt.launch.accelerated import config_of_rank, shard_base

    base = load(config_of_rank(config, ranks), training=True)
    shard_base(base, ranks)
    return base
