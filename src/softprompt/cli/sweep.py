"""softprompt sweep"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from softprompt.cli.command import Command, config_of, given_flags, options_of
from softprompt.cli.run_options import (
    MAY_CHANGE,
    RUN_FLAGS,
    SWEEP_KEY,
    RunTarget,
    in_processes,
    load_among,
    resumed_settings,
    run_options,
)
from softprompt.cli.sweep_file import Sweep, read_sweep
from softprompt.config import TASK_DEFAULTS, BaseConfig, DataConfig, TrainConfig
from softprompt.errors import ConfigError, StorageError
from softprompt.types import NO_VALIDATION

if TYPE_CHECKING:
    from softprompt.base import Base
    from softprompt.data import Split
    from softprompt.runs.session import TrainingTask
    from softprompt.training import Ranks

Settings = dict[str, Any]
_EXAMPLES = (
    "softprompt sweep sweep.toml --out prompts/sweep",
    "softprompt sweep sweep.toml --base BASE --resume --out prompts/sweep",
)


@click.command("sweep", cls=Command, sections={"Run": RUN_FLAGS, "Base": BaseConfig}, examples=_EXAMPLES)
@click.argument("file", type=click.Path(), metavar="SWEEP.toml")
@options_of(BaseConfig, optional=True)
@run_options
@in_processes
def command(file: str, out: str, overwrite: bool, resume: bool, as_json: bool, ranks: Ranks, **flags: Any) -> None:
    """Train the prompts of a sweep file together on one frozen base, and keep the best by validation.

    All rows of all prompts go through one forward and one backward pass per step; each prompt has its own optimiser,
    schedule, patience and best checkpoint, and becomes what it would have become alone. SWEEP.toml has the sections
    [base], [data] and [train] with the settings of `softprompt train`, [grid] with lists of values to combine,
    [candidates.NAME] with candidates by name, and [tasks.NAME] with the data of several tasks; `halving` and
    `ensemble` are as with `train`. Flags override [base]. The prompt kept for a task lies in --out/NAME, or in --out
    where the tasks have no names.
    """
    sweep = read_sweep(Path(file))
    _check_names(file, sweep)
    target = RunTarget.of(out, overwrite=overwrite, resume=resume)
    if target.is_finished:
        target.report_finished(as_json)
        return
    flags = _resumed(file, sweep, out, flags) if target.is_resumed else _with_base(sweep.base, flags)
    if flags["base"] is None:
        raise ConfigError(f"{file} names no base; give one: --base, or base = in its [base]")
    target.check(flags, tasks=[name for name in sweep.tasks if name])
    _train(file, sweep, target, flags, ranks, as_json)


def _train(file: str, sweep: Sweep, target: RunTarget, flags: Settings, ranks: Ranks, as_json: bool) -> None:
    from softprompt.cli.training_run import run_session
    from softprompt.runs.session import tasks_metadata

    base_config = config_of(BaseConfig, flags)
    splits = _splits(_with_begun_splits(sweep, target), offline=base_config.offline)
    base = load_among(base_config, ranks)
    tasks = [_task(sweep, name, split, base) for name, split in splits.items()]
    recorder = target.recorder({**tasks_metadata(tasks), SWEEP_KEY: sweep.to_json()}, flags)
    run_session(
        base, tasks, recorder, ranks=ranks, as_json=as_json, halving=sweep.halving, ensemble=sweep.ensemble,
        command=f"sweep {shlex.quote(file)}",
    )  # fmt: skip


def _check_names(file: str, sweep: Sweep) -> None:
    from softprompt.runs.run_folder import check_part_name

    for section, names in (("tasks", sweep.tasks), ("candidates", sweep.candidates)):
        for name in () if list(names) == [""] else names:
            try:
                check_part_name(name)
            except StorageError as error:
                raise ConfigError(f"{file} [{section}]: {error}") from error


def _with_base(base: Mapping[str, Any], flags: Settings) -> Settings:
    """The file's settings of the base, where no flag is given."""
    given = given_flags()
    return {**flags, **{name: value for name, value in base.items() if name not in given}}


def _splits(sweep: Sweep, *, offline: bool) -> dict[str, Split]:
    """The rows of each task, read as the first candidate needs them."""
    from softprompt.data import split_rows

    configs = list(sweep.candidates.values())
    how: dict[str, Any] = {
        "seed": sweep.seed, "offline": offline, "scored": any(config.best_by != "loss" for config in configs),
        "task": configs[0].task,
    }  # fmt: skip
    return {name: split_rows(data, **how) for name, data in sweep.tasks.items()}


def _task(sweep: Sweep, name: str, split: Split, base: Base) -> TrainingTask:
    from softprompt.data import with_split_task
    from softprompt.runs.session import TrainingTask, rows_metadata

    split = with_split_task(split, base, next(iter(sweep.candidates.values())))
    metadata = rows_metadata(sweep.tasks[name], sweep.seed, split)
    return TrainingTask(name=name, split=split, configs=sweep.candidates, metadata=metadata)


def _with_begun_splits(sweep: Sweep, target: RunTarget) -> Sweep:
    """The sweep with the validation that its tasks were begun with, where the file gives none."""
    from softprompt.runs import RunFolder
    from softprompt.runs.run_folder import TASKS_KEY

    if not target.is_resumed:
        return sweep
    plan = RunFolder(Path(target.out)).read_plan()
    begun = plan.get(TASKS_KEY, {"": plan})
    return replace(sweep, tasks={name: _with_begun_split(data, begun[name]) for name, data in sweep.tasks.items()})


def _with_begun_split(data: DataConfig, begun: Mapping[str, Any]) -> DataConfig:
    if data.validation is not None:
        return data
    return replace(data, validation=begun.get("data", {}).get("validation") or NO_VALIDATION)


def _resumed(file: str, sweep: Sweep, out: str, flags: Settings) -> Settings:
    """The flags that the run was begun with, those given anew, and what the file says anew of the base."""
    from softprompt.runs import RunFolder

    plan = RunFolder(Path(out)).read_plan()
    begun = plan.get(SWEEP_KEY)
    if isinstance(begun, dict):
        _check_same(file, json.loads(json.dumps(sweep.to_json())), begun, out)  # JSON has no tuples
        known = begun.get("base", {})
        changed = {name: value for name, value in sweep.base.items() if known.get(name) != value}
        flags = _with_base(changed, flags)
        return resumed_settings(out, flags, given_flags() | set(changed), command="sweep")
    return resumed_settings(out, flags, (), command="sweep")


def _check_same(file: str, now: Mapping[str, Any], begun: Mapping[str, Any], out: str) -> None:
    """Raises ConfigError where the file means another sweep than the one begun, the base's settings aside.

    Settings that an earlier release did not have, or did not leave to the task, may be at their defaults.
    """
    for section in ("tasks", "candidates"):
        names, known = list(now[section]), list(begun.get(section, ()))
        if names != known:
            _refuse(file, out, f"has the {section} {', '.join(names)}", ", ".join(known))
    here, there = (dict(_leaves(sweep)) for sweep in (now, begun))
    items = [item for kind in (DataConfig, TrainConfig) for item in dataclasses.fields(kind)]
    defaults = {item.name: [*item.default] if isinstance(item.default, tuple) else item.default for item in items}
    for path, value in here.items():
        may_be_default = path not in there or path[-1] in TASK_DEFAULTS["text"]
        if path[0] == "base" or path[-1] in MAY_CHANGE or (may_be_default and value == defaults.get(path[-1], value)):
            continue
        if value != there.get(path):
            _refuse(file, out, f"says {'.'.join(filter(None, path))} = {value!r}", repr(there.get(path)))


def _refuse(file: str, out: str, now: str, begun: str) -> NoReturn:
    raise ConfigError(
        f"{file} {now}, but the sweep in {out} was begun with {begun or 'none by name'}; resume it with the file as it "
        "was, or begin anew in another folder"
    )


def _leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:  # Any: JSON
    if not isinstance(value, Mapping):
        return [(path, value)]
    return [leaf for key, item in value.items() for leaf in _leaves(item, (*path, key))]
