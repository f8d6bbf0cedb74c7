"""The notebook's job and a review classifier on a real language model, beside what a person would write instead.

A written instruction stands in the same comparison as a soft prompt: its vectors are the embeddings of its tokens,
which is the text itself in front of each row. The best one is picked on the evaluated rows, in its favour. PEFT's
defaults are trained where that takes seconds; on the other tasks they would double the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from softprompt.base import Base
from softprompt.config import SamplingConfig, TrainConfig
from softprompt.data import Rows, build_examples, render_row, split_rows
from softprompt.demo.job import Say, lay_out_data
from softprompt.demo.peers import peft_prompt
from softprompt.demo.tasks import INPUTS, TASKS, Task
from softprompt.evaluation import Comparison, Interval, compare, paired_interval, verdict_of
from softprompt.families import forward_of
from softprompt.loss import score_examples
from softprompt.prompt import SoftPrompt
from softprompt.runs import RunFolder
from softprompt.runs.recorder import Recorder
from softprompt.runs.session import TrainingTask, rows_metadata
from softprompt.training import TrainResult
from softprompt.types import PromptRecord

OURS, PEFT = "softprompt", "PEFT's defaults"
Train = Callable[[Base, TrainingTask, Recorder], TrainResult]


@dataclass(frozen=True, kw_only=True)
class RealTask(Task):
    """A task of the demo with a real model."""

    num_test: int  # held-out rows, the first ones of the file
    written: tuple[str, ...] = ()  # instructions to put before a text; a classifier's templates are those of `compare`
    with_peft: bool = False


_DATA = {task.name: task.data for task in TASKS}
REAL_TASKS = (
    RealTask(
        name="coach",
        data=_DATA["coach"],
        train=TrainConfig(virtual_tokens=4, epochs=6),
        num_test=30,
        written=(
            "Write a prompt that makes a chatbot act as a motivational coach.\n",
            "A role prompt for a personal coach: ",
        ),
    ),
    RealTask(
        name="quotes",
        data=replace(_DATA["quotes"], rows=25),
        train=TrainConfig(virtual_tokens=4, epochs=6),
        num_test=60,
        written=("Write an inspiring quote about love, hope and kindness.\n", "A quote about friendship: "),
        with_peft=True,
    ),
    RealTask(
        name="reviews",
        data=replace(_DATA["reviews"], rows=64),
        train=TrainConfig(virtual_tokens=8, epochs=2),
        num_test=80,
    ),
)


@dataclass(frozen=True)
class WrittenVerdict:
    """A soft prompt's held-out loss beside that of the best written instruction, in nats per token."""

    task: str
    num_rows: int
    bare: float
    ours: float
    written: float
    instruction: str
    num_written: int  # tried
    interval: Interval | None  # of ours minus written, over rows, at 95 %

    @property
    def text(self) -> str:
        """The verdict in plain words."""
        low, high = (0.0, 0.0) if self.interval is None else (self.interval.low, self.interval.high)
        conclusion = "lower than" if high < 0 else "higher than" if low > 0 else "no different from"
        return (
            f"On {self.num_rows} rows of {self.task}, the soft prompt's loss is {self.ours:.3f} nats per token, the "
            f"bare base's {self.bare:.3f}, and with the best of {self.num_written} written instructions "
            f"({self.instruction.strip()!r}) {self.written:.3f}. The soft prompt's is {conclusion} that "
            f"({self.ours - self.written:+.3f}, {low:+.3f} to {high:+.3f})."
        )


@dataclass(frozen=True)
class RealDemo:
    """What the demo found and where it lies."""

    folder: Path  # of the trained prompts, one sub-folder each
    data: Path  # copies of the data sets
    found: tuple[Comparison, ...]  # held-out losses, one for each task of texts
    verdicts: tuple[str, ...]  # beside the best that a person wrote, one for each task
    answers: Comparison  # of all prompts, on one base


@dataclass(frozen=True)
class _Trained:
    task: RealTask
    test: Rows
    prompts: Mapping[str, SoftPrompt]  # ours, and PEFT's where it is trained


def run_real_demo(
    base: Base,
    folder: Path,
    say: Say,
    train: Train,
    *,
    overwrite: bool = False,
    tasks: tuple[RealTask, ...] = REAL_TASKS,
) -> RealDemo:
    """Train, compare and answer; adapters go to `folder/<task>`. `train` trains one task and shows how it goes.

    Raises ExistsError where they are there and may not be replaced.
    """
    began = time.perf_counter()
    for task in tasks:
        RunFolder.check_free(folder / task.name, overwrite=overwrite)
    data = lay_out_data(folder / "data", tasks)
    trained, found, verdicts = [], [], []
    for task in tasks:
        item = _train(base, task, folder / task.name, say, train, overwrite)
        say(f"{task.name}: comparing on {len(item.test)} held-out rows ({time.perf_counter() - began:.0f} s so far)")
        trained.append(item)
        if item.test.form.labels:
            verdicts.append(verdict_of(base, task.name, item.test, OURS, item.prompts[OURS], others=True).text)
        else:
            found.append(_compare(base, item))
            verdicts.append(_beside_written(base, item, found[-1]).text)
    say(f"answers before and after ({time.perf_counter() - began:.0f} s so far)")
    return RealDemo(folder, data, tuple(found), tuple(verdicts), _answers(base, trained))


def _train(base: Base, task: RealTask, folder: Path, say: Say, train: Train, overwrite: bool) -> _Trained:
    split = split_rows(task.data)
    assert split.test is not None, task
    rows = rows_metadata(task.data, task.train.seed, split)
    say(f"{task.name}: {len(split.train)} rows, {task.train.virtual_tokens} virtual tokens, {task.train.epochs} epochs")
    wanted = TrainingTask(split=split, configs={"": task.train}, metadata=rows)
    prompts = {OURS: train(base, wanted, Recorder(folder, rows, overwrite=overwrite)).prompt}
    if task.with_peft:
        began = time.perf_counter()
        room = base.max_length - task.train.virtual_tokens
        prompts[PEFT] = peft_prompt(
            base, build_examples(base, split.train, eos=task.train.eos, max_length=room), task.train
        )
        say(f"{task.name}: PEFT's defaults on the same rows and steps, {time.perf_counter() - began:.1f} s")
    return _Trained(task, split.test.select(range(min(task.num_test, len(split.test)))), prompts)


def _compare(base: Base, item: _Trained) -> Comparison:
    written = {_name(text): _as_prompt(base, text) for text in item.task.written}
    return compare(base, {**item.prompts, **written}, held_out={item.task.name: item.test})


def _name(instruction: str) -> str:
    return f"written: {instruction.strip()}"


def _as_prompt(base: Base, instruction: str) -> SoftPrompt:
    """The instruction's token embeddings [P, H]: the text itself, as a prompt."""
    vectors = base.embed(torch.tensor(base.encode(instruction))).float().cpu()
    return SoftPrompt(vectors, PromptRecord(base_name=base.name, base_fingerprint=base.fingerprint))


def _beside_written(base: Base, item: _Trained, found: Comparison) -> WrittenVerdict:
    losses = {loss.prompt: loss.loss for loss in found.losses}
    best = min(item.task.written, key=lambda text: losses[_name(text)])
    prompts = (item.prompts[OURS], _as_prompt(base, best))
    length = base.max_length - max(prompt.num_virtual_tokens for prompt in prompts)
    examples = build_examples(base, item.test, eos=True, max_length=length).examples
    ours, theirs = (score_examples(base, forward_of(base), examples, prompt.tensor) for prompt in prompts)
    return WrittenVerdict(
        task=item.task.name, num_rows=len(item.test), bare=losses[None], ours=losses[OURS], written=losses[_name(best)],
        instruction=best, num_written=len(item.task.written), interval=paired_interval(ours, theirs, 0),
    )  # fmt: skip


def _answers(base: Base, trained: list[_Trained]) -> Comparison:
    prompts = {item.task.name: item.prompts[OURS] for item in trained}
    reviews = [render_row(item.test, 0).prompt for item in trained if item.test.form.labels]
    sampling = SamplingConfig(max_new_tokens=40, repetition_penalty=1.5)
    return compare(base, prompts, [*INPUTS, *reviews], sampling=sampling, raw=True)
