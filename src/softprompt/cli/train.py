"""softprompt train"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from softprompt.base import Base
from softprompt.base.load import trainable_line
from softprompt.cli.console import load, print_json, say, warnings_as_lines
from softprompt.cli.options import config_of, given_flags, options_of
from softprompt.cli.progress import TrainingProgress
from softprompt.config import PRESETS, BaseConfig, DataConfig, TrainConfig
from softprompt.data import Split, held_out_record, report_lines, split_rows
from softprompt.errors import ConfigError, MissingDependencyError
from softprompt.prompt import SoftPrompt
from softprompt.storage import RunFolder, load_prompt, resolve_prompt
from softprompt.storage.runs import BOARD_NAME
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
    flags = {**flags, **_preset(preset)}
    base_config, data_config = config_of(BaseConfig, flags), config_of(DataConfig, flags)
    config = config_of(TrainConfig, flags)
    RunFolder.check_free(out, overwrite=overwrite)
    _require_tensorboard(tensorboard)
    split = split_rows(data_config, seed=config.seed, offline=base_config.offline)
    base = load(base_config)
    start = _start(init_from, library, base, config)
    recorder = _Recorder(Path(out), overwrite, data_config, split, tensorboard)
    with TrainingProgress() as progress:

        def sink(event: Event) -> None:
            recorder.take(event)
            progress.take(event)

        def prepared(ready: Prepared) -> None:
            recorder.begin(ready)
            _say_prepared(base, ready, init_from)
            progress.begin(ready.trial.plan.num_steps)

        result = train(
            base, split.train, config, validation=split.validation, start=start, sink=sink, prepared=prepared
        )
    recorder.finish(result)
    _say_result(result, recorder, out)
    if as_json:
        print_json({"out": out, "content_hash": result.prompt.content_hash, **_outcome(result)})
    if result.interrupted:
        raise click.exceptions.Exit(130)


def _preset(name: str | None) -> dict[str, Any]:
    given = given_flags()
    settings = PRESETS[name] if name is not None else {}
    rates = {"learning_rate", "relative_learning_rate"}
    overridden = given | (rates if rates & given else set())
    return {key: value for key, value in settings.items() if key not in overridden}


def _start(init_from: str | None, library: str | None, base: Base, config: TrainConfig) -> SoftPrompt | None:
    if init_from is None:
        return None
    given = given_flags()
    if {"init", "init_text"} & given:
        raise ConfigError("--init-from and --init exclude each other; give one")
    with warnings_as_lines():
        start = load_prompt(resolve_prompt(init_from, library), base)
    if "virtual_tokens" in given and start.num_virtual_tokens != config.virtual_tokens:
        raise ConfigError(
            f"--virtual-tokens is {config.virtual_tokens}, but {init_from} has {start.num_virtual_tokens} and keeps "
            "them in further training; leave --virtual-tokens out"
        )
    return start


def _say_prepared(base: Base, ready: Prepared, init_from: str | None) -> None:
    plan = ready.trial.plan
    say(trainable_line(base, plan.config.virtual_tokens))
    for examples in (*ready.data, *ready.validation):
        for line in report_lines(examples.report) if examples is not None else ():
            say(line)
    start = plan.config.init if init_from is None else f"prompt {init_from}"
    say(
        f"{plan.num_steps} steps, start {start}, learning rate {plan.learning_rate:.3g} "
        f"({plan.learning_rate / plan.embedding_rms:.3g} x embedding RMS), {plan.config.schedule}, "
        f"seed {plan.config.seed}"
    )
    for note in ready.notes:
        say(f"note: {note}")


def _say_result(result: TrainResult, recorder: _Recorder, out: str) -> None:
    if result.interrupted:
        say(f"interrupted; the prompt of step {result.kept_step} is kept")
    if result.losses:
        first, last = recorder.epoch_loss(0), recorder.epoch_loss(-1)
        say(f"loss {first:.3f} in the first epoch, {last:.3f} in the last (nats per target)")
    say(f"kept step {result.kept_step} of {len(result.losses)}, saved to {out}")


def _outcome(result: TrainResult) -> dict[str, Any]:
    return {
        "steps": len(result.losses),
        "kept_step": result.kept_step,
        "interrupted": result.interrupted,
        "losses": list(result.losses),
        "validation_losses": [list(pair) for pair in result.validation_losses],
    }


class _Recorder:
    """Writes a run's folder as events come. Nothing is touched before `begin`."""

    def __init__(self, place: Path, overwrite: bool, data: DataConfig, split: Split, tensorboard: bool) -> None:
        self._place = place
        self._overwrite = overwrite
        self._wants_board = tensorboard
        self._facts: dict[str, Any] = {
            "data": {**asdict(data), "folder": os.getcwd()},
            "test": held_out_record(split.test) if split.test is not None else None,
        }
        self._steps: list[StepDone] = []

    def begin(self, ready: Prepared) -> None:
        self._folder = RunFolder.create(self._place, overwrite=self._overwrite)
        self._plan = {"plan": ready.trial.plan.to_json(), "notes": list(ready.notes), **self._facts}
        self._folder.write_plan(self._plan)
        self._board = _board(self._place) if self._wants_board else None

    def take(self, event: Event) -> None:
        if isinstance(event, (StepDone, Checkpoint)):
            self._folder.append_metrics(event.to_json())
        if isinstance(event, StepDone):
            self._steps.append(event)
        if isinstance(event, Checkpoint):
            self._folder.save_checkpoint(event.step, event.prompt)
        if self._board is not None:
            _show_on_board(self._board, event)

    def finish(self, result: TrainResult) -> None:
        record = replace(result.prompt.record, run={**result.prompt.record.run, **self._facts})
        self._folder.finish(SoftPrompt(result.prompt.tensor, record))
        self._folder.write_plan({**self._plan, "plan": result.plan.to_json(), "result": _outcome(result)})
        if self._board is not None:
            self._board.close()

    def epoch_loss(self, which: int) -> float:
        """Nats per target over one epoch (0 the first, -1 the last, as far as it went)."""
        epochs = [math.ceil(step.epoch) for step in self._steps]
        chosen = [step for step, epoch in zip(self._steps, epochs, strict=True) if epoch == epochs[which]]
        return sum(step.loss * step.num_targets for step in chosen) / sum(step.num_targets for step in chosen)


def _require_tensorboard(wanted: bool) -> None:
    if wanted and find_spec("tensorboard") is None:
        raise MissingDependencyError("--tensorboard needs the package tensorboard; pip install tensorboard")


def _board(folder: Path) -> Any:  # Any: tensorboard's SummaryWriter, untyped
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / BOARD_NAME))


def _show_on_board(board: Any, event: Event) -> None:  # Any: as above
    if isinstance(event, StepDone):
        board.add_scalar("loss/train", event.loss, event.step)
        board.add_scalar("learning_rate", event.learning_rate, event.step)
    if isinstance(event, Checkpoint) and event.validation_loss is not None:
        board.add_scalar("loss/validation", event.validation_loss, event.step)
