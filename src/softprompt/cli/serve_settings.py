"""Where `softprompt serve` has its settings from: flags, then the environment, then a TOML file. No torch here.

    base = "bigscience/bloomz-560m"    # any flag of the command, with underscores
    port = 9000
    [engine]                           # or in sections, as the flags are grouped: [base], [server], [engine]
    max_rows = 64

Paths are relative to the file's folder. In the environment a flag is SOFTPROMPT_ and its name: SOFTPROMPT_PORT.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from softprompt.config import NAMED_BASES, BaseConfig, EngineConfig, ServerConfig
from softprompt.errors import ConfigError
from softprompt.settings import Table, check_names, nearest, read_section, read_toml, require_table

SECTIONS: Mapping[str, type[Any]] = {"base": BaseConfig, "server": ServerConfig, "engine": EngineConfig}
ENVIRONMENT = "SOFTPROMPT"
_OF_OTHERS = ("SOFTPROMPT_CACHE", "SOFTPROMPT_RENDEZVOUS")  # names of ours that are no flag's
# What Kubernetes sets in every pod for a Service called `softprompt`, or `softprompt-...`: names and values.
_URL = r"(tcp|udp|sctp)://\S+"
_SERVICE_VARIABLES = tuple(
    (re.compile(rf"{ENVIRONMENT}(_[A-Z0-9]+)*_{name}"), re.compile(value))
    for name, value in {
        "SERVICE_HOST": r"[0-9A-Fa-f.:]+",
        r"SERVICE_PORT(_[A-Z0-9_]+)?": r"\d+",
        "PORT": _URL,
        r"PORT_\d+_(TCP|UDP|SCTP)": _URL,
        r"PORT_\d+_(TCP|UDP|SCTP)_PROTO": "tcp|udp|sctp",
        r"PORT_\d+_(TCP|UDP|SCTP)_PORT": r"\d+",
        r"PORT_\d+_(TCP|UDP|SCTP)_ADDR": r"[0-9A-Fa-f.:]+",
    }.items()
)


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
        own = read_section(kind, {key: value for key, value in found.items() if key in fields}, str(path))
        inner = read_section(kind, require_table(sections.get(name, {}), f"{path} [{name}]"), f"{path} [{name}]")
        for key in own.keys() & inner.keys():
            raise ConfigError(f"{path} has {key!r} twice, by itself and in [{name}]; give it once")
        read |= own | inner
    return _with_places(read, path.parent)


def take_file(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    """The file's settings become the command's defaults, below its flags and the environment.

    It runs before any flag is read, and so it is here that Kubernetes' variables leave the environment.
    """
    drop_service_variables()
    if value is not None:
        context.default_map = read_settings(Path(value))


def drop_service_variables() -> None:
    """Forget Kubernetes' SOFTPROMPT_PORT=tcp://10.0.0.7:8000 and the like, which are no settings of ours."""
    found = [name for name, value in os.environ.items() if _is_service_variable(name, value)]
    for name in found:
        del os.environ[name]
    if found:
        from softprompt.cli.console import say

        others = f" and {len(found) - 1} more" if len(found) > 1 else ""
        say(
            f"note: {min(found, key=len)}{others} of a Kubernetes Service are ignored; "
            "enableServiceLinks: false in the pod's spec keeps them out"
        )


def _is_service_variable(name: str, value: str) -> bool:
    return any(known.fullmatch(name) and shape.fullmatch(value) for known, shape in _SERVICE_VARIABLES)


def check_environment(known: set[str]) -> None:
    """Raises ConfigError for a SOFTPROMPT_ variable that is no flag's but is spelt almost like one."""
    names = [f"{ENVIRONMENT}_{name.upper()}" for name in sorted(known)]
    ours = (name for name in os.environ if name.startswith(f"{ENVIRONMENT}_") and name not in _OF_OTHERS)
    check_names([name for name in ours if nearest(name, names, likeness=0.8) is not None], names)


def _with_places(read: Table, folder: Path) -> Table:
    for name in ("library", "state"):
        if name in read:
            read[name] = str(folder / Path(read[name]).expanduser())
    base = read.get("base")
    if base is not None and base not in NAMED_BASES and (folder / Path(base).expanduser()).exists():
        read["base"] = str(folder / Path(base).expanduser())
    return read
