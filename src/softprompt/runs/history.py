"""A run's history as read from its folder, whether the run has ended, was stopped or is still going.

It reads `run.json` and `metrics.jsonl` and knows no training.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from softprompt.errors import AdapterError, StorageError
from softprompt.prompt import Judgement
from softprompt.runs import RunFolder
from softprompt.runs.run_folder import CHECKPOINTS_NAME, METRICS_NAME, PLAN_NAME, TASKS_KEY

State = Literal["finished", "interrupted", "unfinished"]
Point = tuple[int, float]  # step, value

DEPTH = 3  # levels of folders below the one that is searched


@dataclass(frozen=True, kw_only=True)
class PromptHistory:
    """One prompt of a run."""

    task: str  # empty where there is one only
    name: str  # of the candidate, without its task; empty for the only one
    plan: Mapping[str, Any]  # as in `run.json`
    training: tuple[Point, ...]  # nats per counted target
    validation: tuple[Point, ...]  # nats per text token
    scores: tuple[Point, ...]  # of --best-by, higher is better
    steps: int  # done
    dropped_after: int | None
    is_kept: bool
    kept_step: int | None  # that its adapter is from, once the run has ended

    @property
    def best(self) -> float | None:
        """The best validation loss, else the latest training loss; lower is better."""
        return min((loss for _, loss in self.validation), default=self.training[-1][1] if self.training else None)


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """One run. Counts are of the prompt that went furthest."""

    folder: Path
    state: State
    begun: str | None  # ISO 8601 in UTC; None in older runs
    base: str
    data: tuple[str, ...]  # file or Hub set, one per task
    steps: int  # done
    planned_steps: int
    checkpoints: Mapping[int, Path]
    prompts: tuple[PromptHistory, ...]
    notes: tuple[str, ...]
    judgements: Mapping[str, Judgement]  # by task, of an ended run

    @property
    def by_task(self) -> dict[str, list[PromptHistory]]:
        """The prompts of each task, the best first."""
        found: dict[str, list[PromptHistory]] = {}
        for prompt in self.prompts:
            found.setdefault(prompt.task, []).append(prompt)
        return {task: sorted(prompts, key=_rank) for task, prompts in found.items()}

    @property
    def kept_folders(self) -> list[Path]:
        """Where the adapters of an ended run lie."""
        return [] if self.state == "unfinished" else [self.folder / task for task in self.by_task]


def find_runs(folder: Path) -> Iterator[Path]:
    """The run folders at and below `folder`, down to `DEPTH` levels; nothing inside a run, hidden or behind a link.

    Raises: StorageError where there is no such folder.
    """
    if not folder.is_dir():
        raise StorageError(f"no folder {folder} to look for runs in; give one that is there")
    for root, inner, files in os.walk(folder):
        path = Path(root)
        inner.sort()
        if PLAN_NAME in files and _is_run(path):
            inner.clear()
            yield path
        elif len(path.relative_to(folder).parts) >= DEPTH:
            inner.clear()
        inner[:] = [name for name in inner if not name.startswith(".")]


def read_history(folder: Path) -> RunHistory:
    """A run's history; half a last line of the metrics, which a running process may just be writing, is left out.

    Raises: StorageError, AdapterError for a folder that is no run's, or whose files do not read as a run's.
    """
    run = RunFolder(folder)
    plan, lines = run.read_plan(), run.read_metrics()
    try:
        return _history(run, plan, lines)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(
            f"{folder}: run.json and {METRICS_NAME} do not read as a run's ({error!r}); were they edited?"
        ) from error


def _is_run(path: Path) -> bool:
    run = RunFolder(path)
    if run.has_begun():
        return True
    try:
        run.read_plan()
    except AdapterError:  # no JSON: a run that was damaged, if there is more of one
        return (path / METRICS_NAME).exists() or (path / CHECKPOINTS_NAME).is_dir()
    except StorageError:
        return False
    return True


def _history(run: RunFolder, plan: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> RunHistory:
    result = plan.get("result")
    named = plan.get("candidates")
    known = {"": plan} if named is None else named  # each with its plan and, later, its result
    tasks = plan.get(TASKS_KEY)
    kept = [""] if named is None else _kept(result)
    own_lines: dict[str, list[Mapping[str, Any]]] = {name: [] for name in known}
    for line in lines:
        own_lines[line.get("candidate") or ""].append(line)
    parts = {name: _task_and_name(name, tasks is not None) for name in known}
    prompts = tuple(_prompt(*parts[name], known[name], own_lines[name], name in kept) for name in known)
    data = [plan] if tasks is None else tasks.values()
    return RunHistory(
        folder=run.path, state=_state(result), begun=plan.get("begun"),
        base=str(plan.get("settings", {}).get("base") or ""),
        data=tuple(str(each["data"]["data"]) for each in data if "data" in each),
        steps=max(prompt.steps for prompt in prompts),
        planned_steps=max(prompt.plan["num_steps"] for prompt in prompts),
        checkpoints={checkpoint.step: checkpoint.path for checkpoint in run.checkpoints()},
        prompts=prompts, notes=tuple(plan.get("notes", ())), judgements=_judgements(result),
    )  # fmt: skip


def _judgements(result: Mapping[str, Any] | None) -> dict[str, Judgement]:
    """Of the only task, or of each by name."""
    known = (result or {}).get("held_out") or {}
    named = {"": known} if "rows" in known else known
    found = {task: Judgement.from_json(each) for task, each in named.items()}
    return {task: judgement for task, judgement in found.items() if judgement is not None}


def _state(result: Mapping[str, Any] | None) -> State:
    if result is None:
        return "unfinished"
    return "interrupted" if result["interrupted"] else "finished"


def _kept(result: Mapping[str, Any] | None) -> Sequence[str]:
    """The names of the candidates that an ended run kept, one per task."""
    kept = {} if result is None else result["kept"]
    return [kept] if isinstance(kept, str) else list(kept.values())


def _task_and_name(candidate: str, has_tasks: bool) -> tuple[str, str]:
    task, _, name = candidate.rpartition("/")
    return (candidate, "") if has_tasks and not task else (task, name)


def _prompt(
    task: str, name: str, known: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], is_kept: bool
) -> PromptHistory:
    steps = [line for line in lines if line["kind"] == "step"]
    checks = [line for line in lines if line["kind"] == "checkpoint"]
    return PromptHistory(
        task=task, name=name, plan=known["plan"], is_kept=is_kept, kept_step=known.get("result", {}).get("kept_step"),
        training=_points(steps, "loss"), validation=_points(checks, "validation_loss"), scores=_points(checks, "score"),
        steps=max((line["step"] for line in steps), default=0),
        dropped_after=next((line["step"] for line in lines if line["kind"] == "dropped"), None),
    )  # fmt: skip


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[Point, ...]:
    """What is a number, that is: neither missing nor the null that NaN is written as."""
    return tuple((line["step"], float(line[key])) for line in lines if line.get(key) is not None)


def _rank(prompt: PromptHistory) -> tuple[float, ...]:
    if prompt.scores:
        return (-max(score for _, score in prompt.scores),)
    return (float("inf"),) if prompt.best is None else (prompt.best,)
