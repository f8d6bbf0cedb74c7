"""Train soft prompts on a frozen base: resolve the plans, run the loop, return each prompt with its record."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from softprompt.base import Base, free_bytes
from softprompt.config import DEFAULTS_BEFORE, TrainConfig
from softprompt.data import Rows, as_rows, build_examples, build_task_examples, label_ids, with_task
from softprompt.errors import ConfigError, DivergedError, LengthError, PromptError, StorageError
from softprompt.families import Forward, KernelTable, forward_of, kernel_table, this_machine
from softprompt.loss import ObjectiveWeights, objective
from softprompt.prompt import SoftPrompt, StartTexts, drift, starting_tensor
from softprompt.settings import check_kinds
from softprompt.training.events import Event, RunState
from softprompt.training.head_start import fitted_head
from softprompt.training.loop import TrainingLoop
from softprompt.training.memory import fit_micro_batches
from softprompt.training.plan import Plan, make_plan
from softprompt.training.ranks import Alone, Ranks
from softprompt.training.task import resolved_for, task_line
from softprompt.training.trial import Score, Trial
from softprompt.types import Example, ExampleSet, InputForm, PromptRecord, brief_repr

_PREPACK_MEMORY_SHARE = 0.25  # of the free memory, at most
_TOKENS_WORTH_PREPACKING = 20_000  # prepacking takes as long as some 2,000 tokens, and saves a tenth of each
_RATE = "relative_learning_rate"
_LATER: Mapping[str, tuple[Any, ...]] = {  # settings with the values that earlier releases had
    "task": ("auto", "generate"), "placement": ("auto", "front"), "pooling": ("auto",), "decoder_prompt": (False,),
    "head_learning_rate": (None, 1e-3), "head_init": (None, "random"), "label_words": ((),),
}  # fmt: skip
_OTHER_SEED = 1 << 31  # changed in the seed of a decoder's prompt (torch's generators read 32 bits of a seed)
_NOT_IDENTITY = ("micro_batch_rows", "checkpoint_layers")  # settings that change how a run computes, not what

# Texts, dictionaries, a DataFrame or a data set of the `datasets` library count as rows too.
Data = ExampleSet | Rows | Iterable[Any]


Sink = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One prompt to train: rows, settings and start. Candidates of one `group` are rivals on one validation set."""

    __repr__ = brief_repr

    data: Data
    config: TrainConfig
    name: str | None = None
    validation: Data | None = None
    start: SoftPrompt | None = None
    score: Score | None = None  # chooses the best checkpoint in place of the validation loss
    group: int = 0


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run before its first step, or before the first one after it is resumed."""

    __repr__ = brief_repr

    loop: TrainingLoop
    notes: tuple[str, ...]  # what the user should know about how the rows were read and `auto` was resolved

    @property
    def trial(self) -> Trial:
        """The only one, or the first."""
        return self.loop.trials[0]

    @property
    def task_lines(self) -> tuple[str, ...]:
        """What the rows are trained for, and the settings that follow; one sentence for all candidates alike."""
        return tuple(dict.fromkeys(trial.task_line for trial in self.loop.trials))

    @property
    def data(self) -> tuple[ExampleSet, ...]:
        """The training examples of each candidate, as `loop.trials`."""
        return tuple(trial.data for trial in self.loop.trials)

    @property
    def validation(self) -> tuple[ExampleSet | None, ...]:
        """The validation examples of each candidate, as `loop.trials`."""
        return tuple(trial.validation_data for trial in self.loop.trials)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished (or interrupted) run of one prompt."""

    __repr__ = brief_repr

    prompt: SoftPrompt  # the best by validation; without validation, the last
    plan: Plan
    losses: tuple[float, ...]  # nats per target, one per step; see StepDone
    validation_losses: tuple[tuple[int, float], ...]  # (step, nats per text token)
    kept_step: int  # the step that `prompt` is from
    interrupted: bool  # stopped by KeyboardInterrupt
    notes: tuple[str, ...]  # what the user should know about how the rows were read and `auto` was resolved
    name: str | None = None  # of the candidate
    scores: tuple[tuple[int, float], ...] = ()  # (step, the caller's score)
    dropped_after: int | None = None  # the step after which its rivals trained on without it
    diverged_after: int | None = None  # the step after which its loss or prompt was no longer a number

    @property
    def diverged_words(self) -> str:
        """What happened, and what to do."""
        rate = self.plan.learning_rate
        return f"training diverged after step {self.diverged_after}: lower the learning rate ({rate:.3g})"

    @property
    def value(self) -> float:
        """What candidates are ranked by, lower is better: the best validation loss, or the negative of its score.

        Of the means over the last steps, where the run came so far.
        """
        found = [(step, -score) for step, score in self.scores] or list(self.validation_losses)
        means = [(step, value) for step, value in found if step >= self.plan.first_averaged_step]
        return min((value for _, value in means or found if not math.isnan(value)), default=math.inf)

    def to_json(self) -> dict[str, Any]:
        """The outcome, as `run.json`, `--json` and the prompt's record give it; without plan and prompt."""
        found: dict[str, Any] = {
            "steps": len(self.losses),
            "kept_step": self.kept_step,
            "interrupted": self.interrupted,
            "losses": list(self.losses),
            "validation_losses": [list(pair) for pair in self.validation_losses],
        }
        if self.scores:
            found["scores"] = [list(pair) for pair in self.scores]
        if self.name is not None:
            found |= {"value": self.value, "dropped_after": self.dropped_after}
        if self.diverged_after is not None:
            found["diverged_after"] = self.diverged_after
        return found


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
    """Train a soft prompt [P, H] on rows, texts or ready examples, from `start` if given; `sink` gets every event.

    `score` rates a prompt, higher for better, and then chooses the best checkpoint in place of the validation loss.
    `prepared` is called once with the resolved plan and what was read, before the first step. `resume` goes on from the
    state of a ResumePoint event of the same run. A KeyboardInterrupt ends the run early and keeps the best prompt so
    far. The base is not changed by a bit.

    Raises DataError for rows that cannot be used, LengthError where the prompt and a row exceed the base's positions,
    PromptError where `start` has another width, StorageError where `resume` is of another run, MemoryLimitError where
    one row does not fit, and DivergedError where the loss stops being a number before there is a prompt to keep.
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
    result = TrainResult(
        prompt=kept, plan=trial.plan, losses=tuple(trial.losses),
        validation_losses=tuple((step, loss) for step, loss, _ in trial.validations if loss is not None),
        scores=tuple((step, score) for step, _, score in trial.validations if score is not None),
        kept_step=kept_step, interrupted=interrupted, notes=ready.notes, name=trial.name,
        dropped_after=trial.step if trial.is_dropped else None,
        diverged_after=trial.step if trial.is_diverged else None,
    )  # fmt: skip
    moved = [token.to_json() for token in drift(trial.start, kept)]
    run = {**result.to_json(), "seconds": round(seconds, 3), "plan": trial.plan.to_record(), "drift": moved}
    record = replace(kept.record, run={**kept.record.run, **run})
    return replace(result, prompt=replace(kept, record=record))


def _kept(trial: Trial, interrupted: bool) -> tuple[SoftPrompt, int]:
    if trial.best is not None and (trial.validation or trial.is_diverged or not interrupted):
        return trial.best, trial.best_step
    return trial.snapshot(), trial.step


def prepare(
    base: Base,
    candidates: Sequence[Candidate],
    *,
    halving: bool = False,
    ranks: Ranks | None = None,
    resume: RunState | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Prepared:
    """A loop that is ready to run, its steps fitted to the memory. Raises as `train` does."""
    ranks = ranks or Alone()
    table, kernel_notes = _kernels(base, ranks, resume)
    forward = forward_of(base).with_choices(table.choices)
    _check_in_step(base, forward, ranks)
    reader = _Reader(base)
    trials = [_trial(base, forward, candidate, reader, ranks) for candidate in candidates]
    notes = [note for trial in trials for note in trial.notes]
    notes += [forward.packing.note, *_ranks_note(ranks), *_prepack(forward, trials, ranks)]
    resumed_rows = None if resume is None else resume.metadata["micro_batch_rows"]
    rows, split_note = fit_micro_batches(base, forward, trials, ranks, resumed_rows)
    for trial in trials:
        trial.plan = replace(trial.plan, micro_batch_rows=rows, kernels=table.to_json())
    loop = TrainingLoop(
        base=base, forward=forward, trials=trials, micro_batch_rows=rows, clock=clock, halving=halving,
        checkpoint_layers=any(trial.plan.config.checkpoint_layers for trial in trials), ranks=ranks,
        identity=_identity(base, trials, _identifying),
    )  # fmt: skip
    if resume is not None:
        _resume(loop, resume, [_identity(base, trials, each) for each in (_identifying_before, _with_open_rate_before)])
        notes += [f"resumed after step {resume.step}", *kernel_notes]
    return Prepared(loop=loop, notes=tuple(dict.fromkeys((*notes, *split_note))))


def _kernels(base: Base, ranks: Ranks, resume: RunState | None) -> tuple[KernelTable, tuple[str, ...]]:
    """How the run's products are computed: as when it was begun, or else as the cache has it; and a note.

    A base that is sharded over ranks follows the fixed rules, as did runs of releases that recorded nothing.
    """
    machine = this_machine()
    fixed = KernelTable("fixed", machine, {})
    if ranks.in_step or (resume is not None and "kernels" not in resume.metadata):
        return fixed, ()
    begun = None if resume is None else KernelTable.from_json(resume.metadata["kernels"])
    if begun is not None and begun.machine == machine:
        return begun, ()
    found = kernel_table(base, training=True).for_training()
    if begun is None:
        return found, ()
    changed = f"the run was begun elsewhere ({begun.machine.differences(machine)})"
    return found, (f"{changed}: its matrix kernels are planned anew, so its last digits may differ",)


class _Reader:
    """Examples of data, each set built once however many candidates train on it."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._rows: dict[int, Rows] = {}
        self._known: dict[tuple[Any, ...], ExampleSet] = {}  # Any: ids of data, and settings

    def examples(self, data: Data, config: TrainConfig, form: InputForm | None = None) -> ExampleSet:
        """`form` is that of the training rows, for rows of validation, which may come without one."""
        branches = form is None and config.loss != "tokens"
        of_task = form or (config.task, config.placement, config.pooling, config.label_words, config.decoder_prompt)
        key = (id(data), config.eos, config.virtual_tokens, branches, of_task)
        if key not in self._known:
            self._known[key] = self._built(data, config, form, branches)
            _check_lengths(self._base, self._known[key], config)
        return self._known[key]

    def _built(self, data: Data, config: TrainConfig, form: InputForm | None, branches: bool) -> ExampleSet:
        if isinstance(data, ExampleSet):
            return data
        if id(data) not in self._rows:  # kept, since an iterator gives its rows once
            self._rows[id(data)] = as_rows(data, form, config.task)
        rows, max_length = self._rows[id(data)], self._base.max_length - config.virtual_tokens
        rows = with_task(rows, self._base, config) if form is None else replace(rows, form=form)
        if rows.form.task != "generate":
            return build_task_examples(self._base, rows, max_length=max_length)
        return build_examples(self._base, rows, eos=config.eos, branches=branches, max_length=max_length)


def _trial(base: Base, forward: Forward, candidate: Candidate, reader: _Reader, ranks: Ranks) -> Trial:
    start, config = candidate.start, candidate.config
    if start is not None:
        config = as_started(config, start)
    _check_criterion(candidate)
    data = _in_labels_of(start, reader.examples(candidate.data, config))
    validation = reader.examples(candidate.validation, config, data.form) if candidate.validation is not None else None
    _check_checkpointing(forward, config)
    line, config = task_line(config, data), resolved_for(config, data)
    first_PH, start_notes = _start(base, data, config, start)
    start_PH = first_PH.to(base.device, torch.promote_types(base.dtype, torch.float32))
    plan = make_plan(base, forward, data, config)
    read = data.report.notes + (validation.report.notes if validation is not None else ())
    kept = "the mean over the last steps" if config.averaging else "the last step"
    last_kept = (f"no validation rows: {kept} is kept",) if validation is None else ()
    return Trial(
        name=candidate.name, plan=plan, data=data, validation_data=validation, record=_record(base, data, plan, start),
        start=start_PH, head=_head(base, forward, data, config, start, start_PH, ranks),
        score=candidate.score, group=candidate.group, task_line=line, notes=(*read, *start_notes, *last_kept),
    )  # fmt: skip


def as_started(config: TrainConfig, start: SoftPrompt) -> TrainConfig:
    """The settings with what the prompt to go on with was trained as, where they leave that open."""
    form = start.record.form
    if config.decoder_prompt and not form.has_decoder_prompt:
        raise ConfigError(
            "decoder_prompt is set, but the prompt to start from has no vectors for the decoder; leave it out",
            param="decoder_prompt",
        )
    config = replace(config, virtual_tokens=start.num_virtual_tokens, decoder_prompt=form.has_decoder_prompt)
    if form.task == "generate":
        return config
    if config.task not in ("auto", form.task):
        raise ConfigError(
            f"task is {config.task!r}, but the prompt to start from was trained for {form.task!r}; leave it out",
            param="task",
        )
    own: dict[str, Any] = {"task": form.task, "placement": form.placement, "pooling": form.pooling or "auto"}
    return replace(config, **{name: value for name, value in own.items() if getattr(config, name) == "auto"})


def _in_labels_of(start: SoftPrompt | None, data: ExampleSet) -> ExampleSet:
    """The examples with their labels numbered as in the head that is trained further.

    Raises PromptError for a label that it does not have.
    """
    if start is None or not start.head or data.form.labels == (known := start.record.form.labels):
        return data
    new = [label for label in data.form.labels if label not in known]
    if new:
        raise PromptError(
            f"the prompt to start from has a head for the labels {', '.join(map(repr, known))}, and "
            f"{data.report.source} has {new[0]!r} too; train a new prompt for that"
        )
    number = [known.index(label) for label in data.form.labels]
    examples = tuple(replace(each, labels=tuple(number[label] for label in each.labels)) for each in data.examples)
    return replace(data, examples=examples, form=replace(data.form, labels=known))


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
    longest = max(len(ids) for example in data.examples for ids in (example.ids, example.source, *example.others))
    if config.virtual_tokens + longest > base.max_length:
        raise LengthError(
            f"{config.virtual_tokens} virtual tokens and a row of {longest} tokens are more than the "
            f"{base.max_length} positions of base {base.name!r}; use fewer virtual tokens or shorter rows"
        )


def _check_checkpointing(forward: Forward, config: TrainConfig) -> None:
    if config.checkpoint_layers and not forward.can_pack:
        raise ConfigError(f"checkpoint_layers works on packed rows only; {forward.packing.note}")


def _check_in_step(base: Base, forward: Forward, ranks: Ranks) -> None:
    if ranks.in_step and base.kind == "encoder":
        raise ConfigError(
            f"base {base.name!r} is an encoder, which is not sharded over processes (FSDP): it is small enough to "
            "train whole in each; configure Accelerate without FSDP"
        )
    if ranks.in_step and forward.max_batchable_length is not None:
        raise ConfigError(
            f"rows of base {base.name!r} have to run one at a time, so ranks cannot run it in step; "
            "train it without FSDP, with device_map 'auto' say"
        )


def _start(
    base: Base, data: ExampleSet, config: TrainConfig, start: SoftPrompt | None
) -> tuple[Tensor, tuple[str, ...]]:
    if start is None:
        return _new_start(base, data, config)
    if start.hidden_size != base.hidden_size:
        raise PromptError(
            f"the prompt to start from has width {start.hidden_size}; base {base.name!r} has {base.hidden_size}"
        )
    return start.tensor, (f"further training of prompt {start.content_hash[:12]}",)


def _new_start(base: Base, data: ExampleSet, config: TrainConfig) -> tuple[Tensor, tuple[str, ...]]:
    """[P, H]; with a prompt for the decoder [2P, H], whose second half draws on what the decoder is to write."""
    texts = _start_texts(base, data, config)
    start_PH, notes = starting_tensor(base, config.init, config.virtual_tokens, config.seed, texts)
    if not data.form.has_decoder_prompt:
        return start_PH, notes
    texts = replace(texts, data=[_own_ids(base, example) for example in data.examples])
    decoder_PH, _ = starting_tensor(base, config.init, config.virtual_tokens, config.seed ^ _OTHER_SEED, texts)
    return torch.cat([start_PH, decoder_PH]), notes


def _head(
    base: Base, forward: Forward, data: ExampleSet, config: TrainConfig, start: SoftPrompt | None, start_PH: Tensor,
    ranks: Ranks,
) -> ObjectiveWeights | None:  # fmt: skip
    """What rows with columns are trained for, with the head's first weights: new, or those of the prompt to go on."""
    trained = objective(base, forward, data.form)
    if trained is not None and trained.is_joint and ranks.count > 1:
        raise ConfigError(
            f"task {data.form.task!r} compares each row with the others of its step, which {ranks.count} processes "
            "would share out; train it in one process"
        )
    if trained is None or trained.head is None:
        return None if trained is None else ObjectiveWeights(trained, {})
    if start is not None and start.head:
        trained.head.check(start.head, f"prompt {start.content_hash[:12]}")
        return ObjectiveWeights(trained, start.head)
    if config.head_init == "fit":
        return ObjectiveWeights(
            trained, fitted_head(base, forward, trained, data.examples, start_PH, config.seed, ranks)
        )
    return ObjectiveWeights(trained, trained.head.start(config.seed))


def _start_texts(base: Base, data: ExampleSet, config: TrainConfig) -> StartTexts:
    labels = [words[0] for words in data.form.label_words] or data.form.labels
    return StartTexts(
        data=[[*_source_text(base, each), *_own_ids(base, each)] for each in data.examples],
        instruction=base.encode(config.init_text) if config.init_text else (),
        labels=[label_ids(base, "", label) for label in labels],
    )


def _source_text(base: Base, example: Example) -> Sequence[int]:
    """What the encoder of an encoder-decoder reads, without what its tokenizer puts around it."""
    return example.source[len(base.bos_ids) : len(example.source) - len(base.end_ids)]


def _own_ids(base: Base, example: Example) -> Sequence[int]:
    """The ids of a row's text, without what the tokenizer or the task puts around and between."""
    if not example.columns:
        return example.ids[example.num_special : len(example.ids) - int(example.has_eos)]
    added = {*base.bos_ids, *base.end_ids, *base.pair_ids, base.mask_id}
    return [token for ids in (example.ids, *example.others) for token in ids if token not in added]


def _ranks_note(ranks: Ranks) -> tuple[str, ...]:
    if ranks.count == 1:
        return ()
    whole = "each with a part of the base's layers" if ranks.in_step else "each with the whole base"
    return (f"{ranks.count} processes share the rows of a step, {whole}",)


def _prepack(forward: Forward, trials: Sequence[Trial], ranks: Ranks) -> tuple[str, ...]:
    """Store the weights once more in the CPU's fastest layout, if the run is long enough and the memory ample."""
    planned = sum(_planned_tokens(trial) for trial in trials)
    needed = 0 if ranks.in_step else forward.bytes_to_prepack()
    free = free_bytes(torch.device("cpu")) // ranks.num_on_this_machine
    if not 0 < needed <= free * _PREPACK_MEMORY_SHARE or planned < _TOKENS_WORTH_PREPACKING * ranks.count:
        return ()
    forward.prepack()
    return (f"weights kept twice more, as this CPU multiplies them fastest ({needed / 2**20:.0f} MiB)",)


def _planned_tokens(trial: Trial) -> int:
    return sum(trial.examples[index].num_tokens for steps in trial.plan.epochs for step in steps for index in step)


def _record(base: Base, data: ExampleSet, plan: Plan, start: SoftPrompt | None) -> PromptRecord:
    return PromptRecord(
        base_name=base.name,
        base_source=base.source,
        base_fingerprint=base.fingerprint,
        base_kind=base.kind,
        form=data.form,
        parent=start.content_hash if start is not None else None,
        run={"plan": plan.to_record(), "data_hash": data.data_hash, "source": data.report.source},
    )


def _identity(base: Base, trials: Sequence[Trial], identifying: Callable[[TrainConfig], dict[str, Any]]) -> str:
    """sha256 of what is trained on what: base, rows, validation, starts, settings; not of device, dtype or splits."""
    parts = [[base.fingerprint, *(trial.data.data_hash for trial in trials)]] + [
        [trial.name, identifying(trial.plan.config), trial.plan.num_steps, trial.group, trial.record.parent,
         [_of_example(example) for example in trial.validation]]
        for trial in trials
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _of_example(example: Example) -> Any:  # Any: JSON
    """What a validation row is; of one without columns its ids, as in earlier releases."""
    if not example.columns and not example.source:
        return example.ids
    return [example.ids, example.source, example.others, example.columns, example.labels, example.num_first]


def _identifying(config: TrainConfig) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(config).items()
        if name not in _NOT_IDENTITY and value not in _LATER.get(name, ())
    }


def _identifying_before(config: TrainConfig) -> dict[str, Any]:
    """As releases without defaults by task had it, in which some settings had one value only."""
    known, since = _identifying(config), DEFAULTS_BEFORE.items()
    return {name: value for name, value in known.items() if name == _RATE or (name, value) not in since}


def _with_open_rate_before(config: TrainConfig) -> dict[str, Any]:
    """The same where no rate was given."""
    known = _identifying_before(config)
    return known | ({_RATE: None} if known[_RATE] == DEFAULTS_BEFORE[_RATE] else {})


def _resume(loop: TrainingLoop, state: RunState, identities_before: Sequence[str]) -> None:
    if state.identity not in (loop.identity, *identities_before):
        raise StorageError(
            "the checkpoint is of another run: base, rows or settings are not the same; "
            "resume with those that it was begun with, or start anew in another folder"
        )
    loop.restore(state)
