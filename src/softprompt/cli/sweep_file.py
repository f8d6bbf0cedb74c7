"""A sweep's file: which prompts are trained together on which rows, as TOML. No torch here.

    halving = true            # drop the weaker candidates as training proceeds
    ensemble = false          # keep all candidates as a set that votes
    [base]                    # of BaseConfig
    [data]                    # of DataConfig, for every task
    [train]                   # of TrainConfig, for every candidate
    [grid]                    # lists of TrainConfig's values: every combination is a candidate
    [candidates.NAME]         # a candidate by name, beside or instead of the grid
    [tasks.NAME]              # a task by name, over [data]; every candidate trains on every task

Paths are relative to the file's folder. A more specific section replaces what it excludes in a shared one: a task's
`template` replaces a shared `text_column`, a candidate's `learning_rate` that of a `relative_learning_rate`.
"""

from __future__ import annotations

import itertools
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from softprompt.config import NAMED_BASES, BaseConfig, DataConfig, TrainConfig
from softprompt.errors import ConfigError
from softprompt.settings import Table, check_settings, checked_value, located, read_section, read_toml, require_table
from softprompt.types import is_row_count

ConfigT = TypeVar("ConfigT")

_SECTIONS = ("base", "data", "train", "grid", "candidates", "tasks")
_SWITCHES = {"halving": True, "ensemble": False}  # and their defaults
_PARTS = ("validation", "test")  # a share, a number of rows, a file, or no validation
# The settings of a shared section that a more specific one replaces.
_REPLACED_BY: Mapping[str, tuple[str, ...]] = {
    "learning_rate": ("relative_learning_rate",),
    "relative_learning_rate": ("learning_rate",),
    "text_column": ("template", "completion", "messages_column"),
    "label_column": ("template", "completion", "messages_column"),
    "messages_column": ("template", "completion", "text_column", "label_column"),
    "template": ("text_column", "label_column", "messages_column"),
    "completion": ("text_column", "label_column", "messages_column"),
}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep's file says. Names are empty where there is one task, or one candidate, that has none."""

    base: Mapping[str, Any]  # those settings of BaseConfig that the file gives
    tasks: Mapping[str, DataConfig]
    candidates: Mapping[str, TrainConfig]
    halving: bool
    ensemble: bool
    seed: int  # of [train]: deals the rows of every task, alike for all candidates

    def to_json(self) -> dict[str, Any]:
        """For `run.json`, with every setting, given or not."""
        return asdict(self)


def read_sweep(path: Path) -> Sweep:
    """The sweep that a TOML file describes.

    Raises: ConfigError, naming file, section and key, for what cannot be meant.
    """
    tables = _read_tables(path)
    base = read_section(BaseConfig, tables["base"], f"{path} [base]")
    train = read_section(TrainConfig, tables["train"], f"{path} [train]")
    candidates = _candidates(path, tables, train)
    if tables["ensemble"] and len(candidates) < 2:
        raise ConfigError(f"{path}: ensemble needs several candidates to vote, and there is one; give a grid of seeds")
    return Sweep(
        base={**base, **({"base": _base_place(base["base"], path.parent)} if "base" in base else {})},
        tasks=_tasks(path, tables),
        candidates=candidates,
        halving=tables["halving"],
        ensemble=tables["ensemble"],
        seed=train.get("seed", TrainConfig.seed),
    )


def _read_tables(path: Path) -> Table:
    """The file's sections and switches, each of them there and of its type."""
    found = read_toml(path, (*_SWITCHES, *_SECTIONS), "the sweep file")
    for name in _SECTIONS:
        require_table(found.get(name, {}), f"{path} [{name}]")
    for name, default in _SWITCHES.items():
        found[name] = checked_value(bool, found.get(name, default), f"{path}: {name}")
    return {**{name: {} for name in _SECTIONS}, **found}


def _candidates(path: Path, tables: Table, train: Table) -> dict[str, TrainConfig]:
    found: dict[str, Table] = grid_of(_grid_values(tables["grid"], f"{path} [grid]"))
    for name, table in tables["candidates"].items():
        where = f"{path} [candidates.{name}]"
        if name in found:
            raise ConfigError(f"{where} has the name of a candidate of the grid; give it another one")
        found[name] = read_section(TrainConfig, table, where)
    places = {name: f"{path}, candidate {name}" for name in found}
    if not found:
        found, places = {"": {}}, {"": f"{path} [train]"}
    return {name: _config(TrainConfig, _over(train, own), places[name]) for name, own in found.items()}


def _grid_values(grid: Table, where: str) -> dict[str, list[Any]]:
    with located(where):
        check_settings(TrainConfig, grid)
    hints = typing.get_type_hints(TrainConfig)
    return {key: _grid_list(hints[key], values, f"{where}: {key}") for key, values in grid.items()}


def _grid_list(hint: Any, values: object, where: str) -> list[Any]:
    if not isinstance(values, list):
        raise ConfigError(f"{where} is {values!r}; it must be a list of values to try, [{values!r}] say")
    if not values:
        raise ConfigError(f"{where} is an empty list; give the values to try, or leave it out")
    found = [checked_value(hint, value, where) for value in values]
    for index, value in enumerate(found):
        if value in found[:index]:
            raise ConfigError(f"{where} names {value!r} twice; give each value once")
    return found


def _tasks(path: Path, tables: Table) -> dict[str, DataConfig]:
    shared = _data_settings(tables["data"], f"{path} [data]", path.parent)
    if not tables["tasks"]:
        return {"": _data_config(shared, f"{path} [data]")}
    return {
        name: _data_config(_over(shared, _data_settings(table, where, path.parent)), where)
        for name, table in tables["tasks"].items()
        for where in [f"{path} [tasks.{name}]"]
    }


def _data_settings(table: object, where: str, folder: Path) -> Table:
    given = require_table(table, where)
    shares = {name: str(given[name]) for name in _PARTS if type(given.get(name)) in (int, float)}
    found = read_section(DataConfig, {**given, **shares}, where)
    if "data" in found:
        found["data"] = _data_place(found["data"], folder)
    for name in _PARTS:
        if name in found and not is_row_count(found[name]):
            found[name] = str(folder / os.path.expanduser(found[name]))
    return found


def _data_config(settings: Table, where: str) -> DataConfig:
    if "data" not in settings:
        raise ConfigError(f'{where} names no data; give the file or Hub set to learn from: data = "rows.csv"')
    return _config(DataConfig, settings, where)


def _data_place(name: str, folder: Path) -> str:
    """A path as seen from the file's folder; what nothing is called, here or there, may be a Hub id and stays."""
    path = folder / os.path.expanduser(name)
    may_be_on_the_hub = name.count("/") == 1 and not path.exists() and not Path(name).exists()
    return name if may_be_on_the_hub else str(path)


def _base_place(name: str, folder: Path) -> str:
    """A base's folder or file as seen from the file's folder, if it is there; else a Hub id, or a base by name."""
    path = folder / os.path.expanduser(name)
    return str(path) if name not in NAMED_BASES and path.exists() else name


def _over(shared: Table, own: Table) -> Table:
    """`own` settings over `shared` ones, less those that they replace."""
    replaced = {name for key in own for name in _REPLACED_BY.get(key, ())}
    if own.get("init", "text") != "text":
        replaced.add("init_text")
    return {**{name: value for name, value in shared.items() if name not in replaced}, **own}


def _config(kind: type[ConfigT], settings: Table, where: str) -> ConfigT:
    with located(where):
        return kind(**settings)


_LONGEST_NAME = 64
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")

Settings = dict[str, Any]  # Any: a value of whatever setting


def grid_of(values: Mapping[str, Sequence[Any]]) -> dict[str, Settings]:
    """The combinations by name, the last setting's values changing first; none for an empty grid."""
    if not values:
        return {}
    combinations = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    varied = [key for key, options in values.items() if len(options) > 1] or list(values)
    words = _words(varied)
    names = ["-".join(f"{words[key]}{_shown(each[key])}" for key in varied) for each in combinations]
    return dict(zip(_distinct_names(names), combinations, strict=True))


def _words(keys: Sequence[str]) -> dict[str, str]:
    last = [key.rpartition("_")[2] for key in keys]
    return {key: word if last.count(word) == 1 else key.replace("_", "-") for key, word in zip(keys, last, strict=True)}


def _shown(value: object) -> str:
    if isinstance(value, float):
        return _NOT_IN_A_NAME.sub("", f"{value:.12g}")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return "_" + _NOT_IN_A_NAME.sub("_", text)[:20].strip("_")


def _distinct_names(names: Sequence[str]) -> list[str]:
    """The names, with their number in place of the end where they are too long or occur twice."""
    if len(set(names)) == len(names) and max(map(len, names)) <= _LONGEST_NAME:
        return list(names)
    ends = [f"-{number}" for number in range(len(names))]
    return [name[: _LONGEST_NAME - len(end)] + end for name, end in zip(names, ends, strict=True)]
