"""softprompt demo"""

from __future__ import annotations

import shlex
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from softprompt.cli.command import Command
from softprompt.cli.compare import show, show_answers, show_figures
from softprompt.cli.console import load, print_table, print_words, say, warnings_as_lines
from softprompt.config import EMBEDDED_BASE, BaseConfig
from softprompt.errors import MissingDependencyError

if TYPE_CHECKING:
    from softprompt.base import Base
    from softprompt.demo import Demo, Finding
    from softprompt.runs.recorder import Recorder
    from softprompt.runs.session import TrainingTask
    from softprompt.training import TrainResult

_PEERS = {"peft": "PEFT", "accelerate": "accelerate (PEFT's Trainer)", "sklearn": "scikit-learn"}
_COLUMNS = ["task", "held-out", "bare base", "PEFT's defaults", "softprompt", "bag of words"]


@click.command("demo", cls=Command)
@click.option("--out", type=click.Path(), default="demo-out", show_default=True, help="Folder for the trained prompts.")
@click.option("--overwrite/--no-overwrite", default=True, show_default=True, help="Replace an earlier demo's prompts.")
@click.option(
    "--base", default=EMBEDDED_BASE, show_default=True,
    help="Base; any other than the embedded one gets the notebook's job for a real language model.",
)  # fmt: skip
def command(out: str, overwrite: bool, base: str) -> None:
    """Train three soft prompts and compare before and after: a minute on the embedded base, minutes on a real one."""
    _require_peers()
    began = time.perf_counter()
    loaded = load(BaseConfig(base=base, dtype="float32"))
    with warnings_as_lines():
        if base == EMBEDDED_BASE:
            _embedded_demo(loaded, Path(out), overwrite)
        else:
            _real_demo(loaded, base, Path(out), overwrite, began)


def _embedded_demo(base: Base, out: Path, overwrite: bool) -> None:
    from softprompt.demo import run_demo

    found = run_demo(base, out, say, overwrite=overwrite)
    show(found.answers)
    print_table(
        "Before and after, on rows that training never saw", _COLUMNS, [_cells(item) for item in found.findings]
    )
    _conclude(found)


def _real_demo(base: Base, name: str, out: Path, overwrite: bool, began: float) -> None:
    from softprompt.demo import run_real_demo

    found = run_real_demo(base, out, say, _train_shown, overwrite=overwrite)
    show_answers(found.answers)
    for comparison in found.found:
        show_figures(comparison)
    for verdict in found.verdicts:
        print_words(verdict)
    print_words(
        f"{time.perf_counter() - began:.0f} s in all. The prompts lie in {found.folder}/ (adapters for softprompt and "
        f"PEFT alike), the data sets in {found.data}/. Next, your own rows: softprompt train --base "
        f"{shlex.quote(name)} --data rows.csv --out prompts/mine"
    )


def _train_shown(base: Base, task: TrainingTask, recorder: Recorder) -> TrainResult:
    from softprompt.cli.training_run import training_progress
    from softprompt.runs.session import TrainingSession

    with training_progress() as progress:
        session = TrainingSession(
            base, [task], recorder, on_event=progress.show,
            on_start=lambda ready: progress.begin(max(trial.plan.num_steps for trial in ready.loop.trials)),
        )  # fmt: skip
        (result,) = session.train()
    judgements = session.judge([result])
    session.finish([result], judgements)
    for judgement in judgements.values():
        say(judgement.text)
    return result


def _require_peers() -> None:
    """Before anything is trained. Raises MissingDependencyError without what the figures are compared with."""
    missing = [package for module, package in _PEERS.items() if find_spec(module) is None]
    if missing:
        raise MissingDependencyError(f"the demo compares with {' and '.join(missing)}; pip install 'softprompt[demo]'")


def _cells(item: Finding) -> list[str]:
    if item.measure == "accuracy":
        words = "" if item.bag_of_words is None else f"{item.bag_of_words:.1%}"
        bare = f"{item.bare:.1%} (best of 5 templates)"
        return [item.task, f"accuracy, {item.num_rows} rows", bare, f"{item.peft:.1%}", f"{item.ours:.1%}", words]
    figures = [f"{value:.3f} ({value / item.bare - 1:+.0%})" for value in (item.peft, item.ours)]
    return [item.task, f"nats/token, {item.num_rows} rows", f"{item.bare:.3f}", *figures, ""]


def _conclude(found: Demo) -> None:
    click.echo(
        f"PEFT loads {found.folder}/coach and gives the same logits (largest difference {found.peft_difference:.1e})."
    )
    click.echo(
        f"{found.seconds:.0f} s. The prompts lie in {found.folder}/, adapters for softprompt and PEFT alike; "
        f"the data sets in {found.data}/."
    )
