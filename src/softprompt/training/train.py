"""Train one soft prompt on a frozen base: resolve the plan, run the loop, give back the prompt with its record."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from softprompt.base import Base
from softprompt.config import TrainConfig
from softprompt.data import Rows, build_examples, rows_from_texts
from softprompt.errors import ConfigError, LengthError, PromptError
from softprompt.families import Forward, forward_of
from softprompt.prompt import SoftPrompt, StartTexts, starting_tensor
from softprompt.splice import can_share_prefix
from softprompt.training.events import Checkpoint, Event, StepDone
from softprompt.training.loop import TrainingLoop, training_row
from softprompt.training.memory import fit_rows, free_bytes
from softprompt.training.plan import Plan, make_plan, with_micro_batch_rows
from softprompt.training.step import accumulate_gradient
from softprompt.types import Example, ExampleSet, PromptRecord

_ARRANGED_SHARE = 0.25  # of the free memory, at most
_TOKENS_WORTH_ARRANGING = 20_000  # arranging takes as long as some 2,000 tokens, and saves a tenth of each

Sink = Callable[[Event], None]
Data = ExampleSet | Rows | Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run before its first step."""

    loop: TrainingLoop
    data: ExampleSet
    validation: ExampleSet | None
    notes: tuple[str, ...]  # what the user should know about how `auto` was resolved


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished (or interrupted) run."""

    prompt: SoftPrompt  # the best by validation; without validation, the last
    plan: Plan
    losses: tuple[float, ...]  # nats per counted target, one per step
    validation_losses: tuple[tuple[int, float], ...]  # (step, nats per text token)
    kept_step: int  # the step that `prompt` is from
    interrupted: bool  # stopped by KeyboardInterrupt
    notes: tuple[str, ...]  # what the user should know about how `auto` was resolved


def train(
    base: Base,
    data: Data,
    config: TrainConfig | None = None,
    *,
    validation: Data | None = None,
    start: SoftPrompt | None = None,
    sink: Sink | None = None,
    prepared: Callable[[Prepared], None] | None = None,
) -> TrainResult:
    """Train a soft prompt [P, H] on rows, texts or ready examples, from `start` if given; `sink` hears every event.

    `prepared` is called once with the resolved plan and what was read, before the first step. A KeyboardInterrupt ends
    the run early and keeps the best prompt so far. The base is not changed by a bit.

    Raises DataError for rows that cannot be used, LengthError where the prompt leaves no room for text, PromptError
    where `start` has another width, and MemoryLimitError where one row does not fit.
    """
    began = time.perf_counter()
    ready = prepare(base, data, config or TrainConfig(), validation=validation, start=start)
    loop = ready.loop
    if prepared is not None:
        prepared(ready)
    curve: list[StepDone] = []
    checkpoints: list[Checkpoint] = []
    interrupted = False
    try:
        for event in loop.events():
            if isinstance(event, StepDone):
                curve.append(event)
            elif isinstance(event, Checkpoint):
                checkpoints.append(event)
            if sink is not None:
                sink(event)
    except KeyboardInterrupt:
        interrupted = True
    return _result(ready, curve, checkpoints, interrupted, time.perf_counter() - began)


def prepare(
    base: Base,
    data: Data,
    config: TrainConfig,
    *,
    validation: Data | None = None,
    start: SoftPrompt | None = None,
) -> Prepared:
    """A loop that has not begun, with the memory measured. Raises as `train` does."""
    config = config if start is None else replace(config, virtual_tokens=start.num_virtual_tokens)
    examples = _examples(base, data, config)
    held_out = _examples(base, validation, config) if validation is not None else None
    for checked in (examples, held_out) if held_out is not None else (examples,):
        _check_lengths(base, checked, config)
    forward = forward_of(base)
    _check_checkpointing(forward, config)
    tensor, notes = _start(base, examples, config, start)
    plan = make_plan(base, forward, examples, config)
    notes += (forward.packing.note, *_arranged(forward, plan, examples))
    if config.micro_batch_rows is None:
        plan, split = _fitted(base, forward, examples, plan, tensor)
        notes += split
    if held_out is None:
        notes += ("no validation rows: the last step is kept",)
    loop = TrainingLoop(
        base=base,
        forward=forward,
        plan=plan,
        examples=examples.examples,
        validation=held_out.examples if held_out is not None else (),
        start=tensor,
        record=_record(base, examples, plan, start),
        clock=time.perf_counter,
    )
    return Prepared(loop=loop, data=examples, validation=held_out, notes=notes)


def _examples(base: Base, data: Data, config: TrainConfig) -> ExampleSet:
    if isinstance(data, ExampleSet):
        return data
    rows = data if isinstance(data, Rows) else rows_from_texts(data)
    return build_examples(base, rows, eos=config.eos, max_length=base.max_length - config.virtual_tokens)


def _check_lengths(base: Base, data: ExampleSet, config: TrainConfig) -> None:
    longest = max(len(example.ids) for example in data.examples)
    if config.virtual_tokens + longest > base.max_length:
        raise LengthError(
            f"{config.virtual_tokens} virtual tokens and a row of {longest} tokens are more than the "
            f"{base.max_length} positions of base {base.name!r}; use fewer virtual tokens or shorter rows"
        )


def _start(base: Base, data: ExampleSet, config: TrainConfig, start: SoftPrompt | None) -> tuple[torch.Tensor, Any]:
    if start is None:
        return starting_tensor(base, config.init, config.virtual_tokens, config.seed, _start_texts(base, data, config))
    if start.hidden_size != base.hidden_size:
        raise PromptError(
            f"the prompt to start from has width {start.hidden_size}; base {base.name!r} has {base.hidden_size}"
        )
    return start.tensor, (f"further training of prompt {start.content_hash[:12]}",)


def _start_texts(base: Base, data: ExampleSet, config: TrainConfig) -> StartTexts:
    return StartTexts(
        data=[_text_ids(example) for example in data.examples],
        instruction=base.encode(config.init_text) if config.init_text else (),
        labels=[base.encode(label) for label in data.form.labels],
    )


def _text_ids(example: Example) -> tuple[int, ...]:
    return example.ids[example.num_special : len(example.ids) - int(example.has_eos)]


def _check_checkpointing(forward: Forward, config: TrainConfig) -> None:
    if config.checkpoint_layers and not can_share_prefix(forward):
        raise ConfigError(f"checkpoint_layers works on packed rows only; {forward.packing.note}")


def _arranged(forward: Forward, plan: Plan, data: ExampleSet) -> tuple[str, ...]:
    """Keep the weights as the CPU multiplies them fastest, where the run is long enough and the memory ample."""
    tokens = [len(example.ids) for example in data.examples]
    planned = sum(tokens[index] for steps in plan.epochs for step in steps for index in step)
    needed = forward.bytes_to_arrange()
    if not 0 < needed <= free_bytes(torch.device("cpu")) * _ARRANGED_SHARE or planned < _TOKENS_WORTH_ARRANGING:
        return ()
    forward.arrange()
    return (f"weights kept twice more, as this CPU multiplies them fastest ({needed / 2**20:.0f} MiB)",)


def _fitted(
    base: Base, forward: Forward, data: ExampleSet, plan: Plan, start: torch.Tensor
) -> tuple[Plan, tuple[str, ...]]:
    longest = max(data.examples, key=lambda example: len(example.ids))
    leaf = start.detach().clone().to(base.device).requires_grad_(True)

    checkpoint = plan.config.checkpoint_layers

    def run_one_row() -> None:
        list(accumulate_gradient(base, forward, [leaf], [training_row(longest, plan.config.eos_weight)], 1, checkpoint))

    rows = fit_rows(run_one_row, plan.micro_batch_rows, base.device)
    if rows == plan.micro_batch_rows:
        return plan, ()
    note = f"memory allows {rows} of {plan.micro_batch_rows} rows at a time: each step is split, its sums stay the same"
    return with_micro_batch_rows(plan, rows), (note,)


def _record(base: Base, data: ExampleSet, plan: Plan, start: SoftPrompt | None) -> PromptRecord:
    return PromptRecord(
        base_name=base.name,
        base_fingerprint=base.fingerprint,
        form=data.form,
        parent=start.content_hash if start is not None else None,
        run={"plan": plan.to_json(), "data_hash": data.data_hash, "source": data.report.source},
    )


def _result(
    ready: Prepared, curve: list[StepDone], checkpoints: list[Checkpoint], interrupted: bool, seconds: float
) -> TrainResult:
    loop = ready.loop
    kept = _kept(loop, checkpoints, interrupted)
    losses = tuple(event.loss for event in curve)
    validated = tuple((c.step, c.validation_loss) for c in checkpoints if c.validation_loss is not None)
    outcome = {
        "steps": loop.step, "kept_step": kept.step, "interrupted": interrupted, "losses": losses,
        "validation_losses": validated, "seconds": round(seconds, 3), "plan": loop.plan.to_json(),
    }  # fmt: skip
    record = replace(kept.prompt.record, run={**kept.prompt.record.run, **outcome})
    return TrainResult(
        prompt=SoftPrompt(kept.prompt.tensor, record), plan=loop.plan, losses=losses, validation_losses=validated,
        kept_step=kept.step, interrupted=interrupted, notes=ready.notes,
    )  # fmt: skip


def _kept(loop: TrainingLoop, checkpoints: list[Checkpoint], interrupted: bool) -> Checkpoint:
    best = [checkpoint for checkpoint in checkpoints if checkpoint.is_best]
    if best and (loop.validation or not interrupted):
        return best[-1]
    return Checkpoint(step=loop.step, prompt=loop.snapshot(), validation_loss=None, is_best=True)
