"""softprompt generate and softprompt prompts."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from support.command_line import run, succeed
from support.hub_double import TOKEN, hub_double
from transformers import AutoModelForCausalLM

from softprompt.prompt import SoftPrompt, mean_embedding
from softprompt.prompt import similarity as prompt_similarity
from softprompt.storage import Library, load_prompt, save_prompt


@pytest.fixture
def generate(base_folder):
    def call(*flags):
        return succeed("generate", "--base", base_folder, "--dtype", "float32", "--max-new-tokens", 8, *flags)

    return call


@pytest.fixture
def own_library(library, tmp_path):
    return shutil.copytree(library, tmp_path / "library")


class TestGenerate:
    def test_generate_answers_several_texts_in_order(self, generate, library):
        prompt = ("--prompt", library / "coach")
        both = generate("w5 w6", "w7", *prompt).out
        assert both == generate("w5 w6", *prompt).out + generate("w7", *prompt).out

    def test_json(self, generate):
        (answer,) = generate("w5 w6", "--min-new-tokens", 8, "--json").json
        assert set(answer) == {"text", "finish_reason", "ids", "log_probs", "weights"}
        assert len(answer["ids"]) == len(answer["log_probs"]) == 8
        assert answer["finish_reason"] == "length"
        assert answer["text"].split() == [f"w{token}" for token in answer["ids"]]

    def test_a_prompt_is_given_by_name_and_a_text_by_field(self, generate, library):
        field = generate("--prompt", "critic", "--library", library, "--field", "text=w7 w40").out
        assert field == generate("--prompt", library / "critic", "w5 w7 w40 w6").out

    def test_the_same_seed_samples_the_same_answer(self, generate):
        sample = ("w5 w6", "--temperature", 1.5, "--top-p", 0.95, "--top-k", 50, "--min-p", 0.001)
        first, again, other = (generate(*sample, "--seed", seed).out for seed in (0, 0, 1))
        assert first == again
        assert first != other

    def test_an_answer_ends_at_a_stop_and_has_its_minimum_of_tokens(self, generate):
        assert len(generate("w5 w6", "--min-new-tokens", 8).out.split()) == 8
        long = ("w5 w6", "--ignore-eos")
        words = generate(*long).out.split()
        assert len(words) > 4
        assert generate(*long, "--stop", words[2]).out.split() == words[: words.index(words[2])]
        assert generate(*long, "--stop", words[2], "--min-new-tokens", 8).out.split() == words
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
    def test_a_prompt_is_pushed_and_pulled(self, own_library, tmp_path, monkeypatch):
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


class TestShow:
    @pytest.fixture
    def show(self, base_folder):
        def call(prompt, *flags, base=base_folder):
            return run("prompts", "show", prompt, "--base", base, "--dtype", "float32", *flags)

        return call

    @pytest.fixture
    def with_run(self, library, tmp_path):
        """`coach` with other facts of its run."""

        def save(**facts):
            prompt = load_prompt(library / "coach")
            record = replace(prompt.record, run={**prompt.record.run, **facts})
            return save_prompt(replace(prompt, record=record), tmp_path / "changed", overwrite=True)

        return save

    def test_norms_are_also_in_the_bases_own_measure(self, show, library, tiny_llama):
        facts = show(library / "coach", "--json").json
        usual = float(tiny_llama.embedding.weight.double().square().sum(dim=1).mean().sqrt())
        assert facts["relative_norms"] == pytest.approx([norm / usual for norm in facts["norms"]])
        assert "x embedding" in show(library / "coach").out
        assert "x embedding" not in succeed("prompts", "show", library / "coach").out
        assert succeed("prompts", "show", library / "coach", "--json").json["relative_norms"] == []

    def test_drift_of_the_record(self, with_run):
        tokens = [{"distance": 0.25 * i, "relative": 0.5 * i, "cosine": 1 - 0.1 * i} for i in range(3)]
        folder = with_run(drift=tokens)
        shown = succeed("prompts", "show", folder).out
        assert "moved by" in shown
        assert "0.500 (100.0%)" in shown
        assert "0.800" in shown
        assert succeed("prompts", "show", folder, "--json").json["drift"] == tokens

    @pytest.mark.parametrize("known", [None, [], "far", [{"distance": 1}] * 3, [{"distance": 1, "cosine": "1"}] * 3])
    def test_unknown_or_malformed_drift_is_not_shown(self, with_run, known):
        folder = with_run(drift=known)
        shown = succeed("prompts", "show", folder).out
        assert "moved" not in shown
        assert "cosine to start" not in shown
        assert succeed("prompts", "show", folder, "--json").json["drift"] == []

    def test_leave_out_reads_the_rows_that_training_set_aside(self, show, library, base_folder):
        ran = show(library / "coach", "--leave-out")
        assert "Held-out loss on texts.csv: 16 rows, " in ran.out
        assert "scoring 4 prompts on 16 rows of texts.csv" in ran.err
        found = show(library / "coach", "--leave-out", "--json").json["leave_out"]
        flags = ("--dtype", "float32", "--prompt", library / "coach", "--json")
        compared = succeed("compare", "--base", base_folder, *flags).json["losses"][1]
        assert found["loss"] == pytest.approx(compared["loss"], rel=1e-6)
        assert (found["held_out"], found["num_rows"]) == ("texts.csv", 16)
        assert found["num_tokens"] == compared["num_tokens"]
        assert [item["token"] for item in found["left_out"]] == [0, 1, 2]
        lines = [line.split() for line in ran.out.splitlines()]
        assert ["none", f"{found['loss']:.3f}"] in lines
        for item in found["left_out"]:
            interval = item["interval"]
            assert item["difference"] == pytest.approx(item["loss"] - found["loss"])
            assert [
                str(item["token"]), f"{item['loss']:.3f}", f"{item['difference']:+.3f}",
                f"{interval['low']:+.3f}", "to", f"{interval['high']:+.3f}",
            ] in lines  # fmt: skip

    def test_leave_out_rows_is_a_limit(self, show, library):
        found = show(library / "coach", "--leave-out", "--leave-out-rows", 5, "--json").json["leave_out"]
        assert found["num_rows"] == 5
        one = show(library / "coach", "--leave-out", "--leave-out-rows", 1, "--json").json["leave_out"]
        assert [item["interval"] for item in one["left_out"]] == [None] * 3

    def test_leave_out_on_another_set_in_the_prompts_own_template(self, show, library, reviews, texts):
        found = show(library / "critic", "--leave-out", "--data", reviews, "--json").json["leave_out"]
        assert (found["held_out"], found["num_rows"], found["num_tokens"]) == ("reviews.jsonl", 40, 40)
        flags = ("--data", texts, "--text-column", "prompt", "--rows", 7)
        found = show(library / "critic", "--leave-out", *flags, "--json").json["leave_out"]
        assert (found["held_out"], found["num_rows"]) == ("texts.csv", 7)
        assert found["num_tokens"] > 7

    def test_leave_out_without_rows_is_refused(self, show, with_run):
        folder = with_run(test=None)
        ran = show(folder, "--leave-out")
        assert ran.complaint == f"--leave-out has no rows: the record of {folder} leads to no held-out set; give --data"
        assert "has no record of held-out rows" in ran.err

    @pytest.mark.parametrize(
        ("flags", "sentence"),
        [
            (("--leave-out",), "--leave-out computes losses and needs the base; give --base"),
            (("--data", "x.csv"), "--data has no meaning without --leave-out; add --leave-out"),
            (("--leave-out-rows", 5), "--leave-out-rows has no meaning without --leave-out; add --leave-out"),
            (("--leave-out", "--base", "x", "--rows", 5), "--rows has no meaning without --data; add --data"),
            (("--leave-out-rows", 0), "leave_out_rows is 0; it must be at least 1"),
        ],
    )
    def test_flags_that_nothing_would_read_are_refused(self, library, flags, sentence):
        assert run("prompts", "show", library / "coach", *flags).complaint == sentence


class TestSimilarity:
    @pytest.fixture
    def similarity(self, own_library):
        return lambda *flags: run("prompts", "similarity", "--library", own_library, *flags)

    def test_few_prompts_are_a_matrix(self, own_library, similarity):
        shutil.copytree(own_library / "coach", own_library / "again")
        Library(own_library).add("wide", SoftPrompt(torch.ones(2, 24)))
        names = Library(own_library)
        found = prompt_similarity(names.load("coach"), names.load("critic"))
        ran = similarity()
        lines = [line.split() for line in ran.out.splitlines()]
        assert ["1", "again", "1.000", "1.000", f"{found:.3f}", "-"] in lines
        assert ["3", "critic", f"{found:.3f}", f"{found:.3f}", "1.000", "-"] in lines
        assert "Not comparable, being of different widths: 16: again, coach, critic; 24: wide" in ran.out
        assert "Identical (the same content hash): again, coach" in ran.out
        assert (ran.code, ran.err) == (0, "")

    def test_json(self, own_library, similarity):
        shutil.copytree(own_library / "coach", own_library / "again")
        Library(own_library).add("wide", SoftPrompt(torch.ones(2, 24)))
        names = Library(own_library)
        found = similarity("--json").json
        value = pytest.approx(prompt_similarity(names.load("coach"), names.load("critic")))
        assert found["pairs"] == [
            {"one": "again", "other": "coach", "similarity": 1.0, "is_identical": True},
            {"one": "again", "other": "critic", "similarity": value, "is_identical": False},
            {"one": "coach", "other": "critic", "similarity": value, "is_identical": False},
        ]
        assert found["not_comparable"] == [["again", "wide"], ["coach", "wide"], ["critic", "wide"]]
        assert found["prompts"]["wide"]["shape"] == [2, 24]
        assert found["centred_on"] is None

    def test_with_a_base_its_mean_embedding_is_subtracted(self, own_library, similarity, base_folder, tiny_llama):
        names = Library(own_library)
        flags = ("--base", base_folder, "--dtype", "float32")
        (pair,) = similarity(*flags, "--json").json["pairs"]
        prompts = names.load("coach"), names.load("critic")
        assert pair["similarity"] == pytest.approx(prompt_similarity(*prompts, mean_embedding(tiny_llama)), abs=1e-6)
        assert pair["similarity"] != pytest.approx(prompt_similarity(*prompts), abs=1e-4)
        assert "Cosines after subtracting the mean embedding of tiny-llama's vocabulary" in similarity(*flags).out

    def test_what_does_not_load_is_skipped_and_named(self, own_library, similarity, base_folder):
        (own_library / "odd").mkdir()
        names = Library(own_library)
        names.add("wide", SoftPrompt(torch.ones(2, 24)))
        ran = similarity("--base", base_folder, "--json")
        assert list(ran.json["prompts"]) == ["coach", "critic"]
        assert "skipped odd: " in ran.err
        assert "skipped wide: " in ran.err

    def test_names_restrict_the_comparison(self, own_library, similarity):
        shutil.copytree(own_library / "coach", own_library / "again")
        found = similarity("critic", "again", "--json").json
        assert list(found["prompts"]) == ["critic", "again"]
        assert "did you mean 'coach'" in similarity("critic", "couch").complaint
        (own_library / "again" / "adapter_config.json").write_text("{")
        assert similarity("critic", "again").complaint

    def test_many_prompts_are_a_list_of_the_most_similar_pairs(self, own_library, similarity):
        for seed in range(10):
            generator = torch.Generator().manual_seed(seed)
            Library(own_library).add(f"p{seed}", SoftPrompt(torch.randn(3, 16, generator=generator)))
        shown = similarity().out
        pairs = similarity("--json").json["pairs"]
        assert len(pairs) == 66
        assert "20 of 66 pairs" in shown
        rows = [line.replace("│", " ").split() for line in shown.splitlines() if "0." in line]
        assert rows == [[pair["one"], pair["other"], f"{pair['similarity']:.3f}"] for pair in pairs[:20]]

    def test_prompts_of_different_bases_are_a_note(self, own_library, similarity):
        prompt = Library(own_library).load("critic")
        record = replace(prompt.record, base_fingerprint="another")
        Library(own_library).add("foreign", replace(prompt, record=record))
        assert "note: these prompts were trained on 2 different bases" in similarity().err

    def test_a_single_prompt_is_refused(self, own_library, similarity):
        sentence = f"similarity needs two prompts of {own_library}, and has coach; import or name others"
        assert similarity("coach", "coach").complaint == sentence
        shutil.rmtree(own_library / "critic")
        assert similarity().complaint == sentence


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
