"""Bad input of every kind: exit code 2, one line that names it, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from support.command_line import run, succeed
from support.encoders import save_encoder
from support.material import QUICK, chat, save_base, sentence, write_csv, write_jsonl


@pytest.fixture
def train(base_folder, texts, untouched):
    """A training that is refused; the flags given replace those of one that would go well."""

    def call(**changes):
        flags = {"base": base_folder, "data": texts, "text_column": "prompt", "out": untouched, **changes}
        given = {name: value for name, value in flags.items() if value is not None}
        typed = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
        return run("train", "--max-steps", 1, *typed).complaint

    return call


def test_a_file_that_ends_too_early_is_not_reported_as_an_interruption(tmp_path, monkeypatch):
    """click takes an EOFError for Ctrl-D, and 130 was the exit code."""

    def end(self):
        raise EOFError("Ran out of input")

    monkeypatch.setattr("softprompt.storage.Library.list", end)
    ran = run("prompts", "list", "--library", tmp_path)
    assert ran.complaint == "a file or the input ended too early (Ran out of input)"


def test_an_interruption_exits_with_130(tmp_path, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("softprompt.storage.Library.list", stop)
    ran = run("prompts", "list", "--library", tmp_path)
    assert (ran.code, ran.err.strip()) == (130, "softprompt: interrupted")


class TestBase:
    def test_a_missing_base_folder_is_named(self, train, tmp_path):
        missing = tmp_path / "nowhere"
        assert f"there is no such folder or GGUF file (looked at {missing})" in train(base=missing)

    def test_a_base_folder_without_a_model_is_refused(self, train, tmp_path):
        (tmp_path / "empty").mkdir()
        assert "cannot be loaded" in train(base=tmp_path / "empty")

    def test_an_encoder_decoder_of_speech_is_refused(self, train, tmp_path):
        hf.WhisperConfig().save_pretrained(tmp_path / "speech")
        save_file({"a": torch.zeros(1)}, tmp_path / "speech" / "model.safetensors", metadata={"format": "pt"})
        assert "(whisper) that is no language model of text to text; give one such as" in train(
            base=tmp_path / "speech"
        )

    def test_an_encoder_that_cannot_be_exact_is_refused(self, tmp_path):
        folder, rows = save_encoder("bert", tmp_path / "bert"), tmp_path / "rows.jsonl"
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "attention_type": "block_sparse"}))
        write_jsonl(rows, [{"text": f"w{20 + i}", "label": "ab"[i % 2]} for i in range(8)])
        ran = run("train", "--base", folder, "--data", rows, "--out", tmp_path / "out", "--max-steps", 1)
        assert "cannot take a soft prompt: its long rows leave keys out by chance; set its attention" in ran.complaint
        assert not (tmp_path / "out").exists()

    def test_a_base_with_a_broken_config_is_refused(self, train, tmp_path):
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "config.json").write_text("{")
        assert "cannot be loaded" in train(base=tmp_path / "broken")

    def test_a_base_with_broken_weights_is_refused(self, train, tmp_path):
        folder = save_base(tmp_path / "base")
        (folder / "model.safetensors").write_bytes(b"not weights")
        assert "cannot be loaded" in train(base=folder)
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        assert "cannot be loaded" in train(base=folder)

    def test_a_base_without_a_tokenizer_is_refused(self, train, tmp_path):
        folder = save_base(tmp_path / "base")
        for file in folder.glob("*token*"):
            file.unlink()
        assert "cannot be loaded" in train(base=folder)

    def test_a_hub_id_outside_the_cache_is_refused_offline(self, train):
        assert "nobody/nothing" in train(base="nobody/nothing")

    @pytest.mark.parametrize(("flag", "value"), [("device", "abacus"), ("device", "cuda:99"), ("device", "meta")])
    def test_a_device_that_is_not_there_is_refused(self, train, flag, value):
        assert value.partition(":")[0] in train(**{flag: value})

    def test_a_dtype_that_the_device_cannot_compute_and_an_unknown_one_are_refused(self, train):
        assert "float16 on a CPU" in train(dtype="float16", device="cpu")
        assert (
            "dtype is 'float64'; did you mean 'float16'? it must be one of 'auto', 'float32', 'bfloat16', 'float16'"
            in train(dtype="float64")
        )

    @pytest.mark.parametrize("length", [1, 97, 0, -1])
    def test_a_max_length_out_of_range_is_refused(self, train, length):
        assert f"max_length is {length}" in train(max_length=length)


class TestData:
    def test_an_unknown_column_is_refused_with_the_nearest_one(self, train, texts):
        assert f"{texts} has no column 'promt'; did you mean 'prompt'?" in train(text_column="promt")

    def test_a_missing_data_file_is_named(self, train, tmp_path):
        assert "there is no data at" in train(data=tmp_path / "none.csv")

    def test_a_hub_data_set_that_cannot_be_loaded_is_named(self, train):
        assert "nobody/nothing" in train(data="nobody/nothing")

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("empty.csv", b"", "is an empty file"),
            ("header.csv", b"prompt\n", "has no rows"),
            ("blank.csv", b'prompt\n" "\n""\n', "all 2 rows are empty"),
            ("latin.csv", "prompt\nCafé\n".encode("latin-1"), "is not UTF-8: byte 0xe9 in line 2"),
            ("ragged.csv", b"prompt,b\nx,y,z\n", "line 2: 3 cells where the first line names 2 columns"),
            ("broken.jsonl", b'{"prompt": "w5"}\n{"prompt": \n', "line 2 is not JSON"),
            ("list.jsonl", b"[1, 2]\n", "is a int; give objects"),
            ("number.jsonl", b'{"prompt": "w5"}\n{"prompt": 3.5}\n', "row 2 of"),
            ("broken.parquet", b"PAR1 no", "cannot be read"),
            ("text.docx", b"x", "ending '.docx' is not known"),
        ],
    )
    def test_an_unreadable_data_file_is_refused_with_the_reason(self, train, tmp_path, name, content, said):
        (tmp_path / name).write_bytes(content)
        assert said in train(data=tmp_path / name)

    @pytest.mark.parametrize(
        ("template", "completion", "said"),
        [
            ("w5 {txt}", " {label}", "did you mean 'text'?"),
            ("w5 {text", " {label}", "single '{' at character 4"),
            ("w5 {text}", " w9", "has no {column} field"),
            ("w5 {text}", None, "needs a completion too"),
            (None, " {label}", "needs a template too"),
        ],
    )
    def test_a_template_that_does_not_fit_the_rows_is_refused(self, train, reviews, template, completion, said):
        assert said in train(data=reviews, text_column=None, template=template, completion=completion)

    def test_init_labels_needs_labelled_rows(self, train):
        assert "init 'labels' needs a set with labels" in train(init="labels")

    def test_two_forms_of_rows_exclude_each_other(self, train, reviews):
        assert "exclude each other" in train(data=reviews, text_column="text", messages_column="text")

    @pytest.mark.parametrize("messages", ["w5", [], [{"role": "user"}], [{"role": "assistant", "content": 3}], 7])
    def test_messages_that_are_not_a_chat_are_refused_with_their_file(self, train, tmp_path, messages):
        data = write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages}])
        assert str(data) in train(data=data, text_column=None, messages_column="messages")

    @pytest.mark.parametrize("rows", [0, -3])
    def test_fewer_rows_than_one_are_refused(self, train, rows):
        assert f"rows is {rows}; it must be at least 1" in train(rows=rows)

    @pytest.mark.parametrize("part", ["0", "1.5", "-1", "40", "none.csv"])
    @pytest.mark.parametrize("which", ["validation", "test"])
    def test_an_impossible_validation_or_test_part_is_refused(self, train, which, part):
        assert train(**{which: part})


class TestSettings:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("virtual_tokens", 0), ("epochs", 0), ("batch_rows", -1), ("max_steps", 0), ("batch_tokens", 0),
            ("micro_batch_rows", 0), ("relative_learning_rate", 0.0), ("learning_rate", "nan"),
            ("learning_rate", "inf"),
            ("warmup_steps", -1), ("weight_decay", -0.1), ("weight_decay", "nan"), ("max_grad_norm", 0.0),
            ("eos_weight", -1.0), ("validate_every", 0), ("patience", 0), ("seed", -1), ("seed", 2**63),
        ],
    )  # fmt: skip
    def test_a_setting_out_of_range_is_refused_by_its_name(self, train, name, value):
        assert train(**{name: value}).startswith(f"{name} is {value}; it must be")

    def test_two_learning_rates_exclude_each_other(self, train):
        said = train(learning_rate=0.003, relative_learning_rate=0.3)
        assert said == "learning_rate=0.003 and relative_learning_rate=0.3 exclude each other; give one"

    def test_contradictory_settings_of_the_start_are_refused(self, train, library):
        assert "needs init_text" in train(init="text")
        assert "init_text is given, but init is 'data'" in train(init_text="w5")
        assert "is trained further, from what it is; leave init and init_text out" in train(
            init_from=library / "coach", init="random"
        )
        said = train(init_from=library / "coach", virtual_tokens=9)
        assert f"virtual_tokens is 9, but {library / 'coach'} has 3" in said

    @pytest.mark.parametrize("count", [95, 96, 5000])
    def test_more_virtual_tokens_than_positions_are_refused(self, train, count):
        assert "no text fits" in train(virtual_tokens=count)

    def test_a_word_for_a_number_is_refused(self, train):
        assert train(rows="many") == "rows is 'many'; it must be a whole number"


class TestOut:
    @pytest.mark.parametrize("holds", ["a run", "a thesis"])
    def test_an_existing_folder_is_not_overwritten_without_the_flag(self, base_folder, texts, library, tmp_path, holds):
        """Said before the base is loaded, which may take minutes."""
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "thesis.txt").write_text("mine")
        out = library / "coach" if holds == "a run" else tmp_path / "thesis"
        fixed = ("train", "--base", base_folder, "--data", texts, "--text-column", "prompt", "--out", out)
        ran = run(*fixed)
        assert f"{out} exists; replace it on purpose (--overwrite)" in ran.complaint
        assert ran.err.count("\n") == 1
        if holds == "a thesis":
            assert "neither a run nor an adapter" in run(*fixed, "--overwrite").complaint
            assert (out / "thesis.txt").read_text() == "mine"

    def test_an_output_folder_below_a_file_is_refused(self, train, tmp_path):
        (tmp_path / "file").write_text("mine")
        assert "is a file" in train(out=tmp_path / "file")
        assert f"{tmp_path / 'file'} is not a folder" in train(out=tmp_path / "file" / "a" / "run")

    def test_a_full_disk_is_reported_and_leaves_no_adapter(self, base_folder, texts, tmp_path):
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "none", str(disk)]
        try:
            mounted = subprocess.run(mount, capture_output=True).returncode == 0
        except FileNotFoundError:
            mounted = False
        if not mounted:
            pytest.skip("a small disk can only be made by root")
        try:
            flags = ("--text-column", "prompt", "--out", disk / "run", *QUICK)
            said = run("train", "--base", base_folder, "--data", texts, *flags).complaint
            assert "no space left on the disk" in said
            assert not (disk / "run" / "adapter_config.json").exists()
        finally:
            subprocess.run(["umount", str(disk)], check=True)


class TestPrompts:
    """Prompts that must not be used, by `generate`; every command loads them alike."""

    @pytest.fixture
    def generate(self, base_folder):
        def call(*flags):
            return run("generate", "--base", base_folder, "--dtype", "float32", "w5 w6", *flags).complaint

        return call

    @pytest.fixture
    def spoiled(self, library, tmp_path):
        folder = shutil.copytree(library / "coach", tmp_path / "spoiled")
        (folder / "softprompt.json").unlink()
        return folder

    def test_a_prompt_of_another_base_is_refused_with_both_bases_and_runs_with_force(self, library, other_base_folder):
        fixed = ("generate", "--base", other_base_folder, "w5", "--prompt", library / "coach", "--max-new-tokens", 3)
        said = run(*fixed).complaint
        assert "was trained on 'tiny-llama' (fingerprint " in said
        assert "not on 'other-llama' (fingerprint " in said
        succeed(*fixed, "--force")

    def test_a_prompt_of_another_width_is_refused_with_both_shapes(self, generate, spoiled, tmp_path):
        save_file({"prompt_embeddings": torch.zeros(3, 8)}, spoiled / "adapter_model.safetensors")
        config = json.loads((spoiled / "adapter_config.json").read_text())
        (spoiled / "adapter_config.json").write_text(json.dumps({**config, "token_dim": 8}))
        said = generate("--prompt", spoiled)
        assert "[3, 8]" in said
        assert "[97, 16]" in said

    def test_a_prompt_with_nan_is_refused(self, generate, spoiled):
        save_file({"prompt_embeddings": torch.full((3, 16), float("nan"))}, spoiled / "adapter_model.safetensors")
        assert "48 of 48 are NaN or infinite" in generate("--prompt", spoiled)

    def test_a_lora_adapter_is_refused(self, generate, spoiled):
        config = json.loads((spoiled / "adapter_config.json").read_text())
        (spoiled / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA"}))
        assert "LORA" in generate("--prompt", spoiled)

    def test_a_pickled_adapter_is_refused_and_never_run(self, generate, spoiled, tmp_path):
        class Bomb:
            def __reduce__(self):
                return Path.touch, (tmp_path / "ran",)

        (spoiled / "adapter_model.safetensors").unlink()
        torch.save({"prompt_embeddings": Bomb()}, spoiled / "adapter_model.bin")
        assert "adapter_model.bin" in generate("--prompt", spoiled)
        assert not (tmp_path / "ran").exists()

    def test_a_prompt_whose_weights_were_changed_is_refused(self, generate, library, tmp_path):
        folder = shutil.copytree(library / "coach", tmp_path / "changed")
        save_file({"prompt_embeddings": torch.ones(3, 16)}, folder / "adapter_model.safetensors")
        assert "they were changed later" in generate("--prompt", folder)

    def test_a_prompt_that_cannot_be_found_is_refused_with_the_nearest_name(self, generate, library, tmp_path):
        assert "no folder" in generate("--prompt", tmp_path / "none")
        assert "did you mean 'coach'?" in generate("--prompt", "coahc", "--library", library)
        assert "is a name, and no library is given" in generate("--prompt", "coach")
        assert "is not a prompt's name" in generate("--prompt", "..", "--library", library)
        (tmp_path / "nothing").mkdir()
        assert "is not an adapter" in generate("--prompt", tmp_path / "nothing")


class TestInputs:
    @pytest.fixture
    def generate(self, base_folder):
        def call(*flags):
            return run("generate", "--base", base_folder, "--dtype", "float32", *flags).complaint

        return call

    def test_an_input_longer_than_the_positions_is_refused_with_the_sum(self, generate, library):
        said = generate(" ".join(["w5"] * 60), "--prompt", library / "coach")
        assert (
            "maximum context length is 96 tokens. However, you requested 114 tokens (61 in the text, 3 in the soft"
            in said
        )

    def test_no_input_and_two_kinds_of_input_are_refused(self, generate):
        assert "TEXTS, '--field' or '--message'" in generate()
        assert "texts and --field exclude each other" in generate("w5", "--field", "text=w5")

    def test_fields_that_do_not_fit_the_prompt_are_refused(self, generate, library):
        critic = ("--prompt", library / "critic")
        assert "'texts'" in generate(*critic, "--field", "texts=w5")
        assert "given twice" in generate(*critic, "--field", "text=w5", "--field", "text=w6")
        assert "trained on plain text" in generate("--prompt", library / "coach", "--field", "text=w5")
        assert "the bare base has no template" in generate("--field", "text=w5")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("max-new-tokens", 0), ("min-new-tokens", 51), ("temperature", -1), ("temperature", "nan"),
            ("temperature", "inf"), ("top-p", 0), ("top-p", 1.1), ("top-k", -1), ("min-p", 2),
            ("repetition-penalty", 0), ("repetition-penalty", "inf"), ("stop", ""), ("seed", -1), ("seed", 2**64),
        ],
    )  # fmt: skip
    def test_a_sampling_setting_out_of_range_is_refused_by_its_name(self, generate, name, value):
        assert generate("w5", f"--{name}", value).startswith(name.replace("-", "_"))

    def test_bytes_that_are_not_utf8_are_refused(self, generate):
        assert "b'\\xff' is not UTF-8" in generate("\udcff")

    def test_an_empty_text_on_a_base_without_bos_is_refused(self, tmp_path):
        base = save_base(tmp_path / "gpt2", "gpt2")
        assert "an empty text has no token" in run("generate", "--base", base, "").complaint


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("tran",), "no such command 'tran'; did you mean 'train'?"),
            (("train", "--bse", "x"), "--base"),
            (("prompts", "lst"), "list"),
            (("compare",), "Missing options '--base' and '--prompt' or '--ensemble'"),
            (("train", "--base"), "requires an argument"),
            (("prompts", "show"), "Missing argument 'PROMPT'"),
        ],
    )
    def test_a_usage_error_is_one_line_with_the_nearest_name(self, arguments, said):
        assert said in run(*arguments).complaint

    @pytest.mark.parametrize("arguments", [(), ("prompts",)])
    def test_a_command_without_arguments_shows_its_help(self, arguments):
        ran = run(*arguments)
        assert ran.code == 2
        assert "Commands:" in ran.err + ran.out


def test_a_validation_file_without_the_training_column_is_refused(base_folder, texts, tmp_path, untouched):
    valid = write_csv(tmp_path / "valid.csv", [{"said": sentence(1)}])
    flags = ("--data", texts, "--text-column", "prompt", "--validation", valid, "--out", untouched)
    assert f"{valid} has no column 'prompt'" in run("train", "--base", base_folder, *flags).complaint


class TestChat:
    """Templates come with a base, and rows with keys; see also tests/data/test_data_weights.py."""

    def train(self, train, base, tmp_path, *rows):
        data = write_jsonl(tmp_path / "chats.jsonl", list(rows))
        return train(base=base, data=data, text_column=None)

    def test_chat_templates_without_a_default_are_refused_by_their_names(self, train, tmp_path):
        folder, row = save_base(tmp_path / "base"), chat(0)
        tokenizer = hf.AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = {"rag": "x", "tool_use": "y"}
        tokenizer.save_pretrained(folder)
        assert "has chat templates named 'rag', 'tool_use' and none named 'default'" in self.train(
            train, folder, tmp_path, row
        )

    def test_an_endless_chat_template_is_refused(self, train, tmp_path):
        folder, row = save_base(tmp_path / "base"), chat(0)
        (folder / "chat_template.jinja").write_text(
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        )
        assert "row 1 of" in (told := self.train(train, folder, tmp_path, row)) and "does not end" in told

    def test_a_chat_without_a_weighted_assistant_turn_is_refused(self, train, base_folder, tmp_path):
        turns = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4", "weight": 0}]
        assert "there is nothing to learn from" in self.train(train, base_folder, tmp_path, {"messages": turns})
        assert "no assistant turn to learn from" in self.train(train, base_folder, tmp_path, {"messages": turns[:1]})


@pytest.mark.parametrize(
    ("schema", "why"),
    [('{"$ref": "#"}', "json_schema cannot be followed: no text satisfies it"),
     ('{"type": "number", "minimum": 1e999}', "json_schema cannot be followed: "),
     (json.dumps({"type": "object", "properties": {f"k{n}": {} for n in range(1100)}}), "max is 2000; make it")],
    ids=["a reference to itself", "infinity", "too many keys"],
)  # fmt: skip
def test_a_json_schema_that_cannot_be_compiled_is_refused(schema, why):
    flags = ("--base", "embedded", "--dtype", "float32", "--max-new-tokens", 5, "--json-schema", schema)
    assert why in run("generate", "Be kind", *flags).complaint
