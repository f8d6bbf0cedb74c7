"""Train soft prompts on a frozen base: resolve the plans, run the loop, give back each prompt with its record."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from softprompt.base import Base, free_bytes
from softprompt.config import TrainConfig
from softprompt.data import Rows, as_rows, build_examples
from softprompt.errors import ConfigError, DivergedError, LengthError, MemoryLimitError, PromptError, StorageError
from softprompt.families import Forward, forward_of
from softprompt.prompt import SoftPrompt, StartTexts, drift, starting_tensor
from softprompt.settings import check_kinds
from softprompt.splice import can_share_prefix
from softprompt.training.events import Event, RunState
from softprompt.training.loop import TrainingLoop
from softprompt.training.memory import fit_rows
from softprompt.training.plan import Plan, make_plan, with_micro_batch_rows
from softprompt.training.ranks import Alone, Ranks, least, most_shared
from softprompt.training.step import accumulate_gradient
from softprompt.training.trial import Score, Trial, training_row
from softprompt.types import Example, ExampleSet, InputForm, PromptRecord, brief_repr

_ARRANGED_SHARE = 0.25  # of the free memory, at most
_TOKENS_WORTH_ARRANGING = 20_000  # arranging takes as long as some 2,000 tokens, and saves a tenth of each
_NOT_IDENTITY = ("micro_batch_rows", "checkpoint_layers")  # settings that change how a run computes, not what

# Texts, dictionaries, a DataFrame or a data set of the `datasets` library count as rows too.
Data = ExampleSet | Rows | Iterable[Any]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One prompt to train: its rows, settings and start. Candidates of one `group` are rivals on one validation set."""

    __repr__ = brief_repr

    data: Data
    config: TrainConfig
    name: str | None = None
    validation: Data | None = None
    start: SoftPrompt | None = None
    score: Score | None = None  # of a prompt, higher is better: chooses the best checkpoint in place of the loss
    group: int = 0


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run before its first step, or before the first after it is resumed."""

    __repr__ = brief_repr

    loop: TrainingLoop
    data: tuple[ExampleSet, ...]  # of each candidate, as `loop.trials`
    validation: tuple[ExampleSet | None, ...]
    notes: tuple[str, ...]  # what the user should know about how the rows were read and `auto` was resolved

    @property
    def trial(self) -> Trial:
        """The only one, or the first."""
        return self.loop.trials[0]


def prepare(
    base: Base,
    candidates: Sequence[Candidate],
    *,
    halving: bool = False,
    ranks: Ranks | None = None,
    resume: RunState | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Prepared:
    """A loop that is ready to run, with the memory measured. Raises as `train` does."""
    forward, ranks = forward_of(base), ranks or Alone()
    _check_in_step(base, forward, ranks)
    reader = _Reader(base)
    made = [_trial(base, forward, candidate, reader) for candidate in candidates]
    trials, data = [trial for trial, _, _, _ in made], tuple(data for _, data, _, _ in made)
    notes = [note for _, rows, held_out, _ in made for read in (rows, held_out) if read for note in read.report.notes]
    notes += [note for _, _, _, some in made for note in some]
    notes += [forward.packing.note, *_company(ranks), *_arranged(forward, trials, ranks)]
    rows, split = _micro_batch_rows(base, forward, trials, ranks)
    for trial in trials:
        trial.plan = with_micro_batch_rows(trial.plan, rows)
    loop = TrainingLoop(
        base=base, forward=forward, trials=trials, micro_batch_rows=rows, clock=clock, halving=halving,
        checkpoint_layers=any(trial.plan.config.checkpoint_layers for trial in trials), ranks=ranks,
        identity=_identity(base, trials, [examples.data_hash for examples in data]),
    )  # fmt: skip
    if resume is not None:
        _resume(loop, resume)
        notes.append(f"resumed after step {resume.step}")
    validation = tuple(held_out for _, _, held_out, _ in made)
    return Prepared(loop=loop, data=data, validation=validation, notes=tuple(dict.fromkeys((*notes, *split))))


class _Reader:
    """Examples of data, each set built once however many candidates train on it."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._rows: dict[int, Rows] = {}
        self._known: dict[tuple[int, bool, int], ExampleSet] = {}

    def examples(self, data: Data, config: TrainConfig, form: InputForm | None = None) -> ExampleSet:
        """`form` is that of the training rows, for rows of validation that come without one."""
        key = (id(data), config.eos, config.virtual_tokens)
        if key not in self._known:
            self._known[key] = self._built(data, config, form)
            _check_lengths(self._base, self._known[key], config)
        return self._known[key]

    def _built(self, data: Data, config: TrainConfig, form: InputForm | None) -> ExampleSet:
        if isinstance(data, ExampleSet):
            return data
        if id(data) not in self._rows:  # kept, since an iterator gives its rows once
            self._rows[id(data)] = as_rows(data, form)
        return build_examples(
            self._base, self._rows[id(data)], eos=config.eos, max_length=self._base.max_length - config.virtual_tokens
        )


def _trial(
    base: Base, forward: Forward, candidate: Candidate, reader: _Reader
) -> tuple[Trial, ExampleSet, ExampleSet | None, list[str]]:
    start, config = candidate.start, candidate.config
    if start is not None:
        config = replace(config, virtual_tokens=start.num_virtual_tokens)
    _check_criterion(candidate)
    examples = reader.examples(candidate.data, config)
    held_out = (
        reader.examples(candidate.validation, config, examples.form) if candidate.validation is not None else None
    )
    _check_checkpointing(forward, config)
    tensor, notes = _start(base, examples, config, start)
    plan = make_plan(base, forward, examples, config)
    trial = Trial(
        name=candidate.name, plan=plan, examples=examples.examples, record=_record(base, examples, plan, start),
        validation=held_out.examples if held_out is not None else (), score=candidate.score, group=candidate.group,
        start=tensor.to(base.device, torch.promote_types(base.dtype, torch.float32)),
    )  # fmt: skip
    last_kept = ["no validation rows: the last step is kept"] if held_out is None else []
    return trial, examples, held_out, [*notes, *last_kept]


def _check_criterion(candidate: Candidate) -> None:
    wanted = candidate.config.best_by
    if wanted == "loss":
        return
    if candidate.validation is None:
        raise ConfigError(f"best_by is {wanted!r}, but there are no validation rows to choose by; give some")
    if candidate.score is None:
        raise ConfigError(
            f"best_by is {wanted!r}, but no score was given: pass score=softprompt.evaluation.criterion(...)"
        )


def _check_lengths(base: Base, data: ExampleSet, config: TrainConfig) -> None:
    longest = max(len(example.ids) for example in data.examples)
    if config.virtual_tokens + longest > base.max_length:
        raise LengthError(
            f"{config.virtual_tokens} virtual tokens and a row of {longest} tokens are more than the "
            f"{base.max_length} positions of base {base.name!r}; use fewer virtual tokens or shorter rows"
        )


def _start(
    base: Base, data: ExampleSet, config: TrainConfig, start: SoftPrompt | None
) -> tuple[Tensor, tuple[str, ...]]:
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


def _check_in_step(base: Base, forward: Forward, ranks: Ranks) -> None:
    if ranks.in_step and forward.alone_beyond is not None:
        raise ConfigError(
            f"rows of base {base.name!r} have to run one at a time, so ranks cannot run it in step; "
            "train it without FSDP, with device_map 'auto' say"
        )


def _company(ranks: Ranks) -> tuple[str, ...]:
    if ranks.count == 1:
        return ()
    whole = "each with a part of the base's layers" if ranks.in_step else "each with the whole base"
    return (f"{ranks.count} processes share the rows of a step, {whole}",)


def _arranged(forward: Forward, trials: Sequence[Trial], ranks: Ranks) -> tuple[str, ...]:
    """Keep the weights as the CPU multiplies them fastest, where the run is long enough and the memory ample."""
    planned = sum(_planned_tokens(trial) for trial in trials)
    needed = 0 if ranks.in_step else forward.bytes_to_arrange()
    free = free_bytes(torch.device("cpu")) // ranks.num_on_this_machine
    if not 0 < needed <= free * _ARRANGED_SHARE or planned < _TOKENS_WORTH_ARRANGING * ranks.count:
        return ()
    forward.arrange()
    return (f"weights kept twice more, as this CPU multiplies them fastest ({needed / 2**20:.0f} MiB)",)


def _planned_tokens(trial: Trial) -> int:
    return sum(len(trial.examples[index].ids) for steps in trial.plan.epochs for step in steps for index in step)


def _micro_batch_rows(
    base: Base, forward: Forward, trials: Sequence[Trial], ranks: Ranks
) -> tuple[int, tuple[str, ...]]:
    """Rows per forward pass, of all trials together: what was asked for, else what every rank's memory holds.

    All ranks meet here: what they have read until now, none has begun to write.
    """
    asked = [trial.plan.config.micro_batch_rows for trial in trials if trial.plan.config.micro_batch_rows is not None]
    planned = sum(trial.plan.micro_batch_rows for trial in trials)
    if asked:
        return least(min(*asked, planned), ranks), ()
    whole = most_shared(planned, ranks)
    rows = _fitted_rows(base, forward, trials, whole, ranks)
    if rows == whole:
        return rows, ()
    return rows, (f"memory allows {rows} of {whole} rows at a time: each step is split, its sums stay the same",)


def _fitted_rows(base: Base, forward: Forward, trials: Sequence[Trial], whole: int, ranks: Ranks) -> int:
    """As many on every rank; where one cannot hold a row, all of them say so."""
    refusal = MemoryLimitError("one row does not fit into another rank's memory; use fewer processes or shorter rows")
    try:
        rows = fit_rows(lambda: _run_longest_row(base, forward, trials), whole, base.device, ranks.num_on_this_machine)
    except MemoryLimitError as error:
        rows, refusal = 0, error
    rows = least(rows, ranks)
    if rows < 1:
        raise refusal
    return rows


def _run_longest_row(base: Base, forward: Forward, trials: Sequence[Trial]) -> None:
    lengths = [max(len(example.ids) for example in trial.examples) for trial in trials]
    owner = lengths.index(max(lengths))
    longest = max(trials[owner].examples, key=lambda example: len(example.ids))
    config = trials[owner].plan.config
    row = replace(training_row(longest, config.eos_weight), prompt=owner)
    leaves = [trial.prompt().requires_grad_(True) for trial in trials]
    list(accumulate_gradient(base, forward, leaves, [row], 1, config.checkpoint_layers))


def _record(base: Base, data: ExampleSet, plan: Plan, start: SoftPrompt | None) -> PromptRecord:
    return PromptRecord(
        base_name=base.name,
        base_source=base.source,
        base_fingerprint=base.fingerprint,
        form=data.form,
        parent=start.content_hash if start is not None else None,
        run={"plan": plan.to_json(), "data_hash": data.data_hash, "source": data.report.source},
    )


def _identity(base: Base, trials: Sequence[Trial], data_hashes: Sequence[str]) -> str:
    """sha256 of what is trained on what: base, rows, validation, starts, settings; not of device, dtype or splits."""
    facts = [[base.fingerprint, *data_hashes]] + [
        [trial.name, _settings(trial.plan.config), trial.plan.num_steps, trial.group, trial.record.parent,
         [example.ids for example in trial.validation]]
        for trial in trials
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _settings(config: TrainConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if name not in _NOT_IDENTITY}


def _resume(loop: TrainingLoop, state: RunState) -> None:
    if state.identity != loop.identity:
        raise StorageError(
            "the checkpoint is of another run: base, rows or settings are not the same; "
            "resume with those that it was begun with, or start anew in another folder"
        )
    loop.restore(state)


Sink = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished (or interrupted) run of one prompt."""

    __repr__ = brief_repr

    prompt: SoftPrompt  # the best by validation; without validation, the last
    plan: Plan
    losses: tuple[float, ...]  # nats per counted target, one per step
    validation_losses: tuple[tuple[int, float], ...]  # (step, nats per text token)
    kept_step: int  # the step that `prompt` is from
    interrupted: bool  # stopped by KeyboardInterrupt
    notes: tuple[str, ...]  # what the user should know about how the rows were read and `auto` was resolved
    name: str | None = None  # of the candidate
    scores: tuple[tuple[int, float], ...] = ()  # (step, what the caller's score gave)
    dropped_after: int | None = None  # the step after which its rivals trained on without it
    diverged_after: int | None = None  # the step after which its loss or prompt was no longer a number

    @property
    def diverged_words(self) -> str:
        """What happened, and what to do."""
        rate = self.plan.learning_rate
        return f"training diverged after step {self.diverged_after}: lower the learning rate ({rate:.3g})"

    @property
    def value(self) -> float:
        """What candidates are ranked by, lower for better: the best validation's loss, or its score turned round."""
        values = [-score for _, score in self.scores] or [loss for _, loss in self.validation_losses]
        return min((value for value in values if not math.isnan(value)), default=math.inf)


def train(
    base: Base,
    data: Data,
    config: TrainConfig | None = None,
    *,
    validation: Data | None = None,
    start: SoftPrompt | None = None,
    score: Score | None = None,
    sink: Sink | None = None,
    prepared: Callable[[Prepared], None] | None = None,
    ranks: Ranks | None = None,
    resume: RunState | None = None,
) -> TrainResult:
    """Train a soft prompt [P, H] on rows, texts or ready examples, from `start` if given; `sink` hears every event.

    `score` rates a prompt, higher for better, and then chooses the best checkpoint in place of the validation loss.
    `prepared` is called once with the resolved plan and what was read, before the first step. `resume` goes on from the
    state of a ResumePoint event of the same run. A KeyboardInterrupt ends the run early and keeps the best prompt so
    far. The base is not changed by a bit.

    Raises DataError for rows that cannot be used, LengthError where the prompt leaves no room for text, PromptError
    where `start` has another width, StorageError where `resume` is of another run, and MemoryLimitError where one row
    does not fit, and DivergedError where the loss stops being a number before there is a prompt to keep.
    """
    check_kinds(base=(base, Base), config=(config, TrainConfig), start=(start, SoftPrompt))
    only = Candidate(data=data, config=config or TrainConfig(), validation=validation, start=start, score=score)
    return train_together(base, [only], sink=sink, prepared=prepared, ranks=ranks, resume=resume)[0]


def train_together(
    base: Base,
    candidates: Sequence[Candidate],
    *,
    halving: bool = False,
    sink: Sink | None = None,
    prepared: Callable[[Prepared], None] | None = None,
    ranks: Ranks | None = None,
    resume: RunState | None = None,
) -> tuple[TrainResult, ...]:
    """Train several soft prompts at once, one forward and backward pass per step over the rows of all of them.

    Each has its own rows, settings, optimiser, schedule, patience and best checkpoint, and becomes what it would have
    become alone, to rounding. With `halving`, the weaker half of each group stops early, again and again (successive
    halving, Jamieson and Talwalkar 2016). Results are in the order of the candidates. The rest, and what is raised, is
    as with `train`.
    """
    _check_names(candidates)
    began = time.perf_counter()
    ready = prepare(base, candidates, halving=halving, ranks=ranks, resume=resume)
    if prepared is not None:
        prepared(ready)
    interrupted = False
    try:
        for event in ready.loop.events():
            if sink is not None:
                sink(event)
    except KeyboardInterrupt:
        interrupted = True
    seconds = time.perf_counter() - began
    results = tuple(_result(ready, trial, interrupted, seconds) for trial in ready.loop.trials)
    if all(trial.is_diverged and trial.best is None for trial in ready.loop.trials):
        raise DivergedError(f"{results[0].diverged_words}, and train anew")
    return results


def _check_names(candidates: Sequence[Candidate]) -> None:
    if not candidates:
        raise ConfigError("there is no candidate to train; give at least one")
    names = [candidate.name for candidate in candidates]
    if len(candidates) > 1 and (None in names or len(set(names)) < len(names)):
        raise ConfigError(f"candidates that train together need a name each, no two alike; these have {names}")


def _result(ready: Prepared, trial: Trial, interrupted: bool, seconds: float) -> TrainResult:
    kept, kept_step = _kept(trial, interrupted)
    losses = tuple(trial.losses)
    validated = tuple((step, loss) for step, loss, _ in trial.validations if loss is not None)
    scores = tuple((step, score) for step, _, score in trial.validations if score is not None)
    outcome: dict[str, Any] = {
        "steps": trial.step, "kept_step": kept_step, "interrupted": interrupted, "losses": losses,
        "validation_losses": validated, "seconds": round(seconds, 3), "plan": trial.plan.to_json(),
    }  # fmt: skip
    outcome["drift"] = [token.to_json() for token in drift(trial.start, kept)]
    if scores:
        outcome["scores"] = scores
    record = replace(kept.record, run={**kept.record.run, **outcome})
    return TrainResult(
        prompt=SoftPrompt(kept.tensor, record), plan=trial.plan, losses=losses, validation_losses=validated,
        kept_step=kept_step, interrupted=interrupted, notes=ready.notes, name=trial.name, scores=scores,
        dropped_after=trial.step if trial.is_dropped else None,
        diverged_after=trial.step if trial.is_diverged else None,
    )  # fmt: skip


def _kept(trial: Trial, interrupted: bool) -> tuple[SoftPrompt, int]:
    if trial.best is not None and (trial.validation or trial.is_diverged or not interrupted):
        return trial.best, trial.best_step
    return trial.snapshot(), trial.step
