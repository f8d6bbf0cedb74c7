"""softprompt runs"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.command import Group
from softprompt.cli.console import (
    print_json,
    print_list,
    print_table,
    print_words,
    results_width,
    say,
    stdout_is_unicode,
    warnings_as_lines,
)
from softprompt.config import TrainConfig
from softprompt.errors import SoftpromptError
from softprompt.types import COUNTED

if TYPE_CHECKING:
    from softprompt.runs.history import PromptHistory, RunHistory

LIST_COLUMNS = ("run", "base", "data", "steps", "loss", "state", "begun")
_WIDEST_CHART = 100  # columns
MARKS = "abcdefgh"  # one per curve: distinguishable without colours
MAX_CURVES = len(MARKS)
_HEIGHT = 16  # lines
_NUM_TICKS = 5

Points = Sequence[tuple[int, float]]  # (step, value)


@click.group("runs", cls=Group)
def command() -> None:
    """List training runs, or show one with its curves."""


@command.command("list")
@click.argument("folder", type=click.Path(), default=".")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_runs(folder: str, as_json: bool) -> None:
    """Every run in FOLDER (default: here) and down to three levels below it; a broken one with its problem.

    An unfinished run is still going, or was killed; it is resumable from its last checkpoint.
    """
    from softprompt.runs.history import find_runs

    root = Path(folder)
    found = {str(path.relative_to(root)): _read(path) for path in find_runs(root)}
    if as_json:
        print_json([{"run": name, **list_entry(run)} for name, run in found.items()])
        return
    rows = [[name, *list_row(run)] for name, run in found.items()]
    print_list(
        f"{folder}: {len(rows)} run{'' if len(rows) == 1 else 's'}",
        LIST_COLUMNS,
        rows,
        whole=("steps", "state", "begun"),
    )
    for name, run in found.items():
        if isinstance(run, str):
            print_words(f"{name} is broken: {run}")


@command.command("show")
@click.argument("run", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(run: str, as_json: bool) -> None:
    """One run: its settings, checkpoints, candidates, and the curves of its training and validation loss.

    A run may be shown while it is going. Curves are drawn by plotext (pip install 'softprompt[plots]'); without it they
    are tables of numbers.
    """
    from softprompt.runs.history import read_history

    history = read_history(Path(run))
    if as_json:
        print_json(to_json(history))
        return
    print_table(run, ["fact", "value"], summary(history))
    for task, prompts in history.by_task.items():
        if len(prompts) > 1:
            show_candidates(task, prompts)
    reason = reason_against_charts()
    if reason is not None:
        say(reason)
    for task, prompts in history.by_task.items():
        show_curves(task, prompts)


def _read(path: Path) -> RunHistory | str:
    """A run, or what is wrong with it: files that do not read as a run's, or adapters that do not load."""
    from softprompt.runs.history import read_history
    from softprompt.storage import load_prompt

    try:
        history = read_history(path)
        with warnings_as_lines():
            for folder in history.kept_folders:
                load_prompt(folder)
    except SoftpromptError as error:
        return str(error)
    return history


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


def summary(run: RunHistory) -> list[list[str]]:
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
        "does it help": "\n".join(
            f"{task}: {each.text}" if task else each.text for task, each in run.judgements.items()
        ),
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
        "judgements": {task: judgement.to_json() for task, judgement in run.judgements.items()},
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
    counted = COUNTED.get(prompts[0].plan.get("task", "text"))
    _show_chart(task, f"training loss (nats per {counted or 'target'})", {each.name: each.training for each in prompts})
    what = f"validation loss (nats per {counted or 'text token'})"
    _show_chart(task, what, {each.name: each.validation for each in prompts})


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
    defaults = vars(TrainConfig().resolved(first.get("task", "text")))
    shared = {
        name: value
        for name, value in first["config"].items()
        if all(prompt.plan["config"].get(name) == value for prompt in prompts)
        and (name == "virtual_tokens" or value not in (None, [], defaults.get(name)))
    }
    how = {name: first[name] for name in ("task", "dtype", "device", "layout", "micro_batch_rows") if name in first}
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


def can_draw() -> bool:
    """Whether charts can be drawn on stdout."""
    return reason_against_charts() is None


def reason_against_charts() -> str | None:
    """Why curves are tables of numbers, and what to do; None where they can be drawn."""
    if find_spec("plotext") is None:
        return "plotext is not installed, so the curves are tables of numbers; pip install 'softprompt[plots]'"
    if not stdout_is_unicode():
        return (
            f"{sys.stdout.encoding} has no characters for charts, so the curves are tables of numbers; set PYTHONUTF8=1"
        )
    return None


def draw(title: str, curves: Mapping[str, Points], width: int) -> str:
    """A chart over steps as lines of text, `width` columns wide; of several curves each is drawn in its own letter.

    No more than `MAX_CURVES`, each with a point at least. Needs plotext.
    """
    import plotext

    assert 0 < len(curves) <= MAX_CURVES and all(curves.values()), list(curves)
    marks = MARKS if len(curves) > 1 else ("hd",)  # plotext's blocks, several points to a character
    plotext.terminal.limit(False, False)
    figure = plotext.figure  # the only one there is, so it is left as clean as it was found
    figure.clear()
    figure.plot_size(width, _HEIGHT)
    figure.title(title)
    figure.label("step")
    for mark, points in reversed(list(zip(marks, curves.values(), strict=False))):  # the first lies on top
        figure.draw(figure.signal([step for step, _ in points], [value for _, value in points], marker=mark).lines())
    ticks = _ticks(sorted({step for points in curves.values() for step, _ in points}))
    figure.ruler("x").ticks(ticks, [f"{step:,}" for step in ticks])
    drawn = str(figure.build().string(colorless=True))
    figure.clear()
    return "\n".join([*(line.rstrip() for line in drawn.rstrip().split("\n")), *legend(list(curves), width)])


def legend(names: Sequence[str], width: int) -> list[str]:
    """Lines that name the curve of each letter; none for a single curve."""
    pairs = [f"{mark}={name}" for mark, name in zip(MARKS, names, strict=False)] if len(names) > 1 else []
    return textwrap.wrap("  ".join(pairs), width, break_long_words=False, break_on_hyphens=False)


def sampled(curves: Mapping[str, Points], max_rows: int = 10) -> list[list[str]]:
    """The same curves as rows of a table: a step, then each curve's value there, nothing where it has none."""
    steps = sorted({step for points in curves.values() for step, _ in points})
    chosen = _spread(steps, max_rows)
    values = [dict(points) for points in curves.values()]
    return [[f"{step:,}", *(f"{known[step]:.3f}" if step in known else "" for known in values)] for step in chosen]


def _ticks(steps: Sequence[int]) -> list[int]:
    first, last = steps[0], steps[-1]
    return sorted({first + round((last - first) * part / (_NUM_TICKS - 1)) for part in range(_NUM_TICKS)})


def _spread(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly, the first and the last among them."""
    if len(steps) <= count:
        return list(steps)
    return [steps[round(index * (len(steps) - 1) / (count - 1))] for index in range(count)]
