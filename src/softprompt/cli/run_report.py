"""A run's history as rows, facts, tables and charts: what `softprompt runs` shows of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import click

from softprompt.cli.charts import MARKS, MAX_CURVES, Points, can_draw, draw, legend, sampled
from softprompt.cli.console import print_table, results_width
from softprompt.cli.run_history import PromptHistory, RunHistory
from softprompt.config import TrainConfig

LIST_COLUMNS = ("run", "base", "data", "steps", "loss", "state", "begun")
_TRAINING, _VALIDATION = "training loss (nats per target)", "validation loss (nats per text token)"
_WIDEST_CHART = 100  # columns


def list_row(run: RunHistory | str) -> list[str]:
    """The cells of `LIST_COLUMNS` behind the name, of a run or of what is wrong with one."""
    if isinstance(run, str):
        return ["", "", "", "", "broken", ""]
    data = ", ".join(Path(name).name for name in run.data)
    return [Path(run.base).name, data, _steps(run), _short_losses(run), _state(run), _begun(run)[:10]]


def list_entry(run: RunHistory | str) -> dict[str, Any]:
    """The same as JSON values."""
    if isinstance(run, str):
        return {"state": "broken", "problem": run}
    return {
        "state": run.state, "problem": None, "begun": run.begun, "base": run.base, "data": run.data,
        "steps": run.steps, "planned_steps": run.planned_steps, "last_checkpoint": max(run.checkpoints, default=None),
        "best": {task: prompts[0].best for task, prompts in run.by_task.items()},
    }  # fmt: skip


def facts(run: RunHistory) -> list[list[str]]:
    """Rows of name and value."""
    kept_step = run.prompts[0].kept_step if len(run.prompts) == 1 else None
    known = {
        "state": _state(run),
        "begun (UTC)": _begun(run),
        "base": run.base,
        "data": ", ".join(run.data),
        "steps": _steps(run),
        "checkpoints": ", ".join(f"step {step:,}" for step in run.checkpoints),
        "kept": "" if kept_step is None else f"step {kept_step:,}",
        "loss": _losses(run),
        **_settings(run.prompts),
        "notes": "\n".join(run.notes),
    }
    return [[name, value] for name, value in known.items() if value]


def to_json(run: RunHistory) -> dict[str, Any]:
    """All that is known of a run."""
    return {
        "run": str(run.folder),
        **list_entry(run),
        "checkpoints": [{"step": step, "folder": str(path)} for step, path in run.checkpoints.items()],
        "notes": run.notes,
        "prompts": [
            {
                "task": prompt.task, "name": prompt.name, "kept": prompt.is_kept, "steps": prompt.steps,
                "kept_step": prompt.kept_step,
                "dropped_after": prompt.dropped_after, "training": prompt.training, "validation": prompt.validation,
                "scores": prompt.scores, "plan": prompt.plan,
            }
            for prompt in run.prompts
        ],
    }  # fmt: skip


def show_candidates(task: str, prompts: Sequence[PromptHistory]) -> None:
    """The prompts of one task as a table, in the order given."""
    columns = ["candidate", "validation", "training", "learning rate", "tokens", "start", "seed", "steps"]
    print_table(task or "Candidates", columns, [_candidate_row(prompt) for prompt in prompts], figures=True)


def show_curves(task: str, prompts: Sequence[PromptHistory]) -> None:
    """Two charts of one task, or tables where there is nothing to draw with; of many prompts the first ones given."""
    _show_chart(task, _TRAINING, {prompt.name: prompt.training for prompt in prompts})
    _show_chart(task, _VALIDATION, {prompt.name: prompt.validation for prompt in prompts})


def _show_chart(task: str, what: str, curves: Mapping[str, Points]) -> None:
    known = {name: points for name, points in curves.items() if points}
    shown = dict(list(known.items())[:MAX_CURVES])
    if not shown:
        return
    title = (f"{task}: " if task else "") + what
    title += f", best {MAX_CURVES} of {len(known)}" if len(shown) < len(known) else ""
    width = min(results_width(), _WIDEST_CHART)
    if can_draw():
        click.echo(draw(title, shown, width))
        return
    columns = MARKS[: len(shown)] if len(shown) > 1 else ["loss"]
    print_table(title, ["step", *columns], sampled(shown), figures=True)
    for line in legend(list(shown), width):
        click.echo(line)


def _steps(run: RunHistory) -> str:
    return f"{run.steps:,} of {run.planned_steps:,}"


def _losses(run: RunHistory) -> str:
    shown = {task: _loss(prompts) for task, prompts in run.by_task.items()}
    return "; ".join(f"{task} {text}" if task else text for task, text in shown.items() if text)


def _short_losses(run: RunHistory) -> str:
    """The figure first, so that a cut cell still has it."""
    shown = {task: _short_loss(prompts[0]) for task, prompts in run.by_task.items()}
    return "; ".join(f"{task} {text}" if task else text for task, text in shown.items() if text)


def _short_loss(prompt: PromptHistory) -> str:
    if prompt.best is None:
        return ""
    return f"{prompt.best:.3f} " + ("validation, best" if prompt.validation else "training")


def _loss(prompts: Sequence[PromptHistory]) -> str:
    """Of the best: the last and the best validation, else the last step's training loss."""
    first = prompts[0]
    if first.validation:
        best = min(loss for _, loss in first.validation)
        return f"validation {first.validation[-1][1]:.3f}, best {best:.3f}"
    return f"training {first.training[-1][1]:.3f}" if first.training else ""


def _state(run: RunHistory) -> str:
    if run.state == "finished":
        return run.state
    last = max(run.checkpoints, default=None)
    return f"{run.state}, " + ("no checkpoint yet" if last is None else f"resumable from step {last:,}")


def _begun(run: RunHistory) -> str:
    return "" if run.begun is None else run.begun[:16].replace("T", " ")


def _settings(prompts: Sequence[PromptHistory]) -> dict[str, str]:
    """What all prompts share and is no default, and how it was run."""
    first = prompts[0].plan
    defaults = {item.name: item.default for item in dataclass_fields(TrainConfig)}
    shared = {
        name: value
        for name, value in first["config"].items()
        if all(prompt.plan["config"].get(name) == value for prompt in prompts)
        and (name == "virtual_tokens" or value != defaults.get(name))
    }
    how = {name: first[name] for name in ("dtype", "device", "layout", "micro_batch_rows")}
    rates = {prompt.plan["learning_rate"] for prompt in prompts}
    if len(rates) == 1:
        how["learning_rate"] = f"{first['learning_rate']:.3g}"
    return {name.replace("_", " "): str(value) for name, value in {**shared, **how}.items()}


def _candidate_row(prompt: PromptHistory) -> list[str]:
    config = prompt.plan["config"]
    dropped = "" if prompt.dropped_after is None else ", dropped"
    return [
        prompt.name + (" (kept)" if prompt.is_kept else ""),
        f"{min(loss for _, loss in prompt.validation):.4f}" if prompt.validation else "",
        f"{prompt.training[-1][1]:.4f}" if prompt.training else "",
        f"{prompt.plan['learning_rate']:.3g}",
        f"{config['virtual_tokens']}",
        config["init"],
        f"{config['seed']}",
        f"{prompt.steps:,} of {prompt.plan['num_steps']:,}{dropped}",
    ]
