"""softprompt demo"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from softprompt.cli.command import Command
from softprompt.cli.compare import show
from softprompt.cli.console import load, print_table, say, warnings_as_lines
from softprompt.config import EMBEDDED_BASE, BaseConfig
from softprompt.errors import MissingDependencyError

if TYPE_CHECKING:
    from softprompt.demo import Demo, Finding

_PEERS = {"peft": "PEFT", "accelerate": "accelerate (PEFT's Trainer)", "sklearn": "scikit-learn"}
_COLUMNS = ["task", "held-out", "bare base", "PEFT's defaults", "softprompt", "bag of words"]


@click.command("demo", cls=Command)
@click.option("--out", type=click.Path(), default="demo-out", show_default=True, help="Folder for the trained prompts.")
@click.option("--overwrite/--no-overwrite", default=True, show_default=True, help="Replace an earlier demo's prompts.")
def command(out: str, overwrite: bool) -> None:
    """Train three soft prompts on the embedded base and compare before and after (about a minute)."""
    _require_peers()
    from softprompt.demo import run_demo

    base = load(BaseConfig(base=EMBEDDED_BASE, dtype="float32"))
    with warnings_as_lines():
        found = run_demo(base, Path(out), say, overwrite=overwrite)
    show(found.answers)
    print_table(
        "Before and after, on rows that training never saw", _COLUMNS, [_cells(item) for item in found.findings]
    )
    _conclude(found)


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
