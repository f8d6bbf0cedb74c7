"""Every `auto` of a training run, resolved once. The plan is printed and saved; the same plan gives the same prompt."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import torch

from softprompt.base import Base
from softprompt.compute_share import yield_point
from softprompt.config import TaskKind, TrainConfig
from softprompt.data import task_of
from softprompt.data.examples import plan_epoch
from softprompt.families import Forward
from softprompt.types import ExampleSet, brief_repr

_VERSIONS_OF = ("softprompt", "torch", "transformers")
_DECAY_SHARE = 1 / 3  # of the steps, of "stable-decay"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training run with nothing left to decide."""

    __repr__ = brief_repr

    config: TrainConfig  # with the defaults of the task
    learning_rate: float  # absolute, at the top of its schedule
    embedding_rms: float
    epochs: tuple[tuple[tuple[int, ...], ...], ...]  # per epoch, per step: the rows' indices
    num_steps: int
    micro_batch_rows: int
    layout: str  # packed, or padded where the base cannot run packed rows
    dtype: str
    device: str
    num_threads: int
    task: TaskKind = "text"
    kernels: Mapping[str, Any] = field(default_factory=dict)  # a KernelTable as JSON: how its products are computed

    @property
    def first_averaged_step(self) -> int:
        """The first step, counted from 1, whose prompt is part of the mean; beyond the last one without averaging."""
        return self.num_steps + 1 - math.floor(self.num_steps * (self.config.averaging or 0.0))

    def to_json(self) -> dict[str, Any]:
        """The plan for `run.json`; the order of the rows follows from seed and lengths and is left out."""
        record = {key: value for key, value in asdict(self).items() if key != "epochs"}
        return {**record, "versions": versions(), "machine": platform.machine()}

    def to_record(self) -> dict[str, Any]:
        """The plan for the prompt's own record, without what only a resumed run needs."""
        return {key: value for key, value in self.to_json().items() if key != "kernels"}


def make_plan(base: Base, forward: Forward, data: ExampleSet, config: TrainConfig) -> Plan:
    """Resolve learning rate, steps and order, for settings with their task's defaults.

    `micro_batch_rows` is the whole batch until the memory is known.
    """
    assert config.epochs is not None, "the task's defaults are filled in"
    lengths = [example.num_tokens for example in data.examples]
    epochs = tuple(_epoch(lengths, config, epoch) for epoch in range(config.epochs))
    num_steps = sum(len(steps) for steps in epochs)
    longest_step = max(len(step) for steps in epochs for step in steps)
    return Plan(
        config=config,
        learning_rate=_learning_rate(base, config),
        embedding_rms=base.embedding_rms,
        epochs=epochs,
        num_steps=min(num_steps, config.max_steps or num_steps),
        micro_batch_rows=min(config.micro_batch_rows or longest_step, longest_step),
        layout="packed" if forward.can_pack else "padded",
        dtype=str(base.dtype).removeprefix("torch."),
        device=str(base.device),
        num_threads=torch.get_num_threads(),
        task=task_of(data.form),
    )


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    found = {}
    for name in _VERSIONS_OF:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def _learning_rate(base: Base, config: TrainConfig) -> float:
    if config.learning_rate is not None:
        return config.learning_rate
    assert config.relative_learning_rate is not None, "the task's defaults are filled in"
    return config.relative_learning_rate * base.embedding_rms


def rate_factor(schedule: str, warmup_steps: int, num_steps: int, step: int) -> float:
    """What the learning rate at the top is multiplied by in a step, counted from 0; the formulas are transformers'.

    "stable-decay" is the schedule of MiniCPM (Hu et al. 2024, arXiv 2404.06395), falling in a straight line.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "constant":
        return 1.0
    num_after = max(num_steps - warmup_steps, 1)
    if schedule == "linear":
        return max(0.0, (num_steps - step) / num_after)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * (step - warmup_steps) / num_after))
    num_falling = math.ceil(num_steps * _DECAY_SHARE)
    return 1.0 - max(step - (num_steps - num_falling), 0) / num_falling


def _epoch(lengths: Sequence[int], config: TrainConfig, epoch: int) -> tuple[tuple[int, ...], ...]:
    yield_point()
    steps = plan_epoch(
        lengths, batch_rows=config.batch_rows, batch_tokens=config.batch_tokens, seed=config.seed, epoch=epoch
    )
    return tuple(tuple(step) for step in steps)
