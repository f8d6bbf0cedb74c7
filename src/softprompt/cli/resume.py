"""The settings of a run that goes on: those that it was begun with, but for the few that may change on the way."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from softprompt.cli.console import print_json, say
from softprompt.errors import ConfigError
from softprompt.runs import RunFolder

# What says where things are and how they are computed, not what is computed.
MAY_CHANGE = frozenset(
    {"base", "base_id", "data", "validation", "test", "init_from", "library", "device", "dtype", "offline",
     "trust_remote_code", "micro_batch_rows", "checkpoint_layers", "tensorboard", "keep_checkpoints", "device_map"}
)  # fmt: skip
SWEEP_KEY = "sweep"  # of the plan: what the file of a sweep says
_PATHS = ("base", "data", "validation", "test", "init_from", "library")

Settings = dict[str, Any]


def recorded_settings(flags: Mapping[str, Any]) -> Settings:
    """What `run.json` keeps of a run's flags, to go on with."""
    return {**flags, "folder": os.getcwd()}


def resumed_settings(out: str, flags: Mapping[str, Any], given: Collection[str], *, command: str = "train") -> Settings:
    """The flags that the run in `out` was begun with by `command`, and those `given` that may change.

    Raises: ConfigError where a flag that may not change is given with another value, and for another command's run.
    """
    plan = RunFolder(Path(out)).read_plan()
    begun_by = "sweep" if SWEEP_KEY in plan else "train"
    if begun_by != command:
        raise ConfigError(f"{out} is a run of softprompt {begun_by}; resume it with that")
    recorded = plan.get("settings")
    if not isinstance(recorded, dict):
        raise ConfigError(f"{out} does not say how it was begun, so it cannot be resumed; train further: --init-from")
    for name in sorted(set(given) & set(recorded) - MAY_CHANGE):
        if _as_json(flags[name]) != recorded[name]:
            flag = name.replace("_", "-")
            raise ConfigError(
                f"--{flag} is {flags[name]!r}, but the run in {out} was begun with {recorded[name]!r}; leave it out to "
                "resume, or train anew into another folder"
            )
    changed = {name: flags[name] for name in set(given) & MAY_CHANGE}
    return {**flags, **_found_again(recorded), **changed}


def _as_json(value: object) -> object:
    """As `run.json` gives it back, which knows no tuples."""
    return list(value) if isinstance(value, tuple) else value


def is_finished(out: str) -> bool:
    """Whether the run in `out` came to its end."""
    result = _result(out)
    return isinstance(result, dict) and not result.get("interrupted")


def say_finished(out: str, as_json: bool) -> None:
    """What a resumed run says that has nothing left to do; as JSON what it printed when it ended."""
    say(f"the run in {out} is finished; there is nothing to resume")
    if as_json:
        print_json({"out": str(Path(out)), **_outcome(RunFolder(Path(out)))})


def _result(out: str) -> Any:  # Any: a plan is JSON
    return RunFolder(Path(out)).read_plan().get("result")


def _outcome(run: RunFolder) -> dict[str, Any]:
    """A finished run's result, with that of each candidate where there are several."""
    plan = run.read_plan()
    result: dict[str, Any] = plan["result"]
    if "candidates" not in plan:
        return result
    losses = _losses(run)
    known = plan["candidates"].items()
    return {**result, "candidates": {name: {**each["result"], "losses": losses[name]} for name, each in known}}


def _losses(run: RunFolder) -> dict[str, list[float]]:
    """Of each candidate, one per step: `run.json` leaves them to the metrics."""
    found = defaultdict(list)
    for line in run.read_metrics():
        if line["kind"] == "step":
            found[line["candidate"]].append(line["loss"])
    return found


def _found_again(recorded: Mapping[str, Any]) -> Settings:
    """Relative paths as seen from where the run was begun, if they are still there."""
    folder = Path(str(recorded.get("folder", "")))
    settings = {name: value for name, value in recorded.items() if name != "folder"}
    for name in _PATHS:
        path = settings.get(name)
        if isinstance(path, str) and (folder / path).exists():
            settings[name] = str(folder / path)
    return settings
