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
from support.material import QUICK, chat, save_base, sentence, write_csv, write_jsonl
from support.tiny_bases import build_tokenizer


@pytest.fixture
def train(base_folder, texts, untouched):
    """A training that is refused; the flags given replace those of one that would go well."""

    def call(**changes):
        flags = {"base": base_folder, "data": texts, "text_column": "prompt", "out": untouched, **changes}
        given = {name: value for name, value in flags.items() if value is not None}
        typed = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
        return run("train", "--max-steps", 1, *typed).complaint

    return call


def test_a_file_that_ends_too_early_is_no_interruption(tmp_path, monkeypatch):
    """click takes an EOFError for Ctrl-D, and 130 was the exit code."""

    def end(self):
        raise EOFError("Ran out of input")

    monkeypatch.setattr("softprompt.storage.Library.list", end)
    ran = run("prompts", "list", "--library", tmp_path)
    assert ran.complaint == "a file or the input ended too early (Ran out of input)"


def test_an_interruption_is_130(tmp_path, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("softprompt.storage.Library.list", stop)
    ran = run("prompts", "list", "--library", tmp_path)
    assert (ran.code, ran.err.strip()) == (130, "softprompt: interrupted")


class TestBase:
    def test_no_such_folder(self, train, tmp_path):
        assert f"there is no such folder (looked at {tmp_path / 'nowhere'})" in train(base=tmp_path / "nowhere")

    def test_no_model_in_it(self, train, tmp_path):
        (tmp_path / "empty").mkdir()
        assert "cannot be loaded" in train(base=tmp_path / "empty")

    def test_a_broken_config(self, train, tmp_path):
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "config.json").write_text("{")
        assert "cannot be loaded" in train(base=tmp_path / "broken")

    def test_broken_weights(self, train, tmp_path):
        folder = save_base(tmp_path / "base")
        (folder / "model.safetensors").write_bytes(b"not weights")
        assert "cannot be loaded" in train(base=folder)
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        assert "cannot be loaded" in train(base=folder)

    def test_no_tokenizer(self, train, tmp_path):
        folder = save_base(tmp_path / "base")
        for file in folder.glob("*token*"):
            file.unlink()
        assert "cannot be loaded" in train(base=folder)

    def test_an_encoder_decoder(self, train, tmp_path):
        config = hf.T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8, vocab_size=97)
        hf.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
        build_tokenizer().save_pretrained(tmp_path / "t5")
        assert "is an encoder-decoder model (t5)" in train(base=tmp_path / "t5")

    def test_bert(self, train, tmp_path):
        config = hf.BertConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=97
        )
        hf.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
        build_tokenizer().save_pretrained(tmp_path / "bert")
        assert "is a BERT-like model (BertForMaskedLM)" in train(base=tmp_path / "bert")

    def test_a_hub_id_that_is_not_in_the_cache(self, train):
        assert "nobody/nothing" in train(base="nobody/nothing")

    @pytest.mark.parametrize(("flag", "value"), [("device", "abacus"), ("device", "cuda:99"), ("device", "meta")])
    def test_device(self, train, flag, value):
        assert value.partition(":")[0] in train(**{flag: value})

    def test_dtype(self, train):
        assert "float16 on a CPU" in train(dtype="float16", device="cpu")
        assert (
            "dtype is 'float64'; did you mean 'float16'? it must be one of 'auto', 'float32', 'bfloat16', 'float16'"
            in train(dtype="float64")
        )

    @pytest.mark.parametrize("length", [1, 97, 0, -1])
    def test_max_length(self, train, length):
        assert f"max_length is {length}" in train(max_length=length)


class TestData:
    def test_wrong_column_and_the_nearest(self, train, texts):
        assert f"{texts} has no column 'promt'; did you mean 'prompt'?" in train(text_column="promt")

    def test_no_such_file(self, train, tmp_path):
        assert "there is no data at" in train(data=tmp_path / "none.csv")

    def test_a_hub_set_that_cannot_be_had(self, train):
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
    def test_files(self, train, tmp_path, name, content, said):
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
    def test_templates(self, train, reviews, template, completion, said):
        assert said in train(data=reviews, text_column=None, template=template, completion=completion)

    def test_labels_where_there_are_none(self, train):
        assert "init 'labels' needs a set with labels" in train(init="labels")

    def test_two_forms_at_once(self, train, reviews):
        assert "exclude each other" in train(data=reviews, text_column="text", messages_column="text")

    @pytest.mark.parametrize("messages", ["w5", [], [{"role": "user"}], [{"role": "assistant", "content": 3}], 7])
    def test_messages_that_are_no_chat(self, train, tmp_path, messages):
        data = write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages}])
        assert str(data) in train(data=data, text_column=None, messages_column="messages")

    @pytest.mark.parametrize("rows", [0, -3])
    def test_rows(self, train, rows):
        assert f"rows is {rows}; it must be at least 1" in train(rows=rows)

    @pytest.mark.parametrize("part", ["0", "1.5", "-1", "40", "none.csv"])
    @pytest.mark.parametrize("which", ["validation", "test"])
    def test_held_out_parts(self, train, which, part):
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
    def test_out_of_range(self, train, name, value):
        assert train(**{name: value}).startswith(f"{name} is {value}; it must be")

    def test_both_learning_rates(self, train):
        said = train(learning_rate=0.003, relative_learning_rate=0.3)
        assert said == "learning_rate=0.003 and relative_learning_rate=0.3 exclude each other; give one"

    def test_a_start_that_contradicts(self, train, library):
        assert "needs init_text" in train(init="text")
        assert "init_text is given, but init is 'data'" in train(init_text="w5")
        assert "is trained further, from what it is; leave init and init_text out" in train(
            init_from=library / "coach", init="random"
        )
        said = train(init_from=library / "coach", virtual_tokens=9)
        assert f"virtual_tokens is 9, but {library / 'coach'} has 3" in said

    @pytest.mark.parametrize("count", [95, 96, 5000])
    def test_more_virtual_tokens_than_positions(self, train, count):
        assert "no room for text" in train(virtual_tokens=count)

    def test_a_word_for_a_number_is_refused(self, train):
        assert train(rows="many") == "rows is 'many'; it must be a whole number"


class TestOut:
    @pytest.mark.parametrize("holds", ["a run", "a thesis"])
    def test_existing(self, base_folder, texts, library, tmp_path, holds):
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

    def test_under_a_file(self, train, tmp_path):
        (tmp_path / "file").write_text("mine")
        assert "is a file" in train(out=tmp_path / "file")
        assert f"{tmp_path / 'file'} is not a folder" in train(out=tmp_path / "file" / "a" / "run")

    def test_no_space(self, base_folder, texts, tmp_path):
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

    def test_of_another_base_names_both(self, library, other_base_folder):
        fixed = ("generate", "--base", other_base_folder, "w5", "--prompt", library / "coach", "--max-new-tokens", 3)
        said = run(*fixed).complaint
        assert "was trained on 'tiny-llama' (fingerprint " in said
        assert "not on 'other-llama' (fingerprint " in said
        succeed(*fixed, "--force")

    def test_of_another_width(self, generate, spoiled, tmp_path):
        save_file({"prompt_embeddings": torch.zeros(3, 8)}, spoiled / "adapter_model.safetensors")
        config = json.loads((spoiled / "adapter_config.json").read_text())
        (spoiled / "adapter_config.json").write_text(json.dumps({**config, "token_dim": 8}))
        said = generate("--prompt", spoiled)
        assert "[3, 8]" in said
        assert "[97, 16]" in said

    def test_nan(self, generate, spoiled):
        save_file({"prompt_embeddings": torch.full((3, 16), float("nan"))}, spoiled / "adapter_model.safetensors")
        assert "48 of 48 are NaN or infinite" in generate("--prompt", spoiled)

    def test_lora(self, generate, spoiled):
        config = json.loads((spoiled / "adapter_config.json").read_text())
        (spoiled / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA"}))
        assert "LORA" in generate("--prompt", spoiled)

    def test_a_pickle_that_would_run_code(self, generate, spoiled, tmp_path):
        class Bomb:
            def __reduce__(self):
                return Path.touch, (tmp_path / "ran",)

        (spoiled / "adapter_model.safetensors").unlink()
        torch.save({"prompt_embeddings": Bomb()}, spoiled / "adapter_model.bin")
        assert "adapter_model.bin" in generate("--prompt", spoiled)
        assert not (tmp_path / "ran").exists()

    def test_changed_weights(self, generate, library, tmp_path):
        folder = shutil.copytree(library / "coach", tmp_path / "changed")
        save_file({"prompt_embeddings": torch.ones(3, 16)}, folder / "adapter_model.safetensors")
        assert "they were changed later" in generate("--prompt", folder)

    def test_not_there(self, generate, library, tmp_path):
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

    def test_longer_than_the_base(self, generate, library):
        said = generate(" ".join(["w5"] * 60), "--prompt", library / "coach")
        assert (
            "maximum context length is 96 tokens. However, you requested 114 tokens (61 in the text, 3 in the soft"
            in said
        )

    def test_none_or_both(self, generate):
        assert "TEXTS, '--field' or '--message'" in generate()
        assert "texts and --field exclude each other" in generate("w5", "--field", "text=w5")

    def test_fields_that_do_not_fit(self, generate, library):
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
    def test_sampling_out_of_range(self, generate, name, value):
        assert generate("w5", f"--{name}", value).startswith(name.replace("-", "_"))

    def test_bytes_that_are_no_text(self, generate):
        assert "b'\\xff' is not UTF-8" in generate("\udcff")

    def test_nothing_to_continue_from(self, tmp_path):
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
    def test_is_one_line_with_the_nearest_name(self, arguments, said):
        assert said in run(*arguments).complaint

    @pytest.mark.parametrize("arguments", [(), ("prompts",)])
    def test_nothing_asked_shows_the_help(self, arguments):
        ran = run(*arguments)
        assert ran.code == 2
        assert "Commands:" in ran.err + ran.out


def test_rows_of_a_validation_file_in_another_form(base_folder, texts, tmp_path, untouched):
    valid = write_csv(tmp_path / "valid.csv", [{"said": sentence(1)}])
    flags = ("--data", texts, "--text-column", "prompt", "--validation", valid, "--out", untouched)
    assert f"{valid} has no column 'prompt'" in run("train", "--base", base_folder, *flags).complaint


class TestChat:
    """Templates come with a base, and rows with keys; see also tests/data/test_data_weights.py."""

    def train(self, train, base, tmp_path, *rows):
        data = write_jsonl(tmp_path / "chats.jsonl", list(rows))
        return train(base=base, data=data, text_column=None)

    def test_templates_without_a_default(self, train, tmp_path):
        folder, row = save_base(tmp_path / "base"), chat(0)
        tokenizer = hf.AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = {"rag": "x", "tool_use": "y"}
        tokenizer.save_pretrained(folder)
        assert "has chat templates named 'rag', 'tool_use' and none named 'default'" in self.train(
            train, folder, tmp_path, row
        )

    def test_a_template_that_does_not_end(self, train, tmp_path):
        folder, row = save_base(tmp_path / "base"), chat(0)
        (folder / "chat_template.jinja").write_text(
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        )
        assert "row 1 of" in (told := self.train(train, folder, tmp_path, row)) and "does not end" in told

    def test_nothing_to_learn(self, train, base_folder, tmp_path):
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
def test_a_schema_that_cannot_be_followed(schema, why):
    flags = ("--base", "embedded", "--dtype", "float32", "--max-new-tokens", 5, "--json-schema", schema)
    assert why in run("generate", "Be kind", *flags).complaint
