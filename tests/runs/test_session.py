"""A session that is stopped and resumed trains the prompt of the unbroken one, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_bases import random_ids

from softprompt.base import Base
from softprompt.config import TrainConfig
from softprompt.data import Split, rows_from_records, rows_from_texts
from softprompt.data.rows import with_labels
from softprompt.errors import ConfigError, ExistsError
from softprompt.runs import RunFolder
from softprompt.runs.recorder import Recorder
from softprompt.runs.session import SessionStopped, TrainingSession, TrainingTask
from softprompt.storage import load_prompt
from softprompt.training import Checkpoint, Event, SliceDone, StepDone, TrainResult

CONFIG = TrainConfig(virtual_tokens=3, epochs=2, batch_rows=4, micro_batch_rows=2, validate_every=2)


def texts(count: int, first: int = 0) -> list[str]:
    return [" ".join(f"w{token}" for token in random_ids(3 + row % 5, row)) for row in range(first, first + count)]


@pytest.fixture
def open_session(tiny_llama: Base, tmp_path: Path) -> Callable[..., TrainingSession]:
    """A session of one prompt, 6 steps with a validation after every second, in a folder by name."""
    split = Split(train=rows_from_texts(texts(10)), validation=rows_from_texts(texts(3, 50)), test=None)

    def open_it(name: str, config: TrainConfig = CONFIG, **settings: object) -> TrainingSession:
        folder = tmp_path / name
        recorder = Recorder(folder, {}, resume=RunFolder(folder).has_begun())
        task = TrainingTask(split=split, configs={"": config})
        return TrainingSession(tiny_llama, [task], recorder, **settings)  # type: ignore[arg-type]

    return open_it


def assert_same(found: TrainResult, wanted: TrainResult) -> None:
    assert torch.equal(found.prompt.tensor, wanted.prompt.tensor)
    assert found.to_json() == wanted.to_json()


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5])
def test_a_session_stopped_after_every_few_steps_is_the_unbroken_one(
    open_session: Callable[..., TrainingSession], num_steps: int
) -> None:
    (straight,) = open_session("straight").train()
    assert len(straight.losses) == 6
    for _ in range(5 // num_steps):
        seen: list[Event] = []

        def should_stop(seen: list[Event] = seen) -> str | None:
            return "pause" if sum(isinstance(event, StepDone) for event in seen) >= num_steps else None

        with pytest.raises(SessionStopped, match="pause"):
            open_session("stopped", on_event=seen.append, should_stop=should_stop).train()
    (result,) = open_session("stopped").train()
    assert_same(result, straight)


def test_a_session_stopped_within_a_validation_finishes_it_first(open_session: Callable[..., TrainingSession]) -> None:
    (straight,) = open_session("straight").train()
    seen: list[Event] = []

    def should_stop() -> str | None:
        is_in_validation = len(seen) > 1 and isinstance(seen[-1], SliceDone) and seen[-1].step == 2
        return "pause" if is_in_validation or any(isinstance(event, Checkpoint) for event in seen) else None

    with pytest.raises(SessionStopped):
        open_session("stopped", on_event=seen.append, should_stop=should_stop).train()
    assert isinstance(seen[-2], Checkpoint)  # and behind it the state that it resumes from
    (result,) = open_session("stopped").train()
    assert_same(result, straight)


def test_a_session_stopped_behind_its_last_step_ends_as_the_unbroken_one(
    open_session: Callable[..., TrainingSession],
) -> None:
    """While it is judged, say: its prompt is made of the last state again, without a step."""
    (straight,) = open_session("stopped").train()
    seen: list[Event] = []
    (again,) = open_session("stopped", on_event=seen.append).train()
    assert not any(isinstance(event, StepDone) for event in seen)
    assert_same(again, straight)


def test_a_session_that_raises_to_stop_saves_nothing(open_session: Callable[..., TrainingSession]) -> None:
    def should_stop() -> str | None:
        raise SessionStopped("cancel")

    session = open_session("cancelled", should_stop=should_stop)
    with pytest.raises(SessionStopped, match="cancel"):
        session.train()
    assert RunFolder(session.recorder.folder).checkpoints() == []


def test_a_run_of_more_steps_than_allowed_is_refused_before_its_folder_is_made(
    open_session: Callable[..., TrainingSession],
) -> None:
    session = open_session("long", max_steps=3)
    with pytest.raises(ConfigError, match="would take 6 steps, more than 3"):
        session.train()
    assert not session.recorder.folder.exists()


def test_a_finished_session_leaves_an_adapter_and_its_result(
    open_session: Callable[..., TrainingSession], tiny_llama: Base
) -> None:
    session = open_session("finished")
    results = session.train()
    outcome = session.finish(results)
    folder = session.recorder.folder
    assert RunFolder(folder).read_plan()["result"] == outcome
    assert outcome == {"content_hash": results[0].prompt.content_hash, **results[0].to_json()}
    assert torch.equal(load_prompt(folder, tiny_llama).tensor, results[0].prompt.tensor)
    recorder = Recorder(folder, {})
    with pytest.raises(ExistsError):
        TrainingSession(tiny_llama, session.tasks, recorder).train()


def test_a_resumed_run_keeps_the_defaults_that_it_was_begun_with(tiny_llama: Base, tmp_path: Path) -> None:
    """Those of a release that had other ones, and no loss among labels."""
    rows = [{"text": text, "label": f"w{90 + row % 2}"} for row, text in enumerate(texts(10))]
    labelled = rows_from_records(rows, template="w5 {text} w6", completion=" {label}")
    split = Split(train=with_labels(labelled), validation=None, test=None)
    former = {"loss": "tokens", "relative_learning_rate": 0.3, "reparameterisation": "residual-mlp", "epochs": 3}

    def session(name: str, config: TrainConfig, **settings: object) -> TrainingSession:
        recorder = Recorder(tmp_path / name, {}, resume=RunFolder(tmp_path / name).has_begun())
        return TrainingSession(tiny_llama, [TrainingTask(split=split, configs={"": config})], recorder, **settings)  # type: ignore[arg-type]

    config = TrainConfig(virtual_tokens=3, **former)  # type: ignore[arg-type]
    (straight,) = session("straight", config).train()
    seen: list[Event] = []
    with pytest.raises(SessionStopped):
        session("run", config, on_event=seen.append, should_stop=lambda: "pause" if len(seen) > 3 else None).train()
    run = RunFolder(tmp_path / "run")
    plan = run.read_plan()
    del plan["plan"]["config"]["loss"], plan["plan"]["task"]
    plan["plan"]["config"]["relative_learning_rate"] = None
    run.write_plan(plan)
    (resumed,) = session("run", TrainConfig(virtual_tokens=3)).train()
    assert torch.equal(resumed.prompt.tensor, straight.prompt.tensor)
    (anew,) = session("anew", TrainConfig(virtual_tokens=3)).train()
    assert anew.plan.config.loss == "labels" and len(anew.losses) > len(straight.losses)
