"""The demo on a real model, here in small on the embedded one: its figures, its rivals and what it says of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from softprompt import load_base
from softprompt.base import Base
from softprompt.data import read_rows, render_rows
from softprompt.demo import RealDemo, run_real_demo
from softprompt.demo.real import OURS, PEFT, REAL_TASKS, WrittenVerdict
from softprompt.evaluation import Interval
from softprompt.runs.recorder import Recorder
from softprompt.runs.session import TrainingSession, TrainingTask
from softprompt.training import TrainResult

NUM_TEST = 5
pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("embedded", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def demo(base: Base, tmp_path_factory: pytest.TempPathFactory) -> RealDemo:
    small = tuple(
        replace(task, data=replace(task.data, rows=8), train=replace(task.train, epochs=1), num_test=NUM_TEST)
        for task in REAL_TASKS
    )
    return run_real_demo(base, tmp_path_factory.mktemp("real"), lambda line: None, train, tasks=small)


def train(base: Base, task: TrainingTask, recorder: Recorder) -> TrainResult:
    session = TrainingSession(base, [task], recorder)
    (result,) = session.train()
    session.finish([result])
    return result


def test_every_task_has_a_prompt_a_verdict_and_an_answer(demo: RealDemo) -> None:
    assert all((demo.folder / task.name / "adapter_model.safetensors").is_file() for task in REAL_TASKS)
    assert len(demo.verdicts) == len(REAL_TASKS)
    assert all(set(item.answers) == {None, "coach", "quotes", "reviews"} for item in demo.answers.answered)
    assert "the bare base with the best of 4 templates" in demo.verdicts[-1]
    coach, quotes = ({loss.prompt for loss in found.losses} for found in demo.found)
    assert {None, OURS} < coach
    assert {None, OURS, PEFT} < quotes


def test_a_written_instruction_is_measured_as_the_text_in_front_of_each_row(base: Base, demo: RealDemo) -> None:
    task = REAL_TASKS[1]
    rows = read_rows(replace(task.data, data=task.data.test, rows=NUM_TEST, test=None))
    instruction = task.written[0]
    nats, count = 0.0, 0
    for row in render_rows(rows):
        before, text = list(base.encode(instruction)), list(base.encode(row.text))
        with torch.no_grad():
            logits = base.model(torch.tensor([before + text])).logits[0]
        start = len(before) + 1  # a text's first token is no target: the bare base has nothing to predict it from
        nats += float(cross_entropy(logits[start - 1 : -1].double(), torch.tensor(text[1:]), reduction="sum"))
        count += len(text) - 1
    losses = {loss.prompt: loss.loss for loss in demo.found[1].losses}
    assert losses[f"written: {instruction.strip()}"] == pytest.approx(nats / count, rel=1e-4)
    assert losses[None] != pytest.approx(nats / count, rel=1e-2)


@pytest.mark.parametrize(
    ("low", "high", "sentence"),
    [(-0.3, -0.1, "is lower than that"), (0.1, 0.3, "is higher than that"), (-0.1, 0.1, "is no different from that")],
)
def test_the_verdict_says_who_wins_also_where_it_is_the_written_one(low: float, high: float, sentence: str) -> None:
    verdict = WrittenVerdict("quotes", 60, 5.0, 4.0, 4.0 - (low + high) / 2, "A quote: ", 2, Interval(low, high))
    assert sentence in verdict.text
