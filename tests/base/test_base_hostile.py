"""A hostile or broken folder of a base: it loads and answers, or is refused in one sentence, and soon."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.hostile_folders import mutate
from support.tiny_bases import VOCAB, build_closed_tokenizer, build_model, build_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers

from softprompt.base import freeze_base, load_base
from softprompt.config import SamplingConfig
from softprompt.data import input_ids
from softprompt.engine import Request, generate
from softprompt.errors import BaseModelError, ConfigError, EncodingError, SoftpromptError
from softprompt.guard import one_sentence

CPU = {"dtype": "float32", "device": "cpu"}
LONGEST_S = 12.0
ANY_WARNING = pytest.mark.filterwarnings("ignore")  # transformers warns of settings, as it may


def make_folder(place: Path, family: str = "llama") -> Path:
    build_model(family).save_pretrained(place)
    build_tokenizer().save_pretrained(place)
    (place / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}')
    return place


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("sound") / "base")


def outcome(folder: Path) -> str:
    """How a folder fares; anything but a refusal in one sentence escapes."""
    try:
        base = load_base(str(folder), **CPU)
    except (BaseModelError, ConfigError) as error:
        sentence = str(error)
        assert "\n" not in sentence
        assert len(sentence) < 1000
        assert folder.name in sentence
        return sentence
    try:
        request = Request(base.bos_ids + base.encode("w7 w9"), sampling=SamplingConfig(max_new_tokens=2))
        generate(base, [request])
    except SoftpromptError as error:
        return f"loaded, then {error}"
    return "answers"


def test_the_sound_folder_answers(sound: Path) -> None:
    assert outcome(sound) == "answers"


@ANY_WARNING
@pytest.mark.parametrize("first", range(0, 60, 20))
def test_a_mutated_folder_answers_or_is_refused_in_one_sentence_soon(sound: Path, tmp_path: Path, first: int) -> None:
    survey(sound, tmp_path, range(first, first + 20))


@pytest.mark.slow
@ANY_WARNING
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gpt_neo", "opt", "mpt", "gemma2", "falcon"])
def test_a_mutated_folder_of_any_family_answers_or_is_refused(family: str, tmp_path: Path) -> None:
    survey(make_folder(tmp_path / "sound", family), tmp_path, range(1000, 1060))


def survey(sound: Path, tmp_path: Path, seeds: range) -> None:
    outcomes = []
    for seed in seeds:
        folder = tmp_path / f"hostile-{seed}"
        what = mutate(sound, folder, seed)
        begun = time.monotonic()
        try:
            outcomes.append(outcome(folder))
        except BaseException as error:
            pytest.fail(f"seed {seed}, {what}: {type(error).__name__}: {str(error)[:300]}")
        seconds = time.monotonic() - begun
        assert seconds < LONGEST_S, f"seed {seed}, {what}: {seconds:.0f} s"
    assert any(found == "answers" for found in outcomes)
    assert any(found != "answers" for found in outcomes)


# One mistake each -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "base")
    return tmp_path / "base"


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def refusal(folder: Path) -> str:
    with pytest.raises(BaseModelError) as caught:
        load_base(str(folder), **CPU)
    return str(caught.value)


def test_what_a_rust_library_raises_is_one_sentence(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    change(folder / "tokenizer.json", model={**model, "type": "BPE", "merges": [["a"]]})  # a bare Exception
    assert "cannot be loaded: its tokenizer: " in refusal(folder)


def test_an_assertion_of_torch_is_one_sentence(folder: Path) -> None:
    change(folder / "config.json", pad_token_id=VOCAB + 7)
    assert "AssertionError: Padding_idx must be within num_embeddings" in refusal(folder)


def test_a_settings_file_that_is_a_list_is_named(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[]")
    assert "tokenizer_config.json holds a JSON list; it must be an object" in refusal(folder)


def test_a_settings_file_that_is_nested_or_huge_is_named_and_not_read(folder: Path) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"a": json.loads("[" * 100 + "]" * 100)}))
    assert "generation_config.json is nested deeper than 64 levels" in refusal(folder)
    file.write_text("[" * 10_000)
    assert "generation_config.json cannot be read (it is nested too deeply)" in refusal(folder)
    with file.open("wb") as opened:
        opened.truncate(2**40)  # sparse
    assert "generation_config.json has 1,099,511,627,776 bytes" in refusal(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(("kept", "sentence"), [(0, "is empty"), (900, "is cut off or damaged")])
def test_weights_that_are_empty_or_cut_off_are_named(folder: Path, name: str, kept: int, sentence: str) -> None:
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save(build_model("llama").state_dict(), folder / name)
        assert outcome(folder) == "answers"
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:kept])
    said = refusal(folder)
    assert f"{folder / name} {sentence}" in said
    assert "again" in said


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_git_lfs_pointer_in_a_base_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:9c0e\nsize 1044992\n")
    said = refusal(folder)
    assert f"{folder / name} is a Git LFS pointer" in said
    assert "git lfs pull" in said


def test_a_shard_that_is_a_pointer_or_missing_is_named(folder: Path) -> None:
    build_model("llama").save_pretrained(folder, max_shard_size="8KB")
    (folder / "model.safetensors").unlink()
    shard = next(iter(sorted(folder.glob("model-0*.safetensors"))))
    assert outcome(folder) == "answers"
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert f"{shard} is a Git LFS pointer" in refusal(folder)
    shard.unlink()
    assert f"{shard} is not there" in refusal(folder)


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [
        ("num_hidden_layers", 10**12, "num_hidden_layers is 1,000,000,000,000; more than 65,536 cannot be right"),
        ("num_labels", 10**9, "num_labels is 1,000,000,000"),
        ("vocab_size", 10**30, "vocab_size is a number of more than 18 digits"),
        ("hidden_size", 2**30, "they do not belong together"),
        ("vocab_size", 2**30, "they do not belong together"),
        ("intermediate_size", 2**31 - 1, "they do not belong together"),
        ("head_dim", 2**30, "they do not belong together"),
    ],
)
def test_sizes_in_a_config_are_judged_before_memory_is_asked_for(
    folder: Path, setting: str, value: int, sentence: str
) -> None:
    change(folder / "config.json", **{setting: value})
    begun = time.monotonic()
    assert sentence in refusal(folder)
    assert time.monotonic() - begun < LONGEST_S


def test_layers_beyond_number_are_refused_within_bounded_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softprompt.base.folder.LONGEST_BUILD_S", 0.5)
    change(folder / "config.json", num_hidden_layers=60_000)
    begun = time.monotonic()
    assert "(60,000 layers) could not even be laid out" in refusal(folder)
    assert time.monotonic() - begun < LONGEST_S


def test_tables_of_positions_count_as_memory(tmp_path: Path) -> None:
    """GPT-Neo makes a mask of positions by positions, which is in no weights file."""
    folder = make_folder(tmp_path / "base", "gpt_neo")
    file = folder / "config.json"
    change(file, max_position_embeddings=10_000_000, vocab_size=VOCAB)
    (folder / "model.safetensors").unlink()
    assert "needs" in refusal(folder)
    assert "GB are free" in refusal(folder)


def test_a_file_of_weights_larger_than_its_config_says_is_no_problem(folder: Path) -> None:
    """The control of the judgement: quantised or doubled weights load or are refused for what is wrong with them."""
    change(folder / "config.json", max_position_embeddings=4_000)
    assert outcome(folder) == "answers"


def test_a_panic_is_a_sentence_and_a_stop_is_not() -> None:
    class PanicException(BaseException):  # as pyo3's
        pass

    with pytest.raises(BaseModelError, match="the base: PanicException: index out of range"), one_sentence("the base"):
        raise PanicException("index out of range")
    for error in (EOFError(), RecursionError(), MemoryError(), Warning("odd")):
        with pytest.raises(BaseModelError), one_sentence("the base"):
            raise error
    for stop in (KeyboardInterrupt, SystemExit):
        with pytest.raises(stop), one_sentence("the base"):
            raise stop


# Tokenizers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "LlamaTokenizer", "XGLMTokenizer"])
def test_a_folder_without_its_tokenizers_vocabulary_is_refused(folder: Path, kind: str) -> None:
    (folder / "tokenizer.json").unlink()
    change(folder / "tokenizer_config.json", tokenizer_class=kind)
    assert f"tokens for {VOCAB} embeddings); is one of its files missing" in refusal(folder)


def test_a_tokenizer_of_another_base_is_refused(folder: Path) -> None:
    build_tokenizer(vocab=VOCAB + 5).save_pretrained(folder)
    assert f"has ids up to {VOCAB + 4}, but the base embeds ids below {VOCAB}" in refusal(folder)


def test_a_tokenizer_smaller_than_a_padded_table_is_fine(folder: Path) -> None:
    build_tokenizer(vocab=VOCAB - 30).save_pretrained(folder)
    assert outcome(folder) == "answers"


def test_an_added_token_beyond_the_table_is_refused_where_a_text_has_it() -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    base = freeze_base(build_model("llama"), tokenizer, name="small")
    assert base.encode("w7") == (7,)
    with pytest.raises(EncodingError, match=r"token '<extra>' has id 97, but base 'small' embeds ids below 97"):
        base.encode("w7 <extra>")


def test_an_end_token_beyond_the_table_is_refused() -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(BaseModelError, match="begins or ends texts with '<end>', id 97"):
        freeze_base(build_model("llama"), tokenizer)


def test_a_byte_level_tokenizer_fits() -> None:
    words = Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base = freeze_base(build_model("gpt2", vocab_size=300), hf.PreTrainedTokenizerFast(tokenizer_object=words))
    assert len(base.encode("é")) == 2


def test_a_word_that_a_tokenizer_without_an_unknown_token_lacks_is_one_sentence() -> None:
    base = freeze_base(build_model("gpt2"), build_closed_tokenizer(), name="words")
    assert input_ids(base, None, text="the dog ran") == (0, 3, 4)
    with pytest.raises(EncodingError, match=r"the tokenizer of base 'words' cannot encode the text 'the zebra ran' \("):
        input_ids(base, None, text="the zebra ran")
    with pytest.raises(EncodingError, match=r"the text 'zebra zebra .*\.\.\. \(") as caught:
        base.encode("zebra " * 10_000)
    assert len(str(caught.value)) < 300
