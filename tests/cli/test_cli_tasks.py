"""train, sweep and runs on an encoder: every task from its columns, resumed, in candidates and from another prompt."""

from __future__ import annotations

import os
import signal

import pytest
from support.command_line import run, run_apart, succeed
from support.encoders import save_encoder
from support.killable import Forks
from support.material import save_base, sentence, write_csv, write_jsonl

from softprompt.config import DataConfig
from softprompt.data import held_out_record, split_rows
from softprompt.runs import RunFolder
from softprompt.storage import load_prompt

QUICK = ("--virtual-tokens", 3, "--epochs", 2, "--dtype", "float32", "--micro-batch-rows", 8)


def rows(task, count=60):
    texts = [f"{sentence(i)} w{90 + i % 7}" for i in range(count)]
    if task == "tag":
        return [{"tokens": text.split(), "ner_tags": [i % 3 for i in range(len(text.split()))]} for text in texts]
    if task == "answer":
        return [
            {
                "question": f"w{i + 20}",
                "context": f"{text} w9",
                "answers": {"text": ["w9"], "answer_start": [len(text) + 1]},
            }
            for i, text in enumerate(texts)
        ]
    if task == "embed":
        return [{"anchor": text, "positive": f"w{20 + i} w8"} for i, text in enumerate(texts)]
    return [{"text": text, "label": ("bad", "good")[i % 2]} for i, text in enumerate(texts)]


FLAGS = {
    "classify": ("--label-column", "label"),
    "cloze": ("--template", "{text} w9 [MASK]", "--label-column", "label", "--label-words", "good=w15,w16"),
    "tag": (), "answer": ("--validation", 10), "embed": ("--validation", 10),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tasks")
    save_encoder("bert", place / "bert", words=["bad", "good"])
    for task in FLAGS:
        write_jsonl(place / f"{task}.jsonl", rows(task))
    return place


def train(folder, task, *flags, command=succeed, out=None):
    out = out or folder / f"out-{task}"
    data = ("--base", folder / "bert", "--data", folder / f"{task}.jsonl", *FLAGS[task])
    return command("train", *data, *QUICK, "--out", out, *flags)


@pytest.fixture(scope="module")
def classified(folder):
    """A trained classifier; read only."""
    train(folder, "classify")
    return folder / "out-classify"


@pytest.mark.parametrize(
    "task",
    ["classify", "cloze", *(pytest.param(each, marks=pytest.mark.medium) for each in ("tag", "answer", "embed"))],
)
def test_a_task_is_found_trained_and_shown(folder, tmp_path, task):
    ran = train(folder, task, out=tmp_path / "run")
    assert f"\ntask: {task} (" in ran.err
    assert "[CLS][soft prompt]" in ran.err
    form = load_prompt(tmp_path / "run").record.form
    assert (form.task, form.placement) == (task, "after-cls")
    shown = succeed("runs", "show", tmp_path / "run").out
    assert f"{task}" in shown
    assert {"classify": "nats per label", "tag": "nats per tag", "embed": "nats per pair"}.get(
        task, "nats per "
    ) in shown


def test_what_is_trained_counts_the_head(folder):
    ran = train(folder, "tag", out=folder / "counted")
    assert f"trainable params: {3 * 16 + 3 * 16 + 3:,} ||" in ran.err


@pytest.mark.parametrize("task", ["classify", pytest.param("tag", marks=pytest.mark.medium)])
def test_the_held_out_rows_are_known_again_by_the_prompts_own_form(folder, tmp_path, task):
    """Their record is of that form, not of the one that was guessed before the base was known."""
    train(folder, task, "--test", 12, out=tmp_path / "run")
    config = DataConfig(data=str(folder / f"{task}.jsonl"), test="12", validation="20")
    again = split_rows(config, form=load_prompt(tmp_path / "run").record.form)
    plan = RunFolder(tmp_path / "run").read_plan()
    assert [plan[part] for part in ("test", "validation")] == [
        {**held_out_record(getattr(again, part)), "source": plan[part]["source"]} for part in ("test", "validation")
    ]


@pytest.mark.medium
def test_a_killed_run_goes_on_to_the_same_bytes(folder, tmp_path):
    flags = ("--epochs", 12, "--batch-rows", 4, "--save-every", 5, "--validation", 10)
    train(folder, "classify", *flags, out=tmp_path / "straight")
    data = ("--base", folder / "bert", "--data", folder / "classify.jsonl", *FLAGS["classify"], *QUICK)
    with Forks() as forks:
        child = forks.start(("train", *data, *flags, "--out", tmp_path / "killed"), os.devnull)
        metrics = tmp_path / "killed" / "metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 20:
            pass
        os.kill(child, signal.SIGKILL)
        assert forks.wait() == -signal.SIGKILL
    assert "resumed after step" in succeed("train", "--resume", "--out", tmp_path / "killed").err
    found, wanted = (tmp_path / name / "adapter_model.safetensors" for name in ("killed", "straight"))
    assert found.read_bytes() == wanted.read_bytes()


@pytest.mark.medium
def test_candidates_and_an_ensemble_of_classifiers(folder, tmp_path):
    ran = train(folder, "classify", "--candidates", 3, out=tmp_path / "best")
    assert "(kept)" in ran.out + ran.err
    assert load_prompt(tmp_path / "best").head
    train(folder, "classify", "--candidates", 2, "--ensemble", out=tmp_path / "votes")
    assert load_prompt(tmp_path / "votes" / "candidates" / "c1").head


def test_training_goes_on_from_a_prompt_with_its_head(folder, classified, tmp_path):
    train(folder, "classify", "--init-from", classified, out=tmp_path / "more")
    first, more = (load_prompt(path) for path in (classified, tmp_path / "more"))
    assert more.record.parent == first.content_hash
    assert more.record.form == first.record.form
    refused = train(folder, "tag", "--init-from", classified, out=tmp_path / "no", command=run)
    assert (refused.code, refused.err.count("\n")) == (2, refused.err.count("\n"))
    assert "task" in refused.err and not (tmp_path / "no").exists()


@pytest.mark.medium
def test_a_sweep_trains_several_tasks_with_several_heads(folder, tmp_path):
    (tmp_path / "sweep.toml").write_text(
        f"""
[base]
base = "{folder / "bert"}"
dtype = "float32"
[train]
virtual_tokens = 2
epochs = 1
label_words = []
[grid]
head_learning_rate = [0.01, 0.001]
[tasks.reviews]
data = "{folder / "classify.jsonl"}"
label_column = "label"
[tasks.words]
data = "{folder / "tag.jsonl"}"
"""
    )
    ran = succeed("sweep", tmp_path / "sweep.toml", "--out", tmp_path / "run")
    assert "task: classify (" in ran.err and "task: tag (" in ran.err
    assert {load_prompt(tmp_path / "run" / name).record.form.task for name in ("reviews", "words")} == {
        "classify",
        "tag",
    }
    plan = RunFolder(tmp_path / "run").read_plan()
    rates = [each["plan"]["config"]["head_learning_rate"] for each in plan["candidates"].values()]
    assert sorted(set(rates)) == [0.001, 0.01]
    assert "is finished" in succeed("sweep", tmp_path / "sweep.toml", "--resume", "--out", tmp_path / "run").err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--task", "generate"), "is an encoder, which writes no text"),
        (("--task", "tag"), "task 'tag' needs"),
        (("--task", "cloze"), "needs a mask in the template"),
        (("--label-words", "good=w9"), "label_words 'good=w9' are for task cloze"),
        (("--decoder-prompt",), "decoder_prompt is for encoder-decoders"),
        (("--placement", "behind"), "placement is 'behind'"),
        (("--loss", "labels"), "loss is 'labels', but task 'classify' has a loss of its own"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_and_nothing_is_written(folder, untouched, flags, message):
    ran = train(folder, "classify", *flags, command=run, out=untouched)
    assert ran.code == 2
    assert message in ran.err.splitlines()[-1]
    assert "Traceback" not in ran.err


def test_a_causal_base_classifies_where_asked_to(tmp_path):
    base = save_base(tmp_path / "gpt2", "gpt2")
    data = write_csv(tmp_path / "a.csv", [{**row, "label": f"w{len(row['label'])}"} for row in rows("classify")])
    flags = ("--base", base, "--data", data, "--label-column", "label", *QUICK)
    ran = succeed("train", *flags, "--task", "classify", "--out", tmp_path / "headed")
    assert "head over the last token" in ran.err
    assert "task: labels" in succeed("train", *flags, "--out", tmp_path / "generated").err


@pytest.mark.medium
def test_two_processes_train_the_head_of_one(folder, classified, tmp_path):
    data = (
        "--base",
        folder / "bert",
        "--data",
        folder / "classify.jsonl",
        *FLAGS["classify"],
        *QUICK,
        "--device",
        "cpu",
    )
    ran = run_apart("train", *data, "--processes", 2, "--out", tmp_path / "two")
    assert ran.code == 0, ran.err
    one, two = load_prompt(classified), load_prompt(tmp_path / "two")
    assert float((one.tensor - two.tensor).abs().max()) < 1e-4
    pairs = ("--base", folder / "bert", "--data", folder / "embed.jsonl", *QUICK, "--device", "cpu")
    refused = run_apart("train", *pairs, "--processes", 2, "--out", tmp_path / "no")
    assert refused.code == 2 and "train it in one process" in refused.err
