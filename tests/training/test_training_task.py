"""Settings that are left open follow from what the rows are trained for; those that are given stay."""

from __future__ import annotations

import dataclasses

import pytest
from support.material import chat, review, sentence
from support.ready import ready_run

from softprompt.base import Base, load_base
from softprompt.config import NOTEBOOK_PRESET, TASK_DEFAULTS, TrainConfig
from softprompt.data import Rows, rows_from_records, rows_from_texts, split_rows
from softprompt.demo.tasks import TASKS
from softprompt.engine import Request, generate
from softprompt.evaluation import accuracy_by_likelihood
from softprompt.families import forward_of
from softprompt.families.task_head import HEADED_TASKS
from softprompt.training import Candidate, prepare, train

FORM = {"template": "w5 {text} w6", "completion": " {label}"}
EXPLICIT = {
    "loss": "tokens", "relative_learning_rate": 0.7, "reparameterisation": "low-rank", "epochs": 2,
    "averaging": 0.25,
}  # fmt: skip

GENERATED = ("text", "labels", "chat", "answers")  # kinds of rows of the task "generate"


def rows_of(task: str) -> Rows:
    if task == "text":
        return rows_from_texts([sentence(i) for i in range(12)])
    if task == "chat":
        return rows_from_records([chat(i) for i in range(12)], messages_column="messages")
    answers = [{"text": sentence(i), "label": sentence(i + 50)} for i in range(12)]
    return rows_from_records([review(i) for i in range(12)] if task == "labels" else answers, **FORM)


@pytest.mark.parametrize("task", GENERATED)
def test_what_is_left_open_is_the_tasks_default_in_plan_and_record(tiny_llama, task):
    ready = ready_run(tiny_llama, rows_of(task), TrainConfig(virtual_tokens=3))
    plan = ready.trial.plan
    assert plan.task == plan.to_json()["task"] == ready.trial.record.run["plan"]["task"] == task
    for found in (vars(plan.config), ready.trial.record.run["plan"]["config"]):
        assert {name: found[name] for name in TASK_DEFAULTS[task]} == TASK_DEFAULTS[task]
    assert len(plan.epochs) == TASK_DEFAULTS[task]["epochs"]
    assert plan.learning_rate == TASK_DEFAULTS[task]["relative_learning_rate"] * plan.embedding_rms
    assert plan.config == plan.config.resolved("text") == plan.config.resolved("labels")  # nothing is left open


def test_tasks_have_the_same_settings_each_of_them_open_by_default():
    names, of_heads = set(TASK_DEFAULTS["text"]), {"head_init", "head_learning_rate"}
    for task, defaults in TASK_DEFAULTS.items():
        assert set(defaults) == names | (of_heads if task in HEADED_TASKS else set())
    open_settings = {item.name for item in dataclasses.fields(TrainConfig) if item.default in (None, "auto")}
    assert names | of_heads <= open_settings
    for task in TASK_DEFAULTS:
        TrainConfig().resolved(task)


@pytest.mark.parametrize("task", GENERATED)
def test_settings_that_are_given_win(tiny_llama, task):
    config = TrainConfig(virtual_tokens=3, **EXPLICIT)
    ready = ready_run(tiny_llama, rows_of(task), config)
    assert ready.trial.plan.config == config
    assert ready.task_lines[0].endswith("): every setting that goes by task is given")
    absolute = ready_run(tiny_llama, rows_of(task), TrainConfig(virtual_tokens=3, learning_rate=0.5)).trial.plan
    assert (absolute.learning_rate, absolute.config.relative_learning_rate) == (0.5, None)


def test_one_line_says_the_task_and_why_and_what_follows(tiny_llama):
    given = TrainConfig(virtual_tokens=3, **{**EXPLICIT, "loss": "labels"})
    reasons = {
        "text": "12 rows of plain text", "labels": "2 of them in 12 rows", "chat": "12 rows of messages",
        "answers": "12 rows with a completion each, which are no set of labels",
    }  # fmt: skip
    for task, reason in reasons.items():
        (line,) = ready_run(tiny_llama, rows_of(task), TrainConfig(virtual_tokens=3)).task_lines
        assert line.startswith(f"task: {task} ({reason}): loss ")
        rate, epochs = TASK_DEFAULTS[task]["relative_learning_rate"], TASK_DEFAULTS[task]["epochs"]
        assert f"rate {rate:g} x RMS, " in line and f", {epochs} epochs" in line
        assert line.endswith(", the mean over the last 50% of the steps" if task == "labels" else " epochs")
    for name in EXPLICIT:
        config = dataclasses.replace(given, **{name: "auto" if name == "loss" else None})
        (line,) = ready_run(tiny_llama, rows_of("labels"), config).task_lines
        assert line.count(", ") == 0, line  # that one setting alone


def test_candidates_of_one_run_have_each_their_own_tasks_defaults(tiny_llama):
    config = TrainConfig(virtual_tokens=3)
    candidates = [Candidate(name=task, data=rows_of(task), config=config) for task in GENERATED]
    ready = prepare(tiny_llama, [*candidates, dataclasses.replace(candidates[0], name="again")])
    assert [trial.plan.task for trial in ready.loop.trials] == [*GENERATED, "text"]
    for trial in ready.loop.trials:
        assert trial.plan.config.loss == TASK_DEFAULTS[trial.plan.task]["loss"]
    assert len(ready.task_lines) == 4


def test_the_notebooks_settings_leave_nothing_to_the_task():
    assert not TrainConfig(**NOTEBOOK_PRESET).defaults_by_task("labels")


def test_a_record_of_a_release_without_defaults_by_task_means_what_it_meant():
    before = {"epochs": 6, "reparameterisation": "residual-mlp", "relative_learning_rate": None, "learning_rate": None}
    found = TrainConfig.of_record(before)
    assert (found.loss, found.relative_learning_rate, found.learning_rate) == ("tokens", 0.3, None)
    absolute = TrainConfig.of_record({**before, "learning_rate": 0.5})
    assert (absolute.relative_learning_rate, absolute.learning_rate) == (None, 0.5)
    now = TrainConfig(eos=False, epochs=3)
    assert TrainConfig.of_record(vars(now)) == now


@pytest.fixture(scope="module")
def embedded() -> Base:
    return load_base("embedded", dtype="float32")


def test_labels_are_learnt_by_default_by_likelihood_and_in_what_is_written(embedded):
    task = next(task for task in TASKS if task.name == "reviews")
    split = split_rows(dataclasses.replace(task.data, rows=50, validation="none"))
    assert split.test is not None
    test = split.test.select(range(0, len(split.test), 4))
    prompt = train(embedded, split.train, TrainConfig()).prompt
    forward = forward_of(embedded)
    assert accuracy_by_likelihood(embedded, forward, test, prompt) >= 0.9
    texts = [f"Review: {row['text']}\nSentiment:" for row in test.records]
    asked = [Request(embedded.bos_ids + embedded.encode(text), prompt) for text in texts]
    answers = generate(embedded, asked, forward=forward)
    right = [answer.text == f" {row['label']}" for answer, row in zip(answers, test.records, strict=True)]
    assert sum(right) / len(right) >= 0.9  # the label, and EOS right behind it
