"""softprompt train"""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from softprompt.base.load import trainable_line
from softprompt.cli.console import load, print_json, say, warnings_as_lines
from softprompt.cli.options import config_of, given_flags, options_of
from softprompt.cli.progress import TrainingProgress
from softprompt.config import PRESETS, BaseConfig, DataConfig, TrainConfig
from softprompt.data import Split, held_out_record, report_lines, split_rows
from softprompt.errors import ConfigError, MissingDependencyError
from softprompt.prompt import SoftPrompt
from softprompt.storage import RunFolder, load_prompt, resolve_prompt
from softprompt.training import Checkpoint, Event, Prepared, StepDone, TrainResult, train


@click.command("train")
@options_of(BaseConfig)
@options_of(DataConfig)
@options_of(TrainConfig)
@click.option("--init-from", metavar="PROMPT", help="Train further from this adapter (folder, or name in --library).")
@click.option("--library", type=click.Path(), help="Folder of adapters that names refer to.")
@click.option("--preset", type=click.Choice(list(PRESETS)), help="Settings to start from; flags given override them.")
@click.option("--out", required=True, type=click.Path(), help="The run's folder: adapter, run.json, metrics.jsonl.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in --out.")
@click.option("--tensorboard", is_flag=True, help="Also write TensorBoard events into --out/tensorboard.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def command(
    init_from: str | None, library: str | None, preset: str | None, out: str, overwrite: bool, tensorboard: bool,
    as_json: bool, **flags: Any,
) -> None:  # fmt: skip
    """Train a soft prompt on a frozen base."""
    base_config, data_config = config_of(BaseConfig, flags), config_of(DataConfig, flags)
    config = config_of(TrainConfig, {**flags, **_preset(preset)})
    if init_from is not None and {"init", "init_text"} & given_flags():
        raise ConfigError("--init-from and --init exclude each other; give one")
    split = split_rows(data_config, seed=config.seed, offline=base_config.offline)
    base = load(base_config)
    with warnings_as_lines():
        start = load_prompt(resolve_prompt(init_from, library), base) if init_from is not None else None
    recorder = _Recorder(RunFolder.create(out, overwrite=overwrite), data_config, split, tensorboard)
    say(trainable_line(base, start.num_virtual_tokens if start is not None else config.virtual_tokens))
    with TrainingProgress() as progress:

        def sink(event: Event) -> None:
            recorder.take(event)
            progress.take(event)

        def prepared(ready: Prepared) -> None:
            recorder.begin(ready)
            _say_prepared(ready)
            progress.begin(ready.loop.plan.num_steps)

        result = train(
            base, split.train, config, validation=split.validation, start=start, sink=sink, prepared=prepared
        )
    recorder.finish(result)
    _say_result(result, out)
    if as_json:
        print_json({"out": out, "content_hash": result.prompt.content_hash, **recorder.outcome(result)})
    if result.interrupted:
        raise click.exceptions.Exit(130)


def _preset(name: str | None) -> dict[str, Any]:
    given = given_flags()
    settings = PRESETS[name] if name is not None else {}
    rates = {"learning_rate", "relative_learning_rate"}
    overridden = given | (rates if rates & given else set())
    return {key: value for key, value in settings.items() if key not in overridden}


def _say_prepared(ready: Prepared) -> None:
    plan = ready.loop.plan
    for report in [ready.data.report, *([ready.validation.report] if ready.validation is not None else [])]:
        for line in report_lines(report):
            say(line)
    say(
        f"{plan.num_steps} steps, start {plan.config.init}, learning rate {plan.learning_rate:.3g} "
        f"({plan.learning_rate / plan.embedding_rms:.3g} x embedding RMS), {plan.config.schedule}, "
        f"seed {plan.config.seed}"
    )
    for note in ready.notes:
        say(f"note: {note}")


def _say_result(result: TrainResult, out: str) -> None:
    if result.interrupted:
        say(f"interrupted; the prompt of step {result.kept_step} is kept")
    first, last = (result.losses[0], result.losses[-1]) if result.losses else (float("nan"),) * 2
    say(f"loss {first:.3f} -> {last:.3f} nats per target; kept step {result.kept_step} of {len(result.losses)}")
    say(f"saved to {out}")


class _Recorder:
    """Writes a run's folder as events come."""

    def __init__(self, folder: RunFolder, data: DataConfig, split: Split, tensorboard: bool) -> None:
        self._folder = folder
        self._board = _board(folder.path) if tensorboard else None
        self._facts: dict[str, Any] = {
            "data": {**asdict(data), "folder": os.getcwd()},
            "test": held_out_record(split.test) if split.test is not None else None,
        }
        self._plan: dict[str, Any] = {}

    def begin(self, ready: Prepared) -> None:
        self._plan = {"plan": ready.loop.plan.to_json(), "notes": list(ready.notes), **self._facts}
        self._folder.write_plan(self._plan)

    def take(self, event: Event) -> None:
        if isinstance(event, (StepDone, Checkpoint)):
            self._folder.append_metrics(event.to_json())
        if isinstance(event, Checkpoint):
            self._folder.save_checkpoint(event.step, event.prompt)
        if isinstance(event, StepDone) and self._board is not None:
            self._board.add_scalar("loss/train", event.loss, event.step)
            self._board.add_scalar("learning_rate", event.learning_rate, event.step)
        if isinstance(event, Checkpoint) and self._board is not None and event.validation_loss is not None:
            self._board.add_scalar("loss/validation", event.validation_loss, event.step)

    def finish(self, result: TrainResult) -> None:
        record = replace(result.prompt.record, run={**result.prompt.record.run, **self._facts})
        self._folder.finish(SoftPrompt(result.prompt.tensor, record))
        self._folder.write_plan({**self._plan, "plan": result.plan.to_json(), "result": self.outcome(result)})
        if self._board is not None:
            self._board.close()

    def outcome(self, result: TrainResult) -> dict[str, Any]:
        return {
            "steps": len(result.losses),
            "kept_step": result.kept_step,
            "interrupted": result.interrupted,
            "losses": list(result.losses),
            "validation_losses": [list(pair) for pair in result.validation_losses],
        }


def _board(folder: Path) -> Any:  # Any: tensorboard's SummaryWriter, untyped
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError("--tensorboard needs the package tensorboard; pip install tensorboard") from error
    return SummaryWriter(str(folder / "tensorboard"))
