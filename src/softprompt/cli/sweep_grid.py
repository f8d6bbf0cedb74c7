"""Every combination of a grid's values, under a short name that says what differs. No torch here.

A name is made of the settings that take several values: each one's last word (all of its words where two end alike)
and its value, so `relative_learning_rate = [0.1, 0.3]` and `seed = [0, 1]` make `rate0.1-seed0` to `rate0.3-seed1`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

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
    return dict(zip(_told_apart(names), combinations, strict=True))


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


def _told_apart(names: Sequence[str]) -> list[str]:
    """The names, with their number in place of the end where they are too long or occur twice."""
    if len(set(names)) == len(names) and max(map(len, names)) <= _LONGEST_NAME:
        return list(names)
    ends = [f"-{number}" for number in range(len(names))]
    return [name[: _LONGEST_NAME - len(end)] + end for name, end in zip(names, ends, strict=True)]
