"""Train the three prompts, measure them against their peers, and check one of them in PEFT."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from softprompt.base import Base
from softprompt.config import SamplingConfig
from softprompt.data import Rows, build_examples, render_row, split_rows
from softprompt.demo.peers import bag_of_words_accuracy, peft_logits, peft_prompt
from softprompt.demo.tasks import INPUTS, TASKS, WRITTEN_TEMPLATES, Task
from softprompt.evaluation import Comparison, accuracy_by_likelihood, compare
from softprompt.families import Forward, forward_of
from softprompt.prompt import SoftPrompt
from softprompt.runs import RunFolder
from softprompt.runs.recorder import Recorder
from softprompt.runs.session import TrainingSession, TrainingTask, rows_metadata
from softprompt.splice import Row, concatenate

Say = Callable[[str], None]

_OURS, _PEFT = "softprompt", "PEFT"


@dataclass(frozen=True)
class Finding:
    """One task's figures: nats per token for texts, accuracy for labels. All on the same held-out rows."""

    task: str
    measure: str  # "nats/token" (lower is better) or "accuracy" (higher is better)
    bare: float  # the base alone; for labels, the best of the written templates
    peft: float
    ours: float
    bag_of_words: float | None  # labels only
    num_rows: int


@dataclass(frozen=True)
class Demo:
    """What the demo found and where it lies."""

    folder: Path  # of the trained prompts, one sub-folder each
    data: Path  # copies of the data sets
    findings: tuple[Finding, ...]
    answers: Comparison  # of all prompts, on one base
    peft_difference: float  # largest difference of logits, PEFT with our folder against ours
    seconds: float


@dataclass(frozen=True)
class _Trained:
    task: Task
    train: Rows
    test: Rows
    ours: SoftPrompt
    peft: SoftPrompt


def run_demo(base: Base, folder: Path, say: Say, *, overwrite: bool = False, tasks: tuple[Task, ...] = TASKS) -> Demo:
    """Do it all; adapters go to `folder/<task>`. Raises ExistsError where they are there and may not be replaced."""
    began = time.perf_counter()
    for task in tasks:
        RunFolder.check_free(folder / task.name, overwrite=overwrite)
    data = lay_out_data(folder / "data", tasks)
    trained = [_train(base, task, folder / task.name, say, overwrite) for task in tasks]
    findings = tuple(_find(base, item) for item in trained)
    say(f"measured on held-out rows, {time.perf_counter() - began:.0f} s so far")
    prompts = {item.task.name: item.ours for item in trained}
    inputs = [*INPUTS, *(_first_text(item.test) for item in trained if item.test.form.labels)]
    sampling = SamplingConfig(max_new_tokens=40, repetition_penalty=1.5)
    return Demo(
        folder=folder,
        data=data,
        findings=findings,
        answers=compare(base, prompts, inputs, sampling=sampling, raw=True),
        peft_difference=_difference_in_peft(base, folder / trained[0].task.name, trained[0].ours),
        seconds=time.perf_counter() - began,
    )


def _first_text(rows: Rows) -> str:
    """The first held-out row up to its label."""
    return render_row(rows, 0).prompt


def lay_out_data(folder: Path, tasks: tuple[Task, ...]) -> Path:
    """Copies of the tasks' files, for the user to look at and to train on."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in {path for task in tasks for path in (task.data.data, task.data.test) if path is not None}:
        if Path(file).is_file():
            shutil.copy(file, folder)
    return folder


def _train(base: Base, task: Task, folder: Path, say: Say, overwrite: bool) -> _Trained:
    split = split_rows(task.data)
    assert split.test is not None, task
    rows = rows_metadata(task.data, task.train.seed, split)
    wanted = TrainingTask(split=split, configs={"": task.train}, metadata=rows)
    session = TrainingSession(base, [wanted], Recorder(folder, rows, overwrite=overwrite))
    (result,) = session.train()
    judgements = session.judge([result])
    session.finish([result], judgements)
    losses, took = result.losses, result.prompt.record.run["seconds"]
    say(
        f"{task.name}: {len(split.train)} rows, {task.train.virtual_tokens} virtual tokens, {len(losses)} steps, "
        f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, {took:.1f} s"
    )
    for judgement in judgements.values():
        say(f"{task.name}: {judgement.text}")
    room = base.max_length - task.train.virtual_tokens
    began = time.perf_counter()
    peft = peft_prompt(base, build_examples(base, split.train, eos=task.train.eos, max_length=room), task.train)
    say(f"{task.name}: PEFT's defaults on the same rows and steps, {time.perf_counter() - began:.1f} s")
    return _Trained(task, split.train, split.test, result.prompt, peft)


def _find(base: Base, item: _Trained) -> Finding:
    found = compare(base, {_OURS: item.ours, _PEFT: item.peft}, held_out={item.task.name: item.test})
    if not item.test.form.labels:
        losses = {loss.prompt: loss.loss for loss in found.losses}
        return Finding(item.task.name, "nats/token", losses[None], losses[_PEFT], losses[_OURS], None, len(item.test))
    shares = {accuracy.prompt: accuracy.by_likelihood for accuracy in found.accuracies}
    words = bag_of_words_accuracy(item.train, item.test)
    best = _best_written(base, item.test)
    return Finding(item.task.name, "accuracy", best, shares[_PEFT], shares[_OURS], words, len(item.test))


def _best_written(base: Base, test: Rows) -> float:
    """The bare base with each written template; the best is picked on the test rows themselves, in its favour."""
    forward = forward_of(base)
    return max(_written_accuracy(base, forward, test, template) for template in WRITTEN_TEMPLATES)


def _written_accuracy(base: Base, forward: Forward, test: Rows, template: str) -> float:
    rows = replace(test, form=replace(test.form, template=template))
    return accuracy_by_likelihood(base, forward, rows, None)


def _difference_in_peft(base: Base, folder: Path, ours: SoftPrompt) -> float:
    ids = base.bos_ids + base.encode(INPUTS[0])
    forward = forward_of(base)
    spliced = concatenate(base, [Row(ids, 0)], [ours.tensor])
    with torch.no_grad():
        hidden = forward.hidden_states(spliced.embeds_BSH, spliced.mask_BS, spliced.positions_BS)
        logits = forward.logits(hidden[0, -len(ids) :])
    return float((logits - peft_logits(base, str(folder), ids)).abs().max())
