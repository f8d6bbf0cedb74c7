"""Writes a training run's folder as its events come. Nothing is written before `begin`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from softprompt.config import KEPT_CHECKPOINTS, TaskKind, TrainConfig
from softprompt.errors import MissingDependencyError
from softprompt.prompt import SoftPrompt
from softprompt.runs.run_folder import BOARD_NAME, RunFolder, SavedState
from softprompt.storage import save_set
from softprompt.training import Checkpoint, Dropped, Event, Prepared, ResumePoint, StepDone, TrainResult

Metadata = Mapping[str, Any]


class Recorder:
    """One run's folder. `metadata` goes into `run.json`; that of a prompt's own rows goes into its record too."""

    def __init__(
        self, folder: Path, metadata: Metadata, *, overwrite: bool = False, resume: bool = False,
        keep_checkpoints: int = KEPT_CHECKPOINTS, tensorboard: bool = False,
    ) -> None:  # fmt: skip
        self.folder = folder
        self._metadata = metadata
        self._overwrite, self._resume = overwrite, resume
        self._keep = keep_checkpoints
        self._wants_board = tensorboard
        self._steps: list[tuple[float, float, int]] = []  # epoch, loss, targets

    def load_latest(self) -> tuple[SavedState | None, tuple[str, ...]]:
        """The state to resume from, if there is any, and a sentence for each broken checkpoint after it."""
        return RunFolder(self.folder).load_latest() if self._resume else (None, ())

    def as_begun(self, task: str, kind: TaskKind, configs: Mapping[str, TrainConfig]) -> dict[str, TrainConfig]:
        """The settings of a task's candidates; of a run that is resumed with the defaults that it was begun with."""
        plan = RunFolder(self.folder).read_plan() if self._resume else {}
        plans = {name: entry["plan"] for name, entry in plan.get("candidates", {"": plan}).items() if "plan" in entry}
        begun = {name: TrainConfig.of_record(each["config"]) for name, each in plans.items()}
        names = {name: "/".join(part for part in (task, name) if part) for name in configs}
        return {
            name: config.as_begun(begun[names[name]], kind) if names[name] in begun else config
            for name, config in configs.items()
        }

    def begin(self, ready: Prepared) -> None:
        """Make the folder, or go back in it to the step that is resumed from."""
        self._run = RunFolder.create(self.folder, resume=self._resume, overwrite=self._overwrite)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        begun = self._run.read_plan().get("begun") if self._resume else now
        self._plan = {"begun": begun, **_plans(ready), "notes": list(ready.notes), **self._metadata}
        if not self._resume:
            self._run.write_plan(self._plan)  # first of all: from here on the folder is known as a run
        self._run.go_back_to(ready.loop.step)
        self._steps = [
            (line["epoch"], line["loss"], line["num_targets"])
            for line in self._run.read_metrics()
            if line["kind"] == "step"
        ]
        self._run.write_plan(self._plan)
        self._board = _board(self.folder, ready.loop.step + 1) if self._wants_board else None

    def record(self, event: Event) -> None:
        """Write an event: a line of the metrics, a checkpoint, a point of TensorBoard's curves."""
        if isinstance(event, (StepDone, Checkpoint, Dropped)):
            self._run.append_metrics(event.to_json())
        if isinstance(event, StepDone):
            self._steps.append((event.epoch, event.loss, event.num_targets))
        if isinstance(event, ResumePoint):
            state = event.state
            self._run.save_checkpoint(event.step, event.prompts, state.to_json(), state.tensors, keep=self._keep)
        if self._board is not None:
            _add_to_board(self._board, event)

    def save_prompts(
        self, kept: TrainResult, others: Sequence[TrainResult], metadata: Metadata, folder: str = "",
        is_set: bool = False,
    ) -> None:  # fmt: skip
        """The kept prompt's adapter, and those of the candidates that it was chosen from, each with its record."""
        run = RunFolder(self.folder / folder)
        run.path.mkdir(exist_ok=True)
        saved = [run.save_candidate(_own_name(result), _with_metadata(result, metadata)) for result in others]
        if is_set:
            save_set(run.path, [path.relative_to(run.path).as_posix() for path in saved])
        run.finish(_with_metadata(kept, metadata))

    def end(self, outcome: Metadata) -> None:
        """Add the results to `run.json`: from now on there is nothing to resume, unless the run was interrupted."""
        self._run.write_plan({**self._plan, **outcome})
        if self._board is not None:
            self._board.close()

    def epoch_loss(self, which: int) -> float:
        """Nats per target over one epoch (0 the first, -1 the last, as far as it went)."""
        epochs = [math.ceil(epoch) for epoch, _, _ in self._steps]
        chosen = [step for step, epoch in zip(self._steps, epochs, strict=True) if epoch == epochs[which]]
        return sum(loss * targets for _, loss, targets in chosen) / sum(targets for _, _, targets in chosen)


def _own_name(result: TrainResult) -> str:
    """Without its task's name."""
    return str(result.name).rpartition("/")[2]


def _plans(ready: Prepared) -> dict[str, Any]:
    if ready.trial.name is None:
        return {"plan": ready.trial.plan.to_json()}
    return {"candidates": {str(trial.name): {"plan": trial.plan.to_json()} for trial in ready.loop.trials}}


def _with_metadata(result: TrainResult, metadata: Metadata) -> SoftPrompt:
    record = replace(result.prompt.record, run={**result.prompt.record.run, **metadata})
    return replace(result.prompt, record=record)


def require_tensorboard(wanted: bool) -> None:
    """Raises MissingDependencyError where TensorBoard is wanted and not installed."""
    if wanted and find_spec("tensorboard") is None:
        raise MissingDependencyError("--tensorboard needs the package tensorboard; pip install tensorboard")


def _board(folder: Path, first_step: int) -> Any:  # Any: tensorboard's SummaryWriter, untyped
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / BOARD_NAME), purge_step=first_step)


def _add_to_board(board: Any, event: Event) -> None:  # Any: as above
    if isinstance(event, (StepDone, Checkpoint)):
        prefix = f"{event.candidate}/" if event.candidate is not None else ""
    if isinstance(event, StepDone):
        board.add_scalar(f"{prefix}loss/train", event.loss, event.step)
        board.add_scalar(f"{prefix}learning_rate", event.learning_rate, event.step)
    if isinstance(event, Checkpoint) and event.validation_loss is not None:
        board.add_scalar(f"{prefix}loss/validation", event.validation_loss, event.step)
