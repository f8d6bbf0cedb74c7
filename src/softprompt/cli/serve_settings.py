"""Where `softprompt serve` has its settings from: flags, then the environment, then a TOML file. No torch here.

    base = "bigscience/bloomz-560m"    # any flag of the command, with underscores
    port = 9000
    [engine]                           # or in sections, as the flags are grouped: [base], [server], [engine]
    max_rows = 64

Paths are relative to the file's folder. In the environment a flag is SOFTPROMPT_ and its name: SOFTPROMPT_PORT.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from softprompt.cli.toml_settings import Table, read_toml, require_table, settings
from softprompt.config import EMBEDDED_BASE, BaseConfig, EngineConfig, ServerConfig
from softprompt.errors import ConfigError

SECTIONS: Mapping[str, type[Any]] = {"base": BaseConfig, "server": ServerConfig, "engine": EngineConfig}
ENVIRONMENT = "SOFTPROMPT"
_OF_OTHERS = ("SOFTPROMPT_RENDEZVOUS",)  # names of ours that are no flag's


def read_settings(path: Path) -> Table:
    """The file's settings by their flags' names, as the command's parser takes them.

    Raises: ConfigError, naming file and key.
    """
    names = [item.name for kind in SECTIONS.values() for item in dataclasses.fields(kind)]
    found = read_toml(path, (*SECTIONS, *names), "the settings file")
    is_flat = isinstance(found.get("base"), str)  # which may be the flag, or the section of its name
    sections = {name: found.pop(name) for name in SECTIONS if name in found and not (name == "base" and is_flat)}
    read: Table = {}
    for name, kind in SECTIONS.items():
        fields = {item.name for item in dataclasses.fields(kind)}
        own = settings(kind, {key: value for key, value in found.items() if key in fields}, str(path))
        inner = settings(kind, require_table(sections.get(name, {}), f"{path} [{name}]"), f"{path} [{name}]")
        for key in own.keys() & inner.keys():
            raise ConfigError(f"{path} has {key!r} twice, by itself and in [{name}]; give it once")
        read |= own | inner
    return _with_places(read, path.parent)


def take_file(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    """The file's settings become the command's defaults, below its flags and the environment."""
    if value is not None:
        context.default_map = read_settings(Path(value))


def check_environment(known: set[str]) -> None:
    """Raises ConfigError for a SOFTPROMPT_ variable that is no flag's but is spelt almost like one."""
    names = [f"{ENVIRONMENT}_{name.upper()}" for name in sorted(known)]
    for name in os.environ:
        if name.startswith(f"{ENVIRONMENT}_") and name not in (*names, *_OF_OTHERS):
            close = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
            if close:
                raise ConfigError(f"the environment has {name}, which is no setting; did you mean {close[0]}?")


def _with_places(read: Table, folder: Path) -> Table:
    for name in ("library", "state"):
        if name in read:
            read[name] = str(folder / Path(read[name]).expanduser())
    base = read.get("base")
    if base is not None and base != EMBEDDED_BASE and (folder / Path(base).expanduser()).is_dir():
        read["base"] = str(folder / Path(base).expanduser())
    return read
