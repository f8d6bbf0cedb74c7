"""Seeded mutations of a tiny base's folder: what broken downloads, other releases and attackers leave there."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
WEIGHTS = "model.safetensors"
_NESTED: Any = 1
for _ in range(200):
    _NESTED = [_NESTED]
VALUES: tuple[Any, ...] = (
    None, True, "", "x", "../../etc/passwd", [], {}, [1, "a", None], {"a": {"b": []}}, 0, -1, 1, 3, 2**31, 2**63,
    10**30, 10**9, 10**6, 1e308, -0.5, float("nan"), float("inf"), _NESTED, "\ud800", "NaN", [[-1]], {"__proto__": 1},
    96, 97,
)  # fmt: skip


def mutate(sound: Path, folder: Path, seed: int) -> str:
    """A copy of the sound folder with one thing wrong; gives what it is."""
    chooser = random.Random(seed)
    shutil.copytree(sound, folder)
    if chooser.random() < 0.15:
        return _break_bytes(folder / WEIGHTS, chooser)
    file = folder / chooser.choice([name for name in SETTINGS if (folder / name).is_file()])
    if chooser.random() < 0.25:
        return _break_bytes(file, chooser)
    content = json.loads(file.read_text())
    keys = _paths(content)
    if not keys or chooser.random() < 0.1:
        content = chooser.choice(VALUES)
        file.write_text(json.dumps(content))
        return f"{file.name} is {str(content)[:40]}"
    path = chooser.choice(keys)
    value, is_removed = chooser.choice(VALUES), chooser.random() < 0.15
    _put(content, path, value, is_removed=is_removed)
    file.write_text(json.dumps(content))
    return f"{file.name}: {path} is {'not there' if is_removed else str(value)[:40]!a}"


def _break_bytes(file: Path, chooser: random.Random) -> str:
    data = file.read_bytes()
    cut = chooser.randrange(len(data))
    broken, what = chooser.choice(
        [
            (b"", "is empty"),
            (data[:cut], f"is cut at {cut}"),
            (b"\xff\xfe" + data, "has two bytes before it"),
            (data[:cut] + bytes([data[cut] ^ 0x5A]) + data[cut + 1 :], f"has byte {cut} changed"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:9c0e\nsize 10\n", "is a pointer"),
            (data[: cut // 8 * 8] + b"\xff" * 8 + data[cut // 8 * 8 + 8 :], f"has eight bytes 255 at {cut // 8 * 8}"),
            (b"[" * 100_000, "is all brackets"),
        ]
    )
    file.write_bytes(broken)
    return f"{file.name} {what}"


def _paths(content: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value stands; of a long list or vocabulary only a few, so that settings are as likely as words."""
    items = (
        list(content.items())
        if isinstance(content, dict)
        else list(enumerate(content))
        if isinstance(content, list)
        else []
    )
    found = []
    for key, value in items[:24]:
        found += [(*before, key), *_paths(value, (*before, key))]
    return found


def _put(content: Any, path: tuple[Any, ...], value: Any, *, is_removed: bool) -> None:
    for key in path[:-1]:
        content = content[key]
    if is_removed:
        del content[path[-1]]
    else:
        content[path[-1]] = value
