"""softprompt train: what it prints, what it writes, and that the flags mean what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from support.command_line import run, succeed
from support.material import QUICK, TEMPLATE, review, save_base, sentence, write_csv, write_jsonl
from transformers import AutoModelForCausalLM

from softprompt.config import NOTEBOOK_PRESET, TASK_DEFAULTS
from softprompt.runs import RunFolder
from softprompt.storage import load_prompt


@pytest.fixture
def train(base_folder, texts, tmp_path):
    """Train on the plain texts into `tmp_path/out`, as quickly as can be; flags given later override."""

    def call(*flags, out="run"):
        fixed = ("train", "--base", base_folder, "--data", texts, "--text-column", "prompt", "--rows", 24)
        return succeed(*fixed, *QUICK, "--out", tmp_path / out, *flags), tmp_path / out

    return call


def config_of(folder):
    return RunFolder(folder).read_plan()["plan"]["config"]


def test_a_run_prints_what_it_read_and_leaves_a_whole_folder(train, base_folder):
    ran, folder = train()
    assert ran.out == ""
    assert "tiny-llama: llama," in ran.err
    assert "all frozen; float32 on cpu" in ran.err
    assert "24 of 24 rows used" in ran.err
    assert "as the model sees it (⟦counted⟧): [soft prompt]<s>⟦" in ran.err
    assert "6 steps, start data, learning rate" in ran.err
    assert f"kept step 6 of 6, saved to {folder}" in ran.err
    run_folder = RunFolder(folder)
    names = {item.name for item in folder.iterdir()}
    assert names == {
        "adapter_config.json", "adapter_model.safetensors", "softprompt.json", "README.md", "run.json",
        "metrics.jsonl", "checkpoints",
    }  # fmt: skip
    assert [checkpoint.step for checkpoint in run_folder.checkpoints()] == [3, 6]
    metrics = run_folder.read_metrics()
    assert [line["step"] for line in metrics if line["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    plan = run_folder.read_plan()
    assert plan["result"]["kept_step"] == 6
    assert plan["data"]["rows"] == 24
    assert plan["test"]["indices"] == list(range(24, 40))
    loaded = load_prompt(folder)
    assert loaded.tensor.shape == (3, 16)
    assert torch.equal(loaded.tensor, load_prompt(folder / "checkpoints" / "step-6").tensor)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), str(folder))
    assert torch.equal(peft.get_prompt_embedding_to_save("default").float(), loaded.tensor)


def test_the_trainable_line_is_pefts(train, base_folder, capsys):
    ran, _ = train("--virtual-tokens", 4, "--max-steps", 1)
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).print_trainable_parameters()
    assert capsys.readouterr().out.strip() in ran.err


def test_the_same_command_twice_gives_the_same_bits(train):
    _, first = train("--shuffle", out="first")
    _, second = train("--shuffle", out="second")
    _, other = train("--shuffle", "--seed", 1, out="other")
    bits = [(folder / "adapter_model.safetensors").read_bytes() for folder in (first, second, other)]
    assert bits[0] == bits[1]
    assert bits[0] != bits[2]


def test_json_is_all_there_is_on_stdout(train):
    ran, folder = train("--json", "--validation", "6")
    assert ran.json["content_hash"] == load_prompt(folder).content_hash
    assert ran.json["steps"] == len(ran.json["losses"]) == 6
    assert [step for step, _ in ran.json["validation_losses"]] == [3, 6]
    assert ran.json["interrupted"] is False


class TestForms:
    def test_template_and_completion(self, base_folder, reviews, tmp_path):
        out = tmp_path / "critic"
        ran = succeed("train", "--base", base_folder, *QUICK, "--data", reviews, *TEMPLATE, "--out", out)
        assert "w6⟦ w90 </s>⟧" in ran.err
        form = load_prompt(out).record.form
        assert (form.kind, form.template, form.labels) == ("template", "w5 {text} w6", (" w90", " w91"))

    def test_chat(self, base_folder, chats, tmp_path):
        out = tmp_path / "chat"
        succeed("train", "--base", base_folder, *QUICK, "--data", chats, "--messages-column", "messages", "--out", out)
        assert load_prompt(out).record.form.kind == "chat"

    def test_the_only_text_column_needs_no_name(self, base_folder, tmp_path):
        data = write_csv(tmp_path / "one.csv", [{"said": sentence(i)} for i in range(4)])
        succeed("train", "--base", base_folder, *QUICK, "--data", data, "--out", tmp_path / "out")


class TestPreset:
    def test_the_notebook_to_the_letter(self, base_folder, texts, tmp_path):
        out = tmp_path / "notebook"
        fixed = ("train", "--base", base_folder, "--data", texts, "--text-column", "prompt", "--rows", 24, "--out", out)
        ran = succeed(*fixed, "--preset", "notebook")
        config = config_of(out)
        assert {key: config[key] for key in NOTEBOOK_PRESET} == dict(NOTEBOOK_PRESET)
        assert (config["virtual_tokens"], config["epochs"], config["batch_rows"]) == (4, 6, 8)
        assert (config["learning_rate"], config["relative_learning_rate"]) == (3e-3, None)
        assert (config["init"], config["eos"], config["max_grad_norm"]) == ("peft", False, 1.0)
        assert (config["weight_decay"], config["warmup_steps"], config["schedule"]) == (0.0, 0, "linear")
        assert RunFolder(out).read_plan()["plan"]["dtype"] == "float32"
        assert "18 steps, start peft, learning rate 0.003" in ran.err
        assert "</s>" not in ran.err
        rates = [line["learning_rate"] for line in RunFolder(out).read_metrics() if line["kind"] == "step"]
        assert rates == pytest.approx([3e-3 * (1 - step / 18) for step in range(18)])

    def test_flags_override_it(self, train):
        _, folder = train("--preset", "notebook", "--eos", "--relative-learning-rate", 0.5, "--dtype", "bfloat16")
        config = config_of(folder)
        assert (config["virtual_tokens"], config["epochs"], config["eos"]) == (3, 2, True)
        assert (config["learning_rate"], config["relative_learning_rate"]) == (None, 0.5)
        assert config["init"] == "peft"
        assert RunFolder(folder).read_plan()["plan"]["dtype"] == "bfloat16"

    def test_a_flag_that_says_the_default_counts_as_given(self, train):
        _, folder = train("--preset", "notebook", "--init", "data")
        assert config_of(folder)["init"] == "data"


class TestHeldOut:
    def test_validation_by_share_chooses_the_checkpoint(self, train):
        ran, folder = train("--validation", "0.25", "--validate-every", 1, "--keep-checkpoints", 9, "--json")
        losses = dict(ran.json["validation_losses"])
        assert ran.json["kept_step"] == min(losses, key=losses.__getitem__)
        assert torch.equal(
            load_prompt(folder).tensor, load_prompt(folder / "checkpoints" / f"step-{ran.json['kept_step']}").tensor
        )
        assert "18 of 18 rows used" in ran.err
        assert "6 of 6 rows used" in ran.err

    def test_validation_and_test_by_file(self, train, tmp_path):
        valid = write_csv(tmp_path / "valid.csv", [{"prompt": sentence(i)} for i in range(60, 64)])
        test = write_csv(tmp_path / "test.csv", [{"prompt": sentence(i)} for i in range(70, 75)])
        ran, folder = train("--validation", valid, "--test", test)
        assert "4 of 4 rows used" in ran.err
        assert RunFolder(folder).read_plan()["test"]["source"] == str(test)

    def test_without_validation_it_says_so(self, train):
        ran, _ = train()
        assert "note: no validation rows: the last step is kept" in ran.err

    def test_patience_stops_early(self, train):
        flags = ("--validation", "6", "--validate-every", 1, "--patience", 1, "--epochs", 30)
        ran, _ = train(*flags, "--relative-learning-rate", 30, "--json")
        assert ran.json["steps"] < 90


class TestStarts:
    @pytest.mark.parametrize("init", ["data", "vocab", "random", "peft"])
    def test_of_each_kind(self, train, init):
        ran, folder = train("--init", init, "--max-steps", 1)
        assert config_of(folder)["init"] == init
        assert f"start {init}," in ran.err

    def test_text_says_that_it_is_repeated(self, train):
        ran, _ = train("--init", "text", "--init-text", "w7 w8", "--max-steps", 1)
        assert "note: init text has 2 tokens; repeated to fill 3 virtual tokens" in ran.err

    def test_labels(self, base_folder, reviews, tmp_path):
        flags = (*QUICK, "--data", reviews, *TEMPLATE, "--init", "labels", "--max-steps", 1)
        succeed("train", "--base", base_folder, *flags, "--out", tmp_path / "out")

    def test_further_training_by_folder_and_by_name(self, train, library):
        parent = load_prompt(library / "coach")
        ran, folder = train("--init-from", library / "coach", "--max-steps", 1)
        assert f"start prompt {library / 'coach'}, " in ran.err
        assert load_prompt(folder).record.parent == parent.content_hash
        _, named = train("--init-from", "coach", "--library", library, "--max-steps", 1, out="named")
        assert torch.equal(load_prompt(named).tensor, load_prompt(folder).tensor)
        step = (load_prompt(folder).tensor - parent.tensor).abs().max()
        assert 0 < step < 2 * RunFolder(folder).read_plan()["plan"]["learning_rate"]


class TestOverwriting:
    def test_replaces_all_of_the_earlier_run(self, train):
        _, folder = train("--epochs", 4, "--tensorboard")
        assert list((folder / "tensorboard").glob("events.out.*"))
        (folder / "notes.txt").write_text("mine")
        train("--overwrite")
        assert not (folder / "tensorboard").exists()
        assert [checkpoint.step for checkpoint in RunFolder(folder).checkpoints()] == [3, 6]
        assert len(RunFolder(folder).read_metrics()) == 8
        assert (folder / "notes.txt").read_text() == "mine"

    def test_a_failed_start_leaves_the_earlier_run_as_it_was(self, train, texts, base_folder):
        _, folder = train()
        before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        fixed = ("train", "--base", base_folder, "--data", texts, "--out", folder, "--overwrite")
        assert run(*fixed, "--text-column", "prompts").complaint
        assert run(*fixed, "--text-column", "prompt", "--virtual-tokens", 96).complaint
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_tensorboard_shows_the_losses(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, folder = train("--tensorboard", "--validation", "6")
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    shown = [event.value for event in board.Scalars("loss/train")]
    assert shown == pytest.approx(RunFolder(folder).read_plan()["result"]["losses"])
    assert [event.step for event in board.Scalars("loss/validation")] == [3, 6]


def test_dtype_auto_and_a_family_without_a_length_limit(tmp_path: Path, texts: Path) -> None:
    base = save_base(tmp_path / "bloom", "bloom")
    quick = ("--virtual-tokens", 3, "--max-steps", 1, "--rows", 8, "--max-length", 12)
    ran = succeed(
        "train", "--base", base, "--data", texts, "--text-column", "prompt", *quick, "--out", tmp_path / "out"
    )
    assert "12 positions" in ran.err
    assert "cut at the length limit, without EOS:" in ran.err
    assert json.loads((tmp_path / "out" / "run.json").read_text())["plan"]["dtype"] in ("bfloat16", "float32")


def test_a_data_set_with_rows_to_skip(base_folder, tmp_path):
    rows = [review(0), {"text": "", "label": "w90"}, {"text": "w5", "label": " "}, review(1)]
    data = write_jsonl(tmp_path / "gaps.jsonl", rows)
    ran = succeed("train", "--base", base_folder, *QUICK, "--data", data, *TEMPLATE, "--out", tmp_path / "out")
    assert "skipped, nothing to learn: 2 rows (row 2, 3)" in ran.err


def test_what_was_guessed_and_what_is_not_used_is_said_before_the_training_and_kept_with_the_run(base_folder, tmp_path):
    rows = [{**review(i), "author": "x"} for i in range(8)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    ran = succeed("train", "--base", base_folder, "--data", data, "--out", tmp_path / "run", "--max-steps", 1, *QUICK)
    notes = [line for line in ran.err.splitlines() if line.startswith(f"note: {data}: ")]
    assert "labels in column 'label' (2: 'w90', 'w91')" in notes[0]
    assert notes[1] == f"note: {data}: columns not used: 'author'"
    assert "no rows are kept for validation: 8 are too few" in notes[2]
    assert ran.err.index(notes[0]) < ran.err.index("\nloss ")
    kept = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [f"note: {note}" for note in kept["notes"]][:3] == notes


def test_the_task_and_what_follows_from_it_are_said_and_kept(base_folder, reviews, tmp_path):
    flags = ("--base", base_folder, "--data", reviews, *TEMPLATE, "--rows", 12, "--virtual-tokens", 3, "--epochs", 1)
    ran = succeed("train", *flags, "--out", tmp_path / "run")
    labels = TASK_DEFAULTS["labels"]
    rate = labels["relative_learning_rate"]
    said = f"task: labels (2 of them in 12 rows): loss among the labels, rate {rate:g} x RMS, plain vectors, "
    assert f"{said}the mean over the last 50% of the steps" in ran.err.splitlines()
    assert "(nats per label)" in ran.err
    assert "note: no validation rows: the mean over the last steps is kept" in ran.err
    plan = json.loads((tmp_path / "run" / "run.json").read_text())["plan"]
    assert plan["task"] == "labels"
    assert {name: plan["config"][name] for name in labels} == {**labels, "epochs": 1}
    card = (tmp_path / "run" / "README.md").read_text()
    assert "- task: labels\n- loss: labels\n" in card
    assert f"- relative learning rate: {rate:g}\n" in card
    assert "- averaging: 0.5\n" in card
    shown = succeed("runs", "show", tmp_path / "run").out
    assert re.search(r"task +.? *labels", shown) and "epochs" in shown and "relative" not in shown


def test_labels_that_are_not_there_cannot_be_chosen_among(base_folder, texts, untouched):
    flags = ("--base", base_folder, "--data", texts, "--text-column", "prompt", "--loss", "labels")
    ran = run("train", *flags, "--out", untouched)
    assert ran.code == 2
    assert re.search(r"loss is 'labels', but .* has no labels .*; use loss 'tokens'", ran.complaint)
