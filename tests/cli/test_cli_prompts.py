"""softprompt generate and softprompt prompts."""

from __future__ import annotations

import shutil

import pytest
import torch
from command_line import run, succeed
from hub_double import TOKEN, hub_double
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from softprompt.storage import Library, load_prompt


@pytest.fixture
def generate(base_folder):
    def call(*flags):
        return succeed("generate", "--base", base_folder, "--dtype", "float32", "--max-new-tokens", 8, *flags)

    return call


@pytest.fixture
def own_library(library, tmp_path):
    return shutil.copytree(library, tmp_path / "library")


class TestGenerate:
    def test_several_texts_in_order(self, generate, library):
        prompt = ("--prompt", library / "coach")
        both = generate("w5 w6", "w7", *prompt).out
        assert both == generate("w5 w6", *prompt).out + generate("w7", *prompt).out

    def test_json(self, generate):
        (answer,) = generate("w5 w6", "--min-new-tokens", 8, "--json").json
        assert set(answer) == {"text", "finish_reason", "ids", "log_probs"}
        assert len(answer["ids"]) == len(answer["log_probs"]) == 8
        assert answer["finish_reason"] == "length"
        assert answer["text"].split() == [f"w{token}" for token in answer["ids"]]

    def test_by_name_and_by_field(self, generate, library):
        field = generate("--prompt", "critic", "--library", library, "--field", "text=w7 w40").out
        assert field == generate("--prompt", library / "critic", "w5 w7 w40 w6").out

    def test_sampling_has_a_seed(self, generate):
        sample = ("w5 w6", "--temperature", 1.5, "--top-p", 0.95, "--top-k", 50, "--min-p", 0.001)
        first, again, other = (generate(*sample, "--seed", seed).out for seed in (0, 0, 1))
        assert first == again
        assert first != other

    def test_stop_and_min_new_tokens(self, generate):
        long = ("w5 w6", "--min-new-tokens", 8)
        words = generate(*long).out.split()
        assert len(words) == 8
        assert generate(*long, "--stop", words[2]).out.split() == words[: words.index(words[2])]
        assert len(generate("w5 w6").out.split()) < 8

    def test_the_prompt_matters(self, generate, library):
        answers = {
            generate("w5 w6", *flags).out for flags in ((), *(("--prompt", library / n) for n in ("coach", "critic")))
        }
        assert len(answers) == 3


class TestLibrary:
    def test_list(self, library):
        table = succeed("prompts", "list", "--library", library).out
        assert "2 prompts" in table
        assert "tiny-llama" in table
        entries = succeed("prompts", "list", "--library", library, "--json").json
        assert [(entry["name"], entry["problem"], entry["base_name"]) for entry in entries] == [
            ("coach", None, "tiny-llama"), ("critic", None, "tiny-llama"),
        ]  # fmt: skip

    def test_show(self, library, base_folder):
        plain = succeed("prompts", "show", "coach", "--library", library).out
        assert "texts.csv" in plain
        assert "(give --base)" in plain
        shown = succeed("prompts", "show", library / "critic", "--base", base_folder).out
        assert "'w5 {text} w6'" in shown
        facts = succeed("prompts", "show", library / "critic", "--base", base_folder, "--json").json
        assert facts["shape"] == [3, 16]
        assert [len(item["tokens"]) for item in facts["nearest"]] == [5, 5, 5]
        assert facts["norms"] == pytest.approx(load_prompt(library / "critic").tensor.norm(dim=1).tolist())
        assert facts["record"]["base_name"] == "tiny-llama"

    def test_check_says_what_is_wrong_and_exits_1(self, own_library, base_folder, other_base_folder):
        succeed("prompts", "check", "--library", own_library, "--base", base_folder)
        (own_library / "coach" / "adapter_config.json").write_text("{")
        ran = run("prompts", "check", "--library", own_library, "--json")
        assert ran.code == 1
        assert [verdict["problem"] is None for verdict in ran.json] == [False, True]
        ran = run("prompts", "check", "--library", own_library, "--base", other_base_folder)
        assert ran.code == 1
        assert "other-llama" in ran.out

    def test_import_of_pefts_own_folder_and_export(self, own_library, base_folder, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(base_folder)
        tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
        tuned.save_pretrained(tmp_path / "theirs")
        flags = ("--library", own_library, "--base", base_folder)
        ran = succeed("prompts", "import", tmp_path / "theirs", "peft-one", *flags)
        assert "warning:" in ran.err
        assert f"imported to {own_library / 'peft-one'}" in ran.err
        succeed("prompts", "export", "peft-one", tmp_path / "out", "--library", own_library)
        theirs = tuned.get_prompt_embedding_to_save("default")
        assert torch.equal(load_prompt(tmp_path / "out").tensor, theirs)
        assert run("prompts", "export", "peft-one", tmp_path / "out", "--library", own_library).complaint
        succeed("prompts", "export", "peft-one", tmp_path / "out", "--library", own_library, "--overwrite")

    def test_weights_without_a_config_are_named_by_flags(self, own_library, library, tmp_path):
        (tmp_path / "bare").mkdir()
        shutil.copy(library / "coach" / "adapter_model.safetensors", tmp_path / "bare")
        flags = ("prompts", "import", tmp_path / "bare", "bare", "--library", own_library)
        assert "task_type" in run(*flags).complaint
        succeed(*flags, "--task-type", "CAUSAL_LM", "--base-name", "tiny-llama")
        assert Library(own_library).load("bare").record.base_name == "tiny-llama"

    def test_remove(self, own_library):
        succeed("prompts", "remove", "coach", "--library", own_library)
        assert Library(own_library).names() == ("critic",)

    @pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
    def test_push_and_pull(self, own_library, tmp_path, monkeypatch):
        with hub_double(tmp_path, monkeypatch) as hub:
            monkeypatch.setenv("HF_TOKEN", TOKEN)
            ran = succeed("prompts", "push", "coach", "me/coach", "--library", own_library, "--private")
            assert "pushed: http://127.0.0.1" in ran.err
            assert "%|" not in ran.err
            assert hub.private == {"me/coach"}
            succeed("prompts", "pull", "me/coach", "again", "--library", own_library)
            names = Library(own_library)
            assert names.load("again").content_hash == names.load("coach").content_hash
            assert "again" in run("prompts", "pull", "me/coach", "again", "--library", own_library).complaint
            assert "me/nothing" in run("prompts", "pull", "me/nothing", "new", "--library", own_library).complaint
            monkeypatch.setenv("HF_TOKEN", "hf_wrong")
            assert run("prompts", "push", "coach", "me/other", "--library", own_library).complaint


@pytest.mark.parametrize("name", ["../coach", "a/../../coach", "/etc", ".hidden", "", "a" * 65, "co ach", "coach\n"])
@pytest.mark.parametrize("verb", ["remove", "export", "import", "pull"])
def test_no_name_leads_out_of_the_library(own_library, tmp_path, verb, name):
    arguments = {
        "remove": (name,),
        "export": (name, tmp_path / "out"),
        "import": (own_library / "coach", name),
        "pull": ("me/coach", name),
    }[verb]
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert "is not a prompt's name" in run("prompts", verb, *arguments, "--library", own_library).complaint
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_unknown_names_come_with_the_nearest(library):
    complaint = run("prompts", "show", "couch", "--library", library).complaint
    assert complaint == f"no prompt 'couch' in the library {library}; did you mean 'coach'?"
    assert "no library at" in run("prompts", "list", "--library", library / "nowhere").complaint
