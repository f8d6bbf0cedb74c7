"""The commands on prompts of an encoder: trained, compared on the rows set aside, shown, answering files."""

from __future__ import annotations

import json

import pytest
from support.command_line import run, succeed
from support.encoders import save_encoder
from support.headed_prompts import WORDS, records_of
from support.material import write_jsonl

CLOZE = ("--template", "{text} w9 [MASK] w8", "--completion", " {label}", "--label-words", "bad=bad,w20")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder("bert", tmp_path_factory.mktemp("encoder") / "tiny-bert", words=WORDS)


@pytest.fixture(scope="module")
def prompt_of(encoder, tmp_path_factory):
    """The folder of a prompt for a task, trained once, and the file of its rows."""
    folder, known = tmp_path_factory.mktemp("heads"), {}

    def prompt_of(task):
        if task not in known:
            data = write_jsonl(folder / f"{task}.jsonl", records_of(task, 90))
            flags = ("--virtual-tokens", 3, "--epochs", 1, "--validation", 20, "--test", 20)
            known[task] = succeed(
                "train", "--base", encoder, "--dtype", "float32", "--data", data, "--task", task,
                *(CLOZE if task == "cloze" else ()), *flags, "--out", folder / task,
            )  # fmt: skip
        return folder / task, folder / f"{task}.jsonl"

    return prompt_of


@pytest.mark.parametrize("task", ["classify", "cloze", *(pytest.param(t, marks=pytest.mark.medium) for t in
                                                          ("tag", "answer", "embed"))])  # fmt: skip
def test_compare_reads_the_rows_that_training_set_aside_and_predict_answers_them_alike(
    encoder, prompt_of, tmp_path, task
):
    prompt, data = prompt_of(task)
    base = ("--base", encoder, "--dtype", "float32")
    found = succeed("compare", *base, "--prompt", prompt, "--markdown", tmp_path / "report.md", "--json").json
    assert (tmp_path / "report.md").is_file()
    succeed("predict", *base, "--prompt", prompt, "--data", data, "--out", tmp_path / "answers.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 90
    assert not any(row["error"] for row in rows)
    if task in ("classify", "cloze"):
        accuracy = found["accuracies"][-1]
        assert (accuracy["prompt"], accuracy["num_rows"]) == (task, 20)
        held_out = set(json.loads((prompt / "softprompt.json").read_text())["run"]["test"]["indices"])
        wrong = [i for i, row in enumerate(rows) if i in held_out and row["predicted_label"] != row["label"]]
        assert sorted(accuracy["wrong_rows"]) == wrong
        assert all(row["unsure"] in (True, False) for row in rows)
    else:
        assert [item["num_rows"] for item in found["scores"]] == [20] * 4


def test_show_tells_task_words_placement_and_head_and_the_nearest_tokens(encoder, prompt_of):
    facts = succeed("prompts", "show", prompt_of("classify")[0], "--base", encoder, "--dtype", "float32").out
    for fact in (
        "task",
        "classify",
        "pooling",
        "cls",
        "behind [CLS]",
        "parameters beside 48 of the vectors",
        "cosine",
        "confidence",
    ):
        assert fact in facts, fact
    facts = succeed("prompts", "show", prompt_of("cloze")[0]).out
    assert "bad: bad, w20" in facts
    assert "classifier" not in facts
    listed = succeed("prompts", "list", "--library", prompt_of("cloze")[0].parent).out
    assert "cloze" in listed.split("\n", 3)[3]
    assert "classify" in listed


@pytest.mark.parametrize("task", ["classify", pytest.param("cloze", marks=pytest.mark.medium)])
def test_leaving_out_a_virtual_token_changes_the_loss_on_the_labels(encoder, prompt_of, task):
    flags = ("--base", encoder, "--dtype", "float32", "--leave-out", "--json")
    found = succeed("prompts", "show", prompt_of(task)[0], *flags).json["leave_out"]
    whole = succeed("compare", *flags[:4], "--prompt", prompt_of(task)[0], "--json").json["losses"][-1]
    assert found["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    assert (found["num_rows"], len(found["left_out"])) == (20, 3)
    assert all(abs(each["difference"]) > 1e-7 for each in found["left_out"])


def test_generate_and_raw_refuse_a_head_by_name(encoder, prompt_of):
    prompt, _ = prompt_of("classify")
    base = ("--base", encoder, "--dtype", "float32", "--prompt", prompt)
    refused = run("generate", *base, "w7 w8").complaint
    assert "was trained for task classify, which writes no text; softprompt predict answers rows with it" in refused
    assert (
        "raw continues a text, and classify (task classify) writes none"
        in run("compare", *base, "--input", "w7", "--raw").complaint
    )
    assert " (0." in succeed("compare", *base, "--input", "w7 w8").out
