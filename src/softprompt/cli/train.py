"""softprompt train"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.command import Command, OneOf, Setting, config_of, given_flags, options_of, require_flags
from softprompt.cli.console import warnings_as_lines
from softprompt.cli.run_options import RUN_FLAGS, RunTarget, in_processes, load_among, resumed_settings, run_options
from softprompt.config import (
    PRESETS,
    BaseConfig,
    DataConfig,
    TaskKind,
    TrainConfig,
    check_start_stays,
)
from softprompt.errors import ConfigError

if TYPE_CHECKING:
    from softprompt.base import Base
    from softprompt.prompt import SoftPrompt
    from softprompt.training import Ranks


VARIED = ("seed", "rate", "start", "length")
_RATES = (1.0, 3.0, 1 / 3, 10.0)  # times the given learning rate
_STARTS = ("data", "vocab")
_LENGTHS = (1.0, 0.5, 2.0)  # times the given number of virtual tokens
_SECTIONS = {
    "Run": RUN_FLAGS,
    "Data": DataConfig,
    "Base": (*(item.name for item in dataclasses.fields(BaseConfig)), "base_id"),
    "Start": ("preset", "init", "init_text", "init_from", "library"),
    "Several prompts": ("candidates", "vary", "halving", "ensemble"),
    "Task": ("task", "placement", "pooling", "label_words", "head_learning_rate", "decoder_prompt"),
    "Training": TrainConfig,
}
_EXAMPLES = (
    "softprompt train --base embedded --data quotes.jsonl --text-column quote --out prompts/quotes",
    'softprompt train --base BASE --data reviews.csv --template "Review: {text}\\nSentiment:" \\\n'
    '    --completion " {label}" --validation 0.1 --out prompts/reviews',
    "softprompt train --base BASE --data chats.jsonl --messages-column messages --out prompts/support",
    "softprompt train --base ENCODER --data reviews.csv --label-column label --task classify --out prompts/classifier",
    "softprompt train --resume --out prompts/quotes",
)


def _lacking(given: Collection[str]) -> list[str]:
    return [] if "resume" in given else [f"'--{name}'" for name in ("base", "data") if name not in given]


@click.command("train", cls=Command, sections=_SECTIONS, examples=_EXAMPLES, lacking=_lacking)
@options_of(BaseConfig, optional=True)
@options_of(DataConfig, optional=True)
@options_of(TrainConfig)
@click.option("--base-id", metavar="OWNER/NAME",
              help="Hub id that the adapter names as its base, where --base is a folder.")  # fmt: skip
@click.option("--init-from", metavar="PROMPT", help="Train further from this adapter (folder, or name in --library).")
@click.option("--library", type=click.Path(), help="Folder of adapters that names refer to.")
@click.option("--preset", type=OneOf(list(PRESETS)), help="Settings to start from; flags given override them.")
@click.option("--candidates", type=Setting(int, least=1), default=1, show_default=True,
              help="Train so many prompts in one pass and keep the best by validation.")  # fmt: skip
@click.option("--vary", multiple=True, type=OneOf(VARIED), default=("seed", "rate"), show_default=True,
              help="What differs between candidates; may be repeated.")  # fmt: skip
@click.option("--halving/--no-halving", default=True, help="Drop the weaker candidates as training proceeds.")
@click.option("--ensemble", is_flag=True, help="Keep all candidates as a set that votes, instead of the best.")
@run_options
@in_processes
def command(
    out: str, overwrite: bool, resume: bool, as_json: bool, preset: str | None, ranks: Ranks, **flags: Any
) -> None:
    """Train a soft prompt on a frozen base."""
    target = RunTarget.of(out, overwrite=overwrite, resume=resume)
    if target.is_finished:
        target.report_finished(as_json)
        return
    flags = resumed_settings(out, flags, given_flags()) if target.is_resumed else {**flags, **_preset(preset)}
    require_flags(flags, "base", "data")
    target.check(flags)
    _check_start_stays(flags, out)
    _train(target, flags, ranks, as_json)


def _train(target: RunTarget, flags: Mapping[str, Any], ranks: Ranks, as_json: bool) -> None:
    from softprompt.cli.training_run import run_session
    from softprompt.data import split_rows, task_of, with_split_task
    from softprompt.runs.session import TrainingTask, rows_metadata
    from softprompt.training.train import as_started

    base_config, data_config = config_of(BaseConfig, flags), config_of(DataConfig, flags)
    config = config_of(TrainConfig, flags)
    _check_candidates(flags)
    base_id = _base_id(flags)
    scored = config.best_by != "loss"
    split = split_rows(data_config, seed=config.seed, offline=base_config.offline, scored=scored, task=config.task)
    base = load_among(base_config, ranks)
    start = _start(flags, base)
    split = with_split_task(split, base, config if start is None else as_started(config, start))
    metadata = rows_metadata(data_config, config.seed, split)
    configs = _candidates(config, flags, task_of(split.train.form))
    task = TrainingTask(split=split, configs=configs, start=start, metadata=metadata)
    recorder = target.recorder(metadata, {**flags, "validation": split.validation_setting})
    run_session(
        base, [task], recorder, ranks=ranks, as_json=as_json, halving=flags["halving"],
        ensemble=flags["ensemble"], base_id=base_id, start_name=flags["init_from"],
    )  # fmt: skip


def _check_candidates(flags: Mapping[str, Any]) -> None:
    count = flags["candidates"]
    if flags["ensemble"] and count < 2:
        raise ConfigError(f"--ensemble needs several prompts to vote, and --candidates is {count}; give 5, say")
    fixed = sorted({"start", "length"} & set(flags["vary"]))
    if count > 1 and fixed and flags["init_from"] is not None:
        raise ConfigError(f"--init-from gives every candidate its start and length; leave --vary {fixed[0]} out")


def _candidates(config: TrainConfig, flags: Mapping[str, Any], task: TaskKind) -> dict[str, TrainConfig]:
    count = flags["candidates"]
    return {"": config} if count == 1 else vary(config, count, flags["vary"], task)


def _base_id(flags: Mapping[str, Any]) -> str | None:
    from softprompt.storage.card import is_hub_id

    base_id = flags.get("base_id")  # a run of an earlier release knew none
    if base_id is not None and not is_hub_id(base_id):
        raise ConfigError(f"--base-id {base_id[:100]!r} is no Hub id; write it as owner/name")
    return str(base_id) if base_id is not None else None


def _check_start_stays(flags: Mapping[str, Any], out: str) -> None:
    """Raises ConfigError where a run would write over the prompt that it starts from."""
    from softprompt.storage import resolve_prompt

    if flags["init_from"] is None:
        return
    start = resolve_prompt(flags["init_from"], flags["library"]).resolve()
    if start.is_relative_to(Path(out).resolve()):
        raise ConfigError(
            f"--init-from {flags['init_from']} lies in --out {out}, which is written anew; choose another --out"
        )


def _preset(name: str | None) -> dict[str, Any]:
    given = given_flags()
    settings = PRESETS[name] if name is not None else {}
    rates = {"learning_rate", "relative_learning_rate"}
    overridden = given | (rates if rates & given else set())
    return {key: value for key, value in settings.items() if key not in overridden}


def _start(flags: Mapping[str, Any], base: Base) -> SoftPrompt | None:
    from softprompt.storage import load_prompt, resolve_prompt

    init_from = flags["init_from"]
    if init_from is None:
        return None
    with warnings_as_lines():
        start = load_prompt(resolve_prompt(init_from, flags["library"]), base)
    given = {name: flags[name] for name in given_flags() & flags.keys()}
    check_start_stays(given, start.num_virtual_tokens, init_from)
    return start


def vary(config: TrainConfig, count: int, what: Sequence[str], task: TaskKind) -> dict[str, TrainConfig]:
    """`count` settings by name, no two alike: with seeds among `what`, any number; else every combination at most.

    Rates vary about the one given, or the task's default.

    Raises: ConfigError where there are not so many.
    """
    variants = _variants(config, what, task)
    if count > len(variants) and "seed" not in what:
        raise ConfigError(
            f"--candidates is {count}, but --vary {' '.join(what)} makes {len(variants)}; vary the seed too"
        )
    chosen = [
        replace(variants[index % len(variants)], seed=config.seed + (index if "seed" in what else 0))
        for index in range(count)
    ]
    return {f"c{index}": each for index, each in enumerate(chosen)}


def _variants(config: TrainConfig, what: Sequence[str], task: TaskKind) -> list[TrainConfig]:
    found = [config]
    if "length" in what:
        found = [
            replace(each, virtual_tokens=max(round(each.virtual_tokens * by), 1)) for by in _LENGTHS for each in found
        ]
    if "start" in what:
        found = [each for start in _starts(config) for each in (replace(item, **start) for item in found)]
    if "rate" in what:
        found = [replace(each, **_rate(each, by, task)) for by in _RATES for each in found]
    return found


def _starts(config: TrainConfig) -> list[dict[str, Any]]:
    others = [start for start in _STARTS if start != config.init]
    return [{}, *({"init": start, "init_text": None} for start in others)]


def _rate(config: TrainConfig, by: float, task: TaskKind) -> dict[str, Any]:
    if config.learning_rate is not None:
        return {"learning_rate": config.learning_rate * by}
    relative = config.resolved(task).relative_learning_rate
    assert relative is not None
    return {"relative_learning_rate": relative * by}
