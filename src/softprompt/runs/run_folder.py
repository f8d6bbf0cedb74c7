"""A training run's folder: `run.json`, `metrics.jsonl`, `checkpoints/step-N/`, and at the end the adapter's files.

A run for several tasks has a sub-folder with an adapter for each, which its plan names under `tasks`. A checkpoint is
there whole or not at all: the prompt as an adapter (of several prompts trained together, one adapter each in a
sub-folder), `state.json` and `state.safetensors`. This module knows files and nothing of how training goes or of what
a state means.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from softprompt.config import KEPT_CHECKPOINTS
from softprompt.errors import AdapterError, ExistsError, StorageError
from softprompt.prompt import SoftPrompt
from softprompt.storage.atomic import PARTIAL_SUFFIX, append_line, remove_folder, write_file, write_folder
from softprompt.storage.files import (
    ADAPTER_FILES,
    CONFIG_NAME,
    MAX_RECORD_BYTES,
    PICKLE_NAME,
    RECORD_NAME,
    dump_object,
    parse_object,
    read_file,
)
from softprompt.storage.library import NAME, SET_NAME, check_name
from softprompt.storage.peft_config import PEFT_TYPE
from softprompt.storage.save import adapter_to_bytes, save_prompt, save_prompt_into

STATE_NAME = "state.json"
STATE_TENSORS_NAME = "state.safetensors"
_MAX_STATE_BYTES = 256 * 2**20  # losses and validations of many prompts
_MAX_STATE_TENSORS_BYTES = 16 * 2**30
_STEP_FOLDER = re.compile(r"step-(\d+)")


class Checkpoint(NamedTuple):
    """One saved step of a run."""

    step: int  # optimiser steps done
    path: Path  # an adapter folder, or one with an adapter folder for each prompt trained


class SavedState(NamedTuple):
    """What `save_checkpoint` was given."""

    state: dict[str, Any]  # JSON
    tensors: dict[str, Tensor]


def save_checkpoint(
    folder: Path, step: int, prompts: Mapping[str | None, SoftPrompt], state: Mapping[str, Any],
    tensors: Mapping[str, Tensor], *, keep: int,
) -> Path:  # fmt: skip
    """Write `folder/step-N`, then delete all but the latest `keep`; the same step again replaces it.

    `prompts` by name; None for the only one, whose adapter is the folder itself. Raises: StorageError.
    """
    assert step >= 0 and keep >= 1, (step, keep)
    path = folder / f"step-{step}"
    data = safetensors_torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    head = {"tensors_sha256": hashlib.sha256(data).hexdigest(), "state": state}
    files = {STATE_TENSORS_NAME: data, STATE_NAME: dump_object(head)}
    for name, prompt in prompts.items():
        files |= {_within(name, file): content for file, content in adapter_to_bytes(prompt).items()}
    write_folder(path, files, replace=True)
    for old in list_checkpoints(folder)[:-keep]:
        remove_folder(old.path)
    return path


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Saved steps, earliest first."""
    items = folder.iterdir() if folder.is_dir() else ()
    found = ((_STEP_FOLDER.fullmatch(item.name), item) for item in items)
    return sorted(Checkpoint(int(match[1]), item) for match, item in found if match)


def load_latest(folder: Path) -> tuple[SavedState | None, tuple[str, ...]]:
    """The latest checkpoint that is sound, and a sentence for each later one that is not."""
    problems: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            return load_state(checkpoint.path), tuple(problems)
        except (AdapterError, StorageError) as error:
            problems.append(f"{error}; the checkpoint before it is taken")
    return None, tuple(problems)


def load_state(path: Path) -> SavedState:
    """Raises: StorageError or AdapterError for a folder that is not whole."""
    head = read_file(path, STATE_NAME, _MAX_STATE_BYTES)
    data = read_file(path, STATE_TENSORS_NAME, _MAX_STATE_TENSORS_BYTES)
    if head is None or data is None:
        raise StorageError(f"{path} has no {STATE_NAME if head is None else STATE_TENSORS_NAME}")
    known = parse_object(head, str(path / STATE_NAME))
    if hashlib.sha256(data).hexdigest() != known.get("tensors_sha256") or not isinstance(known.get("state"), dict):
        raise StorageError(f"{path}: {STATE_TENSORS_NAME} is not what {STATE_NAME} describes; it was changed or cut")
    try:
        return SavedState(known["state"], safetensors_torch.load(data))
    except SafetensorError as error:
        raise StorageError(f"{path / STATE_TENSORS_NAME} is no safetensors file ({error})") from error


def forget_after(folder: Path, step: int) -> None:
    """Delete checkpoints behind `step`, which a resumed run will make again."""
    for checkpoint in list_checkpoints(folder):
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.path, ignore_errors=True)


def _within(name: str | None, file: str) -> str:
    return file if name is None else f"{name}/{file}"


PLAN_NAME = "run.json"
METRICS_NAME = "metrics.jsonl"
CHECKPOINTS_NAME = "checkpoints"
CANDIDATES_NAME = "candidates"
BOARD_NAME = "tensorboard"
TASKS_KEY = "tasks"  # of the plan: an object whose keys are the tasks' names
_PLAN_MARK = "softprompt_run"  # the key that makes a run.json ours; its value is the format's version
_PLAN_VERSION = 1
# In the order in which they are deleted: what makes the folder known as a run goes last.
_OURS = (*ADAPTER_FILES, PICKLE_NAME, METRICS_NAME, CHECKPOINTS_NAME, CANDIDATES_NAME, SET_NAME, BOARD_NAME, PLAN_NAME)
_NAMES_TAKEN = frozenset({*_OURS, STATE_NAME, STATE_TENSORS_NAME})


@dataclass(frozen=True)
class RunFolder:
    """Where one run writes. Make it with `create`, or open a finished one with `RunFolder(path)`."""

    path: Path

    @classmethod
    def create(cls, path: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False) -> RunFolder:
        """A folder to write a run to: new or empty, or an existing run to resume or to replace.

        Overwriting deletes only what runs and adapters consist of, and only where one of them is recognised; other
        files stay.

        Raises: ExistsError where the folder has content that may not be touched; StorageError.
        """
        if resume and overwrite:
            raise StorageError(f"{path}: resuming and overwriting exclude each other; choose one")
        run = cls(Path(path))
        if resume:
            run._prepare_to_resume()
        else:
            run._prepare_to_start(overwrite)
        return run

    @classmethod
    def check_free(cls, path: str | os.PathLike[str], *, overwrite: bool = False, tasks: Iterable[str] = ()) -> None:
        """Check, before anything slow begins, for whatever `create` refuses, and for a task's folder that is taken.

        Touches nothing. Raises: ExistsError, StorageError.
        """
        run = cls(Path(path))
        run._check_start(overwrite)
        earlier = [task.path for task in run._tasks()]
        for folder in (run.path / name for name in tasks):
            if os.path.lexists(folder) and folder not in earlier:
                raise ExistsError(f"{folder} exists and is not of the run in {path}; give the task another name")

    def has_begun(self) -> bool:
        """Whether a run was begun here, so that there is something to resume."""
        return _PLAN_MARK in _peek(self.path, PLAN_NAME)

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        """The resolved plan, and later the results, as `run.json`; replaces the one before.

        Raises: StorageError.
        """
        write_file(self.path / PLAN_NAME, dump_object({_PLAN_MARK: _PLAN_VERSION, **plan}))

    def read_plan(self) -> dict[str, Any]:
        """What `write_plan` was given.

        Raises: StorageError where there is no run.
        """
        data = read_file(self.path, PLAN_NAME, MAX_RECORD_BYTES)
        plan = {} if data is None else parse_object(data, str(self.path / PLAN_NAME))
        if plan.pop(_PLAN_MARK, None) != _PLAN_VERSION:
            raise StorageError(f"{self.path} is not a run's folder: it has no {PLAN_NAME} of this release")
        return plan

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """One line of `metrics.jsonl`, there for readers at once.

        Raises: StorageError.
        """
        append_line(self.path / METRICS_NAME, dump_object(metrics, indent=None))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every whole line of `metrics.jsonl`, in order; none where nothing was written.

        Raises: AdapterError for a line that is no JSON object.
        """
        file = self.path / METRICS_NAME
        whole = file.read_bytes().rpartition(b"\n")[0] if file.exists() else b""
        lines = whole.split(b"\n") if whole else []
        return [parse_object(line, f"line {number:,} of {file}") for number, line in enumerate(lines, start=1)]

    def save_checkpoint(
        self, step: int, prompts: Mapping[str | None, SoftPrompt], state: Mapping[str, Any],
        tensors: Mapping[str, Tensor], *, keep: int = KEPT_CHECKPOINTS,
    ) -> Path:  # fmt: skip
        """The prompts after `step` optimiser steps and the run's state; see `storage.checkpoints`.

        Raises: StorageError.
        """
        return save_checkpoint(self.path / CHECKPOINTS_NAME, step, prompts, state, tensors, keep=keep)

    def checkpoints(self) -> list[Checkpoint]:
        """Saved steps, earliest first."""
        return list_checkpoints(self.path / CHECKPOINTS_NAME)

    def load_latest(self) -> tuple[SavedState | None, tuple[str, ...]]:
        """The latest sound checkpoint's state, if there is any, and a sentence for each broken one behind it."""
        return load_latest(self.path / CHECKPOINTS_NAME)

    def go_back_to(self, step: int) -> None:
        """Forget metrics and checkpoints behind `step`: a resumed run makes them again.

        Raises: StorageError.
        """
        lines = [line for line in self.read_metrics() if line["step"] <= step]
        write_file(self.path / METRICS_NAME, b"".join(dump_object(line, indent=None) + b"\n" for line in lines))
        forget_after(self.path / CHECKPOINTS_NAME, step)

    def save_candidate(self, name: str, prompt: SoftPrompt) -> Path:
        """One of several prompts that were trained together, as an adapter of its own in `candidates/`.

        Raises: StorageError.
        """
        return save_prompt(prompt, self.path / CANDIDATES_NAME / name, overwrite=True)

    def finish(self, prompt: SoftPrompt) -> Path:
        """Put the chosen prompt's adapter files into the run's folder, which then loads as an adapter.

        Raises: StorageError.
        """
        return save_prompt_into(prompt, self.path)

    def _prepare_to_resume(self) -> None:
        self.read_plan()
        self._remove_partials()
        _drop_unfinished_line(self.path / METRICS_NAME)

    def _prepare_to_start(self, overwrite: bool) -> None:
        self._check_start(overwrite)
        if self.path.is_dir():
            self._clear()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make {self.path}: {error.strerror}; choose another folder") from error

    def _check_start(self, overwrite: bool) -> None:
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise ExistsError(f"{self.path} is a file; a run needs a folder: choose another name")
        nearest = next(path for path in (self.path, *self.path.absolute().parents) if os.path.lexists(path))
        if not nearest.is_dir():
            raise StorageError(f"cannot make {self.path}: {nearest} is not a folder; choose another folder")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise StorageError(f"cannot make {self.path}: {nearest} is not writable; choose another folder")
        if self.path.is_dir() and any(not item.name.endswith(PARTIAL_SUFFIX) for item in self.path.iterdir()):
            self._check_replaceable(overwrite)

    def _check_replaceable(self, overwrite: bool) -> None:
        if not overwrite:
            raise ExistsError(f"{self.path} exists; replace it on purpose (--overwrite), or choose another")
        if not self._is_recognised():
            names = ", ".join(sorted(item.name for item in self.path.iterdir())[:5])
            raise ExistsError(
                f"{self.path} holds {names} and is neither a run nor an adapter, so it is not overwritten; "
                "choose another folder"
            )

    def _clear(self) -> None:
        for task in self._tasks():
            task._clear()
            with suppress(OSError):  # something of the user's is in it
                task.path.rmdir()
        self._remove_partials()
        for name in _OURS:
            _remove(self.path / name)

    def _tasks(self) -> list[RunFolder]:
        """The sub-folders of a run for several tasks."""
        named = _peek(self.path, PLAN_NAME).get(TASKS_KEY)
        names = [name for name in named if is_part_name(name)] if isinstance(named, dict) else []
        folders = [self.path / name for name in names]
        return [RunFolder(path) for path in folders if path.is_dir() and not path.is_symlink()]

    def _is_recognised(self) -> bool:
        return (
            _PLAN_MARK in _peek(self.path, PLAN_NAME)
            or "content_hash" in _peek(self.path, RECORD_NAME)
            or _peek(self.path, CONFIG_NAME).get("peft_type") == PEFT_TYPE
        )

    def _remove_partials(self) -> None:
        for folder in (self.path, self.path / CHECKPOINTS_NAME):
            for leftover in (*folder.glob(f".*{PARTIAL_SUFFIX}"), *folder.glob(".step-*.old")):
                _remove(leftover)


def check_part_name(name: str) -> str:
    """A name that a task or a candidate of a run may have, given back: it names a folder among the run's own.

    Raises: StorageError.
    """
    if not is_part_name(name):
        check_name(name)
        raise StorageError(f"{name!r} is what a file or folder of every run is called; choose another name")
    return name


def is_part_name(name: str) -> bool:
    """Whether `check_part_name` allows the name."""
    return NAME.fullmatch(name) is not None and name not in _NAMES_TAKEN


def _peek(folder: Path, name: str) -> dict[str, Any]:
    try:
        data = read_file(folder, name, MAX_RECORD_BYTES)
        return {} if data is None else parse_object(data, name)
    except AdapterError:
        return {}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _drop_unfinished_line(file: Path) -> None:
    """A killed process may have left half a line; the next line must not be appended to it."""
    if not file.exists():
        return
    data = file.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(file, data.rfind(b"\n") + 1)
