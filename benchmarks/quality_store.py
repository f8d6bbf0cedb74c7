"""What the bench of a real base has measured: a JSON file per set, for any number of processes at once.

A measurement is one contender with one seed. Before it begins, its process locks a file of its own in `claims/`; the
system releases that lock when the process ends, however it ends, so that no claim outlives its process and a killed
bench goes on where it was. Results are put into the set's file one by one, under a lock of that file.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

Settings = dict[str, Any]

BARE, OURS, RANDOM = "the bare base", "ours by default", "random vectors of the same norm"
INSTRUCTION, IN_CONTEXT = "an instruction's words", "8 rows in context"
PROBE, WORDS = "linear probe", "bag of words"
NOTEBOOK, GRID, BEST = "PEFT's start, 3e-3", "grid: ", "PEFT, best of its grid"
IDENTITY = ("dtype", "rows")  # results that differ in one of them are never in one file


@dataclass(frozen=True)
class Result:
    """One contender with one seed on the test rows: a row's nats (with labels: whether it is wrong) and its tokens."""

    sums: list[float]
    counts: list[int]
    seconds: float  # training, choice and scoring
    note: str = ""
    greedy: list[int] | None = None  # 1 for a row whose greedy answer is its label or its record
    loss: float | None = None  # nats per token of the own label, among the whole vocabulary
    commit: str = ""
    recommendation: str | None = None  # of ours, by its own validation rows: the prompt or the base
    resolved: Settings | None = None  # of ours: what was decided by task

    @property
    def mean(self) -> float:
        return sum(self.sums) / sum(self.counts)


class Store:
    """The file of one set, and the claims on its measurements."""

    def __init__(self, folder: Path, name: str, setting: Settings) -> None:
        self.name, self.folder, self._setting = name, folder, setting
        self._file, self._claims = folder / f"{name}.json", folder / "claims"
        self._claims.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self._write(self.read())

    def read(self) -> dict[str, dict[str, Any]]:
        """Settings and seeds of each contender. Raises SystemExit for a file of another dtype or other rows."""
        if not self._file.exists():
            return {}
        found = json.loads(self._file.read_text())
        own = found.get("setting", {})
        differing = [name for name in IDENTITY if own.get(name) != self._setting[name]]
        if differing:
            raise SystemExit(
                f"{self._file} has results of another {' and '.join(differing)} ({own.get('dtype', 'unknown dtype')}); "
                "give another --out, or delete it"
            )
        contenders: dict[str, dict[str, Any]] = found["contenders"]
        return contenders

    def whole(self) -> dict[str, Any]:
        """The file: setting and contenders."""
        found: dict[str, Any] = json.loads(self._file.read_text())
        return found

    def results(self, name: str, settings: Settings | None = None) -> dict[int, Result]:
        """By seed; none where those of the file have other settings."""
        entry = self.read().get(name, {})
        if settings is not None and entry.get("settings") != as_stored(settings):
            return {}
        return {int(seed): Result(**item) for seed, item in entry.get("seeds", {}).items()}

    def add(self, name: str, settings: Settings, seed: int, result: Result) -> None:
        with self._locked():
            known = self.read()
            if known.get(name, {}).get("settings") != as_stored(settings):
                known[name] = {"settings": settings, "seeds": {}}
            known[name]["seeds"][str(seed)] = asdict(result)
            self._write(known)

    def prompt_folder(self, name: str, seed: int) -> Path:
        return self.folder / f"{self.name}-prompts" / f"{file_name(name)}-{seed}"

    @contextmanager
    def claim(self, name: str, seed: int) -> Iterator[bool]:
        """Whether this process may measure it, until the end of the block."""
        with (self._claims / f"{self.name}-{file_name(name)}-{seed}").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            file.truncate(0)
            file.write(f"{os.getpid()}\n")  # for whoever looks; the lock is what counts
            file.flush()
            yield True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._claims / f"{self.name}.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _write(self, contenders: Mapping[str, Any]) -> None:
        new = self._file.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps({"setting": self._setting, "contenders": contenders}))
        new.replace(self._file)


def as_stored(settings: Settings) -> Any:  # Any: JSON
    """The settings as the file has them, tuples as lists."""
    return json.loads(json.dumps(settings))


def file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter == "." else "-" for letter in name)


@cache
def commit() -> str:
    """Of the working tree, with a plus where it has changes."""
    here = Path(__file__).parent
    asked = ["git", "describe", "--always", "--dirty=+"]
    found = subprocess.run(asked, cwd=here, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


@cache
def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in reversed(lines)}
    return f"{named.get('model name')}, family {named.get('cpu family')}, model {named.get('model')}"
